"""The text part of a model that sees pictures: what is not loaded is said, and merging carries it over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

import whet
from whet.ship import merge as merging
from whet.training.run import train


def seeing() -> Any:
    """A Qwen3.5 with a vision part, of two layers each."""
    import transformers

    text: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": tiny.VOCABULARY, "max_position_embeddings": 512,
        "layer_types": ["full_attention", "full_attention"], "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": None,
        "tie_word_embeddings": False, "initializer_range": 0.1,
    }  # fmt: skip
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64,
              "patch_size": 4, "spatial_merge_size": 2, "num_position_embeddings": 16}  # fmt: skip
    return transformers.Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:

    import transformers

    place = tmp_path_factory.mktemp("seeing")
    torch.manual_seed(0)
    network = transformers.Qwen3_5ForConditionalGeneration(seeing())
    network.save_pretrained(str(place))
    return tiny.copy_tokenizer(place)


def run_of(model: Path, place: Path) -> Any:
    data = tiny.write_rows(place / "rows.jsonl", tiny.rows(8))
    return train(tiny.recipe(
        model, data, place / "run", train__max_steps=4, train__learning_rate=0.02, data__val_size=3,
        train__load_best_model_at_end=False,
    ))  # fmt: skip


def test_it_is_said_and_merged_into_the_whole_model(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    run = run_of(model, tmp_path)
    said = " ".join(capsys.readouterr().err.split())
    assert "not loaded and not trained: visual (" in said
    assert "Qwen3_5ForCausalLM" in said
    found = whet.merge(run.path, tmp_path / "out")
    assert found["held_out_loss"] == pytest.approx(found["live_held_out_loss"], abs=1e-3)
    assert "carried over" in " ".join(capsys.readouterr().err.split())

    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert not any("visual" in name for name in moved)

    whole, report = transformers.AutoModelForImageTextToText.from_pretrained(
        str(tmp_path / "out"), dtype=torch.float32, output_loading_info=True
    )
    assert type(whole).__name__ == "Qwen3_5ForConditionalGeneration"
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = torch.arange(5, 30)[None]
    text = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"), dtype=torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(whole(input_ids=ids).logits, text(input_ids=ids).logits, rtol=1e-3, atol=1e-3)


def test_the_plan_says_it_too(model: Path, tmp_path: Path) -> None:
    data = tiny.write_rows(tmp_path / "rows.jsonl", tiny.rows(4))
    assert any("visual" in notice for notice in tiny.plan(tiny.recipe(model, data, tmp_path / "run").recipe)["notices"])


def test_what_cannot_be_matched_is_named(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A base whose text part has one tensor more than the class that was trained."""
    import shutil

    from safetensors.torch import save_file

    shutil.copytree(model, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.language_model.layers.0.extra.weight"] = torch.zeros(2, 2)
    save_file(tensors, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    run = run_of(tmp_path / "model", tmp_path)
    capsys.readouterr()
    whet.merge(run.path, tmp_path / "out")
    assert "the text part alone, without visual" in " ".join(capsys.readouterr().err.split())


def test_a_part_that_is_forgotten_is_seen(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: nothing is carried over."""
    monkeypatch.setattr(merging, "left_out", lambda model, network: {})
    run = run_of(model, tmp_path)
    whet.merge(run.path, tmp_path / "out")
    assert load_file(tmp_path / "out/model.safetensors").keys() != load_file(model / "model.safetensors").keys()
