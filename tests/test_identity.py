"""A run knows its adapter, base, vocabulary and data by content: whatever is another one is named by every verb.

Each fault is planted in a copy of a finished run; the commands stop before a model is loaded.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import whet
from whet import cli
from whet.adapters.loaded import base_of
from whet.base.content import difference, files_in
from whet.base.errors import UserError
from whet.engine.load.identity import SEAL, check_sealed
from whet.recipe import parse
from whet.runs import open_run
from whet.training.run import train

STEPS = {"train__max_steps": 3, "train__save_steps": 1, "data__val_size": 3, "train__load_best_model_at_end": False}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer, rows, and two runs on them; nobody may change them."""
    place = tmp_path_factory.mktemp("made")
    tiny.save_model(tiny.llama(num_hidden_layers=1, sliding_window=None), place / "model")
    tiny.write_rows(place / "rows.jsonl", tiny.rows(9))
    for name, rate in (("run", 0.01), ("other", 0.02)):
        train(tiny.recipe(place / "model", place / "rows.jsonl", place / name, train__learning_rate=rate, **STEPS))
    return place


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of all of it under a path of its own, which the recipes name."""
    shutil.copytree(made, tmp_path / "w")
    for recipe in (tmp_path / "w").glob("*/recipe.yaml"):
        recipe.write_text(recipe.read_text(encoding="utf-8").replace(str(made), str(tmp_path / "w")), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "w"


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model is a failure of the test."""

    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model is loaded")

    for owner in ("engine.load.open", "training.load", "ship.merge"):
        monkeypatch.setattr(f"whet.{owner}.load_model", load)


