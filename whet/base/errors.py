"""The two ways in which something can go wrong, and the one shape of a complaint about input.

`UserError` is for what the user can mend: a recipe, a data file, a missing package. It says where (file, row, field),
what was found, what was expected and one fix; the command line prints it without a traceback and exits with 2. Our own
mistakes are `assert`s and plain exceptions. Nothing in whet catches `Exception` but the top of `cli.py`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(eq=False)
class UserError(Exception):
    """Input that cannot be used. Every part but `problem` and `fix` may be absent.

    problem: one sentence, what is wrong. file, row (1-based line or record), field (dotted path): where.
    found, expected: the value and what would have been right. fix: one thing to do about it.
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
        return "\n".join(lines)

    def __reduce__(self) -> tuple[Any, ...]:  # from one process to another, with every part
        return UserError, (self.problem, self.fix, self.file, self.row, self.field, self.found, self.expected)

    def as_dict(self) -> dict[str, str | int | None]:
        """The same complaint for `--json`."""
        return {
            "problem": self.problem,
            "file": self.file,
            "row": self.row,
            "field": self.field,
            "found": self.found,
            "expected": self.expected,
            "fix": self.fix or None,
        }


def shorten(text: object, limit: int = 120) -> str:
    """`text` on one line and at most `limit` characters long, with an ellipsis where it was cut.

    What a terminal would act on instead of showing (escape sequences, direction marks) is written out.
    """
    line = " ".join(str(text)[: 20 * limit].split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return line if len(line) <= limit else line[: limit - 1] + "…"


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice spelt most like `name`, or None when nothing is near."""
    found = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return found[0] if found else None
