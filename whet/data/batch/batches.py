"""Rows into batches: a deterministic order that depends on the seed and the epoch alone.

Step k always takes the same rows, so resuming is looking up k, not replaying. A batch is laid out flat (documents end
to end in one row, no padding) or padded; both carry, for each learned token, the place that predicts it, so only those
logits are ever computed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from whet.data.batch.curriculum import short_first
from whet.data.batch.forms import Facts, Form, fitting
from whet.data.batch.rows import Rows


@dataclass(frozen=True)
class Batch:
    """One forward pass. ids, positions: int64 [B, T] (flat: B = 1).

    bounds: document boundaries of a flat row, else None. targets: learned token ids, int64 [N], predicted at
    (rows, places), both int64 [N]. sources: indices of the rows of data in it; tokens: real ones. form: what the row
    is filled up to, or None; lengths: tokens of each padded row. weights: factor on each target's loss, float32 [N],
    None: 1 for all.
    """

    ids: np.ndarray
    positions: np.ndarray
    bounds: tuple[int, ...] | None
    rows: np.ndarray
    places: np.ndarray
    targets: np.ndarray
    sources: tuple[int, ...]
    tokens: int
    form: Form | None = None
    lengths: tuple[int, ...] = ()
    weights: np.ndarray | None = None

    @property
    def worth(self) -> float:
        """What the summed loss is divided by: the targets, each by its weight."""
        return len(self.targets) if self.weights is None else float(self.weights.sum(dtype=np.float64))

    def sha256(self) -> str:
        """Of what the model is shown and asked."""
        digest = hashlib.sha256()
        for array in (self.ids, self.positions, self.targets, self.rows, self.places):
            digest.update(np.ascontiguousarray(array).tobytes())
        if self.weights is not None:
            digest.update(self.weights.tobytes())
        return digest.hexdigest()


class Batches:
    """The batches of a run. units: what is drawn together: single rows, or packed groups of rows.

    multiple, forms: what flat rows are filled up to: a multiple of tokens, or the next of a few forms. by_length: the
    first epoch goes from short rows to long ones (`data.curriculum`), of rows that are not packed.
    """

    def __init__(
        self, rows: Rows, bins: Sequence[Sequence[int]] | None, *, size: int, accumulate: int, flat: bool, seed: int,
        multiple: int = 1, forms: Sequence[Form] = (), by_length: bool = False,
    ) -> None:  # fmt: skip
        assert not by_length or bins is None, "packed rows are all of one length"
        self.rows, self.forms, self.by_length = rows, tuple(forms), by_length
        self.units = [tuple(unit) for unit in bins] if bins is not None else [(index,) for index in range(len(rows))]
        self.size, self.accumulate, self.flat, self.seed, self.multiple = size, accumulate, flat, seed, multiple
        self.steps_per_epoch = math.ceil(len(self.units) / (size * accumulate))
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    def step(self, index: int) -> list[Batch]:
        """The micro-batches of optimiser step `index` (from 0), in order."""
        epoch, place = divmod(index, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, self._draw(epoch))
        window = self._order[1][place * self.size * self.accumulate : (place + 1) * self.size * self.accumulate]
        groups = [window[start : start + self.size] for start in range(0, len(window), self.size)]
        return [self._batch([int(unit) for unit in group]) for group in groups]

    def _draw(self, epoch: int) -> np.ndarray:
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.units))
        return short_first(order, self.rows.lengths) if self.by_length and epoch == 0 else order

    def facts(self, steps: int) -> Facts:
        """Of every batch of the first `steps` steps: what forms are chosen from."""
        lengths = self.rows.lengths
        learned = np.add.reduceat(self.rows.learned, self.rows.starts[:-1], dtype=np.int64)
        flat = np.concatenate([np.asarray(unit, np.int64) for unit in self.units])
        starts = np.cumsum([0, *(len(unit) for unit in self.units[:-1])])
        ones = np.ones(len(lengths), np.int64)
        per_unit = Facts.of(iter([(flat, starts)]), Facts(lengths, ones, learned, lengths, lengths))
        epochs = range(math.ceil(steps / self.steps_per_epoch))
        begins = np.arange(0, len(self.units), self.size)
        return Facts.of(((self._draw(epoch), begins) for epoch in epochs), per_unit)

    def all(self) -> list[list[int]]:
        """Every unit once, in order, in groups of `size`: for evaluation. Similar lengths go together."""
        order = sorted(range(len(self.units)), key=lambda u: (sum(self.rows.lengths[list(self.units[u])]), u))
        return [order[start : start + self.size] for start in range(0, len(order), self.size)]

    def batch(self, units: list[int]) -> Batch:
        """The batch of these units."""
        return self._batch(units)

    def _batch(self, units: list[int]) -> Batch:
        rows = tuple(row for unit in units for row in self.units[unit])
        pieces = [self.rows.row(row) for row in rows]
        weights = self._weights(rows)
        if not self.flat:
            return _padded(pieces, rows, weights)
        tokens = sum(len(piece[0]) for piece in pieces)
        form = fitting(self.forms, tokens)
        filler = form.tokens - tokens if form is not None else -tokens % self.multiple
        return _flat(pieces, rows, tokens, filler, form, weights)

    def _weights(self, rows: tuple[int, ...]) -> np.ndarray | None:
        """Of the targets of these rows, in order."""
        if self.rows.weights is None:
            return None
        spans = [self.rows.span(row) for row in rows]
        return np.concatenate([self.rows.weights[span][self.rows.learned[span]] for span in spans])


def _flat(
    pieces: list[tuple[np.ndarray, np.ndarray]],
    rows: tuple[int, ...],
    tokens: int,
    filler: int,
    form: Form | None,
    weights: np.ndarray | None,
) -> Batch:
    """Documents end to end; documents of zeros fill up, so that few shapes occur and each is prepared once (new shapes
    cost oneDNN half a millisecond a product). They attend to themselves and teach nothing."""
    while filler:
        part = min(filler, form.longest) if form is not None else filler
        pieces = [*pieces, (np.zeros(part, np.int32), np.zeros(part, bool))]
        filler -= part
    ids = np.concatenate([piece[0] for piece in pieces]).astype(np.int64)
    learned = np.concatenate([piece[1] for piece in pieces])
    positions = np.concatenate([np.arange(len(piece[0]), dtype=np.int64) for piece in pieces])
    bounds = tuple(np.cumsum([0, *(len(piece[0]) for piece in pieces)]).tolist())
    targets = np.flatnonzero(learned)
    return Batch(
        ids[None], positions[None], bounds, np.zeros(len(targets), np.int64), targets - 1, ids[targets], rows, tokens,
        form, weights=weights,
    )  # fmt: skip


def _padded(pieces: list[tuple[np.ndarray, np.ndarray]], rows: tuple[int, ...], weights: np.ndarray | None) -> Batch:
    longest = max(len(piece[0]) for piece in pieces)
    ids = np.zeros((len(pieces), longest), np.int64)
    learned = np.zeros((len(pieces), longest), bool)
    for index, (row_ids, row_learned) in enumerate(pieces):
        ids[index, : len(row_ids)] = row_ids
        learned[index, : len(row_ids)] = row_learned
    row_index, place = np.nonzero(learned)
    positions = np.broadcast_to(np.arange(longest, dtype=np.int64), ids.shape).copy()
    tokens = sum(len(piece[0]) for piece in pieces)
    lengths = tuple(len(piece[0]) for piece in pieces)
    targets = ids[row_index, place]
    return Batch(ids, positions, None, row_index, place - 1, targets, rows, tokens, None, lengths, weights)
