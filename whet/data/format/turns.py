"""Read lists of turns, in the two usual dialects, as messages in an order that chat templates render as written.

OpenAI's dialect says role and content, ShareGPT's from and value. In ShareGPT a tool call is a turn of its own, in
OpenAI's a part of the assistant's turn; here it is always a part of the assistant's turn, because that is what one
answer of the model holds. An order that a template would drop, merge or render as something else is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from whet.base.errors import UserError, nearest
from whet.data.example import Message, Role
from whet.data.format.fields import ABSENT, blank, content, refuse_media, string, tool_calls, weight, wrong

WEIGHTS = frozenset(("loss_weight", "weight", "train", "training"))
REASONING = ("reasoning_content", "reasoning", "thinking")
_CALLING = "function_call"  # in ShareGPT a role, before OpenAI's tool_calls a field
_BESIDE = frozenset((*REASONING, "tool_calls", _CALLING, "name", "tool_call_id", "images", "image", "videos", "video",
                     "audios", "audio"))  # fmt: skip
_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_AFTER: dict[str, tuple[str, ...]] = {
    "user": ("", "system", "assistant"),
    "assistant": ("", "system", "user", "tool"),
    "tool": ("assistant", "tool"),
}


@dataclass(frozen=True, slots=True)
class Dialect:
    """The field names and roles of one dialect. role, content: the fields of a turn; roles: its word -> ours; calls:
    the roles whose content is a tool call."""

    role: str
    content: str
    roles: Mapping[str, Role]
    calls: tuple[str, ...] = ()


OPENAI = Dialect("role", "content", {**_ROLES, "developer": "system", "function": "tool", "ipython": "tool"})
SHAREGPT = Dialect(
    "from", "value",
    {**_ROLES, "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "bing": "assistant",
     "observation": "tool", "tool_response": "tool", "function_response": "tool", "function": "tool",
     _CALLING: "assistant", "tool_call": "assistant"},
    (_CALLING, "tool_call"),
)  # fmt: skip


def dialect_of(turns: object) -> Dialect:
    """The dialect that the first turn speaks."""
    first = next((turn for turn in turns if isinstance(turn, dict)), {}) if isinstance(turns, list) else {}
    return SHAREGPT if "from" in first and "value" in first else OPENAI


def read_turns(turns: object, key: str, dialect: Dialect | None = None) -> list[Message]:
    """The messages of a list of turns, one by one; `conversation` checks their order. Raises UserError."""
    dialect = dialect or dialect_of(turns)
    if not isinstance(turns, list) or not turns:
        raise wrong(
            key, turns, f"a list of {{{dialect.role}, {dialect.content}}}", "write a question and its answer"
        )  # fmt: skip
    messages: list[Message] = []
    for index, turn in enumerate(turns):
        message = _bare(turn, dialect) or read_turn(turn, f"{key}[{index}]", dialect)
        before = messages[-1] if messages else None
        if dialect.calls and message.tool_calls and before is not None and before.role == "assistant":
            messages[-1] = _joined(before, message, f"{key}[{index}]")
        else:
            messages.append(message)
    return messages


def _bare(turn: object, dialect: Dialect) -> Message | None:
    """The message of a valid turn of nothing but a role and a string, as most are; None for any other."""
    if not isinstance(turn, dict) or len(turn) != 2:
        return None
    word, text = turn.get(dialect.role), turn.get(dialect.content)
    if not isinstance(word, str) or not isinstance(text, str) or word in dialect.calls or "\0" in text:
        return None
    role = dialect.roles.get(word)
    if role is None or (role == "assistant" and (not text or text.isspace())):
        return None
    return Message(role, text)


def read_turn(turn: object, where: str, dialect: Dialect) -> Message:
    """Read one turn. Raises UserError, NothingToLearn for an assistant's turn that says and calls nothing."""
    if not isinstance(turn, dict) or dialect.role not in turn:
        expected = f"an object {{{dialect.role}, {dialect.content}}}"
        raise wrong(where, turn, expected, "write each turn as such an object")
    word = turn[dialect.role]
    role = dialect.roles.get(word) if isinstance(word, str) else None
    if role is None:
        raise _unknown_role(word, f"{where}.{dialect.role}", dialect.roles)
    path = f"{where}.{dialect.content}"
    given = turn.get(dialect.content, ABSENT)
    factor = None if WEIGHTS.isdisjoint(turn) else weight(turn, WEIGHTS, role, where)
    if role != "assistant":
        if not _BESIDE.isdisjoint(turn):
            return _beside(turn, where, role, string(given, path))
        return Message(role, string(given, path))
    if word in dialect.calls:
        return Message(role, "", tool_calls=tool_calls(given, path), weight=factor)
    if _BESIDE.isdisjoint(turn) and isinstance(given, str):
        if not given or given.isspace():
            raise blank(path, given)
        return Message(role, string(given, path), weight=factor)
    return _assistant(turn, where, path, given, factor)


