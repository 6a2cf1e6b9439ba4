"""A conversation: what the template writes before an answer is no part of it, and the next turn sees it once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny

from whet.data.template.template import use_template
from whet.data.template.tokenise import Tokeniser
from whet.engine.config import Model
from whet.engine.load.load import load_tokenizer
from whet.ship.chat import Chat, open_chat, talk

THOUGHT = "<think>\n\n</think>\n\n"
THINKING = """{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"""


def test_a_learned_thinking_block_is_not_carried_into_the_history(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "thinking.jinja").write_text(THINKING, encoding="utf-8")
    tokenizer = load_tokenizer(Model(path=str(model_dir)))
    use_template(tokenizer, str(tmp_path / "thinking.jinja"))
    asked: list[list[int]] = []

    def thinks(network: Any, prompt: list[int], **_: Any) -> list[int]:
        asked.append(prompt)
        return tokenizer(f"{THOUGHT}answer {len(asked)}", add_special_tokens=False).input_ids

    monkeypatch.setattr("whet.ship.chat.stream", thinks)
    monkeypatch.setattr("whet.ship.chat._lines", lambda: iter(["one", "two"]))
    found = talk(Chat(None, Tokeniser(tokenizer, chat=True)), None, None, quiet=True)
    assert [turn["content"] for turn in found] == ["one", "answer 1", "two", "answer 2"]
    assert [str(tokenizer.decode(prompt)).count("<think>") for prompt in asked] == [0, 1]


def test_a_model_directory_can_be_talked_to(model_dir: Path) -> None:
    found = talk(open_chat(str(model_dir), max_new_tokens=3), "Hi", "Be brief.", quiet=True)
    assert [turn["role"] for turn in found] == ["system", "user", "assistant"]
    assert open_chat(str(model_dir)).network.config.vocab_size == tiny.VOCABULARY
