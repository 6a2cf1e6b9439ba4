"""Preference data: rows with a better and a worse answer (chosen and rejected), or with a boolean label for one.

Supervised training can learn from the good side alone; the other side is named and left out, or everything is refused:
`data.preference` says which. A check of the data reads both sides.

The chosen side may be a string, one turn, the turns after the prompt, or a whole conversation. Strings without a prompt
are read where they are written as "Human:" and "Assistant:" paragraphs (the data of https://arxiv.org/abs/2204.05862).
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from whet.base.errors import UserError, shorten
from whet.data.example import Message
from whet.data.format.fields import require, string, wrong
from whet.data.format.single import Conversation, Prompt, answered, are_turns, check_prompt, prompt_of, tools_of
from whet.data.format.turns import conversation, dialect_of, read_turn, read_turns, system
from whet.data.read.read import kind_of

FEEDBACK = ("label", "kto_tag")
Learned = Literal["error", "chosen", "check"]
_PARAGRAPHS = re.compile(r"(?:\A|\n\n)(Human|Assistant): ?")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}


class Judged(NamedTuple):
    """An answered conversation, True if it is the good one, and the name of its field in the row."""

    chat: Conversation
    good: bool
    side: str


def pair(value: dict) -> list[Judged]:
    """Both answers of a row with `chosen` and `rejected`, the chosen one first. Raises UserError."""
    prompt = prompt_of(value)
    tools = tools_of(value)
    sides = []
    for name in ("chosen", "rejected"):
        messages, start = _side(require(value, name), name, prompt, value)
        sides.append(Judged(Conversation(messages, tools, start), name == "chosen", name))
    if sides[0].chat.messages[-1] == sides[1].chat.messages[-1]:
        raise UserError(
            "both answers are the same, so none is better", "write two answers, or leave the row out", field="rejected",
            found=shorten(sides[1].chat.messages[-1].content, 60), expected="another answer than under `chosen`",
        )  # fmt: skip
    if prompt is None:
        first, second = (side.chat.messages for side in sides)
        if first[:-1] != second[:-1]:
            raise UserError(
                "the two sides do not answer the same question", "give both the same turns but the last",
                field="rejected", found=f"{len(first)} and {len(second)} turns that differ before the last",
            )  # fmt: skip
    return sides


def feedback(value: dict, label: str) -> list[Judged]:
    """The one answer of a row with a boolean label. Raises UserError."""
    good = require(value, label)
    if not isinstance(good, bool):
        raise wrong(label, good, "true or false", "write true for a good answer, false for a bad one")
    chat = answered(value)
    start = len(chat.messages) - 1 if chat.completion_from is None else chat.completion_from
    return [Judged(chat._replace(completion_from=start), good, label)]


def _side(given: object, name: str, prompt: Prompt | None, value: dict) -> tuple[list[Message], int]:
    """A whole conversation with the answer `given`, and the index of its first message that is not the prompt."""
    if isinstance(given, list) and are_turns(given):
        turns = read_turns(given, name, dialect_of(given))
        if turns[0].role in ("system", "user"):
            return _whole(turns, name, prompt, value)
    elif isinstance(given, dict):
        turns = [read_turn(given, name, dialect_of([given]))]
    elif prompt is None:
        turns = _paragraphs(string(given, name), name)
        return conversation(turns, name), len(turns) - 1
    else:
        turns = [read_turn({"role": "assistant", "content": given}, name, dialect_of([]))]
    if prompt is None:
        problem, fix = "an answer without its question", "add the question as `prompt`, or write both sides as messages"
        raise UserError(problem, fix, field=name, found=kind_of(given), expected="a prompt, or a whole conversation")
    check_prompt(prompt.messages, prompt.field)
    return conversation(prompt.messages + turns, name, len(prompt.messages)), len(prompt.messages)


def _whole(turns: list[Message], name: str, prompt: Prompt | None, value: dict) -> tuple[list[Message], int]:
    """A side that holds the question too; a prompt beside it has to say the same."""
    before = system(value)
    messages = conversation(before + turns, name, len(before))
    last = max(index for index, message in enumerate(messages) if message.role in ("user", "tool", "system"))
    if prompt is not None:
        question = next((m.content for m in reversed(prompt.messages) if m.role == "user"), None)
        spoken = [m.content for m in messages if m.role == "user"]
        if question is not None and question.strip() not in (text.strip() for text in spoken):
            fix = f"remove `{prompt.field}`, or write only the answer under `{name}`"
            problem = f"the conversation does not hold the question under `{prompt.field}`"
            raise UserError(problem, fix, field=name, found=spoken[0], expected=question)
    return messages, last + 1


def _paragraphs(text: str, name: str) -> list[Message]:
    parts = _PARAGRAPHS.split(text)
    if len(parts) < 5 or parts[0].strip():
        fix = "add the question as `prompt`, or name its field with data.columns.prompt=FIELD"
        expected = 'a prompt beside it, or paragraphs that begin with "Human:" and "Assistant:"'
        raise UserError("an answer without its question", fix, field=name, found=kind_of(text), expected=expected)
    turns = []
    for speaker, said in zip(parts[1::2], parts[2::2], strict=True):
        turns.append(read_turn({"role": _SPEAKERS[speaker], "content": said.strip()}, name, dialect_of([])))
    return turns