def _assistant(turn: dict, where: str, path: str, given: object, factor: float | None) -> Message:
    """An assistant's turn that may think and call tools; its content may be absent only where it calls one."""
    refuse_media(turn, where + ".")
    calls = ()
    for name in ("tool_calls", _CALLING):
        if turn.get(name) not in (None, [], "", "[]"):
            calls += tool_calls(turn[name], f"{where}.{name}")
    said = content("" if calls and given in (None, ABSENT) else given, path)
    reasons = [(name, turn[name]) for name in REASONING if turn.get(name) not in (None, "")]
    if said.reasoning is not None:
        reasons.insert(0, ("content", said.reasoning))
    if len({str(text) for _, text in reasons}) > 1:
        fields = ", ".join(name for name, _ in reasons)
        raise UserError("the reasoning stands in several fields", "keep one", field=where, found=fields)
    calls += said.tool_calls
    if not calls and (not said.text or said.text.isspace()):
        raise blank(path, said.text)
    reasoning = string(reasons[0][1], f"{where}.{reasons[0][0]}") if reasons else None
    return Message("assistant", said.text, reasoning or None, calls, weight=factor)


def _beside(turn: dict, where: str, role: Role, text: str) -> Message:
    refuse_media(turn, where + ".")
    for name in (*REASONING, "tool_calls", _CALLING):
        if turn.get(name) not in (None, "", [], "[]"):
            fix = "move it to the assistant's turn, or remove it"
            raise UserError(f"{name} in a {role} turn", fix, field=f"{where}.{name}", found=role, expected="assistant")
    name, call = (
        string(turn[key], f"{where}.{key}") if role == "tool" and turn.get(key) not in (None, "") else None
        for key in ("name", "tool_call_id")
    )
    return Message(role, text, name=name, tool_call_id=call)


def _joined(before: Message, call: Message, where: str) -> Message:
    """Join the assistant's words and the call that follows in a turn of its own into the one answer that they are."""
    if before.weight != call.weight:
        fix = "give both the same weight"
        raise UserError("one answer in two turns that weigh differently", fix, field=where, found=f"{call.weight}")
    return replace(before, tool_calls=before.tool_calls + call.tool_calls)


def conversation(messages: list[Message], key: str, offset: int = 0) -> list[Message]:
    """`messages`, or UserError for an order of turns that a chat template would not render as they stand.

    offset: how many of them come from another field than `key`.
    """
    previous, called = "", False
    for index, message in enumerate(messages):
        role = message.role
        if role == "system" and index > 0:
            problem = "two system messages" if messages[0].role == "system" else "the system message is not the first"
            fix = "keep one system message, as the first"
        elif role == previous != "tool":
            problem, fix = f"two {role} turns in a row", "join them into one turn or split the conversation"
        elif role in _AFTER and previous not in _AFTER[role]:
            problem, fix = f"a {role} turn after a {previous or 'missing'} turn", "let the assistant speak in between"
        elif role == "tool" and not called:
            problem, fix = "a tool's turn that nothing called", "write the call into `tool_calls` of the turn before"
        else:
            previous, called = role, bool(message.tool_calls) or (role == "tool" and called)
            continue
        expected = "user and assistant in turn, and tool after a call"
        raise UserError(problem, fix, None, None, f"{key}[{index - offset}]", role, expected)
    if previous != "assistant":
        answers = any(message.role == "assistant" for message in messages)
        problem = f"the conversation ends with a {previous} turn" if answers else "no assistant turn: nothing to learn"
        fix = "add the answer, or remove the last turn" if answers else "add an assistant turn"
        raise UserError(problem, fix, field=key, found=f"last role {previous}", expected="last role assistant")
    return messages


def system(value: dict) -> list[Message]:
    """The system message of a row that keeps it in a field of its own; exporters write an absent one as null or ""."""
    given = value.get("system")
    return [] if given is None or given == "" else [Message("system", string(given, "system"))]


def _unknown_role(name: object, where: str, roles: Mapping[str, Role]) -> UserError:
    expected = f"one of {', '.join(roles)}"
    if not isinstance(name, str):
        return wrong(where, name, expected, "give the turn a role")
    near = nearest(name, roles)
    fix = f"did you mean {near}?" if near else "rename it to one of those"
    return UserError("unknown role", fix, None, None, where, name, expected)
