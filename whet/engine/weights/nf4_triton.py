"""The NF4 kernel: bytes in, a dense or an FP8 weight out, in one pass over memory. See `engine.weights.nf4` for its
twin."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]

from whet.engine.weights.nf4 import BLOCK, NESTED_BLOCK, Packed

TILE_ROWS, TILE_COLUMNS = 32, 128


@triton.jit
def _nf4_kernel(
    packed, absmax, nested_absmax, nested_offset, code, nested_code, scale, out,
    rows, columns, stride,
    NESTED: tl.constexpr, SCALED: tl.constexpr, TRANSPOSED: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, EACH: tl.constexpr, NESTED_EACH: tl.constexpr,
):  # fmt: skip
    """One tile of R rows and C weights: C / 2 bytes a row, unpacked side by side. EACH: weights of a block;
    NESTED_EACH: blocks of a nested block."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    half = tl.program_id(1) * (C // 2) + tl.arange(0, C // 2)
    inside = (row[:, None] < rows) & (half[None, :] < columns // 2)
    place = row[:, None].to(tl.int64) * (columns // 2) + half[None, :]
    byte = tl.load(packed + place, mask=inside, other=0).to(tl.int32)
    block = (place * 2) // EACH
    if NESTED:
        small = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        wide = tl.load(nested_code + small)
        largest = wide * tl.load(nested_absmax + block // NESTED_EACH, mask=inside, other=0.0) + tl.load(nested_offset)
    else:
        largest = tl.load(absmax + block, mask=inside, other=0.0)
    if SCALED:
        largest = largest / tl.load(scale + row, mask=row < rows, other=1.0)[:, None]
    first = tl.load(code + (byte >> 4)) * largest
    second = tl.load(code + (byte & 15)) * largest
    both = tl.interleave(first, second)
    column = tl.program_id(1) * C + tl.arange(0, C)
    kept = (row[:, None] < rows) & (column[None, :] < columns)
    if TRANSPOSED:
        target = out + column[:, None].to(tl.int64) * stride + row[None, :]
        tl.store(target, tl.trans(both).to(out.dtype.element_ty), mask=tl.trans(kept))
    else:
        target = out + row[:, None].to(tl.int64) * stride + column[None, :]
        tl.store(target, both.to(out.dtype.element_ty), mask=kept)


def launch(parts: Sequence[Packed], dtype: torch.dtype, transposed: bool) -> torch.Tensor:
    """The weights of all parts [sum of N, K] in `dtype`, or [K, sum of N] if `transposed`; those with an `fp8_scale`
    divided by it."""
    heights, columns = [part.packed.shape[0] for part in parts], 2 * parts[0].packed.shape[1]
    shape = (columns, sum(heights)) if transposed else (sum(heights), columns)
    out = parts[0].packed.new_empty(shape, dtype=dtype)
    start = 0
    for part, rows in zip(parts, heights, strict=True):
        _launch_one(part, out[:, start:] if transposed else out[start:], transposed)
        start += rows
    return out


def _launch_one(part: Packed, out: torch.Tensor, transposed: bool) -> None:
    rows, columns = part.packed.shape[0], 2 * part.packed.shape[1]
    nested, scaled = part.nested_absmax is not None, part.fp8_scale is not None
    grid = (triton.cdiv(rows, TILE_ROWS), triton.cdiv(columns, TILE_COLUMNS))
    _nf4_kernel[grid](  # type: ignore[index]
        part.packed, part.absmax, part.nested_absmax if nested else part.absmax,
        part.nested_offset if nested else part.absmax, part.code, part.nested_code if nested else part.code,
        part.fp8_scale if scaled else part.code, out, rows, columns, out.stride(0),
        NESTED=nested, SCALED=scaled, TRANSPOSED=transposed, R=TILE_ROWS, C=TILE_COLUMNS, EACH=BLOCK,
        NESTED_EACH=NESTED_BLOCK, num_warps=4,
    )  # fmt: skip
