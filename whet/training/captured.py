"""Whole optimiser steps as CUDA graphs: forward, backward, clipping and update without Python in between.

A small model's step is a thousand short kernels; started one by one from Python they leave the GPU idle nine tenths of
the time. A graph starts them all at once. Each form of batch gets a graph of its own, after two ordinary steps of that
form in which everything that happens once has happened. The values of a step are read while the next one runs, so the
host never stands in the way; a step whose loss or gradient is not finite is skipped on the device, with all after it,
until the host has noticed. Gives up: a little memory per form, and batches must come in a few fixed forms.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch

from whet.base.private import zero_all
from whet.data.batch.batches import Batch
from whet.training.objective.objective import DeviceBatch, Objective
from whet.training.optim import Optimiser
from whet.training.step import NotFinite, Pending, Stepped, train_step

WARM_STEPS = 2


@contextlib.contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """A CUDA stream of its own for the whole of training: capture is not possible on the default one."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


class Replayed(Pending):
    """A replayed step: its loss, norm and verdict are on their way to the host."""

    def __init__(self, values: torch.Tensor, step: int, batches: Sequence[Batch], targets: int) -> None:
        self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        self._host.copy_(values, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()
        self._step, self._batches, self._targets = step, batches, targets

    def read(self) -> Stepped:
        self._event.synchronize()
        loss, norm, bad = self._host.tolist()
        if bad:
            rows = [row for batch in self._batches for row in batch.sources]
            raise NotFinite("gradient norm" if loss == loss and abs(loss) != float("inf") else "loss", self._step, rows)
        return Stepped(loss, norm, sum(batch.tokens for batch in self._batches), self._targets)


class GraphSteps:
    """Runs steps, captured where their forms have been seen often enough, else one by one."""

    def __init__(
        self, model: torch.nn.Module, optimiser: Optimiser, objective: Objective[Any, Any],
        max_grad_norm: float,
    ) -> None:  # fmt: skip
        self.model, self.optimiser, self.objective = model, optimiser, objective
        self.limit = max_grad_norm if max_grad_norm > 0 else float("inf")
        self.parameters = [p for group in optimiser.param_groups for p in group["params"]]
        device = objective.device
        self.total, self.inverse, self.bad = (torch.zeros((), device=device) for _ in range(3))
        self.values = torch.zeros(3, device=device)
        self.pool = torch.cuda.graph_pool_handle()
        self.graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, DeviceBatch | None]] = {}
        self.seen: Counter[Hashable] = Counter()
        self.sums: list[torch.Tensor] = []

    def step(self, batches: Sequence[Batch], step: int) -> Pending:
        """Launch one optimiser step. Raises NotFinite at once only where it runs uncaptured."""
        key = (len(batches) == 1, *sorted({batch.form.tokens for batch in batches if batch.form}))
        ready = all(batch.form is not None for batch in batches)
        self.seen[key] += 1
        if not ready or self.seen[key] <= WARM_STEPS:
            for parameter in self.parameters:
                parameter.grad = None
            return Pending(train_step(
                self.model, self.optimiser, batches, self.objective, max_grad_norm=self.limit, step=step
            ))  # fmt: skip
        targets = sum(len(batch.targets) for batch in batches)
        self.inverse.fill_(1.0 / sum(map(self.objective.worth, batches)))
        for batch in self.objective.placed(step, batches):
            self._replay(batch, whole=len(batches) == 1)
        if len(batches) > 1:
            self._graph("update", None, self._update_sums).replay()
        return Replayed(self.values, step, batches, targets)

    def _replay(self, batch: Batch, *, whole: bool) -> None:
        """Put the batch where the graph reads it, and start the graph."""
        new = self.objective.to_device(batch)
        graph, read = self._captured((whole, batch.form), new, whole)
        for old, value in zip(read.tensors(), new.tensors(), strict=True):
            old.copy_(value)
        graph.replay()

    def _captured(self, key: Hashable, batch: DeviceBatch, whole: bool) -> tuple[torch.cuda.CUDAGraph, DeviceBatch]:
        """The graph of a form, and the batch whose memory it reads: `batch` where it is captured now."""
        if key not in self.graphs:
            if not whole and not self.sums:
                self.sums = [torch.zeros_like(parameter) for parameter in self.parameters]
            for index, parameter in enumerate(self.parameters):
                parameter.grad = None if whole else self.sums[index]
            self._graph(key, batch, lambda: self._whole(batch) if whole else self._part(batch))
        graph, read = self.graphs[key]
        assert read is not None
        return graph, read

    def _graph(self, key: Hashable, batch: DeviceBatch | None, run: Any) -> torch.cuda.CUDAGraph:
        if key not in self.graphs:
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, pool=self.pool, stream=torch.cuda.current_stream()):
                run()
            self.graphs[key] = (graph, batch)
        return self.graphs[key][0]

    def _loss(self, batch: DeviceBatch) -> torch.Tensor:
        self.objective.before_step()
        loss = self.objective.losses(self.model, batch).sum() * self.inverse
        loss.backward()
        return loss.detach()

    def _whole(self, batch: DeviceBatch) -> None:
        """A step of one batch: nothing is added up, so gradients are made and used in place."""
        self._update(self._loss(batch), [p.grad for p in self.parameters if p.grad is not None])

    def _part(self, batch: DeviceBatch) -> None:
        """One of several micro-batches: gradients add up in place."""
        self.total += self._loss(batch)

    def _update_sums(self) -> None:
        self._update(self.total, self.sums)
        zero_all(self.sums)
        self.total.zero_()

    def _update(self, loss: torch.Tensor, grads: list[torch.Tensor]) -> None:
        """Clip and update in one pass: the fused AdamW divides by `grad_scale` and skips where `found_inf` is 1."""
        norm = torch.nn.utils.get_total_norm(grads).float()
        finite = torch.isfinite(norm) & torch.isfinite(loss)
        self.bad.copy_(torch.maximum(self.bad, (~finite).float()))
        scale = ((norm + 1e-6) / self.limit).clamp_min(1.0)
        optimiser: Any = self.optimiser
        optimiser.grad_scale, optimiser.found_inf = scale, self.bad
        optimiser.step()
        optimiser.grad_scale = optimiser.found_inf = None
        self.values.copy_(torch.stack([loss.float(), norm, self.bad]))
