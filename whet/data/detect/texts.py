"""Walk over every text that an example holds, to read or change it: one walk for all checks, so that none misses one.

Contents, reasoning, the arguments of tool calls, raw text and its pair are texts; roles, labels, names of fields and
of functions and the list of tools are not. An example that is changed keeps its id, by which its origin and its side
of the split are known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from whet.data.example import Example, Message

Change = Callable[[str], str]


def texts(example: Example) -> Iterator[str]:
    """Every text in `example`, in order."""
    for message in example.messages or ():
        yield message.content
        if message.reasoning:
            yield message.reasoning
        for call in message.tool_calls:
            yield from _strings(_arguments(call))
    for text in (example.text, example.text_pair):
        if text is not None:
            yield text


def with_texts(example: Example, change: Change) -> Example:
    """`example` with every text in it changed, in the same order."""
    messages = example.messages
    if messages is not None:
        messages = tuple(_message(message, change) for message in messages)
    text, pair = (_changed(part, change) for part in (example.text, example.text_pair))
    return replace(example, messages=messages, text=text, text_pair=pair)


def _message(message: Message, change: Change) -> Message:
    content = change(message.content)
    reasoning = change(message.reasoning) if message.reasoning else message.reasoning
    calls = tuple(
        {**call, "function": {**call["function"], "arguments": _changed(_arguments(call), change)}}
        if _arguments(call) is not None else call
        for call in message.tool_calls
    )  # fmt: skip
    return replace(message, content=content, reasoning=reasoning, tool_calls=calls)


def _arguments(call: dict[str, Any]) -> Any:
    function = call.get("function")
    return function.get("arguments") if isinstance(function, dict) else None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def _changed(value: Any, change: Change) -> Any:
    """`value` with every string in it changed; names of fields stay."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_changed(part, change) for part in value]
    return {key: _changed(part, change) for key, part in value.items()} if isinstance(value, dict) else value
