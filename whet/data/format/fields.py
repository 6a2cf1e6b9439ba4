"""Read and check single values of a row; a bad one gives an error that names the field.

Every format reads its strings, answers, tools and weights through these functions, so that a value is refused in the
same words wherever it stands.
"""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

from whet.base.errors import UserError, nearest
from whet.data.example import ToolCall
from whet.data.read.read import kind_of

LATER = "not supported yet"
ABSENT = object()
EMPTY = (None, "", [], {}, "[]", "{}")
TEXT_PARTS = ("text", "input_text", "output_text")
REASONING_PARTS = ("reasoning", "thinking")
MEDIA = frozenset(("images", "image", "videos", "video", "audios", "audio"))
_DEFINITION = '{"type": "function", "function": {"name": …, "parameters": …}}'
_CALL = '{"name": …, "arguments": {…}}'


class NothingToLearn(UserError):
    """A row whose answer is blank: an error, or a dropped row with `data.empty=drop`."""


class Content(NamedTuple):
    """The content of a turn: its text, and the reasoning and tool calls of an assistant."""

    text: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()


def wrong(where: str, value: object, expected: str, fix: str) -> UserError:
    """The error for a value of the wrong kind."""
    kind = "no such field" if value is ABSENT else kind_of(value)
    return UserError("wrong kind of value", fix, field=where, found=kind, expected=expected)


def require(value: dict, name: str) -> object:
    """The field `name` of a row. Raises UserError where it is missing."""
    if name in value:
        return value[name]
    near = nearest(name, value)
    fix = f"did you mean the field {near}?" if near else "add the field, or remove the row"
    raise UserError(f"the field {name} is missing", fix, field=name, found=kind_of(value), expected=name)


def string(value: object, where: str) -> str:
    """Read a string, or a list of text parts, which are joined."""
    return content(value, where).text if isinstance(value, list) else _checked(value, where)


def _checked(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise wrong(where, value, "a string", "write it as a string")
    if "\0" in value:
        fix, found = "remove it: no text holds one", f"\\u0000 at character {value.index(chr(0))}"
        raise UserError("a NUL character", fix, field=where, found=found, expected="text")
    return value


def answer(value: object, where: str, what: str = "answer") -> str:
    """Read a string that is not blank. Raises NothingToLearn."""
    text = string(value, where)
    if not text or text.isspace():
        raise blank(where, text, what)
    return text


def blank(where: str, value: object, what: str = "answer") -> NothingToLearn:
    """The error for a value with nothing to learn in it."""
    fix = f"write the {what}, or leave such rows out with data.empty=drop"
    return NothingToLearn(f"nothing to learn: the {what} is blank", fix, None, None, where, kind_of(value), "text")


def content(value: object, where: str) -> Content:
    """Read a string, or a list of parts: text, and in an assistant's turn reasoning and tool calls."""
    if not isinstance(value, list):
        return Content(_checked(value, where))
    if not value or not all(isinstance(part, dict) for part in value):
        raise wrong(where, value, "a string", "write it as a string")
    texts: list[str] = []
    reasons: list[str] = []
    calls: list[ToolCall] = []
    for index, part in enumerate(value):
        here, kind = f"{where}[{index}]", part.get("type")
        inside = part.get("value", part.get(str(kind)))
        if kind in TEXT_PARTS:
            texts.append(_part(part.get("text", inside), here))
        elif kind in REASONING_PARTS:
            reasons.append(_part(part.get("text", inside), here))
        elif kind == "tool_call":
            calls += tool_calls(inside, here)
        else:
            problem, fix = f"content parts of this type are {LATER}", "remove such parts, or the rows that hold them"
            raise UserError(problem, fix, None, None, here, f"type {kind}", "type text, reasoning or tool_call")
    return Content("".join(texts), "\n\n".join(reasons) if reasons else None, tuple(calls))


def _part(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise wrong(where, value, 'a string under "text" or "value"', "write the text as a string")
    return _checked(value, where)


def tool_calls(value: object, where: str) -> tuple[ToolCall, ...]:
    """Read the calls of an assistant's turn as templates render them; arguments in a JSON string become an object."""
    value = _from_text(value, where, _CALL)
    calls = value if isinstance(value, list) else [value]
    return tuple(_call(call, f"{where}[{index}]" if len(calls) > 1 else where) for index, call in enumerate(calls))


def _call(call: object, where: str) -> ToolCall:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise wrong(where, call, _CALL, "give each call its name and its arguments")
    given = function.get("arguments", function.get("parameters", {}))
    arguments = _from_text(given if given not in (None, "") else {}, f"{where}.arguments", "a JSON object")
    if not isinstance(arguments, dict):
        raise wrong(
            f"{where}.arguments", arguments, "an object", "write the arguments as an object of names and values"
        )
    result: ToolCall = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if isinstance(call, dict) and isinstance(call.get("id"), str):
        result = {"id": call["id"], **result}
    return result


def tools(value: object, where: str = "tools") -> str | None:
    """Read the definitions of a row's tools as JSON text of a list, None where there are none."""
    if value in EMPTY:
        return None
    value = _from_text(value, where, f"a list of {_DEFINITION}")
    if value in EMPTY:
        return None
    if not isinstance(value, list):
        raise wrong(where, value, f"a list of {_DEFINITION}", "write the tools as a list")
    definitions = []
    for index, tool in enumerate(value):
        if isinstance(tool, str):
            tool = _from_text(tool, f"{where}[{index}]", _DEFINITION)
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise wrong(f"{where}[{index}]", tool, _DEFINITION, "give each tool its name")
        definitions.append(tool if function is not tool else {"type": "function", "function": function})
    return json.dumps(definitions, ensure_ascii=False)


def _from_text(value: object, where: str, expected: str) -> Any:
    """`value`, read as JSON where it is a string."""
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value, parse_constant=_no_constant, object_pairs_hook=_no_twice)
    except (ValueError, RecursionError) as error:
        problem = f"broken JSON in a string: {error}"
        raise UserError(problem, "write it with json.dumps", None, None, where, kind_of(value), expected) from error
    return parsed


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _no_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return value


def weight(turn: dict, names: frozenset[str], role: str, where: str) -> float | None:
    """Read the factor on the loss of a turn: 0 to 1 for an assistant's, and only 0 for a turn that is never learned."""
    factor = None
    for name in sorted(names.intersection(turn)):
        given = turn[name]
        if given is None:
            continue
        valid = isinstance(given, bool | int | float) and math.isfinite(given)
        if not valid or not 0 <= given <= (1 if role == "assistant" else 0):
            expected = "a number from 0 to 1" if role == "assistant" else f"0: a {role} turn is not learned"
            fix = f"write such a number, or remove `{name}`: data.loss_on says what is learned"
            raise UserError(
                "a weight that cannot be used", fix, None, None, f"{where}.{name}", kind_of(given), expected
            )
        if factor is not None and factor != float(given):
            raise UserError(
                "two weights that differ", "keep one of them", None, None, f"{where}.{name}", kind_of(given),
                f"{factor:g}",
            )  # fmt: skip
        factor = float(given)
    return factor if role == "assistant" else None


def refuse_media(value: dict, prefix: str = "") -> None:
    """Refuse a row with pictures or sound, which would change what is learned. Raises UserError."""
    for name in sorted(MEDIA.intersection(value)):
        if value[name] not in EMPTY:
            fix = f"remove `{name}` if the answers do not depend on it, or leave such rows out"
            raise UserError(f"{name}: {LATER}", fix, None, None, prefix + name, kind_of(value[name]))
