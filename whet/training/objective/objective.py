"""Objectives: the losses of the tokens or rows of a batch, and how much a batch counts.

The loss of an optimiser step is the sum of the losses of all its micro-batches divided once by the sum of their worths.
Dividing each micro-batch by its own count weighs a token by the company it keeps, and the result depends on how the
batch was cut (transformers #34191). Summing never does.

A new objective is one file in this directory with a subclass of `Objective`, a branch in `choose.py`, and batches of
its own in `data` (`data.batch.batches` says what they must have). It implements

- `worth(batch)`: what the summed loss of the step is divided by, counted on the host before the first forward pass:
  learned tokens by their weights, rows, pairs. It depends on the batch alone, never on the model.
- `to_device(batch)`: the batch as tensors on the device; `tensors()` lists all that differs between two batches. Where
  batches come in fixed forms (`batch.form`), they have one shape for a form: a captured step is replayed on other
  numbers in the same memory.
- `losses(model, on_device)`: float32 [N], one for each token, row or pair, each times its weight, computed inside
  `self.arithmetic.context()`. In captured steps it must not wait for the device (no `.item()`, no boolean indexing).
- `run_once(model)` if the model is called otherwise than with token ids, and `before_step()` if there is more to
  prepare than copies of weights.

A preference loss (DPO, IPO, ORPO, a reward model) is such a file: its batch holds pairs, with the learned tokens of
both sides and their log-probabilities under the reference; `losses` adds up `Head.losses` of each side and returns one
loss for each pair; its worth is the number of pairs. Any such function may follow the losses of a frozen head. With a
trained head, `Head.losses` are read without gradients first, and asked again with its derivatives as `weights`. Gives
up: a statistic of the whole step under the weights of the moment (KTO's reference point) is for `before_step`, which
does not see the batches yet.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch

from whet.data.batch.batches import Batch
from whet.engine.compute.dropout import Draws
from whet.engine.device import Placement

PROBE_TOKENS = 8  # what `run_once` runs the model on


class DeviceBatch(Protocol):
    """A batch on the device."""

    def tensors(self) -> list[torch.Tensor]:
        """Everything that differs between batches of one form, always in the same order."""
        ...


@dataclass(frozen=True)
class Arithmetic:
    """Where and in which type the model is computed. autocast: float32 weights are multiplied in `compute`."""

    device: torch.device
    compute: torch.dtype = torch.float32
    autocast: bool = False

    @classmethod
    def of(cls, placement: Placement, *, float32_trained: bool = False) -> Arithmetic:
        """As placed. float32_trained: trained weights are float32 whatever the storage: shorter types need autocast."""
        autocast = placement.compute != torch.float32 if float32_trained else placement.autocast
        return cls(placement.device, placement.compute, autocast)

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """What forward passes run in."""
        return torch.autocast(self.device.type, self.compute) if self.autocast else contextlib.nullcontext()

    def move(self, array: np.ndarray) -> torch.Tensor:
        """The array on the device; on CUDA without waiting for the copy."""
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)


B = TypeVar("B", bound=Batch)
D = TypeVar("D", bound=DeviceBatch)


@dataclass(frozen=True)
class Objective(ABC, Generic[B, D]):
    """Losses of batches of one kind. refresh: brings copies of weights up to date, e.g. those of LoRA groups; draws:
    what masks of dropout depend on."""

    arithmetic: Arithmetic
    refresh: Callable[[], None] | None = None
    draws: Draws | None = field(default=None, kw_only=True)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.arithmetic.device

    @abstractmethod
    def worth(self, batch: B) -> float:
        """How much the batch counts: what the summed loss of a step is divided by, summed over its micro-batches."""

    @abstractmethod
    def to_device(self, batch: B) -> D:
        """The batch on the device, filled up to its form if it has one."""

    @abstractmethod
    def losses(self, model: torch.nn.Module, on_device: D) -> torch.Tensor:
        """Losses of the batch's tokens, rows or pairs, each times its weight, float32 [N]; with gradients."""

    def loss(self, model: torch.nn.Module, batch: B) -> torch.Tensor:
        """Sum of the losses of a batch that is on the host, a float32 scalar."""
        return self.losses(model, self.to_device(batch)).sum()

    def before_step(self) -> None:
        """Prepare what the forward passes of a step, or of an evaluation, read."""
        if self.refresh is not None:
            self.refresh()

    def place(self, step: int, before: int) -> None:
        """Let the next forward pass belong to optimiser step `step`, behind `before` tokens of it."""
        if self.draws is not None:
            self.draws.place(step, before)

    def placed(self, step: int, batches: Iterable[B]) -> Iterator[B]:
        """The micro-batches of a step in turn, each behind the tokens of those before it; padding counts as tokens."""
        before = 0
        for batch in batches:
            if self.draws is not None:
                self.place(step, before)
                before += batch.tokens if batch.mask is None else batch.ids.size
            yield batch

    def run_once(self, model: torch.nn.Module) -> None:
        """Run the model on a few token ids, for whoever watches its layers."""
        ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device=self.device)
        with self.arithmetic.context():
            model(input_ids=ids, use_cache=False)
