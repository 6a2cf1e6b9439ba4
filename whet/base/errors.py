"""Errors: the one shape of an error in the user's input; our own mistakes are `assert`s and plain exceptions.

`UserError` is for faults that the user can mend: in a recipe, a data file, a missing package. It names the position
(file, row, field), the value found, the value expected and one fix; the command line prints it without a traceback and
exits with 2. Nothing in whet catches `Exception` but the top of `cli.py`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from whet.base.secrets import hide
from whet.base.visible import visible

LONGEST_NAME, MOST_CHOICES = 100, 5000


@dataclass(eq=False)
class UserError(Exception):
    """Input that cannot be used. Every part but `problem` and `fix` may be absent.

    problem: the fault, in one sentence. file, row (1-based line or record), field (dotted path): its position.
    found, expected: the value, and one that would have been right. fix: one thing to do about it.
    """

    problem: str
    fix: str = ""
    file: str | None = None
    row: int | None = None
    field: str | None = None
    found: str | None = None
    expected: str | None = None

    def __str__(self) -> str:
        where = ", ".join(
            part
            for part in (
                self.file,
                f"row {self.row}" if self.row is not None else None,
                f"field {self.field}" if self.field else None,
            )
            if part
        )
        lines = [f"{where}: {self.problem}" if where else self.problem]
        if self.found is not None:
            lines.append(f"  found:    {shorten(self.found)}")
        if self.expected is not None:
            lines.append(f"  expected: {self.expected}")
        if self.fix:
            lines.append(f"  fix:      {self.fix}")
        return visible(hide("\n".join(lines)))

    def __reduce__(self) -> tuple[Any, ...]:  # from one process to another, with every part
        return UserError, (self.problem, self.fix, self.file, self.row, self.field, self.found, self.expected)

    def as_dict(self) -> dict[str, str | int | None]:
        """The error as plain values for `--json`."""
        values = {
            "problem": self.problem,
            "file": self.file,
            "row": self.row,
            "field": self.field,
            "found": self.found,
            "expected": self.expected,
            "fix": self.fix or None,
        }
        return {name: hide(value) if isinstance(value, str) else value for name, value in values.items()}


def shorten(text: object, limit: int = 120) -> str:
    """`text` on one line and at most `limit` characters long, with an ellipsis where it was cut.

    Characters that a terminal would obey instead of printing are made visible.
    """
    line = visible(" ".join(str(text)[: 20 * limit].split()))
    return line if len(line) <= limit else line[: limit - 1] + "…"


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice spelt most like `name`, or None when nothing is near."""
    if len(name) > LONGEST_NAME:  # no slip of the pen, and the comparison is quadratic
        return None
    short = [choice for choice in islice(choices, MOST_CHOICES) if len(choice) <= LONGEST_NAME]
    matches = difflib.get_close_matches(name, short, n=1, cutoff=0.6)
    return matches[0] if matches else None
