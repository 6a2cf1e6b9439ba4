"""A model whose attention cannot keep documents apart is trained padded, says so, and loses nothing by it.

BLOOM computes attention by itself and never sees where the documents of a row begin. The judge is plain transformers on
each row alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from ruamel.yaml import YAML
from torch.nn.functional import cross_entropy

import whet
from whet import runs
from whet.base.errors import UserError
from whet.engine.compute.isolation import Isolation
from whet.runs import Run, open_run
from whet.training import load

SETTINGS: dict[str, Any] = {"train.max_steps": 3, "train.per_device_train_batch_size": 6, "data.val_size": 4}


@pytest.fixture(scope="module")
def bloom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BloomConfig

    config = BloomConfig(
        hidden_size=64, n_layer=2, n_head=4, vocab_size=tiny.VOCABULARY, pad_token_id=0, bos_token_id=2,
        eos_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    return tiny.save_model(config, tmp_path_factory.mktemp("bloom"))


def trained(model: Path, data: Path, out: Path, **changes: Any) -> Run:
    return whet.train(None, **(tiny.settings(model, data, out) | SETTINGS | changes))


def losses(run: Run) -> list[tuple[str, float]]:
    return [(line["kind"], line.get("loss", line.get("eval_loss"))) for line in run.lines("metrics.jsonl")]


@torch.inference_mode()
def plain_loss(run: Run) -> float:
    """The loss of the untrained model on the rows of the first step, each row alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(run.recipe.model.path, dtype=torch.float32).eval()
    rows = runs.prepared(run.recipe).train
    total, count = 0.0, 0
    for index in range(len(rows)):
        ids, learned, *_ = rows.row(index)
        tokens = torch.from_numpy(ids.astype(np.int64))
        chosen = torch.from_numpy(np.flatnonzero(learned[1:]))
        logits = model(input_ids=tokens[None]).logits[0, :-1].double()
        total += float(cross_entropy(logits[chosen], tokens[1:][chosen], reduction="sum"))
        count += len(chosen)
    return total / count


def fallback_holds(bloom: Path, data: Path, place: Path) -> None:
    """Left open, rows are padded: the run says so, and is the one that asks for padding, to the bit."""
    left_open = trained(bloom, data, place / "auto")
    asked = trained(bloom, data, place / "padded", **{"data.padding_free": False})
    written = YAML(typ="safe").load((place / "auto" / "recipe.yaml").read_text(encoding="utf-8"))
    assert written["data"]["padding_free"] is False
    assert open_run(place / "auto").recipe.data.padding_free is False
    origin = left_open.read("origins.json")["data.padding_free"]  # type: ignore[index]
    assert (origin["value"], origin["origin"]) == (False, "decided")
    assert "isolation" in origin["reason"]
    assert losses(left_open) == losses(asked)
    assert tiny.final_bytes(left_open.path) == tiny.final_bytes(asked.path)


def test_a_model_that_ignores_documents_is_trained_padded_and_says_so(
    bloom: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fallback_holds(bloom, data_file, tmp_path)
    assert "padded instead" in " ".join(capsys.readouterr().err.split())


def test_without_the_fallback_documents_would_see_each_other(
    bloom: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted fault: every model passes the check."""
    monkeypatch.setattr(Isolation, "holds", property(lambda self: True))
    monkeypatch.setattr(load, "knows_documents", lambda network: True)
    with pytest.raises(AssertionError):
        fallback_holds(bloom, data_file, tmp_path)
    contaminated = dict(losses(open_run(tmp_path / "auto")))
    assert contaminated["train"] != dict(losses(open_run(tmp_path / "padded")))["train"]


def test_a_model_that_mixes_tokens_beside_its_attention_is_trained_padded(data_file: Path, tmp_path: Path) -> None:
    """Its attention is whet's and keeps documents apart; the convolutions between do not, as only trying tells."""
    from transformers import Lfm2Config

    config = Lfm2Config(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
        layer_types=["conv", "full_attention"], vocab_size=tiny.VOCABULARY, pad_token_id=0, bos_token_id=2,
        eos_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    run = trained(tiny.save_model(config, tmp_path / "model"), data_file, tmp_path / "run", **{"train.max_steps": 1})
    assert run.recipe.data.padding_free is False


def test_the_padded_loss_is_that_of_each_row_alone(bloom: Path, data_file: Path, tmp_path: Path) -> None:
    changes = {"train.per_device_train_batch_size": 24, "train.max_steps": 1, "data.val_size": 0}
    run = trained(bloom, data_file, tmp_path / "run", **changes)
    assert dict(losses(run))["train"] == pytest.approx(plain_loss(run), rel=1e-5)


def test_a_fallen_back_run_is_continued_by_the_same_command(bloom: Path, data_file: Path, tmp_path: Path) -> None:
    run = trained(bloom, data_file, tmp_path / "run")
    before = tiny.final_bytes(run.path)
    (run.path / "finished.json").unlink()
    again = trained(bloom, data_file, tmp_path / "run")
    assert again.recipe.data.padding_free is False
    assert tiny.final_bytes(again.path) == before


@pytest.mark.parametrize(
    "changes", [{"data.packing": True, "data.max_length": 256}, {"data.padding_free": True}], ids=["packing", "flat"]
)  # fmt: skip
def test_documents_in_one_row_are_refused_where_they_are_asked_for(
    changes: dict[str, Any], bloom: Path, data_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="see each other") as caught:
        trained(bloom, data_file, tmp_path / "run", **changes)
    assert str(caught.value.field).startswith("data.")
    assert "data.padding_free=false" in str(caught.value.fix)


def test_a_model_that_keeps_documents_apart_is_not_padded(model_dir: Path, data_file: Path, tmp_path: Path) -> None:
    run = trained(model_dir, data_file, tmp_path / "run")
    assert run.recipe.data.padding_free is True
