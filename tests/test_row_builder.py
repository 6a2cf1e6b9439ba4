"""Rows are the same however many processes make them, and what is refused is refused with its place."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from whet.base.errors import UserError
from whet.data.batch import row_builder
from whet.data.config import Data
from whet.data.prepare import Prepared, prepare
from whet.engine.config import Model
from whet.engine.load.load import load_tokenizer

ROWS = [
    {"prompt": f"q{n} " + "단어 " * (n * 7 % 40), "completion": "" if n % 50 == 3 else f"a{n} " + "word " * (n % 5)}
    for n in range(260)
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(Model(path="builtin:tiny"))


def prepared(tokenizer: Any, folder: Path, rows: list[dict[str, Any]], **settings: Any) -> Prepared:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return prepare(Data(dataset=str(path), **({"empty": "drop", "val_size": 0.2} | settings)), tokenizer, 256)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_first_row_that_is_refused_is_named(
    processes: int, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever meets it; a later one that another process meets first does not win."""
    monkeypatch.setattr(row_builder, "forks_safely", lambda: True)  # a fresh process takes seconds to import all
    rows = [{"prompt": f"q{n}", "completion": "word " * (300 if n in (40, 41, 900) else 2)} for n in range(1200)]
    with pytest.raises(UserError, match="longer") as caught:
        prepared(tokenizer, tmp_path, rows, num_proc=processes, max_length=128, over_length="error", val_size=0)
    assert caught.value.row == 41
    assert caught.value.file == str(tmp_path / "rows.jsonl")
    assert caught.value.fix.startswith("data.max_length=")


def test_a_complaint_travels_whole() -> None:
    said = UserError("what", "do this", file="f", row=3, field="a.b", found="x", expected="y")
    assert pickle.loads(pickle.dumps(said)).as_dict() == said.as_dict()  # noqa: S301 (what processes do)
    assert pickle.loads(pickle.dumps(UserError(problem="what"))).problem == "what"  # noqa: S301


@pytest.mark.parametrize(("rows", "cores", "forks", "expected"), [
    (100, 8, True, 1), (40_000, 8, True, 2), (1_000_000, 8, True, 8), (1_000_000, 8, False, 1),
])  # fmt: skip
def test_as_many_processes_as_pay(
    rows: int, cores: int, forks: bool, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_builder.os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr(row_builder, "forks_safely", lambda: forks)
    assert row_builder.usual_processes(rows) == expected


@pytest.mark.parametrize("forked", [True, False])
def test_two_processes_build_what_one_builds(
    forked: bool, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forked or fresh: ids, marks, order, held-out rows, and every count of the ledger, with rows dropped and cut."""
    settings = {"max_length": 64, "over_length": "truncate_prompt"}
    monkeypatch.setattr(row_builder, "forks_safely", lambda: forked)
    monkeypatch.setattr(row_builder, "CHUNK", 17)
    alone = prepared(tokenizer, tmp_path, ROWS, num_proc=1, **settings)
    found = prepared(tokenizer, tmp_path, ROWS, num_proc=2, **settings)
    for name in ("train", "evaluation"):
        one, other = getattr(alone, name), getattr(found, name)
        for part in ("ids", "learned", "starts", "sources"):
            assert np.array_equal(getattr(one, part), getattr(other, part)), part
    assert alone.ledger.dropped
    assert alone.ledger.tokens_lost
    assert alone.ledger.as_dict() == found.ledger.as_dict()


def test_small_data_gets_no_process(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any, **__: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(row_builder, "ProcessPoolExecutor", none)
    assert len(prepared(tokenizer, tmp_path, ROWS).train)
    with pytest.raises(AssertionError, match="process was started"):
        prepared(tokenizer, tmp_path, ROWS, num_proc=2)


def _dies(*_: Any) -> None:
    os._exit(3)


def test_a_process_that_dies_is_said(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_builder, "forks_safely", lambda: True)
    monkeypatch.setattr(row_builder, "_build_chunk", _dies)
    with pytest.raises(UserError, match="ended before its work") as caught:
        prepared(tokenizer, tmp_path, ROWS, num_proc=2)
    assert caught.value.field == "data.num_proc"


def test_few_chunks_are_held_at_a_time(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows there are: a chunk is let go before the next but one is made."""
    import weakref

    alive: list[Any] = []
    most = 0
    build = row_builder.RowBuilder.build

    def watched(self: row_builder.RowBuilder, examples: Any) -> Any:
        nonlocal most
        built = build(self, examples)
        alive.append(weakref.ref(built.ids))
        most = max(most, sum(ref() is not None for ref in alive))
        return built

    monkeypatch.setattr(row_builder, "CHUNK", 10)
    monkeypatch.setattr(row_builder.RowBuilder, "build", watched)
    prepared(tokenizer, tmp_path, ROWS)
    assert len(alive) >= 20
    assert most <= 2
