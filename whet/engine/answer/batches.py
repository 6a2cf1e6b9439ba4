"""Items of similar length computed together, the longest first, and fewer together when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from whet.base.errors import UserError
from whet.base.out_of_memory import ran_out
from whet.engine.memory.scarce import forget_frames, let_go

Result = TypeVar("Result")


@dataclass(frozen=True)
class Scarce:
    """What is done when memory runs out. fewer: told how many items are computed together from now on; leaner: gives up
    speed for memory where a single item does not fit, and tells whether it did; refusal: the error for a single item of
    so many tokens after that."""

    fewer: Callable[[int], None]
    leaner: Callable[[], bool]
    refusal: Callable[[int], UserError]


def in_batches(
    lengths: Sequence[int],
    batch_size: int,
    compute: Callable[[list[int], int], Sequence[Result]],
    *,
    equal_lengths: bool = False,
    done: Callable[[int], None] | None = None,
    scarce: Scarce,
) -> list[Result]:
    """One result for each item, in the order given. lengths: in tokens.

    compute: the numbers of the items of a batch, and how many a full batch has, to their results. equal_lengths: items
    of different length share no batch. done: called with the number of items of each finished batch. Raises UserError
    where a single item does not fit.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    results: list[Any] = [None] * len(lengths)
    start, size = 0, min(batch_size, len(lengths))
    while start < len(order):
        batch = order[start : start + size]
        if equal_lengths:
            batch = [index for index in batch if lengths[index] == lengths[batch[0]]]
        values = _computed(compute, batch, size)
        if values is None and size > 1:
            size = (size + 1) // 2
            scarce.fewer(size)
        elif values is None and not scarce.leaner():
            raise scarce.refusal(lengths[batch[0]])
        if values is None:
            continue
        for index, value in zip(batch, values, strict=True):
            results[index] = value
        start += len(batch)
        if done is not None:
            done(len(batch))
    return results


def _computed(
    compute: Callable[[list[int], int], Sequence[Result]], batch: list[int], size: int
) -> Sequence[Result] | None:
    """The results of a batch, or None when memory ran out."""
    try:
        return compute(batch, size)
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        forget_frames(error)
    let_go()  # out of the handler, where the failed call's tensors are gone
    return None
