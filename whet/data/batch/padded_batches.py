"""Padded batches of texts with labels and of sources with answers.

Rows of similar length share a step, so little is padded: an epoch's rows are drawn at random, sorted by length within
pools of some fifty steps, cut into steps, and the steps are drawn at random again. Order and cut are a function of seed
and epoch alone and the same however a step is cut into forward passes. Gives up: where length tells the label, the rows
of a step are more alike than chance would have it; pools are small against the data to keep that low.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from whet.data.batch.batches import Batches, Cut, Order
from whet.data.batch.rows import Rows

POOL_STEPS = 50
LEAST_POOLS = 4  # few pools would put the same rows together in every epoch


class _OfAnyShape:
    """Padded batches have too many shapes for forms."""

    @property
    def form(self) -> None:
        return None


@dataclass(frozen=True)
class LabelledBatch(_OfAnyShape):
    """Texts in one forward pass. ids int64 [B, T], zeros where mask bool [B, T] is False; types: token types int64
    [B, T] or None.

    targets: int64 [B], float32 [B] or float32 [B, C]. sources: indices of the rows of data; tokens: real ones.
    """

    ids: np.ndarray
    mask: np.ndarray
    types: np.ndarray | None
    targets: np.ndarray
    sources: tuple[int, ...]
    tokens: int

    def sha256(self) -> str:
        """Hash of the model's inputs and of the targets."""
        return _sha256(self.ids, self.mask, self.types, self.targets)


@dataclass(frozen=True)
class SequencePairBatch(_OfAnyShape):
    """Sources and answers in one forward pass. ids int64 [B, T] and mask bool [B, T] of the sources; answers int64
    [B, S] and answer_mask bool [B, S].

    targets: the answers' tokens end to end, int64 [N], as many as answer_mask is True.
    """

    ids: np.ndarray
    mask: np.ndarray
    answers: np.ndarray
    answer_mask: np.ndarray
    targets: np.ndarray
    sources: tuple[int, ...]
    tokens: int

    def sha256(self) -> str:
        """Hash of the model's inputs and of the targets."""
        return _sha256(self.ids, self.mask, self.answers, self.answer_mask)


class PaddedBatches(Batches[LabelledBatch | SequencePairBatch]):
    """The batches of a run over `rows` with labels or answers."""

    def __init__(self, rows: Rows, *, order: Order, cut: Cut) -> None:
        assert rows.labels is not None or rows.answers is not None
        assert not order.short_first, "every step has rows of similar length"
        super().__init__(
            rows, rows.lengths if rows.answers is None else rows.lengths + rows.answers.lengths, order, cut
        )

    def batch(self, units: list[int]) -> LabelledBatch | SequencePairBatch:
        """The batch of these rows."""
        ids, mask = _padded(self.rows, units)
        if self.rows.answers is not None:
            answers, answer_mask = _padded(self.rows.answers, units)
            tokens = int(mask.sum() + answer_mask.sum())
            return SequencePairBatch(ids, mask, answers, answer_mask, answers[answer_mask], tuple(units), tokens)
        assert self.rows.labels is not None
        types = None
        if self.rows.types is not None:
            types = np.zeros_like(ids)
            types[mask] = np.concatenate([self.rows.types[self.rows.span(row)] for row in units])
        return LabelledBatch(ids, mask, types, self.rows.labels[units], tuple(units), int(mask.sum()))

    def most_tokens(self) -> int:
        """Tokens of the `size` longest rows together, padding included."""
        longest = np.sort(self.lengths)[::-1][: self.size]
        return int(longest[0] * len(longest)) if len(longest) else 0

    def _draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        draw = np.random.default_rng([self.order.seed, epoch])
        order = draw.permutation(len(self.rows))
        together = self.cut.step_size
        pool = together * max(1, min(POOL_STEPS, self.steps_per_epoch // LEAST_POOLS))
        for start in range(0, len(order), pool):
            part = order[start : start + pool]
            order[start : start + pool] = part[np.argsort(self.lengths[part], kind="stable")]
        starts = np.arange(0, len(order), together)
        return order, starts[draw.permutation(len(starts))]


def _padded(rows: Rows, chosen: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """(ids int64 [B, T], mask bool [B, T]) of rows, filled up on the right."""
    pieces = [rows.ids[rows.span(row)] for row in chosen]
    lengths = np.asarray([len(piece) for piece in pieces])
    mask = np.arange(int(lengths.max()))[None] < lengths[:, None]
    ids = np.zeros(mask.shape, np.int64)
    ids[mask] = np.concatenate(pieces)
    return ids, mask


def _sha256(*arrays: np.ndarray | None) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        if array is not None:
            digest.update(f"{array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
