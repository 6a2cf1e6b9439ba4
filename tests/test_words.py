"""The words of the command line: errors in the one shape, with the setting that an option meant; nothing is cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import whet
from whet import cli
from whet.arguments import parse_words
from whet.base.errors import UserError


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        ("train x.yaml --epochs 3", "whet train x.yaml train.num_train_epochs=3"),
        ("train x.yaml --lr=1e-4", "whet train x.yaml train.learning_rate=1e-4"),
        ("train x.yaml --learning-rate 1e-4", "whet train x.yaml train.learning_rate=1e-4"),
        ("train x.yaml --batch_size 4", "whet train x.yaml train.per_device_train_batch_size=4"),
        ("quickstart --epochs 1", "whet quickstart train.num_train_epochs=1"),
        ("eval runs/a --spilt test", "did you mean --split?"),
        ("trian x.yaml", "whet train"),
        ("eval", "whet eval --help shows an example"),
        ("eval runs/a runs/b", "whet eval --help shows them"),
        ("eval runs/a --max-rows many", "whet eval --help"),
        ("eval runs/a --split tset", "whet eval --help"),
        ("data chekc x", "whet data --help"),
        ("predict runs/a new.csv --top 0", "whet predict --help"),
    ],
)
def test_wrong_words_are_said_in_the_one_shape(words: str, fix: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(words.split()) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert f"\n  fix:      {fix}\n" in said.err
    assert "usage:" not in said.err
    assert cli.run([*words.split(), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["fix"] == fix


def test_rows_in_place_of_a_recipe_are_seen(data_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["train", str(data_file)]) == 2
    said = capsys.readouterr().err
    assert "these are rows" in said
    assert f"data.dataset={data_file}" in said
    with pytest.raises(UserError, match="these are rows"):
        whet.train(str(data_file))


def test_bare_whet_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.run([])
    assert stop.value.code == 0
    assert "start here:" in capsys.readouterr().out


def test_settings_may_stand_among_options() -> None:
    words = parse_words(["train", "x.yaml", "--json", "train.max_steps=3", "--offline", "method=ia3"])
    assert sorted(words.overrides) == ["method=ia3", "train.max_steps=3"]
    with pytest.raises(UserError):
        parse_words(["eval", "runs/a", "train.max_steps=3"])


def test_nothing_is_cut_in_a_pipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table

    from whet.base import console

    console._consoles.clear()
    long = "a-folder-of-a-long-name/" * 8 + "adapter"
    table = Table(box=None)
    table.add_column("adapter")
    table.add_row(long)
    console.console(stdout=True).print(table)
    assert long in capsys.readouterr().out


def test_answers_are_on_stdout(data_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["data", "check", str(data_file), "--fast"]) == 0
    said = capsys.readouterr()
    assert "rows to learn from" in said.out
    assert "rows to learn from" not in said.err


def test_merge_says_its_result_once(
    recipe: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from whet.training.run import train

    run = train(recipe(train__max_steps=1, data__val_size=3))
    capsys.readouterr()
    assert cli.run(["merge", str(run.path), str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert said.out.count("greedy answers") == 1
    assert "greedy answers 100.00%" not in said.err


def test_a_gated_model_says_how_to_log_in() -> None:
    import httpx
    from huggingface_hub.errors import GatedRepoError

    from whet.engine.load.load import _fix_of_hub

    response = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co/org/model"))
    try:
        try:
            raise GatedRepoError("no access", response=response)
        except GatedRepoError as error:
            raise OSError("You are trying to access a gated repo.") from error
    except OSError as error:
        fix = _fix_of_hub(error, "org/model")
    assert "https://huggingface.co/org/model" in fix
    assert "HF_TOKEN" in fix
    assert "accept its terms" not in _fix_of_hub(OSError("no such model"), "org/model")
