"""Items of similar length computed together, the longest first, and fewer together when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def in_batches(
    lengths: Sequence[int],
    batch_size: int,
    compute: Callable[[list[int], int], Sequence[Result]],
    *,
    equal_lengths: bool = False,
    done: Callable[[int], None] | None = None,
    fewer: Callable[[int], None],
) -> list[Result]:
    """One result for each item, in the order given. lengths: in tokens.

    compute: the numbers of the items of a batch, and how many a full batch has, to their results. equal_lengths: items
    of different length share no batch. done: called with the number of items of each finished batch. fewer: called with
    the new size when a batch did not fit. torch.OutOfMemoryError: a single item does not fit.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    results: list[Any] = [None] * len(lengths)
    start, size = 0, min(batch_size, len(lengths))
    while start < len(order):
        batch = order[start : start + size]
        if equal_lengths:
            batch = [index for index in batch if lengths[index] == lengths[batch[0]]]
        values = _computed(compute, batch, size)
        if values is None:
            size = (size + 1) // 2
            fewer(size)
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
    """The results of a batch, or None when memory ran out and fewer items may fit."""
    try:
        return compute(batch, size)
    except torch.OutOfMemoryError:
        if size == 1:
            raise
    torch.cuda.empty_cache()  # out of the handler, where the failed call's tensors are gone
    return None
