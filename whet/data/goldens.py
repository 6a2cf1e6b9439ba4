"""Five conversations whose exact token ids are saved with every adapter.

Whoever uses the adapter later (chat, merge, server) renders and tokenises them again and must get the same ids, or
stops: a template or tokenizer that drifted between training and serving is the loudest silent failure there is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from whet.base.errors import UserError
from whet.data.example import Message
from whet.data.template import contract
from whet.data.tokenise import Tokeniser

FILE = "whet_template.json"

_TEXTS = (
    ("user:What is 2 + 2?", "assistant:4"),
    ("user:안녕하세요, 오늘 날씨 어때요?", "assistant:맑고 따뜻해요. ☀️"),
    ("user:Hi!", "assistant:Hello.\nHow can I help?", "user:List two fruits.", "assistant:- apple\n- pear"),
    ("user:  two  spaces\tand a tab ", "assistant:x = {'a': [1, 2]}  # code"),
    ("system:Answer in Korean.", "user:Good morning", "assistant:좋은 아침이에요."),
)


def write_contract(tokeniser: Tokeniser, path: Path) -> None:
    """Store the template and the token ids of those conversations that it accepts."""
    goldens = []
    for texts in _TEXTS:
        messages = _messages(texts)
        try:
            goldens.append((messages, *_ids(tokeniser, messages)))
        except UserError:
            continue  # a template without system messages, for instance
    path.write_text(contract(tokeniser.tokenizer, goldens) + "\n", encoding="utf-8")


def check_contract(tokeniser: Tokeniser, path: Path) -> int:
    """Reproduce the stored ids; returns how many conversations agreed. Raises UserError on the first that does not."""
    if not path.is_file():
        return 0
    record = json.loads(path.read_text(encoding="utf-8"))
    goldens, beside = record["golden"], path.with_name("chat_template.jinja")
    if beside.is_file() and beside.read_bytes().decode("utf-8", "replace") != record["chat_template"]:
        raise UserError(
            "the chat template beside the adapter is not the one that it was trained with", file=str(beside),
            found="other text", expected=f"chat_template of {path.name}", fix=f"copy it back from {path.name}",
        )  # fmt: skip
    for index, golden in enumerate(goldens):
        messages = [Message(m["role"], m["content"]) for m in golden["messages"]]
        ids, prompt = _ids(tokeniser, messages)
        old_prompt = golden.get("prompt", prompt)
        if ids != golden["ids"] or prompt != old_prompt:
            old, new = (golden["ids"], ids) if ids != golden["ids"] else (old_prompt, prompt)
            place = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
            raise UserError(
                "the tokenizer or chat template is not the one that the adapter was trained with",
                file=str(path), field=f"golden.{index}", found=f"another token at place {place + 1}",
                expected="the token ids stored with the adapter",
                fix="use the tokenizer files that lie beside the adapter",
            )  # fmt: skip
    return len(goldens)


def _ids(tokeniser: Tokeniser, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and of the prompt of its last answer, which the template may write otherwise."""
    return tokeniser.conversations([messages], "assistant")[0].ids.tolist(), tokeniser.prompt(messages[:-1])


def _messages(texts: Sequence[str]) -> list[Message]:
    return [Message(role, content) for role, _, content in (text.partition(":") for text in texts)]  # type: ignore[arg-type]
