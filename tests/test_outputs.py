"""No output is an input: every option of every verb that writes, against everything that the call reads.

Inputs are named as they are, by another spelling, by a symbolic and by a hard link; directories also from above.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

from whet import arguments, cli
from whet.base.errors import UserError
from whet.base.outputs import Input, output_directory, output_file
from whet.recipe import parse
from whet.training.run import train

# What each verb takes: options that name an output, and all others that take a value.
OUTPUTS = {
    ("data check", "--html"), ("data check", "--removed"), ("data judge", "--out"), ("data augment", "--out"),
    ("merge", "out"), ("adapters", "targets"), ("train", "overrides"), ("quickstart", "overrides"),
    ("predict", "--out"), ("plan", "--html"),
}  # fmt: skip
OTHERS = {
    ("init", "name"), ("data check", "target"), ("data check", "overrides"), ("data check", "--benchmark"),
    ("data check", "--show"), ("data judge", "target"), ("data judge", "overrides"), ("data judge", "--rubric"),
    ("data judge", "--least"), ("data augment", "target"), ("data augment", "overrides"), ("data augment", "--copies"),
    *((verb, name) for verb in ("data judge", "data augment")
      for name in ("--endpoint", "--model", "--api-key-env", "--jobs", "--timeout")),
    ("plan", "target"), ("plan", "overrides"), ("train", "target"), ("eval", "target"), ("eval", "--split"),
    ("eval", "--max-rows"), ("chat", "target"), ("chat", "--message"), ("chat", "--adapter"), ("chat", "--system"),
    ("chat", "--max-new-tokens"), ("predict", "target"), ("predict", "file"), ("merge", "target"),
    ("plan", "--gpu"), ("plan", "--gpus"),
    ("predict", "--top"), ("predict", "--max-new-tokens"), ("eval", "--data"), ("merge", "--data"),
    ("adapters", "what"), ("adapters", "--how"), ("adapters", "--weights"), ("adapters", "--rank"),
    ("adapters", "--density"), ("bench", "what"), ("bench", "target"), ("bench", "overrides"), ("bench", "--rows"),
    ("bench", "--length"), ("bench", "--accumulation"), ("bench", "--steps"), ("bench", "--warm"),
    ("bench", "--lengths"),
}  # fmt: skip


def options(parser: argparse.ArgumentParser, verb: str = "") -> Iterator[tuple[str, str]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield from options(inner, f"{verb} {name}".strip())
        elif action.nargs != 0 and action.dest != "lang":  # every verb has it
            yield verb, action.option_strings[0] if action.option_strings else action.dest


def test_every_option_is_known_as_an_output_or_not() -> None:
    """A new option that takes a value fails here until somebody says what it is; an output then needs its case."""
    found = set(options(arguments.parser_of_words()))
    assert found - OUTPUTS - OTHERS == set(), "an option that writes goes into OUTPUTS, with a case in COMMANDS"
    assert found == OUTPUTS | OTHERS


# a small world of inputs


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, rows to learn from and of a test, a recipe, and a run of them."""
    place = tmp_path_factory.mktemp("world")
    tiny.save_model(tiny.llama(num_hidden_layers=1), place / "model")
    for name in ("rows.jsonl", "held.jsonl"):
        tiny.write_rows(place / name, tiny.rows(6))
    (place / "recipe.yaml").write_text(
        f"model: {{path: {place}/model}}\ndata: {{dataset: {place}/rows.jsonl, eval_dataset: {place}/held.jsonl}}\n"
        f"method: {{name: lora, r: 2}}\nbase: {{device: cpu}}\ntrain: {{max_steps: 1, learning_rate: 0.001}}\n"
        f"output_dir: {place}/run\n", encoding="utf-8",
    )  # fmt: skip
    train(parse(place / "recipe.yaml"))
    (place / "copy").mkdir()
    shutil.copytree(place / "run" / "adapter", place / "copy" / "adapter")
    return place


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def content(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()}


