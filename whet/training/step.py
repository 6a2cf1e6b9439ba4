"""One optimiser step: count, forward, backward, clip, look, update.

How much the batches count is known before the first backward, so the loss is exact however the batch is cut. A loss or
a gradient that is not finite stops here, before it enters the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from whet.base.errors import UserError
from whet.data.batch.batches import Batch
from whet.engine.compute.compile import uncompiled
from whet.training.objective.objective import Objective
from whet.training.optim import Optimiser


class NotFinite(Exception):
    """A loss or gradient became NaN or infinite; nothing was updated."""

    def __init__(self, what: str, step: int, rows: Sequence[int]) -> None:
        super().__init__(what)
        self.what, self.step, self.rows = what, step, tuple(rows)


@dataclass(frozen=True)
class Stepped:
    """loss: the summed losses of the step over its worth, without a penalty; grad_norm: before clipping; tokens: real
    ones; targets: learned tokens or rows."""

    loss: float
    grad_norm: float
    tokens: int
    targets: int


class Pending:
    """A step that may still be running; `read` waits for it and raises NotFinite when it came to nothing."""

    def __init__(self, done: Stepped) -> None:
        self._done = done

    def read(self) -> Stepped:
        return self._done


def train_step(
    model: torch.nn.Module,
    optimiser: Optimiser,
    batches: Sequence[Batch],
    objective: Objective[Any, Any],
    *,
    max_grad_norm: float,
    step: int,
    penalty: Callable[[], torch.Tensor | None] | None = None,
) -> Stepped:
    """Forward and backward over the micro-batches, then one update. Raises NotFinite instead of updating.

    penalty: makes what is added to the mean loss of the whole step, once, however many micro-batches there are.
    """
    targets, worth = sum(len(batch.targets) for batch in batches), sum(map(objective.worth, batches))
    optimiser.forget_broken_step()
    objective.before_step()
    total = torch.zeros((), dtype=torch.float32, device=objective.device)
    for batch in objective.placed(step, batches):
        loss = objective.loss(model, batch) / worth
        loss.backward()
        total += loss.detach()
    extra = penalty() if penalty is not None else None
    if extra is not None:
        extra.backward()
    optimiser.collect_gradients()
    parameters = [p for group in optimiser.param_groups for p in group["params"] if p.grad is not None]
    limit = max_grad_norm if max_grad_norm > 0 else float("inf")
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    loss_value, norm_value = torch.stack([total, norm.float().to(total.device)]).tolist()
    rows = [row for batch in batches for row in batch.sources]
    for name, value in (("loss", loss_value), ("gradient norm", norm_value)):
        if value != value or value in (float("inf"), float("-inf")):
            optimiser.zero_grad(set_to_none=True)
            raise NotFinite(name, step, rows)
    try:
        optimiser.step()
    except torch.OutOfMemoryError as error:  # part of the weights may be updated: this step cannot be made again
        raise UserError(
            "the optimiser's moments do not fit in memory beside the model", field="train.optim",
            found=type(optimiser).__name__, expected="a smaller optimiser, or one on the host",
            fix="train.offload_optimizer=true, or train.optim=adamw_8bit; the last checkpoint is intact",
        ) from error  # fmt: skip
    optimiser.zero_grad(set_to_none=True)
    return Stepped(loss_value, norm_value, sum(batch.tokens for batch in batches), targets)


class Steps:
    """Runs steps one by one, each to its end."""

    def __init__(
        self, model: torch.nn.Module, optimiser: Optimiser, objective: Objective[Any, Any],
        max_grad_norm: float, penalty: Callable[[], torch.Tensor | None] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.optimiser, self.objective, self.limit = model, optimiser, objective, max_grad_norm
        self.penalty = penalty

    def step(self, batches: Sequence[Batch], step: int) -> Pending:
        """One optimiser step. Raises NotFinite."""
        return Pending(train_step(
            self.model, self.optimiser, batches, self.objective, max_grad_norm=self.limit, step=step,
            penalty=self.penalty,
        ))  # fmt: skip


@torch.inference_mode()
def held_out_loss(
    model: torch.nn.Module, batches: Sequence[Batch], objective: Objective[Any, Any]
) -> tuple[float, int]:
    """(mean loss, learned tokens or rows) over batches, in evaluation mode; no logits are kept."""
    was_training = model.training
    total, targets, worth = 0.0, 0, 0.0
    try:
        model.eval()
        objective.before_step()
        with uncompiled():
            for batch in batches:
                total += float(objective.loss(model, batch))
                targets, worth = targets + len(batch.targets), worth + objective.worth(batch)
    finally:
        model.train(was_training)
    return total / (worth or 1.0), targets
