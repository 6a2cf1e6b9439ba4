"""The held-out rows during training: their loss after a number of steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from whet.base.console import say
from whet.base.errors import UserError
from whet.base.out_of_memory import CLOSE_OTHERS, ran_out
from whet.data.batch.make import make_batches
from whet.engine.memory.scarce import forget_frames, free_text, let_go
from whet.planning.phases import held_out_cut
from whet.training.objective.objective import Objective
from whet.training.setup import Ready
from whet.training.step import held_out_loss

MAX_TOKENS = 500_000


class HeldOut:
    """Held-out rows in batches of similar length, up to a bound on their tokens; each row stands alone.

    groups: the units of each batch; make: the batch of some units. Where memory runs out, batches have half as many
    rows, for good: a loss is always that of one size, and what it is a mean over is the same.
    """

    def __init__(self, groups: Sequence[list[int]], make: Callable[[list[int]], Any], run: str) -> None:
        self.groups, self.make, self.run = list(groups), make, run
        self.batches: Sequence[Any] = [make(units) for units in self.groups]

    def measure(
        self, model: torch.nn.Module, objective: Objective, step: int, release: Callable[[], bool] = lambda: False
    ) -> tuple[float, int]:
        """(mean loss, learned tokens) after step `step`. release: gives up memory for one row that does not fit, and
        tells whether it did. Raises UserError for a loss that is not finite, and for a row that does not fit."""
        while True:
            try:
                loss, targets = held_out_loss(model, self.batches, objective)
                break
            except (RuntimeError, MemoryError) as error:
                if not ran_out(error):
                    raise
                forget_frames(error)
            let_go()
            if not self._halve() and not release():
                raise self._no_room(objective.device)
        if not math.isfinite(loss):
            raise UserError(
                f"the held-out loss after step {step} is not finite", file=self.run, found=str(loss),
                expected="a finite number",
                fix="lower train.learning_rate, or base.compute=fp32; look at the held-out rows",
            )  # fmt: skip
        return loss, targets

    def _halve(self) -> bool:
        """Go on with half as many rows in a batch; False where each has one already."""
        most = max(map(len, self.groups))
        if most == 1:
            return False
        size = (most + 1) // 2
        pieces = [units[start : start + size] for units in self.groups for start in range(0, len(units), size)]
        self.groups, self.batches = pieces, [self.make(units) for units in pieces]
        say(f"out of memory: the held-out loss is computed with {size} rows together", style="yellow")
        return True

    def _no_room(self, device: torch.device) -> UserError:
        longest = max(batch.ids.size for batch in self.batches)
        return UserError(
            "the loss of one held-out row does not fit in memory", file=self.run,
            found=f"{longest:,} tokens; {free_text(device)}", expected=f"rows of about {max(1, longest // 2):,} tokens",
            fix=f"a shorter data.max_length, or data.val_size=0; or {CLOSE_OTHERS}",
        )  # fmt: skip


def held_out_of(ready: Ready) -> HeldOut:
    """The held-out rows of a run; without any, no batches."""
    rows, recipe, run = ready.prepared.evaluation, ready.recipe, str(ready.run.path)
    if not len(rows):
        return HeldOut([], list, run)
    chosen, tokens = [], 0
    batches = make_batches(rows, recipe.data, seed=0, cut=held_out_cut(recipe.train))
    for units in batches.all():
        tokens += int(rows.lengths[units].sum())
        if tokens > MAX_TOKENS:
            break
        chosen.append(units)
    return HeldOut(chosen, batches.batch, run)