ENDPOINT = ["--endpoint", "http://127.0.0.1:9/v1", "--model", "m"]
FILES: dict[str, Callable[[Path, str], list[str]]] = {
    "data check --html": lambda w, out: ["data", "check", f"{w}/recipe.yaml", "--html", out],
    "data check --removed": lambda w, out: ["data", "check", f"{w}/recipe.yaml", "--removed", out],
    "plan --html": lambda w, out: ["plan", f"{w}/recipe.yaml", "--html", out],
    "data judge --out": lambda w, out: ["data", "judge", f"{w}/recipe.yaml", "--out", out, *ENDPOINT],
    "predict --out": lambda w, out: ["predict", f"{w}/run", f"{w}/held.jsonl", "--out", out],
    "data augment --out": lambda w, out: ["data", "augment", f"{w}/recipe.yaml", "--out", out, *ENDPOINT],
}
DIRECTORIES: dict[str, Callable[[Path, str], list[str]]] = {
    "train overrides": lambda w, out: ["train", f"{w}/recipe.yaml", f"output_dir={out}"],
    "quickstart overrides": lambda w, out: ["quickstart", f"output_dir={out}", f"model.path={w}/model",
                                            f"data.dataset={w}/rows.jsonl"],
    "merge out": lambda w, out: ["merge", f"{w}/run", out],
    "adapters targets": lambda w, out: ["adapters", "compose", out, f"{w}/run", f"{w}/copy/adapter"],
}  # fmt: skip
READ_FILES = ("recipe.yaml", "rows.jsonl", "held.jsonl", "model/config.json", "model/model.safetensors",
              "model/tokenizer.json")  # fmt: skip
SPELLINGS = ("same", "dots", "symbolic link", "link above", "hard link")


def spelt(target: Path, spelling: str, place: Path) -> str:
    if spelling == "dots":
        return f"{target.parent}/../{target.parent.name}/{target.name}"
    if spelling == "symbolic link":
        (place / "link").symlink_to(target)
        return "link"
    if spelling == "link above":
        (place / "above").symlink_to(target.parent)
        return f"above/{target.name}"
    if spelling == "hard link":
        os.link(target, place / "hard")
        return "hard"
    return str(target)


def test_every_output_has_a_case() -> None:
    assert {tuple(name.rsplit(" ", 1)) for name in (*FILES, *DIRECTORIES)} == OUTPUTS


