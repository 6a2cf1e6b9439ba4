"""What a careless edit is: a text that stands once in a file of whet, and what might be written there by mistake."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """name: room and a few words. file: below whet/. old: stands exactly once in it; new: takes its place. breaks: what
    a user would get. tests: arguments of pytest, of which at least one test has to fail."""

    name: str
    file: str
    old: str
    new: str
    breaks: str
    tests: str
