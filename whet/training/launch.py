"""Launching optimiser steps, and what happens when memory runs out: the step is made again in smaller micro-batches.

A loss is a sum over the tokens of the whole step, so a step that is cut otherwise is the same step: same rows, same
order, same update, up to rounding; random numbers start where they did. A row that is alone is made again with fewer
activations kept (`training.relief`). It is never done silently. The batch that needs most memory is tried right after
the first step, when the optimiser has its moments, and forgotten: what would fail after five hours fails in the first
minute.

Gives up: a cut lasts for the rest of the process, without CUDA graphs. The trial costs one forward and backward pass,
on a GPU only, and padded tasks have none. Only what comes before the update can be made again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

import torch

from whet.base.console import say
from whet.base.errors import UserError
from whet.base.out_of_memory import ran_out
from whet.base.seed import random_state, restore_random_state
from whet.engine.memory.rerun import put_back, random_state_of
from whet.engine.memory.scarce import forget_frames, let_go, refusing
from whet.training.apply import Arranged
from whet.training.captured import GraphSteps
from whet.training.optim import Optimiser
from whet.training.relief import Relief, mode_entries
from whet.training.step import Pending, Steps

TRIED_ON = ("cuda",)  # devices whose memory has a hard end
T = TypeVar("T")


class Launcher:
    """Starts the steps of a run, captured or one by one, and cuts them to what the memory holds.

    relief: what more can be given up where one row is alone, and who is told of it.
    """

    def __init__(
        self, arranged: Arranged, optimiser: Optimiser, relief: Relief, *, total: int, max_grad_norm: float,
        penalty: Callable[[], torch.Tensor | None] | None = None,
    ) -> None:  # fmt: skip
        self.arranged, self.optimiser, self.relief = arranged, optimiser, relief
        self.total, self.max_grad_norm, self.penalty = total, max_grad_norm, penalty
        self.batches = arranged.batches
        self.is_first = True
        self.steps: GraphSteps | Steps = self._first_steps()

    def launch(self, index: int) -> tuple[Pending, list[Any]]:
        """Start step `index` (from 0); returns it, still running perhaps, and its micro-batches."""
        device = self.arranged.device
        drawn = random_state_of(device)
        while True:
            batches = self.batches.step(index)
            start = partial(self.steps.step, batches, index + 1)
            try:
                pending = self.arranged.first(start) if self.is_first else start()
                self.is_first = False
                return pending, batches
            except (RuntimeError, MemoryError) as error:
                if not ran_out(error):
                    raise
                forget_frames(error)
            put_back(drawn, device)
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
            except (RuntimeError, MemoryError) as error:
                if not ran_out(error):
                    raise
                forget_frames(error)
            self.cut(index)

    def cut(self, index: int) -> None:
        """Continue in smaller micro-batches, or with less kept of each row. Raises UserError where nothing helps."""
        self.release_graphs(again=False)
        free_memory(self.optimiser)
        before = self.batches.step(index)
        smaller = self.batches.smaller(self.total)
        if smaller is None:
            self._keep_less(index, before)
            return
        say(f"out of memory in step {index + 1}, with up to {max(b.ids.size for b in before):,} tokens at once: going "
            f"on with {smaller.accumulate} instead of {self.batches.accumulate} forward passes a step; the result is "
            "the same", style="yellow")  # fmt: skip
        self.batches = smaller
        self.relief.remember(index + 1, {"micro_batches": smaller.accumulate}, {"cut": asdict(smaller.cut)})

    def release_graphs(self, *, again: bool = True) -> bool:
        """Give the memory of captured steps back; returns whether there was any. again: they are captured anew."""
        if not isinstance(self.steps, GraphSteps):
            return False
        self.steps = self._first_steps() if again else self._plain_steps()
        optimiser: Any = self.optimiser  # a capture that failed may have left its factor there
        optimiser.grad_scale = optimiser.found_inf = None
        free_memory(self.optimiser)
        return True

    def with_room(self, work: Callable[[], T], refusal: Callable[[], UserError]) -> T:
        """Do what is no part of a step and may be done twice; once more, without graphs, where memory ran out.

        Raises the UserError `refusal` where that does not help.
        """
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            forget_frames(error)
        self.release_graphs()
        free_memory(self.optimiser)
        with refusing(refusal):
            return work()

    def _keep_less(self, index: int, batches: Sequence[Any]) -> None:
        """Go on with the next leaner memory mode."""
        found = self.relief.next_mode(self.arranged)
        if found is None:
            raise self.relief.refusal(batches)
        self.arranged, words = found
        self.steps = self._plain_steps()
        say(f"out of memory in step {index + 1}, with {max(b.ids.size for b in batches):,} tokens of one row at once: "
            f"going on with {words}; the result is the same", style="yellow")  # fmt: skip
        entries = mode_entries(self.arranged)
        self.relief.remember(index + 1, {"mode": entries["mode"]}, entries)

    def _first_steps(self) -> GraphSteps | Steps:
        """As the layout says."""
        if not self.arranged.layout.cuda_graphs:
            return self._plain_steps()
        return GraphSteps(self.arranged.model, self.optimiser, self.arranged.objective, self.max_grad_norm)

    def _plain_steps(self) -> Steps:
        return Steps(self.arranged.model, self.optimiser, self.arranged.objective, self.max_grad_norm, self.penalty)

    def _try_out(self, batches: Sequence[Any]) -> None:
        """Forward and backward pass of the largest of `batches`; nothing is learned, no random number is used up."""
        state, objective = random_state(), self.arranged.objective
        try:
            objective.before_step()
            largest = objective.to_device(max(batches, key=lambda batch: batch.ids.size))
            objective.losses(self.arranged.model, largest).sum().backward()
        finally:
            self.optimiser.zero_grad(set_to_none=True)
            restore_random_state(*state)


def free_memory(optimiser: Optimiser) -> None:
    """Let go of gradients, and of what torch keeps for later."""
    optimiser.zero_grad(set_to_none=True)
    let_go()
