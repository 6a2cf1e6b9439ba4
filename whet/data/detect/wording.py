"""The questions and answers of rows, as texts to compare.

asked: all that stands before the answer (of a conversation the user's turns and the system message; of other rows their
text); said: the answers, or the label; both: the two together; user: the user's turns alone, where there are any. Rows
that repeat another one are found by `both`; test questions that the model has seen by `asked` alone; and rows from
elsewhere (a benchmark has no system message) by `user`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from whet.data.example import Example
from whet.data.labels import label_text

Part = Literal["asked", "said", "both", "user"]


def words(example: Example, part: Part) -> str:
    """One part of an example as text."""
    if part == "both":
        return f"{words(example, 'asked')}\n{words(example, 'said')}"
    if part == "user":
        turns = [m.content for m in example.messages or () if m.role == "user"]
        return "\n".join(turns) if turns else words(example, "asked")
    if example.messages is not None:
        chosen = (m for m in example.messages if (m.role == "assistant") == (part == "said"))
        return "\n".join(f"{m.content}{m.tool_calls or ''}" for m in chosen)
    if part == "said":
        return label_text(example.label)
    return "\n".join(text for text in (example.text, example.text_pair) if text is not None)


class Wording(Sequence[str]):
    """One part of each example [N], read when it is asked for."""

    def __init__(self, examples: Sequence[Example], part: Part) -> None:
        self.examples = examples
        self.part: Part = part

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if isinstance(index, slice):
            return Wording(self.examples[index], self.part)
        return words(self.examples[index], self.part)

    def __iter__(self) -> Iterator[str]:
        return (words(example, self.part) for example in self.examples)
