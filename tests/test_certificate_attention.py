"""The certificate of a merge is made by transformers' own attention, and the merged model has the type of its base.

Whet's attention is made wrong on purpose (a window, or a chunk, that does not reach it): the live model and every model
that whet opens would then be wrong alike, and only plain transformers can tell.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tasks
import tiny
import torch

import whet
from whet.base.errors import UserError
from whet.engine.compute import attention, proven_attention
from whet.runs import Run
from whet.ship import agreement
from whet.ship import merge as merging

WINDOW = 16


def windowed() -> Any:
    from transformers import MistralConfig

    sizes = tiny.llama(initializer_range=0.2).to_dict()
    kept = {name: sizes[name] for name in (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "vocab_size", "max_position_embeddings", "initializer_range", "eos_token_id", "pad_token_id",
    )}  # fmt: skip
    return MistralConfig(**kept, sliding_window=WINDOW, bos_token_id=None)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    model = tiny.save_model(windowed(), tmp_path_factory.mktemp("mistral"))
    return tasks.make_run("llama", "seq2seq", model, tmp_path_factory.mktemp("run"))


def forget_the_window(patch: pytest.MonkeyPatch) -> None:
    """A row sees all that stands before it, wherever whet computes attention, and no proof at loading notices."""
    patch.setattr(proven_attention, "_difference", lambda *given: "")
    right = attention._one
    patch.setattr(attention, "_one", lambda *given: right(*given[:-1], None))


def test_the_rows_are_longer_than_the_window(run: Run) -> None:
    from whet import runs

    assert int(runs.prepared(run.recipe).evaluation.lengths.max()) > 2 * WINDOW


def test_a_sound_merge_has_the_same_held_out_loss(run: Run, tmp_path: Path) -> None:
    found = whet.merge(run.path, tmp_path / "out")
    assert found["held_out_loss"] == pytest.approx(found["live_held_out_loss"], abs=1e-4)
    assert found["held_out_rows"] == 12


@pytest.mark.parametrize("blind", [False, True], ids=["all figures", "the loss alone"])
def test_an_attention_without_its_window_is_seen(
    blind: bool, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_the_window(monkeypatch)
    if blind:
        monkeypatch.setattr(agreement, "MEAN_KL_LIMIT", 1e9)
    with pytest.raises(UserError, match="near enough"):
        whet.merge(run.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_read_back_by_whet_the_wrong_attention_would_pass(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted fault of the proof itself: the candidate opened as the live model is."""
    from whet.engine.config import Model
    from whet.engine.load.open import Opened, open_model

    forget_the_window(monkeypatch)
    monkeypatch.setattr(
        merging, "_read_back", lambda folder, live, *_: open_model(Model(path=str(folder)), live.placement)
    )
    monkeypatch.setattr(
        agreement.Questions, "plain_answers", lambda self, network, _: self.answers_of(Opened(network, None, tasks.CPU))
    )
    assert whet.merge(run.path, tmp_path / "out")["kl"] < 1e-4


def stored_types(folder: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(str(folder / "model.safetensors"), "pt") as file:
        return {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - not a mapping


TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def base_of_type(place: Path, dtype: torch.dtype) -> Path:
    from transformers import AutoModelForCausalLM

    tiny.save_model(tiny.llama(initializer_range=0.2), place)
    AutoModelForCausalLM.from_pretrained(str(place), dtype=dtype).save_pretrained(str(place))
    return place


@pytest.mark.parametrize("name", TYPES)
def test_a_merged_model_has_the_type_of_its_base(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tasks.make_run("llama", "seq2seq", base_of_type(tmp_path / "base", TYPES[name]), tmp_path)
    monkeypatch.setattr(merging, "WIDER", dict.fromkeys(TYPES, ()))  # rounding may turn an answer of a random model
    monkeypatch.setattr(agreement, "LOSS_LIMIT", 1.0)
    found = whet.merge(run.path, tmp_path / "out")
    assert found["chosen"] == f"trained base, {name}"
    assert stored_types(tmp_path / "out") == {{"fp16": "F16", "bf16": "BF16", "fp32": "F32"}[name]}
    config = json.loads((tmp_path / "out/config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == str(TYPES[name]).removeprefix("torch.")


def test_what_fp16_cannot_hold_is_written_in_a_wider_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The base fits into fp16; with the update a weight is over 65,504."""
    from safetensors.torch import load_file, save_file

    run = tasks.make_run("llama", "seq2seq", base_of_type(tmp_path / "base", torch.float16), tmp_path)
    weights = run.adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if "v_proj.lora_A" in name)
    tensors[name][0, 0] = tensors[name.replace("lora_A", "lora_B")][0, 0] = 400.0
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.MonkeyPatch.context() as lifted:
        lifted.setattr(agreement, "MEAN_KL_LIMIT", 1e9)
        lifted.setattr(agreement, "LOSS_LIMIT", 1e9)
        found = whet.merge(run.path, tmp_path / "out")
    assert found["chosen"].split()[-1] in ("bf16", "fp32")
    assert "too large for fp16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stored", "tried"), [("fp16", ["fp16", "bf16", "fp32"]), ("bf16", ["bf16", "fp32"]), ("fp32", ["fp32"])]
)
def test_the_types_that_are_tried(stored: str, tried: list[str]) -> None:
    assert merging._candidates("fp32", stored) == [("trained", dtype) for dtype in tried]
    assert [dtype for _, dtype in merging._candidates("nf4", stored)][::2] == tried
