"""Five conversations whose exact token ids are saved with every adapter.

Whoever uses the adapter later (chat, merge, server) renders and tokenises them again and must get the same ids, or
stops: a template or tokenizer that drifted between training and serving is the loudest silent failure there is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from whet.base.errors import UserError
from whet.data.example import Example, Message
from whet.data.template.row_tokenizer import RowTokenizer
from whet.data.template.template import contract

FILE = "whet_template.json"
OTHER_TEMPLATES = "additional_chat_templates"
COUNT = 5

_WEATHER = [{"type": "function", "function": {
    "name": "weather", "description": "The weather in a city", "parameters": {
        "type": "object", "properties": {"city": {"type": "string", "description": "Its name"}}, "required": ["city"]},
}}]  # fmt: skip
_CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "서울"}}}


def _said(*texts: str) -> dict[str, Any]:
    return {"messages": [dict(zip(("role", "content"), text.split(":", 1), strict=True)) for text in texts]}


# In order of preference: the first COUNT that the template accepts are saved. Thinking and tools come
# first, because templates differ most there, and a template that has neither leaves room for the plain ones.
_CONVERSATIONS: tuple[dict[str, Any], ...] = (
    {"messages": [*_said("user:What is the weather in Seoul?")["messages"],
                  {"role": "assistant", "content": "", "tool_calls": [_CALL]},
                  *_said("tool:맑음, 21°C", "assistant:It is sunny, 21 °C.")["messages"]], "tools": _WEATHER},
    {"messages": [*_said("user:Is 91 prime?")["messages"],
                  {"role": "assistant", "content": "No.", "reasoning": "91 = 7 * 13"},
                  *_said("user:And 97?")["messages"],
                  {"role": "assistant", "content": "Yes.", "reasoning": "2, 3, 5 and 7 do not divide it."}]},
    _said("system:Answer in Korean.", "user:Good morning", "assistant:좋은 아침이에요."),
    _said("user:Hi!", "assistant:Hello.\nHow can I help?", "user:List two fruits.", "assistant:- apple\n- pear"),
    _said("user:  two  spaces\tand a tab ", "assistant:x = {'a': [1, 2]}  # code"),
    _said("user:안녕하세요, 오늘 날씨 어때요?", "assistant:맑고 따뜻해요. ☀️"),
    _said("user:What is 2 + 2?", "assistant:4"),
)  # fmt: skip


def write_contract(row_tokenizer: RowTokenizer, path: Path) -> None:
    """Store the template and the token ids of the first five conversations that it renders whole."""
    goldens = []
    for conversation in _CONVERSATIONS:
        try:
            ids, prompt, dropped = _ids(row_tokenizer, conversation)
        except UserError:
            continue  # a template without system messages, for instance
        last = len(conversation["messages"]) - 1
        if all(field == "reasoning" and index < last for index, field in dropped):  # as some do with earlier thinking
            goldens.append((conversation, ids, prompt))
    goldens = goldens[:COUNT]
    path.write_text(contract(row_tokenizer.tokenizer, goldens) + "\n", encoding="utf-8")


def check_contract(row_tokenizer: RowTokenizer, path: Path) -> int:
    """Reproduce the stored ids; returns how many conversations agreed. Raises UserError on the first that does not."""
    if not path.is_file():
        return 0
    record = json.loads(path.read_text(encoding="utf-8"))
    goldens, templates = record["golden"], record["chat_template"]
    for name, text in (templates if isinstance(templates, dict) else {"default": templates}).items():
        beside = path.with_name("chat_template.jinja")
        if name != "default":  # as transformers saves a model's second template, such as tool_use
            beside = path.with_name(OTHER_TEMPLATES) / f"{name}.jinja"
        if beside.is_file() and beside.read_bytes().decode("utf-8", "replace") != text:
            raise UserError(
                "the chat template beside the adapter is not the one that it was trained with", file=str(beside),
                found="other text", expected=f"chat_template of {path.name}", fix=f"copy it back from {path.name}",
            )  # fmt: skip
    for index, golden in enumerate(goldens):
        ids, prompt, _ = _ids(row_tokenizer, golden)
        old_prompt = golden.get("prompt", prompt)
        if ids != golden["ids"] or prompt != old_prompt:
            old, new = (golden["ids"], ids) if ids != golden["ids"] else (old_prompt, prompt)
            changed = (i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b)
            position = next(changed, min(len(old), len(new)))
            raise UserError(
                "the tokenizer or chat template is not the one that the adapter was trained with",
                file=str(path), field=f"golden.{index}", found=f"another token at position {position + 1}",
                expected="the token ids stored with the adapter",
                fix="use the tokenizer files that lie beside the adapter",
            )  # fmt: skip
    return len(goldens)


def _ids(
    row_tokenizer: RowTokenizer, conversation: dict[str, Any]
) -> tuple[list[int], list[int], tuple[tuple[int, str], ...]]:
    """Token ids of a conversation, of the prompt of its last answer, which the template may write otherwise, and what
    the template leaves out."""
    messages = tuple(_message(message) for message in conversation["messages"])
    tools = conversation.get("tools")
    given = None if tools is None else json.dumps(tools, ensure_ascii=False)
    row = row_tokenizer.conversations([_example(messages, given)], "assistant")[0]
    return row.ids.tolist(), row_tokenizer.prompt(_example(messages[:-1], given)), row.dropped


def _message(values: dict[str, Any]) -> Message:
    calls = tuple(values.get("tool_calls", ()))
    return Message(values["role"], values["content"], values.get("reasoning"), calls)


def _example(messages: Sequence[Message], tools: str | None) -> Example:
    return Example("", tuple(messages), None, "", 0, tools=tools)