def flip_bit(path: Path, at: float = 0.7) -> None:
    """Turn one bit of a file, in its tensors."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 1
    path.write_bytes(content)


def edit(path: Path, **values: Any) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(found | values), encoding="utf-8")


def not_a_number(path: Path) -> None:
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, path)


def another_model(place: Path) -> None:
    shutil.rmtree(place / "model")
    tiny.save_model(tiny.llama(num_hidden_layers=1, sliding_window=None), place / "model", seed=1)


def another_adapter(place: Path) -> None:
    shutil.rmtree(place / "run" / "adapter")
    shutil.copytree(place / "other" / "adapter", place / "run" / "adapter")


def another_vocabulary(place: Path) -> None:
    path = place / "model" / "tokenizer.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    first, second = list(found["model"]["vocab"])[500:502]
    vocabulary = found["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(found), encoding="utf-8")


ADAPTER: dict[str, Callable[[Path], None]] = {
    "a bit": lambda w: flip_bit(w / "run/adapter/adapter_model.safetensors"),
    "alpha": lambda w: edit(w / "run/adapter/adapter_config.json", lora_alpha=99),
    "rslora": lambda w: edit(w / "run/adapter/adapter_config.json", use_rslora=True),
    "NaN": lambda w: not_a_number(w / "run/adapter/adapter_model.safetensors"),
    "another run's": another_adapter,
    "no weights": lambda w: (w / "run/adapter/adapter_model.safetensors").unlink(),
    "no seal": lambda w: (w / "run/adapter" / SEAL).unlink(),
    "a seal of nonsense": lambda w: (w / "run/adapter" / SEAL).write_text("[1]", encoding="utf-8"),
}
BASE: dict[str, Callable[[Path], None]] = {
    "a bit": lambda w: flip_bit(w / "model/model.safetensors"),
    "another of the same shapes": another_model,
    "window": lambda w: edit(w / "model/config.json", sliding_window=8),
    "no layers": lambda w: edit(w / "model/config.json", num_hidden_layers=0),
    "vocabulary": another_vocabulary,
}
VERBS = {
    "eval": ["eval", "w/run"], "merge": ["merge", "w/run", "out"], "chat": ["chat", "w/run", "--message", "hello"],
    "chat with adapters": ["chat", "w/run", "--message", "hello", "--adapter", "b=w/other"],
    "chat with a folder": ["chat", "w/run/adapter", "--message", "hello"],
    "compose": ["adapters", "compose", "out", "w/run", "w/other"],
}  # fmt: skip


def pairs(faults: dict[str, Any], through: str) -> list[tuple[str, str]]:
    """Every fault with the verb `through`, and every verb with the first fault."""
    return [*((through, fault) for fault in faults), *((verb, next(iter(faults))) for verb in VERBS if verb != through)]


@pytest.mark.parametrize(("verb", "fault"), pairs(ADAPTER, "compose"))
def test_another_adapter_is_named_by_every_verb(
    verb: str, fault: str, place: Path, no_model: None, capsys: pytest.CaptureFixture[str]
) -> None:
    ADAPTER[fault](place)
    assert cli.run(VERBS[verb]) == 2
    said = capsys.readouterr().err
    assert "what was trained is not as it was written" in said or "no adapter" in said
    assert not (place.parent / "out").exists()


@pytest.mark.parametrize(("verb", "fault"), pairs(BASE, "chat"))
def test_another_base_is_named_by_every_verb(
    verb: str, fault: str, place: Path, no_model: None, capsys: pytest.CaptureFixture[str]
) -> None:
    BASE[fault](place)
    assert cli.run(VERBS[verb]) == 2
    said = capsys.readouterr().err
    assert "of the base model is not the one that was trained on" in said or "tokenizer" in said or "golden" in said
    assert not (place.parent / "out").exists()


@pytest.mark.parametrize("fault", BASE)
def test_another_base_is_named_when_a_run_goes_on(fault: str, place: Path, no_model: None) -> None:
    (place / "run" / "finished.json").unlink()
    before = {path: path.read_bytes() for path in (place / "run").rglob("*") if path.is_file()}
    BASE[fault](place)
    with pytest.raises(UserError):
        train(parse(place / "run" / "recipe.yaml"))
    assert {path: path.read_bytes() for path in (place / "run").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("verb", ["eval", "merge"])
def test_other_rows_are_named(verb: str, place: Path, no_model: None, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tiny.rows(9)
    rows[2]["output"] += " more"
    tiny.write_rows(place / "rows.jsonl", rows)
    assert cli.run(VERBS[verb]) == 2
    assert "among the data of this run" in capsys.readouterr().err


def test_a_model_that_moved_is_the_same_model(place: Path) -> None:
    (place / "model").rename(place / "elsewhere")
    recipe = place / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("w/model", "w/elsewhere"), encoding="utf-8")
    edit(place / "elsewhere" / "config.json", transformers_version="9.9")
    assert whet.chat(str(place / "run"), "hello", max_new_tokens=2) is not None


def test_what_is_composed_is_sealed_and_its_base_known(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(VERBS["compose"]) == 0
    assert check_sealed(Path("out")) == check_sealed(place / "run" / "adapter")
    another_model(place)
    assert cli.run(["chat", "out", "--message", "hello"]) == 2
    assert "base model is not the one that was trained on" in capsys.readouterr().err


def test_a_recipe_that_happens_to_stand_above_an_adapter_is_not_its_own(place: Path, tmp_path: Path) -> None:
    """A folder of another name, and one called adapter beside a recipe of somebody else."""
    for name in ("mine", "adapter"):
        above = tmp_path / f"above-{name}"
        shutil.copytree(place / "run" / "adapter", above / name)
        shutil.copy(place / "run" / "recipe.yaml", above / "recipe.yaml")
        text = (above / "recipe.yaml").read_text(encoding="utf-8")
        (above / "recipe.yaml").write_text(text.replace(str(place / "model"), "builtin:tiny"), encoding="utf-8")
        edit(above / name / "adapter_config.json", base_model_name_or_path=str(place / "model"))
        assert base_of(above / name)[0].path == str(place / "model")
    assert base_of(place / "run" / "adapter")[0].path == str(place / "model")
    assert base_of(place / "run")[0].path == str(place / "model")


# adapters of other tools, which have no seal


def foreign(place: Path) -> Path:
    target = place / "foreign"
    shutil.copytree(place / "run" / "adapter", target)
    (target / SEAL).unlink()
    return target


def test_an_adapter_that_is_only_a_pickle_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = foreign(place)
    torch.save(load_file(target / "adapter_model.safetensors"), target / "adapter_model.bin")
    (target / "adapter_model.safetensors").unlink()
    assert cli.run(["chat", str(target), "--message", "hello"]) == 2
    assert "pickle" in capsys.readouterr().err


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_with_numbers_that_are_none_is_refused(
    value: float, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = foreign(place) / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[-1]
    tensors[name][-1, -1] = value
    save_file(tensors, path)
    for words in (["chat", str(path.parent), "--message", "hi"], ["adapters", "compose", "out", str(path.parent)]):
        assert cli.run(words) == 2
        assert name in capsys.readouterr().err


# the record itself


def test_a_difference_is_found_whatever_it_is(tmp_path: Path) -> None:
    for name in ("a", "b/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * 100)
    recorded = files_in(tmp_path)
    assert list(recorded) == ["a", "b/c"]
    assert difference(recorded, tmp_path) is None
    (tmp_path / "more").write_bytes(b"")  # of the user
    assert difference(recorded, tmp_path) is None
    flip_bit(tmp_path / "b/c")
    assert "b/c does not match" in str(difference(recorded, tmp_path))
    (tmp_path / "a").write_bytes(b"x")
    assert "a has 1 bytes" in str(difference(recorded, tmp_path))
    (tmp_path / "a").unlink()
    assert "a is missing" in str(difference(recorded, tmp_path))
    for nonsense in ([], {"a": 3}, None):
        assert "damaged" in str(difference(nonsense, tmp_path))


def test_a_large_file_is_remembered_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("whet.base.content.REMEMBERED_BYTES", 10)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "w").write_bytes(b"x" * 100)
    first = files_in(tmp_path / "d")
    reads: list[Path] = []
    read = __import__("whet.base.content", fromlist=["_read"])._read
    monkeypatch.setattr("whet.base.content._read", lambda path: reads.append(path) or read(path))
    assert files_in(tmp_path / "d") == first
    assert reads == []
    flip_bit(tmp_path / "d" / "w")
    assert files_in(tmp_path / "d") != first
    (tmp_path / "cache" / "hashes.json").write_text('{"a": 1}', encoding="utf-8")
    assert files_in(tmp_path / "d") != first


def test_a_run_of_an_older_whet_is_opened_as_before(place: Path) -> None:
    """No seal is remembered, none is there."""
    (place / "run" / "adapter" / SEAL).unlink()
    finished = json.loads((place / "run" / "finished.json").read_text(encoding="utf-8"))
    del finished["trained_sha256"]
    (place / "run" / "finished.json").write_text(json.dumps(finished), encoding="utf-8")
    assert whet.chat(str(open_run(place / "run").path), "hello", max_new_tokens=2) is not None
