"""The common part of all batches: a deterministic order that depends on the seed and the epoch alone, and its cut.

Step k always takes the same units (rows, or packed groups of rows), so resuming is looking up k, not replaying. An
optimiser step is a window of that order, cut into micro-batches; another cut makes the same step in other forward
passes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from copy import copy
from dataclasses import dataclass, replace
from typing import Generic, Protocol, Self, TypeVar

import numpy as np

from whet.data.batch.forms import Form
from whet.data.batch.rows import Rows


class Batch(Protocol):
    """The rows of one forward pass, as arrays on the host; each objective has a kind of its own."""

    @property
    def ids(self) -> np.ndarray:
        """Token ids that the model reads, int64 [B, T], padding included."""
        ...

    @property
    def mask(self) -> np.ndarray | None:
        """True where `ids` is no padding, bool [B, T]; None: there is none."""
        ...

    @property
    def targets(self) -> np.ndarray:
        """Learned tokens, or labels of rows, [N]."""
        ...

    @property
    def sources(self) -> tuple[int, ...]:
        """Indices of the rows of data in it."""
        ...

    @property
    def tokens(self) -> int:
        """Real tokens, without padding."""
        ...

    @property
    def form(self) -> Form | None:
        """The shape that the batch is filled up to, which a captured step needs; None: it has its own."""
        ...

    def sha256(self) -> str:
        """Hash of the model's inputs and of the targets."""
        ...


B = TypeVar("B", bound=Batch)


@dataclass(frozen=True)
class Order:
    """How the units of an epoch are drawn. short_first: the first epoch goes from short rows to long ones
    (curriculum.py); not for packed rows, which are all of one length."""

    seed: int
    short_first: bool = False


@dataclass(frozen=True)
class Cut:
    """How an optimiser step is cut. size: units in a forward pass; accumulate: forward passes in a step.

    multiple, forms: what flat rows are filled up to: a multiple of tokens, or the next of a few forms.
    """

    size: int
    accumulate: int = 1
    multiple: int = 1
    forms: tuple[Form, ...] = ()

    @property
    def step_size(self) -> int:
        """Units in an optimiser step."""
        return self.size * self.accumulate


class Batches(ABC, Generic[B]):
    """The batches of a run over `rows`. lengths: tokens of each unit, int64 [U]."""

    flat = False  # True: documents stand end to end in one row, without padding

    def __init__(self, rows: Rows, lengths: np.ndarray, order: Order, cut: Cut) -> None:
        self.rows, self.lengths, self.order, self.cut = rows, lengths, order, cut
        self._epoch, self._drawn = -1, (np.zeros(0, np.int64), np.zeros(0, np.int64))

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps that see every unit once."""
        return math.ceil(len(self.lengths) / self.cut.step_size)

    @property
    def size(self) -> int:
        """Units in a forward pass."""
        return self.cut.size

    @property
    def accumulate(self) -> int:
        """Forward passes in an optimiser step."""
        return self.cut.accumulate

    @property
    def forms(self) -> tuple[Form, ...]:
        """The shapes that batches are filled up to, smallest first; (): each has its own."""
        return self.cut.forms

    def step(self, index: int) -> list[B]:
        """The micro-batches of optimiser step `index` (from 0), in order."""
        epoch, number = divmod(index, self.steps_per_epoch)
        if self._epoch != epoch:
            self._epoch, self._drawn = epoch, self._draw(epoch)
        order, starts = self._drawn
        window = order[starts[number] : starts[number] + self.cut.step_size].tolist()
        return [self.batch(window[start : start + self.size]) for start in range(0, len(window), self.size)]

    def all(self) -> list[list[int]]:
        """Every unit once, in groups of `size`, similar lengths together: for evaluation."""
        order = np.argsort(self.lengths, kind="stable").tolist()
        return [order[start : start + self.size] for start in range(0, len(order), self.size)]

    @abstractmethod
    def batch(self, units: list[int]) -> B:
        """The batch of these units."""

    def recut(self, size: int) -> Self:
        """The same steps in micro-batches of `size` units, which must divide a step; forms are left to `filled`."""
        accumulate, rest = divmod(self.cut.step_size, size)
        assert not rest, f"steps of {self.cut.step_size} units in micro-batches of {size}"
        return self.with_cut(replace(self.cut, size=size, accumulate=accumulate, forms=()))

    def smaller(self, steps: int) -> Self | None:
        """The same steps in micro-batches of at most half the size, or None where they hold one unit each.

        steps: of the run, whose batches any forms must hold.
        """
        together = self.cut.step_size
        size = next((n for n in range(self.size // 2, 0, -1) if together % n == 0), None)
        return None if size is None else self.recut(size)

    def largest_step(self, steps: int) -> int | None:
        """The first of `steps` steps with the largest forward pass, if that is larger than all of the first step; None
        too where it cannot be known without making every batch."""
        return None

    def largest_tokens(self, steps: int) -> int:
        """Tokens of the largest forward pass of the first `steps` steps, as far as it is known without making them."""
        return self.most_tokens()

    @abstractmethod
    def most_tokens(self) -> int:
        """Tokens of the largest forward pass that there can be, padding included."""

    @abstractmethod
    def _draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(the units of an epoch in an order, int64 [U]; where in it each step begins, int64 [steps])."""

    def with_cut(self, cut: Cut) -> Self:
        """The same units in the same order, cut otherwise."""
        assert cut.step_size == self.cut.step_size
        other = copy(self)
        other.cut = cut
        return other
