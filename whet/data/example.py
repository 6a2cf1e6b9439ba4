"""The one shape of a row, whatever the file looked like: a conversation, raw text, or a text with its label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant"]
# As it stands in the file: a class by name or number, a value, names of several labels, or a 0 or 1 for each label.
Label = str | bool | int | float | tuple[str, ...] | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """One thing to learn from: either `messages` (optional system, then turns by turns, the last one the assistant's)
    or raw `text`, never both. A text may have a `label`, and then a second text `text_pair` as well.

    id: 16 hex digits of the sha256 of the content alone, so that equal content has an equal id wherever it stands.
    """

    id: str
    messages: tuple[Message, ...] | None
    text: str | None
    file: str
    row: int
    label: Label | None = None
    text_pair: str | None = None

    @property
    def question(self) -> tuple[Message, ...]:
        """All but the last message; () for raw text."""
        return (self.messages or ())[:-1]

    @property
    def answer(self) -> str:
        """The last message; "" for raw text."""
        return self.messages[-1].content if self.messages else ""
