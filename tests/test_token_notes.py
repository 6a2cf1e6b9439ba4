"""What is said of the tokens: words that a tokenizer does not know, and one kind of question answered in two ways."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from whet.data.batch.ledger import Ledger
from whet.data.config import Data
from whet.data.prepare import prepare
from whet.data.token_notes import unknown_tokens
from whet.engine.config import Model
from whet.engine.load.load import load_tokenizer

# As Qwen3's: an empty block of thinking stands before the last answer alone.
THINKS_LAST = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}[think][/think]{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n[think][/think]{% endif %}"
)
THINKS_ALWAYS = THINKS_LAST.replace(" and loop.last", "")


def notes(tmp_path: Path, template: str, turns: int, **settings: Any) -> str:
    """The notes of six conversations of `turns` questions."""
    path = tmp_path / "rows.jsonl"
    talk = [{"role": role, "content": f"{role} {n}"} for n in range(turns) for role in ("user", "assistant")]
    path.write_text("".join(json.dumps({"messages": [*talk[:-1], talk[-1] | {"content": f"end {k}"}]}) + "\n"
                            for k in range(6)), encoding="utf-8")  # fmt: skip
    tokenizer = load_tokenizer(Model(path="builtin:tiny"))
    tokenizer.chat_template = template
    return " ".join(prepare(Data(dataset=str(path), val_size=0, **settings), tokenizer, 512).ledger.notes)


def test_answers_that_are_taught_in_two_ways_are_said(tmp_path: Path) -> None:
    said = notes(tmp_path, THINKS_LAST, 2)
    assert "before the last answer and not before earlier ones" in said
    assert "data.loss_on=last_assistant" in said
    assert "row 1 for one" in said


@pytest.mark.parametrize(("template", "turns", "settings"), [
    (THINKS_LAST, 1, {}), (THINKS_LAST, 2, {"loss_on": "last_assistant"}), (THINKS_ALWAYS, 2, {}),
], ids=["one turn", "the last alone", "always"])  # fmt: skip
def test_answers_that_are_taught_in_one_way_are_not(
    template: str, turns: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    assert "two ways" not in notes(tmp_path, template, turns, **settings)


@pytest.mark.parametrize(("unknown", "said"), [(38, "38 % of the tokens are unknown"), (0, None)])
def test_the_share_of_unknown_tokens_is_said(unknown: int, said: str | None) -> None:
    tokenizer: Any = SimpleNamespace(unk_token_id=7, unk_token="[UNK]", bos_token_id=1, eos_token_id=2, pad_token_id=0)
    rows: Any = SimpleNamespace(ids=np.asarray([7] * unknown + [9] * (100 - unknown)))
    ledger = Ledger()
    found = list(unknown_tokens(rows, tokenizer, ledger))
    assert ledger.unknown_tokens == unknown
    assert [sentence.startswith(said or "") for sentence in found] == ([True] if said else [])


def test_an_end_that_is_called_unknown_too_is_no_unknown_word() -> None:
    """GPT-2 calls its end of text unk_token as well; its bytes know every word."""
    tokenizer: Any = SimpleNamespace(
        unk_token_id=7, unk_token="<|e|>", bos_token_id=7, eos_token_id=7, pad_token_id=None
    )
    rows: Any = SimpleNamespace(ids=np.full(10, 7))
    assert list(unknown_tokens(rows, tokenizer, Ledger())) == []
