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
from whet.data.batch.batches import Batches
from whet.data.batch.task_batches import TaskBatches
from whet.training.arrange import formed, replace_sizes
from whet.training.loss import Forward

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


def smaller(batches: Any, steps: int, device: torch.device) -> Any:
    """The same steps in micro-batches of at most half the size, or None where they hold one row each."""
    together = batches.size * batches.accumulate
    size = next((n for n in range(batches.size // 2, 0, -1) if together % n == 0), None)
    if size is None:
        return None
    if isinstance(batches, TaskBatches):
        return TaskBatches(batches.rows, size=size, accumulate=together // size, seed=batches.seed)
    found = replace_sizes(batches, size, together // size)
    return formed(found, steps, device.type == "cuda", max(1, len(batches.forms)))


def largest_step(batches: Any, steps: int) -> int | None:
    """The first step with the largest forward pass, if that is larger than all of the first step; else None."""
    if not isinstance(batches, Batches):
        return None
    per_epoch = -(-len(batches.units) // batches.size)
    epochs, more = divmod(steps, batches.steps_per_epoch)
    tokens = batches.facts(steps).tokens[: epochs * per_epoch + more * batches.accumulate]
    largest = int(tokens.argmax())
    step = largest // per_epoch * batches.steps_per_epoch + largest % per_epoch // batches.accumulate
    first = max(batch.ids.size for batch in batches.step(0))
    return step if max(batch.ids.size for batch in batches.step(step)) > first else None


def try_out(model: torch.nn.Module, optimiser: torch.optim.Optimizer, batches: Sequence[Any], forward: Forward) -> None:
    """Forward and backward of the largest of `batches`; nothing is learned, and no random number is used up."""
    state = random_state()
    if forward.prepare is not None:
        forward.prepare()
    forward.loss(model, max(batches, key=lambda batch: batch.ids.size)).backward()
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
