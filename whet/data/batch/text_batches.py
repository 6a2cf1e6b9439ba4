"""Batches of text: documents end to end in one flat row without padding, or padded rows.

Both carry, for each learned token, the position that predicts it, so only those logits are ever computed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from whet.data.batch.batches import Batches, Cut, Order
from whet.data.batch.curriculum import short_first
from whet.data.batch.forms import BatchSizes, Form, choose_forms, fitting
from whet.data.batch.rows import Rows

MULTIPLE = 32  # tokens that flat rows are filled up to where they have no forms: few shapes, so few preparations


@dataclass(frozen=True)
class TextBatch:
    """One forward pass. ids, positions: int64 [B, T] (flat: B = 1).

    bounds: document boundaries of a flat row, else None. targets: learned token ids, int64 [N], predicted at
    (rows, columns), both int64 [N]. sources: indices of the rows of data in it; tokens: real ones. form: what the row
    is filled up to, or None; lengths: tokens of each padded row. weights: factor on each target's loss, float32 [N],
    None: 1 for all.
    """

    ids: np.ndarray
    positions: np.ndarray
    bounds: tuple[int, ...] | None
    rows: np.ndarray
    columns: np.ndarray
    targets: np.ndarray
    sources: tuple[int, ...]
    tokens: int
    form: Form | None = None
    lengths: tuple[int, ...] = ()
    weights: np.ndarray | None = None

    @property
    def mask(self) -> np.ndarray | None:
        """True where a padded row has a token, bool [B, T]; None for a flat row."""
        if self.bounds is not None:
            return None
        return np.arange(self.ids.shape[1])[None] < np.asarray(self.lengths)[:, None]

    def sha256(self) -> str:
        """Hash of the model's inputs and of the targets."""
        digest = hashlib.sha256()
        for array in (self.ids, self.positions, self.targets, self.rows, self.columns):
            digest.update(np.ascontiguousarray(array).tobytes())
        if self.weights is not None:
            digest.update(self.weights.tobytes())
        return digest.hexdigest()


