"""The answers of conversations, each with the messages before it: what base and tuned are asked for.

Every answer that training would learn is scored, not the last one alone: a dialogue of ten turns often ends with a good
bye. Each is asked with the true messages before it. Answers of one conversation are no independent rows, so intervals
are taken over conversations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

from whet.data.example import Example, Message


@dataclass(frozen=True)
class Turns:
    """Answers to score. examples: conversations that end with one each; owners: the conversation that each is of."""

    examples: list[Example]
    owners: list[int]

    @property
    def conversations(self) -> int:
        return len(set(self.owners))

    def by_conversation(self, values: Sequence[float]) -> list[float]:
        """One value a conversation, whose mean is that of `values`: its sum over the mean number of its answers."""
        sums: dict[int, float] = {}
        for owner, value in zip(self.owners, values, strict=True):
            sums[owner] = sums.get(owner, 0.0) + value
        share = len(sums) / len(values)
        return [total if share == 1 else total * share for total in sums.values()]


def turns_of(conversations: Sequence[Example], limit: int, loss_on: str | None) -> Turns:
    """The learned answers of conversations, the first `limit` of all."""
    pairs = ((owner, cut) for owner, example in enumerate(conversations) for cut in _cuts(example, loss_on))
    chosen = list(islice(pairs, limit))
    return Turns([cut for _, cut in chosen], [owner for owner, _ in chosen])


def _cuts(example: Example, loss_on: str | None) -> list[Example]:
    """The conversation up to each learned answer; at least up to the last one."""
    messages = example.messages or ()
    last = len(messages) - 1
    first = example.completion_from or 0 if loss_on == "completion" else 0
    learned = [
        index for index, message in enumerate(messages)
        if index >= first and _is_scored(message) and (loss_on != "last_assistant" or index == last)
    ]  # fmt: skip
    return [replace(example, messages=messages[: index + 1]) for index in learned or [last]]


def _is_scored(message: Message) -> bool:
    return message.role == "assistant" and message.weight != 0 and bool(message.content.strip())
