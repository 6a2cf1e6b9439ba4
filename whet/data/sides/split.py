"""Split rows into sides by a hash of the row, so that a row never changes side.

Adding rows, reordering the file or training on another machine moves no row from one side to the other, and a row that
occurs twice is on one side only. Two settings bend that rule, each by as little as it can:

- groups (a column, or clusters of near duplicates): the group is hashed in place of the row, so paraphrases, or the
  answers of one customer, stay together. A group of more rows than are to be held out stays in training.
- strata (labels): each label gives its share, within one row. New rows may then move rows at the border of a share, at
  most about as many as are new; order still changes nothing, and each label keeps a row to learn from.

Validation takes the lowest hashes and test the highest, so one can be asked for later without moving the other. Gives
up: exact shares where they are below 1 and no strata are asked for; a hash gives 5 % only on average.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from whet.base.errors import UserError

TRAIN, VALIDATION, TEST = 0, 1, 2


def held_out(ids: Sequence[str], val_size: float) -> list[bool]:
    """True for each row that is held out. val_size < 1: a share; >= 1: so many rows, those of the lowest hashes."""
    return (split(positions_of(ids), val_size) == VALIDATION).tolist()


def positions_of(names: Iterable[str] | np.ndarray) -> np.ndarray:
    """The position of each name between 0 and 2**64, by its hash, uint64 [R]. A uint64 array stands for ids of 16 hex
    digits."""
    if isinstance(names, np.ndarray):
        names = (f"{value:016x}" for value in names.astype(np.uint64).tolist())
    return np.fromiter(
        (int.from_bytes(hashlib.sha256(f"split:{name}".encode()).digest()[:8], "big") for name in names), np.uint64
    )


def cluster_positions(ids: np.ndarray, first: np.ndarray) -> np.ndarray:
    """One position for all rows of a cluster, that of its lowest id, uint64 [R].

    ids: uint64 [R], of content; first: of `Duplicates`, int64 [R]. The order of rows changes nothing, a row that is
    alone has the position that it always had, and a new row moves at most the cluster that it joins.
    """
    lowest = np.full(len(ids), np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(lowest, first, ids)
    unique, inverse = np.unique(lowest[first], return_inverse=True)
    return positions_of(unique)[inverse]


def split(
    positions: np.ndarray, val_size: float, test_size: float = 0, *, groups: np.ndarray | None = None,
    strata: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """The side of each row, int8 [R]: TRAIN, VALIDATION or TEST.

    positions: `positions_of` the rows' ids, uint64 [R]. val_size, test_size: a share below 1, a number of rows from 1
    on. groups: `positions_of` their names or `cluster_positions`, uint64 [R], equal for rows that stay together.
    strata: integers [R], of the labels. Raises UserError where nothing would be left to train on.
    """
    for name, size in (("val_size", val_size), ("test_size", test_size)):
        if size >= 1 and not float(size).is_integer():
            raise UserError(
                f"from 1 on, {name} is a number of rows", field=f"data.{name}", found=str(size),
                expected="a share below 1, or a whole number", fix=f"data.{name}={round(size)}",
            )  # fmt: skip
    rows = len(positions)
    shares = sum(size for size in (val_size, test_size) if size < 1)
    if test_size > 0 and (shares >= 1 or _count(val_size, rows) + _count(test_size, rows) >= rows > 0):
        raise UserError(
            "validation and test together leave no row to train on", field="data.test_size",
            found=f"{val_size} and {test_size} of {rows} rows", expected="less than all rows together",
            fix="lower data.test_size or data.val_size",
        )  # fmt: skip
    units = positions if groups is None else groups
    if strata is not None or (groups is not None and max(val_size, test_size) >= 1):
        return _by_rank(units, np.zeros(rows, np.int64) if strata is None else strata, val_size, test_size)
    sides = np.zeros(rows, np.int8)
    small = np.ones(rows, bool) if groups is None else None
    for side, size, ranks in ((TEST, test_size, ~units), (VALIDATION, val_size, units)):
        fits = small if small is not None else _rows_of(units) <= max(1, _count(size, rows))
        sides[_lowest(ranks, size) & fits] = side
    return sides


def strata_of(labels: Iterable[object]) -> np.ndarray:
    """A number for each row's label, int64 [R], whatever kind of value the labels are. Rows of equal label share it."""
    written = [repr(label) for label in labels]
    return np.unique(np.asarray(written, dtype=object), return_inverse=True)[1] if written else np.zeros(0, np.int64)