def refused(words: list[str], world: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The error of a command, which leaves everything as it was."""
    before = content(world)
    assert cli.run(words) == 2
    assert content(world) == before
    return capsys.readouterr().err


@pytest.mark.parametrize("name", READ_FILES)
@pytest.mark.parametrize("verb", FILES)
def test_a_file_that_is_read_is_never_written(
    verb: str, name: str, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(FILES[verb](world, str(world / name)), world, capsys)
    read = (verb, name) != ("predict --out", "recipe.yaml")  # the run has a recipe of its own
    assert ("would overwrite the " if read else "would be lost") in said
    assert str(world / name) in said


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("verb", FILES)
def test_however_it_is_spelt(
    verb: str, spelling: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = spelt(world / "rows.jsonl", spelling, tmp_path)
    assert "would overwrite the data" in refused(FILES[verb](world, out), world, capsys)


READ_DIRECTORIES = {
    "train overrides": ("model", ".", "rows.jsonl"), "quickstart overrides": ("model", "."),
    "merge out": ("model", ".", "run", "run/adapter", "run/checkpoints/new"),
    "adapters targets": ("model", ".", "run", "run/adapter", "run/adapter/new", "copy", "copy/adapter"),
}  # fmt: skip
PLACES = [(verb, name, "same") for verb, names in READ_DIRECTORIES.items() for name in names]
ALIASES = [(verb, "model", way) for verb in DIRECTORIES for way in ("dots", "symbolic link", "link above")]


@pytest.mark.parametrize(("verb", "name", "spelling"), [*PLACES, *ALIASES])
def test_a_directory_that_is_read_or_holds_what_is_read_is_never_written(
    verb: str, name: str, spelling: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = spelt(world if name == "." else world / name, spelling, tmp_path)
    assert out.rpartition("/")[2] in refused(DIRECTORIES[verb](world, out), world, capsys)


def test_a_directory_above_an_input_is_no_output_whatever_else_lies_in_it(tmp_path: Path) -> None:
    """Merging and training refuse a directory that is not empty as well; those that replace one would not."""
    (tmp_path / "above" / "model").mkdir(parents=True)
    (tmp_path / "other").symlink_to(tmp_path / "above")
    for name in ("above", "above/model", "other", "other/model", "above/model/.."):
        with pytest.raises(UserError, match="would overwrite the model"):
            output_directory(tmp_path / name, [Input(tmp_path / "above" / "model", "the model")])
    assert output_directory(tmp_path / "beside", [Input(tmp_path / "above" / "model", "the model")])


def test_a_finished_run_is_not_its_own_input(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The recipe that a run keeps continues it."""
    assert cli.run(["train", f"{world}/run/recipe.yaml"]) == 0
    assert "nothing to do" in capsys.readouterr().err


def test_rows_that_would_be_read_the_next_time_are_not_written_among_the_data(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    tiny.write_rows(tmp_path / "data" / "a.jsonl", tiny.rows(3))
    for target in ("data", "data/*.jsonl"):
        assert cli.run(["data", "check", target, "--removed", "data/removed.jsonl"]) == 2
        assert cli.run(["data", "check", target, "--removed", "removed.jsonl"]) == 0
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["a.jsonl"]


def test_two_outputs_of_one_call_are_two_files(tmp_path: Path) -> None:
    tiny.write_rows(tmp_path / "a.jsonl", tiny.rows(3))
    assert cli.run(["data", "check", "a.jsonl", "--html", "x", "--removed", "./x"]) == 2
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("option", ["--html", "--removed"])
def test_a_file_of_somebody_else_is_not_replaced_but_ones_own_is(option: str, tmp_path: Path) -> None:
    tiny.write_rows(tmp_path / "a.jsonl", tiny.rows(3))
    (tmp_path / "thesis").write_text("mine", encoding="utf-8")
    assert cli.run(["data", "check", "a.jsonl", option, "thesis"]) == 2
    assert (tmp_path / "thesis").read_text(encoding="utf-8") == "mine"
    for _ in range(2):
        assert cli.run(["data", "check", "a.jsonl", option, "own"]) == 0


def test_through_a_link_the_file_behind_it_is_written(tmp_path: Path) -> None:
    tiny.write_rows(tmp_path / "a.jsonl", tiny.rows(3))
    (tmp_path / "there").mkdir()
    (tmp_path / "page.html").symlink_to(tmp_path / "there" / "page.html")
    assert cli.run(["data", "check", "a.jsonl", "--html", "page.html"]) == 0
    assert (tmp_path / "page.html").is_symlink()
    assert (tmp_path / "there" / "page.html").is_file()


@pytest.mark.parametrize("name", ["", " ", "a\0b", "$HOME/x", "${HOME}/x", "~nobody-of-this-name/x", "pipe", "x" * 300])
def test_what_can_be_no_output_is_one_clear_error(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.write_rows(tmp_path / "a.jsonl", tiny.rows(3))
    os.mkfifo(tmp_path / "pipe")
    assert cli.run(["data", "check", "a.jsonl", "--removed", name]) == (0 if not name else 2)
    assert "whet itself failed" not in capsys.readouterr().err
    assert (tmp_path / "pipe").is_fifo()
    settings = tiny.settings("builtin:tiny", tmp_path / "a.jsonl", tmp_path) | {"output_dir": name}
    (tmp_path / "recipe.yaml").write_text("{}", encoding="utf-8")
    if name:
        assert cli.run(["train", "recipe.yaml", *tiny.words(settings)]) == 2
        assert "whet itself failed" not in capsys.readouterr().err


def test_home_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert output_directory("~/x", []) == tmp_path / "home" / "x"
    assert output_file("~/x", [Input(tmp_path, "the data")]) == tmp_path / "home" / "x"
    tiny.write_rows(tmp_path / "a.jsonl", tiny.rows(6))
    settings: dict[str, Any] = tiny.settings("builtin:tiny", tmp_path / "a.jsonl", tmp_path, train__max_steps=1)
    run = train(parse(None, tiny.words(settings | {"output_dir": "~/run"})))
    assert run.path == tmp_path / "home" / "run"
    assert (run.path / "finished.json").is_file()
    assert not (tmp_path / "~").exists()
