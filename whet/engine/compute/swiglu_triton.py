"""SwiGLU's backward pass and the FP8 rounding of its result, a row in one program: one read, one write.

Inductor's own kernel loops twice over a row of 2 F numbers: it loads the incoming gradient and the gate once for each
half. Here they are loaded once; the bf16 row is read back from the cache, where it has just been written, which is
faster on an H100 than keeping it in registers (0.515 against 0.537 ms at 8,192 rows of 28,672). Gives up: rows wider
than `engine.compute.swiglu.WIDEST`. The plain form stands in `engine.compute.swiglu`.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]

from whet.engine.weights.fp8 import E4M3, FP8_MAX


@triton.jit
def _swiglu_kernel(
    dh, gate, up, channel, out, codes, scales, width, stride_dh, stride_gate, stride_up,
    PARTS: tl.constexpr, PART: tl.constexpr, EVEN: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """One row: [dh up silu'(gate) | dh silu(gate)], rounded to out's type, then times `channel` as e4m3 codes.
    LARGEST: what the codes hold."""
    row = tl.program_id(0).to(tl.int64)
    place = row * 2 * width
    largest = tl.zeros((PART,), tl.float32)
    for part in tl.static_range(PARTS):
        at = part * PART + tl.arange(0, PART)
        inside = (at < width) | EVEN
        g = tl.load(gate + row * stride_gate + at, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        d = tl.load(dh + row * stride_dh + at, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        u = tl.load(up + row * stride_up + at, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-g))
        left = (d * u * sigmoid * (1.0 + g * (1.0 - sigmoid))).to(out.dtype.element_ty)
        right = (d * (g * sigmoid)).to(out.dtype.element_ty)
        tl.store(out + place + at, left, mask=inside)
        tl.store(out + place + width + at, right, mask=inside)
        of_gate = tl.load(channel + at, mask=inside, other=0.0, eviction_policy="evict_last")
        of_up = tl.load(channel + width + at, mask=inside, other=0.0, eviction_policy="evict_last")
        largest = tl.maximum(largest, tl.abs(left.to(tl.float32) * of_gate))
        largest = tl.maximum(largest, tl.abs(right.to(tl.float32) * of_up))
    scale = tl.maximum(tl.max(largest, 0), 1e-30) / LARGEST
    tl.store(scales + row, scale)
    tl.debug_barrier()  # other threads wrote what this one reads
    for part in tl.static_range(PARTS):
        at = part * PART + tl.arange(0, PART)
        inside = (at < width) | EVEN
        of_gate = tl.load(channel + at, mask=inside, other=0.0, eviction_policy="evict_last")
        of_up = tl.load(channel + width + at, mask=inside, other=0.0, eviction_policy="evict_last")
        left = tl.load(out + place + at, mask=inside, other=0.0)
        right = tl.load(out + place + width + at, mask=inside, other=0.0)
        left_code = (left.to(tl.float32) * of_gate / scale).to(codes.dtype.element_ty)
        right_code = (right.to(tl.float32) * of_up / scale).to(codes.dtype.element_ty)
        tl.store(codes + place + at, left_code, mask=inside)
        tl.store(codes + place + width + at, right_code, mask=inside)


def swiglu_rows(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, channel: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dgu [T, 2F], its e4m3 codes [T, 2F] and their row scales float32 [T]; dh, gate, up [T, F], rows contiguous."""
    rows, width = dh.shape
    out = torch.empty(rows, 2 * width, dtype=dh.dtype, device=dh.device)
    codes = torch.empty(rows, 2 * width, dtype=E4M3, device=dh.device)
    scales = torch.empty(rows, dtype=torch.float32, device=dh.device)
    part, warps = (4096, 16) if width > 16384 else (2048, 8)
    part = min(part, triton.next_power_of_2(width))
    _swiglu_kernel[(rows,)](  # type: ignore[index]
        dh, gate, up, channel, out, codes, scales, width, dh.stride(0), gate.stride(0), up.stride(0),
        PARTS=triton.cdiv(width, part), PART=part, EVEN=width % part == 0, LARGEST=FP8_MAX,
        num_warps=warps if part >= 1024 else 4,
    )  # fmt: skip
    return out, codes, scales