class TextBatches(Batches[TextBatch]):
    """The batches of a run that learns text. bins: packed groups of rows, drawn together; None: each row by itself."""

    def __init__(
        self, rows: Rows, bins: Sequence[Sequence[int]] | None = None, *, flat: bool, order: Order, cut: Cut
    ) -> None:
        assert not order.short_first or bins is None, "packed rows are all of one length"
        self.flat = flat
        self.units = [tuple(unit) for unit in bins] if bins is not None else [(index,) for index in range(len(rows))]
        lengths = rows.lengths
        if bins is not None:
            lengths = np.asarray([lengths[list(unit)].sum() for unit in self.units], np.int64)
        super().__init__(rows, lengths, order, cut)

    def facts(self, steps: int) -> BatchSizes:
        """Sizes of every batch of the first `steps` steps: what forms are chosen from."""
        lengths = self.rows.lengths
        learned = np.add.reduceat(self.rows.learned, self.rows.starts[:-1], dtype=np.int64)
        flat = np.concatenate([np.asarray(unit, np.int64) for unit in self.units])
        starts = np.cumsum([0, *(len(unit) for unit in self.units[:-1])])
        ones = np.ones(len(lengths), np.int64)
        per_unit = BatchSizes.of(iter([(flat, starts)]), BatchSizes(lengths, ones, learned, lengths, lengths))
        epochs = range(math.ceil(steps / self.steps_per_epoch))
        begins = np.arange(0, len(self.units), self.size)
        return BatchSizes.of(((self._draw(epoch)[0], begins) for epoch in epochs), per_unit)

    def filled(self, steps: int, *, most_forms: int = 0) -> Self:
        """The same batches, flat rows filled up: to at most `most_forms` forms that hold the batches of the first
        `steps` steps; 0: to a multiple of MULTIPLE tokens. Padded rows stay as they are."""
        if not self.flat:
            return self
        if not most_forms:
            return self.with_cut(replace(self.cut, multiple=MULTIPLE, forms=()))
        return self.with_cut(replace(self.cut, multiple=1, forms=tuple(choose_forms(self.facts(steps), most_forms))))

    def fewest(self, fits: Callable[[Self], bool], steps: int, *, least_tokens: int) -> Self:
        """The micro-batches of a step as few and large as fit: joined, or cut down to `least_tokens` tokens.

        Where nothing fits they stay as they are, and a memory mode has to help.
        """
        for size in (n for n in range(self.cut.step_size, 0, -1) if self.cut.step_size % n == 0):
            candidate = self.recut(size)
            if size < self.size and candidate.largest_tokens(steps) < least_tokens:
                break
            if fits(candidate):
                return candidate
        return self

    def smaller(self, steps: int) -> Self | None:
        """`Batches.smaller`, filled up again to as many forms as before."""
        less = super().smaller(steps)
        return less if less is None or not self.forms else less.filled(steps, most_forms=len(self.forms))

    def largest_tokens(self, steps: int) -> int:
        """Tokens of the largest forward pass of the first `steps` steps, filling included where there are forms; of
        rows with padding, the most that there can be."""
        if not self.flat:
            return self.most_tokens()
        if self.forms:
            return self.forms[-1].tokens
        return int(self.facts(min(steps, self.steps_per_epoch)).tokens.max())

    def largest_step(self, steps: int) -> int | None:
        """The first of `steps` steps with the largest forward pass, if that is larger than all of the first step."""
        per_epoch = -(-len(self.units) // self.size)
        epochs, more = divmod(steps, self.steps_per_epoch)
        tokens = self.facts(steps).tokens[: epochs * per_epoch + more * self.accumulate]
        largest = int(tokens.argmax())
        step = largest // per_epoch * self.steps_per_epoch + largest % per_epoch // self.accumulate
        first = max(batch.ids.size for batch in self.step(0))
        return step if max(batch.ids.size for batch in self.step(step)) > first else None

    def most_tokens(self) -> int:
        """Tokens of the `size` longest units; with padding, as many as the longest for each."""
        if not self.flat:  # a unit is a row: packed ones are never padded
            return min(self.size, len(self.units)) * int(self.lengths.max())
        return int(np.sort(self.lengths)[::-1][: self.size].sum())

    def batch(self, units: list[int]) -> TextBatch:
        """The batch of these units."""
        rows = tuple(row for unit in units for row in self.units[unit])
        pieces = [self.rows.row(row) for row in rows]
        weights = self._weights(rows)
        if not self.flat:
            return _padded(pieces, rows, weights)
        tokens = sum(len(piece[0]) for piece in pieces)
        form = fitting(self.forms, tokens)
        filler = form.tokens - tokens if form is not None else -tokens % self.cut.multiple
        return _flat(pieces, rows, tokens, filler, form, weights)

    def _draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        order = np.random.default_rng([self.order.seed, epoch]).permutation(len(self.units))
        if self.order.short_first and epoch == 0:
            order = short_first(order, self.lengths)
        return order, np.arange(0, len(self.units), self.cut.step_size)

    def _weights(self, rows: tuple[int, ...]) -> np.ndarray | None:
        """Factors of the targets of these rows, in order."""
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
) -> TextBatch:
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
    return TextBatch(
        ids[None], positions[None], bounds, np.zeros(len(targets), np.int64), targets - 1, ids[targets], rows, tokens,
        form, weights=weights,
    )  # fmt: skip


def _padded(
    pieces: list[tuple[np.ndarray, np.ndarray]], rows: tuple[int, ...], weights: np.ndarray | None
) -> TextBatch:
    longest = max(len(piece[0]) for piece in pieces)
    ids = np.zeros((len(pieces), longest), np.int64)
    learned = np.zeros((len(pieces), longest), bool)
    for index, (row_ids, row_learned) in enumerate(pieces):
        ids[index, : len(row_ids)] = row_ids
        learned[index, : len(row_ids)] = row_learned
    row_index, column = np.nonzero(learned)
    positions = np.broadcast_to(np.arange(longest, dtype=np.int64), ids.shape).copy()
    tokens = sum(len(piece[0]) for piece in pieces)
    lengths = tuple(len(piece[0]) for piece in pieces)
    targets = ids[row_index, column]
    return TextBatch(ids, positions, None, row_index, column - 1, targets, rows, tokens, None, lengths, weights)
