"""Running out of memory: the step is made again in smaller micro-batches, and the largest batch of a run comes early.

A loss is a sum over the tokens of the whole step, so a step that is cut otherwise is the same step: same rows, same
order, same update, up to rounding and to dropout's numbers. It is never cut silently. The batch that needs most memory
is tried right after the first step, when the optimiser has its moments, and forgotten: what would fail after five hours
fails in the first minute.

Gives up: a cut lasts for the rest of the process, without CUDA graphs. The trial costs one forward and backward pass,
on a GPU only, and padded tasks have none. Only what comes before the update can be made again.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch

from whet.base.errors import UserError
from whet.base.seed import random_state, restore_random_state
from whet.training.objective.objective import Objective

TRIED_ON = ("cuda",)  # devices whose memory has a hard end


def ran_out(error: BaseException | None) -> bool:
    """Whether memory ran out: in `error`, or in what it was raised in place of."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


def free_memory(optimiser: torch.optim.Optimizer) -> None:
    """Let go of gradients, and of what torch keeps for later."""
    optimiser.zero_grad(set_to_none=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def try_out(
    model: torch.nn.Module, optimiser: torch.optim.Optimizer, batches: Sequence[Any], objective: Objective[Any, Any]
) -> None:
    """Forward and backward of the largest of `batches`; nothing is learned, and no random number is used up."""
    state = random_state()
    objective.before_step()
    objective.loss(model, max(batches, key=lambda batch: batch.ids.size)).backward()
    optimiser.zero_grad(set_to_none=True)
    restore_random_state(*state)


def no_room(batches: Sequence[Any], where: str) -> UserError:
    """For a step whose micro-batches cannot be cut any further. where: the rows of the largest, by file and row."""
    most = max(batch.ids.size for batch in batches)
    return UserError(
        "a forward and backward pass of one row does not fit in memory", file=where, found=f"{most:,} tokens",
        expected="a row that fits by itself",
        fix="train.gradient_checkpointing=true train.activation_offload=true; then a shorter data.max_length",
    )  # fmt: skip
