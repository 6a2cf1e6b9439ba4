"""Cross-entropy on logits that exist, in place: each row becomes its gradient, in two passes over memory.

The plain form in `engine.compute.head` needs about eight passes over float32 copies. See there for the twin.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]


@triton.jit
def _row_kernel(
    logits, bias, targets, losses, columns, stride, softcap,
    BIASED: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: largest value and sum of exponentials, then probabilities minus one at the target."""
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * stride
    target = tl.load(targets + row)
    offsets = tl.arange(0, BLOCK)
    peak = -float("inf")
    total = 0.0
    chosen = 0.0
    for start in range(0, columns, BLOCK):
        at = start + offsets
        value = tl.load(base + at, mask=at < columns, other=-float("inf")).to(tl.float32)
        if BIASED:
            value += tl.load(bias + at, mask=at < columns, other=0.0).to(tl.float32)
        if CAPPED:
            value = tl.where(at < columns, softcap * _tanh(value / softcap), -float("inf"))
        higher = tl.maximum(peak, tl.max(value, 0))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(value - higher), 0)
        chosen += tl.sum(tl.where(at == target, value, 0.0), 0)
        peak = higher
    counts = target >= 0
    tl.store(losses + row, tl.where(counts, tl.log(total) + peak - chosen, 0.0))
    weight = tl.where(counts, 1.0 / total, 0.0)
    for start in range(0, columns, BLOCK):
        at = start + offsets
        value = tl.load(base + at, mask=at < columns, other=-float("inf")).to(tl.float32)
        if BIASED:
            value += tl.load(bias + at, mask=at < columns, other=0.0).to(tl.float32)
        slope = 1.0
        if CAPPED:
            squashed = _tanh(value / softcap)
            value = tl.where(at < columns, softcap * squashed, -float("inf"))
            slope = 1.0 - squashed * squashed
        grad = tl.exp(value - peak) * weight - tl.where((at == target) & counts, 1.0, 0.0)
        tl.store(base + at, (grad * slope).to(logits.dtype.element_ty), mask=at < columns)


@triton.jit
def _tanh(x):
    """tanh from exp, exact to float32 rounding away from 0 and good to 1e-7 near it."""
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x >= 0, t, -t)


def rows_to_gradients(
    logits: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, softcap: float | None
) -> torch.Tensor:
    """Loss of each row, float32 [C]; `logits` [C, V] become its gradient. A target below 0 counts for nothing."""
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    _row_kernel[(len(logits),)](  # type: ignore[index]
        logits, logits if bias is None else bias, targets, losses, logits.shape[1], logits.stride(0),
        0.0 if softcap is None else softcap, BIASED=bias is not None, CAPPED=softcap is not None,
        BLOCK=4096, num_warps=8,
    )  # fmt: skip
    return losses
