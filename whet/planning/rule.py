"""One rule about what excludes each other: the field it is about, what was found and expected, and one fix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from whet.base.errors import UserError
from whet.planning.asked import Asked

Fact = Literal[
    "storage", "device", "task", "config", "held_out_rows", "structure", "head_alone", "head_in_fp8", "can_capture",
]  # fmt: skip
Text = str | Callable[[Asked], str]  # a string may name facts as str.format does: {method.name}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """name: of the rule, for tests and logs. broken: whether what is asked breaks it; needs: facts without which that
    cannot be said yet, so that it waits. The other fields are those of `UserError`."""

    name: str
    field: str
    broken: Callable[[Asked], object]
    problem: str
    expected: Text
    fix: Text
    found: Text = "true"
    needs: tuple[Fact, ...] = ()

    def holds(self, asked: Asked) -> bool:
        """Whether it is kept, as far as it can be told yet."""
        return any(getattr(asked, fact) is None for fact in self.needs) or not self.broken(asked)

    def refusal(self, asked: Asked) -> UserError:
        """The complaint about `asked`, which breaks it."""
        words = [_said(text, asked) for text in (self.problem, self.fix, self.found, self.expected)]
        return UserError(words[0], words[1], field=self.field, found=words[2], expected=words[3])


def _said(text: Text, asked: Asked) -> str:
    return text.format_map(vars(asked)) if isinstance(text, str) else text(asked)
