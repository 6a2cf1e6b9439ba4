"""Choose the rows of each source that are learned from: weighted mixtures and replay, fixed before training.

A mixture is a list of rows, fixed for the run, and not a draw during it: so its rows can be counted, listed and hashed
before the first step, every step is a function of seed and epoch, and workers and resuming change nothing. The rows of
a source are chosen by a hash of seed and row, so that a larger share contains the rows of a smaller one and the order
of the file changes nothing. A source that is asked for more rows than it has repeats whole before any row comes once
more. Up to four passes teach nearly as well as new data (Muennighoff et al. 2023, arXiv:2305.16264); more are reported.
Gives up: a fresh draw of a large source in every epoch.

Replay mixes general data in, so that the model forgets less of what it could (Scialom et al. 2022, arXiv:2205.12393;
Ibrahim et al. 2024, arXiv:2403.08763): a share of the rows learned from, 10 to 20 % as a rule. Replay rows are added
after the split, so none is ever held out, and a row whose text stands in the held-out data is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from whet.base.errors import UserError
from whet.data.detect.minhash import mixed

MOST_PASSES = 4


@dataclass(frozen=True)
class Mixture:
    """Rows to learn from. source: index of each row's source, int64 [T]; row: its index there, int64 [T]; both in order
    of source and row, a repeated row beside itself.

    available, wanted, used: rows of each source, int64 [S]; notes: sentences for people about sources that repeat or
    fall short.
    """

    source: np.ndarray
    row: np.ndarray
    available: np.ndarray
    wanted: np.ndarray
    used: np.ndarray
    notes: tuple[str, ...]

    def as_dict(self, names: Sequence[str]) -> dict[str, Any]:
        """Plain values for the ledger, by the names of the sources."""
        counts = zip(names, self.available.tolist(), self.wanted.tolist(), self.used.tolist(), strict=True)
        sources = {name: {"available": a, "wanted": w, "used": u} for name, a, w, u in counts}
        return {"sources": sources, "notes": list(self.notes)}


def mixture(
    ids: Sequence[np.ndarray], weights: Sequence[float], *, names: Sequence[str], total: int | None = None,
    repeat: bool = True, seed: int = 0,
) -> Mixture:  # fmt: skip
    """Rows of several sources in proportion to `weights`, which need not sum to 1.

    ids: of each source's rows, uint64 [R], by content. total: rows in the mixture; None: as many as all sources have.
    repeat: a source of too few rows repeats, else it gives what it has and the mixture is smaller by the rest. Raises
    UserError for weights or sources that cannot be mixed.
    """
    _check_weights(ids, weights, names)
    available = np.asarray([len(rows) for rows in ids], np.int64)
    shares = np.asarray(weights, np.float64) / float(np.sum(weights))
    exact = shares * (int(available.sum()) if total is None else total)
    wanted = np.floor(exact + 1e-9).astype(np.int64)
    rest = round(float(exact.sum())) - int(wanted.sum())
    wanted[np.argsort(-(exact - wanted), kind="stable")[:rest]] += 1
    used = wanted if repeat else np.minimum(wanted, available)
    rows = [chosen(part, count, seed) for part, count in zip(ids, used.tolist(), strict=True)]
    source = np.repeat(np.arange(len(ids)), used)
    notes: list[str] = []
    for name, have, want in zip(names, available.tolist(), wanted.tolist(), strict=True):
        if want > have and not repeat:
            notes.append(f"{name} has {have:,} rows of the {want:,} that its weight asks for, so its share is lower")
        elif want > have:
            often = f"each of the {have:,} rows of {name} comes {want / have:.1f} times in an epoch"
            notes.append(often + (", which teaches little new" if want > MOST_PASSES * have else ""))
    return Mixture(source, np.concatenate(rows), available, wanted, used, tuple(notes))


def chosen(ids: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Indices of `count` rows of a source, int64 [count], ascending: those of the lowest hashes of seed and id.

    count above the number of rows: every row as often as it goes in whole, and the rest once more.
    """
    if not count:
        return np.zeros(0, np.int64)
    whole, part = divmod(count, len(ids))
    hashes = mixed(ids.astype(np.uint64) ^ mixed(np.asarray([seed], np.int64).view(np.uint64)))
    lowest = np.lexsort((np.arange(len(ids)), ids, hashes))[:part]
    return np.sort(np.concatenate([np.tile(np.arange(len(ids)), whole), lowest])).astype(np.int64)


@dataclass(frozen=True)
class Replay:
    """Rows of general data to learn from beside one's own. rows: indices, int64, ascending; left_out: rows that were
    not considered because their text is held out; share: of all rows learned from; notes: for people."""

    rows: np.ndarray
    left_out: int
    share: float
    notes: tuple[str, ...]


def replay(
    train_rows: int, ids: np.ndarray, keys: np.ndarray, held_out_keys: np.ndarray, share: float, seed: int = 0
) -> Replay:
    """The rows of general data that make `share` of all rows learned from, none of them twice.

    train_rows: one's own rows to learn from. ids: of the general rows, uint64 [R]; keys, held_out_keys: `text_keys` of
    the general and of all held-out texts. Raises UserError for a share that is none.
    """
    if not 0 <= share < 1:
        raise UserError(
            "replay is a share of the rows learned from", field="data.replay", found=str(share),
            expected="0 or more and below 1; 0.1 to 0.2 as a rule", fix="data.replay=0.1",
        )  # fmt: skip
    wanted = round(train_rows * share / (1 - share))
    allowed = np.flatnonzero(~np.isin(keys, held_out_keys))
    rows = allowed[chosen(ids[allowed], min(wanted, len(allowed)), seed)]
    notes = []
    if wanted > len(allowed):
        notes.append(f"replay asks for {wanted:,} rows of general data and there are {len(allowed):,}")
    if len(allowed) < len(ids):
        notes.append(f"{len(ids) - len(allowed):,} rows of general data are held out as well and are not learned from")
    return Replay(rows, len(ids) - len(allowed), len(rows) / max(1, len(rows) + train_rows), tuple(notes))


def _check_weights(ids: Sequence[np.ndarray], weights: Sequence[float], names: Sequence[str]) -> None:
    assert len(ids) == len(weights) == len(names)
    for name, weight, rows in zip(names, weights, ids, strict=True):
        if not np.isfinite(weight) or weight < 0:
            raise UserError(
                "a source's weight is not a share", field="data.weights", found=f"{name}: {weight}",
                expected="a number from 0 on", fix=f"write 1 for {name}, or take it out",
            )  # fmt: skip
        if weight > 0 and not len(rows):
            raise UserError("a source of the mixture has no rows", file=name, fix=f"take {name} out of the mixture")
    if not sum(weights) > 0:
        raise UserError(
            "no source of the mixture has a weight", field="data.weights", found=", ".join(map(str, weights)),
            expected="one above 0", fix="write 1 for each source",
        )  # fmt: skip
