"""A sample of the cases of a test: `make test` runs some of them, `make proofs` all the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def sampled(cases: Iterable[Any], often: Callable[[Any], bool] | Iterable[Any]) -> list[Any]:
    """Parameters for pytest.mark.parametrize. often: the cases that `make test` runs, or what says so of one; a case of
    several arguments is a tuple. The others have the mark `proof`. Errors: AssertionError where none is run often."""
    known = often if callable(often) else list(often).__contains__
    every = [(case, known(case)) for case in cases]
    assert any(chosen for _, chosen in every), "make test would run no case"
    marks = {True: (), False: (pytest.mark.proof,)}
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=marks[bool(chosen)])
        for case, chosen in every
    ]
