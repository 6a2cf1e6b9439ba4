"""plan.json is computed for the largest forward pass that the run can have: counted here from the tokenizer alone, and
from what the model is really given over an epoch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tasks
import tiny
import torch
from torch.nn.modules import module as hooks

import whet
from whet.runs import Run

FILLED_TO = 32  # a flat row is filled up to a multiple of so many tokens on a CPU


def chat_lengths(records: list[dict[str, str]], model: Path) -> list[int]:
    """Tokens of each row as plain transformers renders it."""
    tokenizer = tasks.tokenizer(model)
    chats = [
        [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]
        for row in records
    ]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    return sorted((len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts), reverse=True)


def planned(run: Run) -> int:
    plan = json.loads((run.path / "plan.json").read_text(encoding="utf-8"))
    return plan["assumed"]["tokens_per_forward"]


def trained(model: Path, data: Path, out: Path, **changes: Any) -> Run:
    usual = {"train.num_train_epochs": 1, "train.per_device_train_batch_size": 5}
    return whet.train(None, **(tiny.settings(model, data, out) | usual | changes))


@pytest.fixture
def given() -> Iterator[list[int]]:
    """Tokens of every forward pass of an embedding: ids that the model reads, padding and filling included."""
    seen: list[int] = []

    def before(module: torch.nn.Module, args: Any) -> None:
        # the checks at the start ask for a few tokens only
        if isinstance(module, torch.nn.Embedding) and module.num_embeddings == tiny.VOCABULARY:
            seen.append(args[0].numel())

    handle = hooks.register_module_forward_pre_hook(before)
    yield seen
    handle.remove()


@pytest.mark.parametrize("size", [1, 5, 24, 100])
def test_rows_laid_end_to_end_are_planned_as_the_run_joins_them(
    size: int, model_dir: Path, data_file: Path, tmp_path: Path, given: list[int]
) -> None:
    run = trained(model_dir, data_file, tmp_path / "run", **{"train.per_device_train_batch_size": size})
    lengths = chat_lengths(tiny.rows(), model_dir)
    assert max(lengths) <= planned(run) <= sum(lengths[:size])
    assert max(given) == FILLED_TO * math.ceil(planned(run) / FILLED_TO)


def test_packed_rows_are_planned_as_full_as_they_are(
    model_dir: Path, data_file: Path, tmp_path: Path, given: list[int]
) -> None:
    changes = {"data.packing": True, "data.max_length": 256, "train.per_device_train_batch_size": 2}
    run = trained(model_dir, data_file, tmp_path / "run", **changes)
    assert 256 < planned(run) <= 2 * 256
    assert max(given) == FILLED_TO * math.ceil(planned(run) / FILLED_TO)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: tasks.save_model(kind, tmp_path_factory.mktemp(kind)) for kind in ("llama", "bert", "t5")}


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_labelled_rows_are_planned_with_their_padding(
    kind: str, models: dict[str, Path], tmp_path: Path, given: list[int]
) -> None:
    records = tasks.rows("classification")
    data = tiny.write_rows(tmp_path / "rows.jsonl", records)
    run = trained(models[kind], data, tmp_path / "run")
    tokenizer = tasks.tokenizer(models[kind])
    longest = max(len(tokenizer(record["text"]).input_ids) for record in records)
    assert planned(run) == 5 * longest == max(given)


def test_no_forward_pass_of_an_encoder_decoder_is_larger_than_planned(
    models: dict[str, Path], tmp_path: Path, given: list[int]
) -> None:
    records = tasks.rows("seq2seq")
    data = tiny.write_rows(tmp_path / "rows.jsonl", records)
    run = trained(models["t5"], data, tmp_path / "run")
    tokenizer = tasks.tokenizer(models["t5"])
    longest = max(len(tokenizer(record["prompt"]).input_ids) for record in records)
    assert planned(run) >= max(given) == 5 * longest


def test_padded_text_is_planned_with_its_padding(
    model_dir: Path, data_file: Path, tmp_path: Path, given: list[int]
) -> None:
    run = trained(model_dir, data_file, tmp_path / "run", **{"data.padding_free": False})
    assert planned(run) == 5 * max(chat_lengths(tiny.rows(), model_dir))
    assert planned(run) >= max(given)
