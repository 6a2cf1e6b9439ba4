"""The one shape of a row, whatever the file looked like: a conversation or raw text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """One thing to learn from: either `messages` (optional system, then turns by turns, the last one the assistant's)
    or raw `text`, never both.

    id: 16 hex digits of the sha256 of the content alone, so that equal content has an equal id wherever it stands.
    """

    id: str
    messages: tuple[Message, ...] | None
    text: str | None
    file: str
    row: int

    @property
    def question(self) -> tuple[Message, ...]:
        """All but the last message; () for raw text."""
        return (self.messages or ())[:-1]

    @property
    def answer(self) -> str:
        """The last message; "" for raw text."""
        return self.messages[-1].content if self.messages else ""
