"""Who is held out: complete, disjoint, unmoved by order and growth, groups whole, shares right."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest

from whet.base.errors import UserError
from whet.data.detect.duplicates import exact_duplicates, near_duplicates, text_keys
from whet.data.sides.split import TEST, TRAIN, VALIDATION, cluster_positions, held_out, positions_of, split, strata_of

SIZES = [(0.1, 0), (0.05, 0.2), (30, 0), (0.1, 40), (25, 0.1), (20, 40), (0, 0.3)]


def ids_of(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << 64, count, dtype=np.uint64)


def groups_of(rows: int, groups: int, seed: int) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return positions_of(f"group {name}" for name in draw.integers(0, groups, rows))


def test_an_array_of_ids_is_split_as_their_names_are() -> None:
    ids = ids_of(500, 1)
    names = [f"{value:016x}" for value in ids.tolist()]
    for size in (0.1, 7, 0):
        assert held_out(names, size) == (split(positions_of(ids), size) == VALIDATION).tolist()
    place = int.from_bytes(hashlib.sha256(f"split:{names[0]}".encode()).digest()[:8], "big")
    assert int(positions_of(ids[:1])[0]) == place


@pytest.mark.parametrize(("val_size", "test_size"), SIZES)
@pytest.mark.parametrize("kind", ["plain", "strata", "groups", "both"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_order_changes_nothing_and_parts_stay_together(val_size: float, test_size: float, kind: str, seed: int) -> None:
    draw = np.random.default_rng(seed)
    ids = ids_of(600, seed)
    ids[500:] = ids[draw.integers(0, 500, 100)]
    places = positions_of(ids)
    groups = positions_of(ids % np.uint64(97)) if kind in ("groups", "both") else None
    labels = (ids // np.uint64(97) % np.uint64(5)).astype(np.int64) if kind in ("strata", "both") else None
    sides = split(places, val_size, test_size, groups=groups, strata=labels)
    assert set(np.unique(sides)) <= {TRAIN, VALIDATION, TEST}
    order = draw.permutation(len(ids))
    again = split(
        places[order], val_size, test_size, groups=None if groups is None else groups[order],
        strata=None if labels is None else labels[order],
    )  # fmt: skip
    assert np.array_equal(again, sides[order])
    units = places if groups is None else groups
    for unit in np.unique(units):
        assert len(set(sides[units == unit].tolist())) == 1, "no unit is on two sides"
    for side, size in ((VALIDATION, val_size), (TEST, test_size)):
        wanted = size if size >= 1 else size * len(ids)
        slack = 45 if kind == "plain" and size < 1 else 60 if kind == "groups" else 30
        assert abs(int((sides == side).sum()) - wanted) <= slack
        assert ((sides == side).sum() == 0) == (size == 0)


@pytest.mark.parametrize("grouped", [False, True])
def test_growth_moves_no_row(grouped: bool) -> None:
    ids = ids_of(3000, 3)
    groups = groups_of(3000, 400, 4) if grouped else None
    places = positions_of(ids)
    for count in (500, 1000, 2999):
        part = split(places[:count], 0.1, 0.1, groups=None if groups is None else groups[:count])
        assert np.array_equal(part, split(places, 0.1, 0.1, groups=groups)[:count])
    small = split(places, 0.05, 0, groups=groups)
    large = split(places, 0.1, 0.2, groups=groups)
    assert (large[small == VALIDATION] == VALIDATION).all(), "a larger share keeps the rows of a smaller one"


def test_strata_have_equal_shares_within_one_row() -> None:
    draw = np.random.default_rng(0)
    labels = draw.choice(77, 5000, p=(weights := 1.0 / np.arange(1, 78)) / weights.sum())
    places = positions_of(ids_of(5000, 5))
    for val_size, test_size in ((0.05, 0), (0.1, 0.2), (300, 500)):
        sides = split(places, val_size, test_size, strata=labels)
        for side, size in ((VALIDATION, val_size), (TEST, test_size)):
            share = size if size < 1 else size / 5000
            assert (sides == side).sum() == round(share * 5000)
            for label in np.unique(labels):
                rows = labels == label
                assert abs((sides[rows] == side).sum() - share * rows.sum()) <= 1
    plain = split(places, 0.1)
    off = [abs((plain[labels == name] == VALIDATION).sum() - 0.1 * (labels == name).sum()) for name in range(20)]
    assert max(off) > 1, "the check above would see a split without strata"


def test_new_rows_move_few_rows_of_strata() -> None:
    places = positions_of(ids_of(4000, 6))
    labels = np.random.default_rng(1).integers(0, 9, 4000)
    old = split(places[:3900], 0.1, strata=labels[:3900])
    new = split(places, 0.1, strata=labels)[:3900]
    assert (old != new).sum() <= 100 / 5, "about the held-out share of the new rows, twice"


def test_each_label_keeps_a_row_to_learn_from() -> None:
    places = positions_of(ids_of(60, 7))
    labels = np.concatenate([np.zeros(40), np.arange(1, 21)]).astype(np.int64)
    sides = split(places, 0.4, 0.3, strata=labels)
    assert set(labels[sides == TRAIN].tolist()) == set(labels.tolist())
    pairs = split(places, 0.4, strata=labels, groups=groups_of(60, 12, 8))
    assert (pairs == TRAIN).any()


def test_a_group_larger_than_what_is_held_out_stays_in_training() -> None:
    for seed in range(20):
        ids = ids_of(1000, seed)
        groups = positions_of(ids)
        groups[:600] = positions_of([f"large {seed}"])[0]
        for strata in (None, np.zeros(1000, np.int64)):
            sides = split(positions_of(ids), 0.1, 0.1, groups=groups, strata=strata)
            assert (sides[:600] == TRAIN).all()
            assert (sides[600:] != TRAIN).any()


def test_near_duplicates_stay_on_one_side() -> None:
    texts = [f"how do i change the pin of card number {n * 7919 % 10007} in the app" for n in range(40)]
    texts += [
        f"{n * 104729 % 99991} is my {'very ' * (n % 7)}own {n * 7919 % 10007} question {n * 31 % 977}"
        for n in range(400)
    ]
    found = near_duplicates(texts)
    assert len(found.removable) > 20
    ids = text_keys(texts)
    sides = split(positions_of(ids), 0.3, 0.2, groups=cluster_positions(ids, found.first))
    for cluster in found.clusters():
        assert len(set(sides[cluster].tolist())) == 1
    ungrouped = split(positions_of(ids), 0.3, 0.2)
    assert any(len(set(ungrouped[cluster].tolist())) > 1 for cluster in found.clusters()), "the check can fail"
    alone = np.flatnonzero(np.bincount(found.first, minlength=len(texts))[found.first] == 1)
    assert np.array_equal(sides[alone], ungrouped[alone]), "a row that is alone stands where it stood"


def test_places_of_clusters_follow_content_and_not_order() -> None:
    ids = ids_of(50, 9)
    first = exact_duplicates(ids // np.uint64(1 << 61)).first
    order = np.random.default_rng(2).permutation(50)
    again = cluster_positions(ids[order], exact_duplicates(ids[order] // np.uint64(1 << 61)).first)
    assert np.array_equal(again, cluster_positions(ids, first)[order])
    assert len(np.unique(again)) == len(np.unique(first))


def test_labels_of_any_kind_become_strata() -> None:
    labels = ["a", ("a", "b"), 1, "1", True, ("a", "b"), 1.0]
    found = strata_of(labels)
    assert Counter(found.tolist()) == Counter([0, 1, 2, 3, 4, 5, 1]) or len(set(found.tolist())) == 6
    assert found[1] == found[5]
    assert len(strata_of([])) == 0


def test_no_rows() -> None:
    nothing = positions_of([])
    for groups, strata in (
        (None, None),
        (nothing, None),
        (None, np.zeros(0, np.int64)),
        (nothing, np.zeros(0, np.int64)),
    ):
        for sizes in ((0.1, 0), (5, 0), (0.1, 0.1)):
            assert split(nothing, *sizes, groups=groups, strata=strata).tolist() == []
    assert held_out([], 3) == []


@pytest.mark.parametrize(("val_size", "test_size"), [(0.6, 0.5), (60, 40), (1.5, 0), (0, 2.5), (0.5, 60), (0, 100)])
def test_sizes_that_leave_nothing_are_refused(val_size: float, test_size: float) -> None:
    with pytest.raises(UserError, match="size"):
        split(positions_of(ids_of(100, 0)), val_size, test_size)
