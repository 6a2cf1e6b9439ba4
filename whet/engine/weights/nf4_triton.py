"""The NF4 kernel: bytes in, a dense or an FP8 weight out, in one pass over memory. See `engine.weights.nf4` for its
twin."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]

TILE_ROWS, TILE_COLUMNS = 32, 128


@triton.jit
def _nf4_kernel(
    packed, absmax, nested_absmax, nested_offset, code, nested_code, scale, out,
    rows, columns, stride,
    NESTED: tl.constexpr, SCALED: tl.constexpr, TRANSPOSED: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One tile of R rows and C weights: C / 2 bytes a row, unpacked side by side."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    half = tl.program_id(1) * (C // 2) + tl.arange(0, C // 2)
    inside = (row[:, None] < rows) & (half[None, :] < columns // 2)
    place = row[:, None].to(tl.int64) * (columns // 2) + half[None, :]
    byte = tl.load(packed + place, mask=inside, other=0).to(tl.int32)
    block = (place * 2) // 64
    if NESTED:
        small = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        wide = tl.load(nested_code + small)
        largest = wide * tl.load(nested_absmax + block // 256, mask=inside, other=0.0) + tl.load(nested_offset)
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


def launch(
    parts: Sequence[tuple[torch.Tensor | None, ...]], scales: Sequence[torch.Tensor], dtype: torch.dtype,
    transposed: bool,
) -> torch.Tensor:  # fmt: skip
    """The weights of all parts [sum of N, K] in `dtype`, or [K, sum of N] if `transposed`."""
    packed = [part[0] for part in parts]
    heights = [tensor.shape[0] for tensor in packed if tensor is not None]
    assert packed[0] is not None
    columns = 2 * packed[0].shape[1]
    out = packed[0].new_empty((columns, sum(heights)) if transposed else (sum(heights), columns), dtype=dtype)
    start = 0
    for index, (part, rows) in enumerate(zip(parts, heights, strict=True)):
        here = out[:, start:] if transposed else out[start:]
        _launch_one(part, scales[index] if scales else None, here, rows, columns, transposed)
        start += rows
    return out


def _launch_one(
    tensors: tuple[torch.Tensor | None, ...], scale: torch.Tensor | None, out: torch.Tensor, rows: int, columns: int,
    transposed: bool,
) -> None:  # fmt: skip
    packed, absmax, nested_absmax, nested_offset, code, nested_code = tensors
    nested = nested_absmax is not None
    grid = (triton.cdiv(rows, TILE_ROWS), triton.cdiv(columns, TILE_COLUMNS))
    _nf4_kernel[grid](  # type: ignore[index]
        packed, absmax, nested_absmax if nested else absmax, nested_offset if nested else absmax, code,
        nested_code if nested else code, scale if scale is not None else code, out, rows, columns, out.stride(0),
        NESTED=nested, SCALED=scale is not None, TRANSPOSED=transposed, R=TILE_ROWS, C=TILE_COLUMNS, num_warps=4,
    )  # fmt: skip
