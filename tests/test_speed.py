"""`whet bench speed`: through the path of training, with clear errors before any model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from whet import cli

LOAD = ["--rows", "2", "--length", "32", "--warm", "1", "--steps", "2", "--json"]


def words(more: list[str]) -> list[str]:
    """The command with these settings and options, in the order that the command line takes."""
    settings = [word for word in more if "=" in word]
    return ["bench", "speed", "builtin:tiny", *settings, *LOAD, *(word for word in more if "=" not in word)]


def measured(more: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert cli.run(words(more)) == 0
    return json.loads(capsys.readouterr().out)


def test_it_measures_the_path_of_training(capsys: pytest.CaptureFixture[str]) -> None:
    found = measured([], capsys)
    assert found["tokens_per_second"] > 0
    assert found["layout"]["groups"] == 24
    assert found["layout"]["tokens"] == 64
    assert found["loss"] != found["first_loss"]
    assert found["first_step_seconds"] > found["load_seconds"]


def test_lengths_are_packed_and_only_real_tokens_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = tmp_path / "lengths.json"
    lengths.write_text("[40, 24, 50, 14, 33, 31]")
    found = measured(["--lengths", str(lengths)], capsys)
    assert found["layout"]["tokens"] == 64


@pytest.mark.parametrize(
    ("more", "said"),
    [(["--lengths", "/nowhere.json"], "cannot be read"), (["base.storage=bf16", "base.compute=fp32"], "bf16"),
     (["base.fp8_head=true"], "fp8 compute"),
     (["train.tile_mlp=8", "train.gradient_checkpointing=false"], "recomputed layers"),
     (["train.tile_pml=8"], "write train.tile_mlp"), (["train.max_steps=8"], "--steps says it"),
     (["data.dataset=rows.jsonl"], "does not use this setting"), (["train.seed=1"], "does not use this setting"),
     (["method=full"], "measured with LoRA"), (["output_dir=out"], "does not use this setting")],
    ids=str,
)  # fmt: skip
def test_bad_input_is_refused(more: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(words(more)) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{}", "[]", "[1.5]", "[0]", "not json", "[4000]"])
def test_lengths_that_are_none_are_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = tmp_path / "lengths.json"
    lengths.write_text(text)
    assert cli.run(words(["--lengths", str(lengths)])) == 2
    assert str(lengths) in capsys.readouterr().err
