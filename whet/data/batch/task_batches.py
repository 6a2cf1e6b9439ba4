"""Padded batches of rows with labels and of sources with answers, beside the flat ones of text (`data.batches`).

Rows of similar length share a step, so little is padded: an epoch's rows are drawn at random, sorted by length within
pools of some fifty steps, cut into steps, and the steps are drawn at random again. Order and cut are a function of seed
and epoch alone and the same however a step is cut into forward passes. Gives up: where length tells the label, the rows
of a step are more alike than chance would have it; pools are small against the data to keep that low.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from whet.data.batch.rows import Rows

POOL_STEPS = 50
LEAST_POOLS = 4  # few pools would put the same rows together in every epoch


@dataclass(frozen=True)
class LabelBatch:
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

    @property
    def worth(self) -> float:
        """What the summed loss is divided by."""
        return len(self.targets)

    def sha256(self) -> str:
        """Of what the model is shown and asked."""
        return _sha256(self.ids, self.mask, self.types, self.targets)


@dataclass(frozen=True)
class PairBatch:
    """Sources and answers in one forward pass. ids int64 [B, T] and mask bool [B, T] of the sources; answers int64
    [B, S] and answer_mask bool [B, S].

    targets: the answers' tokens end to end, int64 [N], N as many as answer_mask has places.
    """

    ids: np.ndarray
    mask: np.ndarray
    answers: np.ndarray
    answer_mask: np.ndarray
    targets: np.ndarray
    sources: tuple[int, ...]
    tokens: int

    @property
    def worth(self) -> float:
        """What the summed loss is divided by."""
        return len(self.targets)

    def sha256(self) -> str:
        """Of what the model is shown and asked."""
        return _sha256(self.ids, self.mask, self.answers, self.answer_mask)


class TaskBatches:
    """The batches of a run over `rows`, which have labels or answers. size: rows in a forward pass; accumulate: forward
    passes in a step."""

    flat = False

    def __init__(self, rows: Rows, *, size: int, accumulate: int, seed: int) -> None:
        assert rows.labels is not None or rows.answers is not None
        self.rows, self.size, self.accumulate, self.seed = rows, size, accumulate, seed
        self.lengths = rows.lengths if rows.answers is None else rows.lengths + rows.answers.lengths
        self.steps_per_epoch = math.ceil(len(rows) / (size * accumulate))
        self._order: tuple[int, list[np.ndarray]] = (-1, [])

    def step(self, index: int) -> list[LabelBatch | PairBatch]:
        """The micro-batches of optimiser step `index` (from 0), in order."""
        epoch, place = divmod(index, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, self._draw(epoch))
        window = self._order[1][place].tolist()
        return [self.batch(window[start : start + self.size]) for start in range(0, len(window), self.size)]

    def all(self) -> list[list[int]]:
        """Every row once in groups of `size`, similar lengths together: for evaluation."""
        order = np.argsort(self.lengths, kind="stable").tolist()
        return [order[start : start + self.size] for start in range(0, len(order), self.size)]

    def batch(self, rows: list[int]) -> LabelBatch | PairBatch:
        """The batch of these rows."""
        ids, mask = _padded(self.rows, rows)
        if self.rows.answers is not None:
            answers, answer_mask = _padded(self.rows.answers, rows)
            tokens = int(mask.sum() + answer_mask.sum())
            return PairBatch(ids, mask, answers, answer_mask, answers[answer_mask], tuple(rows), tokens)
        assert self.rows.labels is not None
        types = None
        if self.rows.types is not None:
            types = np.zeros_like(ids)
            types[mask] = np.concatenate([self.rows.types[self.rows.span(row)] for row in rows])
        return LabelBatch(ids, mask, types, self.rows.labels[rows], tuple(rows), int(mask.sum()))

    def largest(self) -> int:
        """Tokens of the largest forward pass there can be, padding included."""
        longest = np.sort(self.lengths)[::-1][: self.size]
        return int(longest[0] * len(longest)) if len(longest) else 0

    def _draw(self, epoch: int) -> list[np.ndarray]:
        """The rows of each step of an epoch."""
        draw = np.random.default_rng([self.seed, epoch])
        order = draw.permutation(len(self.rows))
        together = self.size * self.accumulate
        pool = together * max(1, min(POOL_STEPS, self.steps_per_epoch // LEAST_POOLS))
        windows: list[np.ndarray] = []
        for start in range(0, len(order), pool):
            part = order[start : start + pool]
            part = part[np.argsort(self.lengths[part], kind="stable")]
            windows += [part[first : first + together] for first in range(0, len(part), together)]
        return [windows[place] for place in draw.permutation(len(windows))]


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
