"""What rows need of a model, remembered: the same tokens and the same answers as the whole tokenizer, without torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tasks
import tiny

from whet.data import row_model
from whet.data.config import Data
from whet.data.labels import encode_typed
from whet.data.prepare import prepare
from whet.data.row_model import RowModel, remembered_row_model
from whet.data.template.remembered import RememberedTokenizer
from whet.engine.config import Model
from whet.engine.load.load import load_tokenizer

TEXTS = ["Hello there", "  두 칸 띄운 글 ☀️", "", "a\n\nb\t" * 40, "<|im_end|> spelt out", "naïve Café ﬁ"]
SHARED = Path(__file__).parents[2] / "shared" / "data" / "tokenizers"


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(row_model, "WORTH_SECONDS", 0.0)


def remembered(model: Model) -> RowModel:
    """The second opening of a model, which the first one was kept for."""
    remembered_row_model(model)
    known = remembered_row_model(model)
    assert isinstance(known.tokenizer, RememberedTokenizer)
    return known


def places() -> list[Any]:
    real = [SHARED / name for name in ("gpt2", "phi-3-mini", "mistral-7b-v0.2", "qwen")]
    missing = pytest.mark.skip(reason="the real tokenizers lie beside this repository only where it is developed")
    return [tiny.BUILTIN, *(pytest.param(p, marks=() if p.is_dir() else missing, id=p.name) for p in real)]


@pytest.mark.parametrize("place", places(), ids=lambda place: Path(place).name)
def test_a_remembered_tokenizer_answers_as_the_whole_one(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(place, folder)
    if not (folder / "config.json").is_file():
        shutil.copy(tiny.BUILTIN / "config.json", folder / "config.json")
    if not (folder / "tokenizer_config.json").is_file():
        kind = "PreTrainedTokenizerFast" if (folder / "tokenizer.json").is_file() else "GPT2Tokenizer"
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}), encoding="utf-8")
    model = Model(path=str(folder))
    whole, kept = load_tokenizer(model), remembered(model).tokenizer
    for name in ("bos_token_id", "eos_token", "pad_token_id", "all_special_tokens", "all_special_ids",
                 "special_tokens_map", "chat_template"):  # fmt: skip
        assert getattr(kept, name) == getattr(whole, name)
    assert kept.get_vocab() == whole.get_vocab()
    assert len(kept) == len(whole)
    assert {n: str(t) for n, t in kept.added_tokens_decoder.items()} == {
        n: str(t) for n, t in whole.added_tokens_decoder.items()
    }
    pairs = TEXTS[::-1]
    for options in ({}, {"max_length": 7}, {"pairs": pairs}, {"pairs": pairs, "max_length": 9}):
        for mine, theirs in zip(
            encode_typed(kept, TEXTS, **options), encode_typed(whole, TEXTS, **options), strict=True
        ):
            assert mine[0].tolist() == theirs[0].tolist()
            assert mine[1].tolist() == theirs[1].tolist()
    assert kept._whole is None, "the whole tokenizer was opened for what is kept"
    for text in TEXTS:
        assert kept(text).input_ids == whole(text).input_ids
        ids = whole(text).input_ids
        for skip in (False, True):
            options = {"skip_special_tokens": skip, "clean_up_tokenization_spaces": False}
            assert kept.decode(ids, **options) == whole.decode(ids, **options)
    assert kept._whole is None


def test_what_is_not_kept_comes_from_the_whole_tokenizer_with_the_template_in_use() -> None:
    model = Model(path="builtin:tiny")
    kept = remembered(model).tokenizer
    kept.chat_template = "{{ messages[0].content }}"
    asked = kept.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert asked == "hi"
    assert kept("hi", return_offsets_mapping=True)["offset_mapping"]


def test_cutting_on_the_left_is_remembered(tmp_path: Path) -> None:
    folder = tmp_path / "left"
    shutil.copytree(tiny.BUILTIN, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"truncation_side": "left"}))
    model = Model(path=str(folder))
    text = ["one two three four five six seven eight nine ten"]
    whole, kept = load_tokenizer(model), remembered(model).tokenizer
    assert encode_typed(kept, text, None, 4)[0][0].tolist() == encode_typed(whole, text, None, 4)[0][0].tolist()
    assert encode_typed(kept, text, None, 4)[0][0].tolist() != encode_typed(kept, text)[0][0].tolist()[:4]


@pytest.mark.parametrize("rows", [
    [{"prompt": f"q{n}", "completion": f"답 {n}"} for n in range(20)],
    [{"text": f"text {n}", "label": f"class {n % 3}"} for n in range(20)],
    [{"text": f"only text {n}"} for n in range(20)],
], ids=["chats", "labels", "texts"])  # fmt: skip
def test_rows_are_the_same(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    known = remembered(Model(path="builtin:tiny"))
    data = Data(dataset=str(path), val_size=0.2)
    mine = prepare(data, known.tokenizer, known.readable, None, known.text_task)
    theirs = prepare(data, load_tokenizer(Model(path="builtin:tiny")), known.readable, None, known.text_task)
    assert mine.ledger.as_dict() == theirs.ledger.as_dict()
    assert mine.train.ids.tolist() == theirs.train.ids.tolist()
    assert mine.evaluation.ids.tolist() == theirs.evaluation.ids.tolist()


def test_a_tokenizer_that_changed_is_not_the_remembered_one(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny.BUILTIN, folder)
    model = Model(path=str(folder))
    assert remembered(model).tokenizer.eos_token != "<|endoftext|>x"
    path = folder / "chat_template.jinja"
    path.write_text("{{ 'another' }}", encoding="utf-8")
    assert remembered_row_model(model).tokenizer.chat_template == "{{ 'another' }}"


def test_new_tokens_are_another_tokenizer() -> None:
    plain, grown = remembered(Model(path="builtin:tiny")), remembered(Model(path="builtin:tiny", new_tokens=["[[x]]"]))
    assert "[[x]]" in grown.tokenizer.get_vocab()
    assert "[[x]]" not in plain.tokenizer.get_vocab()


def test_tasks_and_length_are_those_of_the_config(tmp_path: Path) -> None:
    folder = tasks.save_model("bert", tmp_path / "bert")
    known = remembered(Model(path=str(folder)))
    assert known.text_task == "classification"
    assert "causal" not in known.tasks
    assert known.readable == json.loads((folder / "config.json").read_text())["max_position_embeddings"]


def test_data_check_of_a_known_model_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "q", "completion": "a"}\n{"prompt": "r", "completion": "b"}\n', encoding="utf-8")
    remembered_row_model(Model(path="builtin:tiny"))
    script = (
        "import sys; from whet.cli import run; code = run(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'peft'} & set(sys.modules); sys.exit(f'imported {heavy}' if heavy else code)"
    )
    command = [sys.executable, "-c", script, "data", "check", str(path), "--show", "1"]
    done = subprocess.run(command, env=os.environ.copy(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "learned tokens" in done.stderr + done.stdout
