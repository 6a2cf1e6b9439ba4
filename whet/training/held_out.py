"""The held-out rows during training: their loss after a number of steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from whet.base.errors import UserError
from whet.data.batch.make import make_batches
from whet.planning.phases import held_out_cut
from whet.training.objective.objective import Objective
from whet.training.setup import Ready
from whet.training.step import held_out_loss

MAX_TOKENS = 500_000


@dataclass(frozen=True)
class HeldOut:
    """Held-out rows in batches of similar length, up to a bound on their tokens; each row stands alone."""

    batches: Sequence[Any]
    run: str

    def measure(self, model: torch.nn.Module, objective: Objective, step: int) -> tuple[float, int]:
        """(mean loss, learned tokens) after step `step`. Raises UserError for a loss that is not finite."""
        loss, targets = held_out_loss(model, self.batches, objective)
        if not math.isfinite(loss):
            raise UserError(
                f"the held-out loss after step {step} is not finite", file=self.run, found=str(loss),
                expected="a finite number",
                fix="lower train.learning_rate, or base.compute=fp32; look at the held-out rows",
            )  # fmt: skip
        return loss, targets


def held_out_of(ready: Ready) -> HeldOut:
    """The held-out rows of a run; without any, no batches."""
    rows, recipe = ready.prepared.evaluation, ready.recipe
    chosen, tokens = [], 0
    if len(rows):
        cut = held_out_cut(recipe.train)
        batches = make_batches(rows, recipe.data, seed=0, cut=cut)
        for units in batches.all():
            tokens += int(rows.lengths[units].sum())
            if tokens > MAX_TOKENS:
                break
            chosen.append(batches.batch(units))
    return HeldOut(chosen, str(ready.run.path))
