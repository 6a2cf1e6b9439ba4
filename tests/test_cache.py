"""The cache of prepared rows: the same rows at the next start, never those of another state, and no damaged ones."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import task_nets
import tiny

from whet.data import cache, prepare
from whet.data.batch.rows import Rows
from whet.data.config import Data
from whet.data.prepare import Prepared
from whet.engine.load.load import load_tokenizer

Make = Callable[..., Prepared]
CHATS = [{"prompt": f"q{n} " + "word " * (n % 9), "completion": f"답 {n} ☀️"} for n in range(60)]
LABELLED = [{"text": f"text {n} " + "word " * (n % 9), "label": f"class {n % 3}"} for n in range(60)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from whet.engine.config import Model

    return load_tokenizer(Model(path="builtin:tiny"))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that keeps everything."""
    monkeypatch.setenv("WHET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "KEEP_SECONDS", 0.0)
    return tmp_path / "cache" / "data"


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A note of each time that rows are made."""
    notes: list[str] = []
    prepare_anew = prepare._prepare_anew
    monkeypatch.setattr(prepare, "_prepare_anew", lambda *a: notes.append("made") or prepare_anew(*a))
    return notes


def write(place: Path, rows: list[dict[str, Any]]) -> str:
    path = place / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def assert_same(one: Prepared, other: Prepared) -> None:
    def same_rows(a: Rows | None, b: Rows | None) -> None:
        assert (a is None) == (b is None)
        for field in fields(Rows) if a is not None else ():
            x, y = getattr(a, field.name), getattr(b, field.name)
            if isinstance(x, Rows):
                same_rows(x, y)
            else:
                assert (x is None) == (y is None)
                assert x is None or (x.dtype == y.dtype and np.array_equal(x, y))

    same_rows(one.train, other.train)
    same_rows(one.evaluation, other.evaluation)
    assert list(one.train_examples) == list(other.train_examples)
    assert list(one.held_out) == list(other.held_out)
    assert (one.bins, one.max_length, one.decided, one.task) == (
        other.bins,
        other.max_length,
        other.decided,
        other.task,
    )
    assert one.ledger.as_dict() == other.ledger.as_dict()


CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any], tuple[Any, ...], str | None]] = {
    "chat": (CHATS, {"val_size": 0.2}, (), None),
    "chat, packed": (CHATS, {"val_size": 0.2, "packing": True}, (), None),
    "chat, nothing held out, rows dropped": (CHATS, {"val_size": 0, "max_length": 24}, (), None),
    "text, split and packed": ([{"text": "word " * 50}] * 4, {"val_size": 0, "max_length": 32}, (), None),
    "classification": (LABELLED, {"val_size": 0.2}, ("classification",), "Bert"),
    "seq2seq": (CHATS, {"val_size": 0.2}, ("seq2seq", "seq2seq"), "T5"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_second_start_finds_what_the_first_made(
    case: str, root: Path, builds: list[str], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, settings, task, kind = CASES[case]
    used = tokenizer if kind is None else task_nets.tokenizer(kind)
    data = Data(dataset=write(tmp_path, rows), **settings)
    first, second = (prepare.prepare(data, used, 64, *task) for _ in range(2))
    assert builds == ["made"]
    assert len(list(root.iterdir())) == 1
    monkeypatch.setenv("WHET_CACHE", "off")
    fresh = prepare.prepare(data, used, 64, *task)
    assert builds == ["made", "made"]
    for found in (first, second):
        assert_same(found, fresh)


def test_whatever_the_rows_are_made_from_changes_the_name(
    root: Path, builds: list[str], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One change after the other, each on top of the last; every one is made anew, and nothing else is."""
    path = Path(write(tmp_path, CHATS))

    def start(readable: int = 64, **settings: Any) -> int:
        prepare.prepare(Data(dataset=str(path), **settings), tokenizer, readable)
        return len(builds)

    assert [start(), start()] == [1, 1]
    path.write_bytes(path.read_bytes().replace(b"q7 ", b"q8 "))  # one byte
    assert [start(), start()] == [2, 2]
    assert [start(val_size=0.1), start(val_size=0.1)] == [3, 3]
    assert start(max_length=32) == 4
    assert start(readable=48) == 5
    monkeypatch.setattr(tokenizer, "chat_template", tokenizer.chat_template + "{# a remark #}")
    assert [start(), start()] == [6, 6]
    monkeypatch.setattr(cache, "LIBRARIES", (*cache.LIBRARIES, "peft"))
    assert [start(), start()] == [7, 7]
    monkeypatch.setattr(cache, "_code", lambda: "another version of whet")
    assert [start(), start()] == [8, 8]
    tokenizer.add_tokens(["<new>"])
    assert [start(), start()] == [9, 9]


def test_a_file_of_the_same_bytes_elsewhere_is_named_by_its_place(root: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Rows say where they stand, so a copy gets rows of its own."""
    (tmp_path / "copy").mkdir()
    for place in (tmp_path, tmp_path / "copy"):
        found = prepare.prepare(Data(dataset=write(place, CHATS), val_size=0), tokenizer, 64)
        assert found.train_examples[0].file == str(place / "rows.jsonl")


def damage(path: Path, how: str) -> None:
    raw = bytearray(path.read_bytes())
    if how == "one bit":
        raw[len(raw) // 2] ^= 4
        path.write_bytes(raw)
    elif how == "cut short":
        path.write_bytes(raw[: len(raw) * 3 // 4])
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["one bit", "cut short", "gone"])
@pytest.mark.parametrize("file", ["train.ids", "train.learned", "train.starts", "examples.jsonl", "manifest.json"])
def test_a_damaged_entry_is_made_anew(
    file: str, how: str, root: Path, builds: list[str], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Data(dataset=write(tmp_path, CHATS), val_size=0.2)
    with monkeypatch.context() as patch:
        patch.setenv("WHET_CACHE", "off")
        whole = prepare.prepare(data, tokenizer, 64)
    prepare.prepare(data, tokenizer, 64)
    (entry,) = root.iterdir()
    if file == "manifest.json" and how == "one bit":  # a bit of the manifest may be anywhere: take what matters
        place = entry / file
        place.write_text(place.read_text().replace('"max_length": ', '"max_length": 1'))
    else:
        damage(entry / file, how)
    again = prepare.prepare(data, tokenizer, 64)
    assert_same(again, whole)
    assert builds == ["made"] * 3
    prepare.prepare(data, tokenizer, 64)
    assert builds == ["made"] * 3


def test_what_is_made_quickly_is_not_kept(
    root: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "KEEP_SECONDS", 60.0)
    found = prepare.prepare(Data(dataset=write(tmp_path, CHATS), val_size=0.2), tokenizer, 64)
    assert list(root.iterdir()) == []
    assert found.train_examples[0].messages  # files without a name can still be read


@pytest.mark.parametrize("value", ["off", "/proc/nowhere"])
def test_without_a_cache_rows_are_made_each_time(
    value: str, builds: list[str], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "KEEP_SECONDS", 0.0)
    monkeypatch.setenv("WHET_CACHE", value)
    for _ in range(2):
        found = prepare.prepare(Data(dataset=write(tmp_path, CHATS), val_size=0.2), tokenizer, 64)
        assert len(found.train) + len(found.evaluation) == 60
    assert builds == ["made", "made"]


def test_a_row_that_is_refused_leaves_nothing(root: Path, tokenizer: Any, tmp_path: Path) -> None:
    from whet.base.errors import UserError

    with pytest.raises(UserError, match="longer"):
        prepare.prepare(Data(dataset=write(tmp_path, CHATS), max_length=16, over_length="error"), tokenizer, 64)
    assert list(root.iterdir()) == []


def test_what_a_killed_process_left_goes_after_a_day(root: Path, tokenizer: Any, tmp_path: Path) -> None:
    for name, hours in ((".new-old", 30), (".new-young", 1)):
        (root / name).mkdir(parents=True)
        os.utime(root / name, (time.time() - 3600 * hours,) * 2)
    prepare.prepare(Data(dataset=write(tmp_path, CHATS)), tokenizer, 64)
    assert {path.name for path in root.glob(".new-*")} == {".new-young"}


def test_old_entries_give_way(root: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "LARGEST_BYTES", 1)
    for size in (0.1, 0.2, 0.3):
        prepare.prepare(Data(dataset=write(tmp_path, CHATS), val_size=size), tokenizer, 64)
        assert len(list(root.iterdir())) == 1


def test_the_whole_run_is_the_same_with_and_without(
    root: Path, recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from whet import api

    losses = []
    for name, where in (("made", str(root)), ("found", str(root)), ("off", "off")):
        monkeypatch.setenv("WHET_CACHE", where)
        run = api.train_parsed(recipe(name, train__max_steps=3))
        losses.append([line["loss"] for line in run.lines("metrics.jsonl") if "loss" in line])
    assert losses[0] == losses[1] == losses[2]
    assert len(losses[0]) == 3
    assert tiny.BUILTIN.is_dir()
