"""Examples on disk are the examples that were put there, in every order and selection."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from whet.data.batch import store as module
from whet.data.batch.store import Examples, Store, opened, stored
from whet.data.example import Example, Message


def examples(count: int) -> list[Example]:
    """Unequal sizes, some of several bytes a character."""
    found = []
    for index in range(count):
        text = f"{index} " + "가나다 ☀️\u2028\n" * (index * 7 % 23)
        messages = (Message("user", text), Message("assistant", f"답 {index}"))
        found.append(Example(f"{index * 2654435761 % 2**64:016x}", messages, None, "rows.jsonl", index + 1))
    return found


@pytest.mark.parametrize("together", [1, 300, 1 << 20])
def test_what_goes_in_comes_out(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOGETHER_BYTES", together)
    given = examples(200)
    found = stored(given)
    assert len(found) == 200
    assert list(found) == given
    assert [found[index] for index in (0, 7, 199, -1)] == [given[index] for index in (0, 7, 199, -1)]
    assert found.ids.tolist() == [int(example.id, 16) for example in given]


@pytest.mark.parametrize("seed", range(5))
def test_a_selection_keeps_its_order(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that jumps back and forth and takes rows twice, read in blocks of a few rows."""
    monkeypatch.setattr(module, "TOGETHER_BYTES", 700)
    given = examples(60)
    chosen = np.random.default_rng(seed).integers(0, 60, 150)
    taken = stored(given).take(chosen)
    assert list(taken) == [given[index] for index in chosen]
    assert list(taken[10:90:7]) == [given[index] for index in chosen][10:90:7]
    mask = np.zeros(150, bool)
    mask[chosen % 3 == 0] = True
    assert list(taken.take(mask)) == [given[index] for index in chosen[mask]]


def test_none_at_all() -> None:
    empty = stored([])
    assert (len(empty), list(empty), len(empty.ids)) == (0, [], 0)
    assert list(stored(examples(3)).take(np.zeros(3, bool))) == []


def test_a_file_is_opened_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "examples.jsonl")
    for example in examples(30):
        store.add(example)
    arrays = store.finish().take(np.array([3, 1, 29])).arrays()
    assert list(opened(tmp_path / "examples.jsonl", arrays)) == [examples(30)[index] for index in (3, 1, 29)]


def test_rows_in_memory_do_not_grow_with_the_file() -> None:
    """What is held of a row is its place, size and id: 20 bytes, whatever its text."""
    found = stored(examples(2000))
    held = sum(array.nbytes for array in found.arrays().values())
    assert held == 20 * 2000
    assert sys.getsizeof(found) + held < 50_000
    assert isinstance(found[:10], Examples)
