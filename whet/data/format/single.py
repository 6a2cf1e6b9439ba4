"""Rows with fields of their own for question and answer: alpaca, prompt and completion, raw text, text with a label."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from whet.base.errors import UserError
from whet.data.example import Message
from whet.data.format.fields import NothingToLearn, answer, require, string, tools, wrong
from whet.data.format.label_field import LabelledText, read_label
from whet.data.format.turns import conversation, read_turns, system
from whet.data.read.read import TURN_FIELDS, kind_of

_TOOL_FIELDS = ("tools", "functions")


class Conversation(NamedTuple):
    """A whole conversation, the tools it may use (JSON text), and where the completion begins if the row says so."""

    messages: list[Message]
    tools: str | None = None
    completion_from: int | None = None


def are_turns(value: object) -> bool:
    """True if a list holds turns, and not the parts of one content."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "type" not in value[0]


def tools_of(value: dict) -> str | None:
    """The tools that a row defines beside its turns. Raises UserError."""
    for name in _TOOL_FIELDS:
        if name in value and (definitions := tools(value[name], name)) is not None:
            return definitions
    return None


def alpaca_question(value: dict) -> list[Message]:
    """System, history and the user's turn: instruction and input, a blank line between them."""
    messages = system(value)
    history = value.get("history") or []
    for index, pair in enumerate(history if isinstance(history, list) else [history]):
        where = f"history[{index}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise wrong(where, pair, "a list [user, assistant]", "write history as a list of such pairs")
        messages.append(Message("user", string(pair[0], f"{where}[0]")))
        messages.append(Message("assistant", answer(pair[1], f"{where}[1]")))
    prompt = string(require(value, "instruction"), "instruction")
    extra = value.get("input")
    if extra is not None and (extra := string(extra, "input")) and not extra.isspace():
        prompt = f"{prompt}\n\n{extra}" if prompt and not prompt.isspace() else extra
    return [*messages, Message("user", prompt)]


def alpaca(value: dict) -> Conversation:
    """The conversation of an alpaca row: instruction, input and output."""
    messages = alpaca_question(value)
    messages.append(Message("assistant", answer(require(value, "output"), "output")))
    return Conversation(messages, tools_of(value))


def prompt_completion(value: dict) -> Conversation:
    """The conversation of prompt and completion, two strings or two lists of turns. An answer inside the prompt is part
    of the prompt: it is not learned."""
    prompt, completion = require(value, "prompt"), require(value, "completion")
    given = tools_of(value)
    if are_turns(prompt) and isinstance(completion, list):
        turns = read_turns(prompt, "prompt")
        before = system(value)
        asked = before + [replace(turn, weight=0.0) if turn.role == "assistant" else turn for turn in turns]
        turns = conversation(asked + read_turns(completion, "completion"), "prompt+completion", len(before))
        return Conversation(turns, given, len(asked))
    asked = [*system(value), Message("user", string(prompt, "prompt"))]
    return Conversation([*asked, Message("assistant", answer(completion, "completion"))], given, len(asked))


def turn_list(value: dict, key: str) -> Conversation:
    """A conversation under `key`, in either dialect."""
    before = system(value)
    messages = before + read_turns(require(value, key), key)
    return Conversation(conversation(messages, key, len(before)), tools_of(value))


def answered(value: dict) -> Conversation:
    """The conversation of a row in any of the formats above."""
    key = next((key for key in TURN_FIELDS if key in value), None)
    if key is not None:
        return turn_list(value, key)
    return alpaca(value) if "instruction" in value else prompt_completion(value)


def raw_text(value: dict) -> str:
    """The document of a row of raw text."""
    return answer(require(value, "text"), "text", "text")


def classification(value: dict) -> LabelledText:
    """A text with its label; a pair of texts where there is a second one. Raises UserError."""
    text, pair = answer(require(value, "text"), "text", "text"), value.get("text_pair")
    if value.get("label") is None:
        fix = "write the label, or leave such rows out with data.empty=drop"
        raise NothingToLearn("the label is missing", fix, field="label", found=kind_of(value), expected="label")
    return LabelledText(text, None if pair is None else string(pair, "text_pair"), read_label(value["label"]))


class Prompt(NamedTuple):
    """The turns before an answer, and the field that they are in."""

    messages: list[Message]
    field: str


def prompt_of(value: dict) -> Prompt | None:
    """The prompt of a row whose answers stand in other fields; None if there is none."""
    key = next((key for key in TURN_FIELDS if key in value), None)
    if key is not None:
        return Prompt(system(value) + read_turns(require(value, key), key), key)
    if "instruction" in value:
        return Prompt(alpaca_question(value), "instruction")
    for key in ("prompt", "question"):
        if key in value:
            given = value[key]
            messages = read_turns(given, key) if are_turns(given) else [Message("user", string(given, key))]
            return Prompt(system(value) + messages, key)
    return None


def check_prompt(messages: list[Message], field: str) -> None:
    """Refuse a prompt that does not end where an answer may begin. Raises UserError."""
    if not messages or messages[-1].role not in ("user", "tool"):
        role = messages[-1].role if messages else "nothing"
        raise UserError(
            "the prompt does not end with a question", "end it with the user's turn", field=field, found=role
        )
