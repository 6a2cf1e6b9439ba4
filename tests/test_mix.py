"""Mixtures and replay: shares right, decided by content, never held out; short rows first, and resumable."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from whet.base.errors import UserError
from whet.data.batch.batches import Cut, Order
from whet.data.batch.curriculum import PARTS, short_first
from whet.data.batch.rows import Rows
from whet.data.batch.text_batches import TextBatches
from whet.data.sides.mix import chosen, mixture, replay


def ids_of(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << 64, count, dtype=np.uint64)


@pytest.mark.parametrize("weights", [(1, 1, 1), (0.7, 0.2, 0.1), (5, 0, 2), (1e-3, 1e-3, 2e-3)])
@pytest.mark.parametrize("total", [None, 1, 97, 1000])
def test_shares_are_the_weights(weights: tuple[float, ...], total: int | None) -> None:
    ids = [ids_of(count, count) for count in (300, 40, 7)]
    made = mixture(ids, weights, names=("a", "b", "c"), total=total)
    rows = 347 if total is None else total
    assert len(made.row) == len(made.source) == rows == made.used.sum()
    for source, weight in enumerate(weights):
        count = int((made.source == source).sum())
        assert abs(count - rows * weight / sum(weights)) < 1
        times = np.bincount(made.row[made.source == source], minlength=len(ids[source]))
        assert times.max() - times.min() <= 1, "no row comes twice more often than another"


def test_a_source_that_is_too_small_repeats_or_falls_short_and_it_is_said() -> None:
    ids = [ids_of(90, 0), ids_of(10, 1)]
    made = mixture(ids, (1, 1), names=("large", "small"))
    assert made.used.tolist() == [50, 50]
    assert len(made.notes) == 1
    assert "10 rows of small comes 5.0 times" in made.notes[0]
    assert "little new" in made.notes[0]
    short = mixture(ids, (1, 1), names=("large", "small"), repeat=False)
    assert short.used.tolist() == [50, 10]
    assert "10 rows of the 50" in short.notes[0]
    assert mixture(ids, (9, 1), names=("large", "small")).notes == ()
    assert short.as_dict(("large", "small"))["sources"]["small"] == {"available": 10, "wanted": 50, "used": 10}


def test_which_rows_are_used_is_decided_by_content_and_seed() -> None:
    ids = ids_of(500, 2)
    order = np.random.default_rng(0).permutation(500)
    wanted = set(ids[chosen(ids, 120, 7)].tolist())
    assert wanted == set(ids[order][chosen(ids[order], 120, 7)].tolist()), "not by the order of the file"
    assert wanted < set(ids[chosen(ids, 200, 7)].tolist()), "a larger share keeps the rows of a smaller one"
    assert wanted != set(ids[chosen(ids, 120, 8)].tolist())
    twice = Counter(chosen(ids, 620, 7).tolist())
    assert set(twice.values()) == {1, 2}
    assert {int(ids[row]) for row, times in twice.items() if times == 2} == wanted
    assert abs(chosen(ids, 250, 7).mean() - 250) < 25, "from everywhere in the file"
    assert chosen(ids[:0], 0, 7).tolist() == []


def test_the_same_rows_on_every_machine_and_in_every_version() -> None:
    assert chosen(np.arange(40, dtype=np.uint64), 5, 3).tolist() == [12, 14, 22, 33, 35]


@pytest.mark.parametrize("share", [0.1, 0.15, 0.2, 0.5])
def test_replay_is_its_share_and_never_held_out(share: float) -> None:
    ids = ids_of(2000, 4)
    held = ids[::3]
    made = replay(900, ids, ids, held, share, seed=1)
    assert abs(len(made.rows) / (900 + len(made.rows)) - share) < 1e-3
    assert abs(made.share - share) < 1e-3
    assert not np.isin(ids[made.rows], held).any()
    assert np.isin(ids[replay(900, ids, ids, held[:0], share, seed=1).rows], held).any(), "the check can fail"
    assert len(np.unique(made.rows)) == len(made.rows)
    assert made.left_out == len(held)
    assert any("held out" in note for note in made.notes)


def test_replay_off_and_short_of_rows() -> None:
    ids = ids_of(10, 5)
    assert replay(900, ids, ids, ids[:0], 0).rows.tolist() == []
    made = replay(900, ids, ids, ids[:0], 0.2)
    assert len(made.rows) == 10
    assert "225" in made.notes[0]


@pytest.mark.parametrize("share", [1, -0.1, 15, float("nan")])
def test_a_replay_that_is_no_share_is_refused(share: float) -> None:
    with pytest.raises(UserError, match=r"data\.replay"):
        replay(10, ids_of(3, 0), ids_of(3, 0), ids_of(0, 0), share)


@pytest.mark.parametrize("weights", [(0, 0), (-1, 2), (float("nan"), 1), (float("inf"), 1)])
def test_weights_that_cannot_be_mixed_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match="weight"):
        mixture([ids_of(3, 0), ids_of(3, 1)], weights, names=("a", "b"))
    with pytest.raises(UserError, match="no rows"):
        mixture([ids_of(3, 0), ids_of(0, 1)], (1, 1), names=("a", "b"))


def rows_of(lengths: np.ndarray) -> Rows:
    return Rows.gather((n, np.full(size, n, np.int32), np.ones(size, bool)) for n, size in enumerate(lengths.tolist()))


def test_short_rows_come_first_in_the_first_epoch_only() -> None:
    lengths = np.random.default_rng(0).integers(2, 90, 203)
    made = {
        flag: TextBatches(rows_of(lengths), flat=True, order=Order(3, short_first=flag), cut=Cut(4, 2))
        for flag in (False, True)
    }
    steps = made[True].steps_per_epoch

    def epoch(batches: TextBatches, number: int) -> list[int]:
        return [
            row for step in range(number * steps, (number + 1) * steps) for b in batches.step(step) for row in b.sources
        ]

    first = epoch(made[True], 0)
    assert sorted(first) == list(range(203)), "every row once"
    means = [lengths[part].mean() for part in np.array_split(np.asarray(first), PARTS)]
    assert all(one < other for one, other in pairwise(means))
    plain = [lengths[part].mean() for part in np.array_split(np.asarray(epoch(made[False], 0)), PARTS)]
    assert not all(one < other for one, other in pairwise(plain)), "the check can fail"
    assert lengths[first].tolist() != sorted(lengths.tolist()), "random within a part"
    assert epoch(made[True], 1) == epoch(made[False], 1), "later epochs are random as ever"


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_short_rows_come_first_however_a_step_is_cut(size: int) -> None:
    lengths = np.random.default_rng(2).integers(2, 90, 61)
    batches = TextBatches(rows_of(lengths), flat=True, order=Order(3, short_first=True), cut=Cut(4, 2))
    other = batches.recut(size).filled(2 * batches.steps_per_epoch, most_forms=2)
    assert (other.size, other.accumulate) == (size, 8 // size)
    for step in range(2 * batches.steps_per_epoch):
        before, after = ([row for batch in made.step(step) for row in batch.sources] for made in (batches, other))
        assert before == after


def test_a_run_whose_short_rows_come_first_is_trained(recipe: Any) -> None:
    from whet.training.run import train

    lines = train(recipe(data__order="short_first", train__max_steps=6, train__per_device_train_batch_size=4)).lines(
        "metrics.jsonl"
    )
    tokens = np.diff([0, *(line["tokens"] for line in lines if line["kind"] == "train")])
    assert len(tokens) == 6
    assert tokens[-1] > 2 * tokens[0]


def test_a_step_is_looked_up_whatever_came_before() -> None:
    rows = rows_of(np.random.default_rng(1).integers(2, 50, 61))
    whole = TextBatches(rows, flat=True, order=Order(5, short_first=True), cut=Cut(2, 3))
    hashes = [[batch.sha256() for batch in whole.step(step)] for step in range(2 * whole.steps_per_epoch)]
    for step in (len(hashes) - 1, 3, 0, whole.steps_per_epoch):
        fresh = TextBatches(rows, flat=True, order=Order(5, short_first=True), cut=Cut(2, 3))
        assert [batch.sha256() for batch in fresh.step(step)] == hashes[step]


def test_short_first_is_a_permutation_of_its_order() -> None:
    for count in (0, 1, 5, 10, 11, 100):
        order = np.random.default_rng(count).permutation(count)
        lengths = np.random.default_rng(count + 1).integers(1, 9, count)
        assert sorted(short_first(order, lengths).tolist()) == list(range(count))
