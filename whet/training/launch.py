"""Launching optimiser steps, and what happens when memory runs out: the step is made again in smaller micro-batches.

A loss is a sum over the tokens of the whole step, so a step that is cut otherwise is the same step: same rows, same
order, same update, up to rounding and to dropout's numbers. It is never cut silently. The batch that needs most memory
is tried right after the first step, when the optimiser has its moments, and forgotten: what would fail after five hours
fails in the first minute.

Gives up: a cut lasts for the rest of the process, without CUDA graphs. The trial costs one forward and backward pass,
on a GPU only, and padded tasks have none. Only what comes before the update can be made again.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from whet.base.console import say
from whet.base.errors import UserError
from whet.base.seed import random_state, restore_random_state
from whet.runs import Run
from whet.training.apply import Arranged
from whet.training.captured import GraphSteps
from whet.training.optim import Optimiser
from whet.training.step import Pending, Steps

TRIED_ON = ("cuda",)  # devices whose memory has a hard end


class Launcher:
    """Starts the steps of a run, captured or one by one, and cuts them to what the memory holds.

    name_rows: says where rows of the training data come from, by file and row, for an error.
    """

    def __init__(
        self, arranged: Arranged, optimiser: Optimiser, run: Run, *, total: int, max_grad_norm: float,
        penalty: Callable[[], torch.Tensor | None] | None, name_rows: Callable[[Sequence[int]], str],
    ) -> None:  # fmt: skip
        self.arranged, self.optimiser, self.run = arranged, optimiser, run
        self.total, self.max_grad_norm, self.penalty, self.name_rows = total, max_grad_norm, penalty, name_rows
        self.batches = arranged.batches
        self.is_first = True
        self.steps: GraphSteps | Steps
        if arranged.layout.cuda_graphs:
            self.steps = GraphSteps(arranged.model, optimiser, arranged.objective, max_grad_norm)
        else:
            self.steps = self._plain_steps()

    def launch(self, index: int) -> tuple[Pending, list[Any]]:
        """Start step `index` (from 0); returns it, still running perhaps, and its micro-batches."""
        while True:
            batches = self.batches.step(index)
            start = partial(self.steps.step, batches, index + 1)
            try:
                pending = self.arranged.first(start) if self.is_first else start()
                self.is_first = False
                return pending, batches
            except RuntimeError as error:
                if not ran_out(error):
                    raise
            self.cut(index)  # out of the handler, where the failed step is let go with all it held

    def try_largest(self) -> None:
        """Run the largest batch of the run once, so that memory runs out now or never."""
        while self.arranged.device.type in TRIED_ON:
            index = self.batches.largest_step(self.total)
            if index is None:
                return
            try:
                self._try_out(self.batches.step(index))
                return
            except RuntimeError as error:
                if not ran_out(error):
                    raise
            self.cut(index)

    def cut(self, index: int) -> None:
        """Continue in smaller micro-batches. Raises UserError where a single row does not fit."""
        free_memory(self.optimiser)
        before = self.batches.step(index)
        smaller = self.batches.smaller(self.total)
        if smaller is None:
            largest = max(before, key=lambda batch: batch.ids.size)
            raise no_room(before, self.name_rows(largest.sources[:3]))
        say(f"out of memory in step {index + 1}, with up to {max(b.ids.size for b in before):,} tokens at once: going "
            f"on with {smaller.accumulate} instead of {self.batches.accumulate} forward passes a step; the result is "
            "the same", style="yellow")  # fmt: skip
        self.batches = smaller
        self.steps = self._plain_steps()
        facts = self.run.read("layout.json") or {}
        cuts = [*facts.get("out_of_memory", []), {"step": index + 1, "micro_batches": smaller.accumulate}]
        self.run.write("layout.json", facts | {
            "cut": asdict(smaller.cut), "cuda_graphs": False, "out_of_memory": cuts,
        })  # fmt: skip

    def _plain_steps(self) -> Steps:
        return Steps(self.arranged.model, self.optimiser, self.arranged.objective, self.max_grad_norm, self.penalty)

    def _try_out(self, batches: Sequence[Any]) -> None:
        """Forward and backward pass of the largest of `batches`; nothing is learned, no random number is used up."""
        state, objective = random_state(), self.arranged.objective
        objective.before_step()
        largest = objective.to_device(max(batches, key=lambda batch: batch.ids.size))
        objective.losses(self.arranged.model, largest).sum().backward()
        self.optimiser.zero_grad(set_to_none=True)
        restore_random_state(*state)


def ran_out(error: BaseException | None) -> bool:
    """Tell whether memory ran out: in `error`, or in what it was raised in place of."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


def free_memory(optimiser: Optimiser) -> None:
    """Let go of gradients, and of what torch keeps for later."""
    optimiser.zero_grad(set_to_none=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def no_room(batches: Sequence[Any], where: str) -> UserError:
    """The error for a step that cannot be cut any further. where: the rows of the largest, by file and row."""
    most = max(batch.ids.size for batch in batches)
    return UserError(
        "a forward and backward pass of one row does not fit in memory", file=where, found=f"{most:,} tokens",
        expected="a row that fits by itself",
        fix="train.gradient_checkpointing=true train.activation_offload=true; then a shorter data.max_length",
    )  # fmt: skip
