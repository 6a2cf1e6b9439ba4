"""Examples: the one shape of data, whatever the file looked like: a conversation, raw text, or a text with its label.

Examples are plain values, so that a set larger than memory can lie on disk as one line of JSON each. `to_json` leaves
out fields that are empty; `from_json` gives back an equal example, with every type as it was. A reader written for one
fixed form is several times faster than a general one, which matters for a million rows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from json.encoder import encode_basestring as quoted
from operator import attrgetter
from typing import Any, Literal, NamedTuple

Role = Literal["system", "user", "assistant", "tool"]
# As it stands in the file: a class by name or number, a value, names of several labels, or a 0 or 1 for each label.
Label = str | bool | int | float | tuple[str, ...] | tuple[int, ...]
# {"type": "function", "function": {"name": str, "arguments": object}}, with an "id" where the file has one.
ToolCall = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. content: "" where an assistant only calls tools.

    reasoning: what the assistant thought before its answer. tool_calls: in the shape that chat templates render.
    name, tool_call_id: of a tool's turn, where the file gives them. weight: factor on the loss of an assistant's turn,
    0 to 1; 0: not learned; None: as `loss_on` says.
    """

    role: Role
    content: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    tool_call_id: str | None = None
    weight: float | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """One thing to learn from: either `messages` (optional system, then turns by turns, the last one the assistant's)
    or raw `text`, never both. A text may have a `label`, and then a second text `text_pair` as well.

    id: 16 hex digits of the sha256 of the content alone, so that equal content has an equal id wherever it stands.
    tools: what the assistant may call, as JSON text of a list. completion_from: of a row that tells prompt from
    completion, the index of the first message of the completion.
    """

    id: str
    messages: tuple[Message, ...] | None
    text: str | None
    file: str
    row: int
    label: Label | None = None
    text_pair: str | None = None
    tools: str | None = None
    completion_from: int | None = None

    @property
    def question(self) -> tuple[Message, ...]:
        """All but the last message; () for raw text."""
        return (self.messages or ())[:-1]

    @property
    def unanswered(self) -> Example:
        """The example without its last message, with the tools: the prompt that the model is given."""
        return replace(self, messages=self.question)

    @property
    def answer(self) -> str:
        """The content of the last message; "" for raw text."""
        return self.messages[-1].content if self.messages else ""


def content_id(example: Example) -> str:
    """The id of an example with this content: 16 hex digits of its sha256.

    A part that not every example has is named, and no role has such a name. NUL separates the parts; no content holds
    one, so different parts never join to one string.
    """
    if example.messages is None:
        parts = ["text", example.text or ""]
        if example.label is not None:
            pair = [] if example.text_pair is None else ["pair", example.text_pair]
            kind, label = type(example.label).__name__, repr(example.label).replace("\0", "")
            parts = ["labelled", example.text or "", *pair, kind, label]
    else:
        parts = [] if example.tools is None else ["tools", example.tools]
        for message in example.messages:
            parts += [message.role, message.content]
            parts += [] if message.reasoning is None else ["reasoning", message.reasoning]
            parts += ["tool_calls", json.dumps(message.tool_calls, ensure_ascii=False)] if message.tool_calls else []
            parts += [] if message.name is None else ["name", message.name]
    return sha256("\0".join(parts).encode()).hexdigest()[:16]


def named(example: Example) -> Example:
    """The example with the id of its content."""
    return Example(content_id(example), *_values(example))


_values = attrgetter("messages", "text", "file", "row", "label", "text_pair", "tools", "completion_from")
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), check_circular=False).encode
_PLAIN = 2  # a message of nothing but role and content is written as a list of these two
_SHORT = 5  # an example of nothing but a conversation or a text is written as its first five values
_TOOLS, _COMPLETION_FROM = 7, 8  # where they stand among the values of any other


def to_json(example: Example) -> str:
    """`example` on one line; `from_json` gives an equal one back."""
    messages = "null" if example.messages is None else f"[{','.join(map(_written, example.messages))}]"
    text = "null" if example.text is None else quoted(example.text)
    line = f"[{quoted(example.id)},{messages},{text},{quoted(example.file)},{example.row}"
    rest = (example.label, example.text_pair, example.tools, example.completion_from)
    return line + "]" if rest == _NO_REST else f"{line},{_encode(rest)[1:]}"


def _written(m: Message) -> str:
    rest = (m.reasoning, m.tool_calls, m.name, m.tool_call_id, m.weight)
    both = f"[{quoted(m.role)},{quoted(m.content)}"
    return both + "]" if rest == _BARE else f"{both},{_encode(rest)[1:]}"


_NO_REST, _BARE = (None,) * 4, (None, (), None, None, None)


def from_json(text: str) -> Example:
    """The example that `to_json` wrote."""
    return from_values(json.loads(text))


def from_values(values: list[Any]) -> Example:
    """The example whose line `to_json` wrote holds these values."""
    if (messages := values[1]) is not None:
        values[1] = tuple(Message(*m) if len(m) == _PLAIN else _message(*m) for m in messages)
    if len(values) > _SHORT and isinstance(values[_SHORT], list):
        values[_SHORT] = tuple(values[_SHORT])
    return Example(*values)


class PlainTurns(NamedTuple):
    """A conversation whose turns are roles and contents, none of them empty, and nothing else to render.

    own_mask: True if the row itself says what is learned of it, by weights or by where its completion begins.
    """

    roles: tuple[str, ...]
    contents: list[str]
    own_mask: bool = False


def plain_turns(values: list[Any]) -> PlainTurns | None:
    """The plain turns of the example whose line `to_json` wrote holds these values; None for any other example."""
    messages, own_mask = values[1], False
    if messages is None:
        return None
    if len(values) != _SHORT:
        if values[_TOOLS] is not None:
            return None
        own_mask = values[_COMPLETION_FROM] is not None
    roles, contents = [], []
    for m in messages:
        if not m[1]:
            return None
        if len(m) != _PLAIN:
            reasoning, tool_calls, name, tool_call_id, weight = m[_PLAIN:]
            if reasoning is not None or tool_calls or name or tool_call_id is not None:
                return None
            own_mask = own_mask or weight is not None
        roles.append(m[0])
        contents.append(m[1])
    return PlainTurns(tuple(roles), contents, own_mask)


def plain_turns_of(chat: Example | Sequence[Message]) -> PlainTurns | None:
    """`plain_turns` of an example, or of messages that stand in none."""
    own_mask = isinstance(chat, Example) and chat.completion_from is not None
    messages = chat.messages if isinstance(chat, Example) else chat
    if messages is None or (isinstance(chat, Example) and chat.tools is not None):
        return None
    roles, contents = [], []
    for m in messages:
        if not m.content or m.reasoning is not None or m.tool_calls or m.name or m.tool_call_id is not None:
            return None
        own_mask = own_mask or m.weight is not None
        roles.append(m.role)
        contents.append(m.content)
    return PlainTurns(tuple(roles), contents, own_mask)


def _message(role: Role, content: str, reasoning: Any, tool_calls: list[ToolCall], *rest: Any) -> Message:
    return Message(role, content, reasoning, tuple(tool_calls), *rest)