def _lowest(positions: np.ndarray, size: float) -> np.ndarray:
    """True for the rows of a share, or of so many distinct positions, bool [R]."""
    if size <= 0 or not len(positions):
        return np.zeros(len(positions), bool)
    if size < 1:
        return positions.astype(np.float64) * 2.0**-64 < size
    ranked = np.unique(positions)
    return positions <= ranked[min(int(size), len(ranked)) - 1]


def _by_rank(units: np.ndarray, strata: np.ndarray, val_size: float, test_size: float) -> np.ndarray:
    """Sides by rank within each label: rows of a unit stay together, and a unit counts for its most frequent label."""
    names, unit_of, sizes = np.unique(units, return_inverse=True, return_counts=True)
    labels, kinds = np.unique(strata, return_inverse=True)
    coded, votes = np.unique(unit_of * len(labels) + kinds, return_counts=True)
    order = np.lexsort((coded % max(1, len(labels)), -votes, coded // max(1, len(labels))))
    firsts = np.unique(coded[order] // max(1, len(labels)), return_index=True)[1]
    label = coded[order][firsts] % max(1, len(labels))
    rows_of_label = np.bincount(label, sizes, len(labels)).astype(np.int64)
    left = np.maximum(rows_of_label - 1, 0)
    sides = np.zeros(len(names), np.int8)
    for side, size, ranks in ((VALIDATION, val_size, names), (TEST, test_size, ~names)):
        quota = _quotas(_count(size, len(units)), rows_of_label, left)
        sides[_taken(ranks, label, np.where(sides == TRAIN, sizes, 0), quota, left, sizes)] = side
        left = left - np.bincount(label, np.where(sides == side, sizes, 0), len(labels)).astype(np.int64)
        left = np.maximum(left, 0)
    return sides[unit_of]


def _taken(
    ranks: np.ndarray, label: np.ndarray, free: np.ndarray, quota: np.ndarray, most: np.ndarray,
    sizes: np.ndarray
) -> np.ndarray:  # fmt: skip
    """The units of lowest rank in each label whose rows fill its quota, as indices. free: rows, 0 where it is taken.

    A unit that more than half lies over the quota is left out; so is one that is larger than the quota. most: rows that
    a label may give at all.
    """
    order = np.lexsort((ranks, label))
    usable = np.where(free[order] <= quota[label[order]], free[order], 0)
    reached = np.cumsum(usable)
    starts = np.searchsorted(label[order], np.arange(len(quota)))
    before = np.concatenate([[0], reached])[starts]
    reached = reached - before[label[order]]
    inside = (2 * reached - usable <= 2 * quota[label[order]]) & (reached <= most[label[order]])
    return order[inside & (usable > 0) & (usable == sizes[order])]


def _quotas(total: int, rows: np.ndarray, most: np.ndarray) -> np.ndarray:
    """Rows that each label gives, int64 [L]: its share of `total` rounded down, then up by largest remainder."""
    everything = int(rows.sum())
    if not everything or not total:
        return np.zeros(len(rows), np.int64)
    given = np.minimum(total * rows // everything, most)
    order = np.lexsort((np.arange(len(rows)), -(total * rows % everything)))
    order = order[(given < most)[order]][: max(0, total - int(given.sum()))]
    given[order] += 1
    return given


def _count(size: float, rows: int) -> int:
    return int(size) if size >= 1 else round(size * rows)


def _rows_of(units: np.ndarray) -> np.ndarray:
    """Rows in the unit of each row, int64 [R]."""
    _, inverse, counts = np.unique(units, return_inverse=True, return_counts=True)
    return counts[inverse]
