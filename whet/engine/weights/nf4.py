"""NF4 bytes back into a dense weight: one call for each backend, all giving the same values.

weight = table[code] * absmax, and with double quantisation absmax = nested_table[byte] * nested_absmax + offset. On a
GPU one Triton kernel does both steps in one pass, in any of the forms that a product wants: rows in bf16, or FP8 codes
scaled by a given value for each output channel, in rows or transposed (bitsandbytes needs three launches and a bf16
tensor first). Elsewhere plain torch does it; the two are tested against each other and against bitsandbytes.
Several weights that share an input are rebuilt into one tensor, side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import library

from whet.engine.weights.fp8 import E4M3, FP8_MAX

BLOCK = 64  # weights that share a maximum
NESTED_BLOCK = 256  # maxima that share a scale, with double quantisation


class Packed(NamedTuple):
    """One nf4 weight [N, K]. packed: uint8 [N, K / 2], two codes a byte; absmax: the maximum of each block, float32, or
    uint8 with the nested tensors (float32 maxima of theirs, an offset [1] and a table) beside it; code: the table of
    the 16 values; fp8_scale: float32 [N], where it is computed in FP8 (`fp8_scale`)."""

    packed: torch.Tensor
    absmax: torch.Tensor
    nested_absmax: torch.Tensor | None
    nested_offset: torch.Tensor | None
    code: torch.Tensor
    nested_code: torch.Tensor | None
    fp8_scale: torch.Tensor | None = None


def rebuild_nf4(parts: Sequence[Packed], dtype: torch.dtype) -> torch.Tensor:
    """The dense weights [sum of N, K] in `dtype`."""
    *columns, _ = _columns(parts)
    return torch.ops.whet.nf4_rebuild(*columns, [], dtype, False)


def rebuild_nf4_as_fp8(parts: Sequence[Packed], transposed: bool) -> torch.Tensor:
    """e4m3 codes of weight / fp8_scale: [sum of N, K], or [K, sum of N]."""
    return torch.ops.whet.nf4_rebuild(*_columns(parts), E4M3, transposed)


def _columns(parts: Sequence[Packed]) -> list[list[torch.Tensor]]:
    return [[tensor for tensor in column if tensor is not None] for column in zip(*parts, strict=True)]


@library.custom_op("whet::nf4_rebuild", mutates_args=())
def _rebuild(
    packed: list[torch.Tensor], absmax: list[torch.Tensor], nested_absmax: list[torch.Tensor],
    nested_offset: list[torch.Tensor], code: list[torch.Tensor], nested_code: list[torch.Tensor],
    scales: list[torch.Tensor], dtype: torch.dtype, transposed: bool,
) -> torch.Tensor:  # fmt: skip
    columns = (packed, absmax, nested_absmax, nested_offset, code, nested_code, scales)
    parts = [Packed._make(column[i] if column else None for column in columns) for i in range(len(packed))]
    if packed[0].is_cuda:
        from whet.engine.weights.nf4_triton import launch

        return launch(parts, dtype, transposed)
    rows = [plain_rebuild(part, dtype) for part in parts]
    dense = rows[0] if len(rows) == 1 else torch.cat(rows)
    return dense.t().contiguous() if transposed else dense


@_rebuild.register_fake
def _(packed, absmax, nested_absmax, nested_offset, code, nested_code, scales, dtype, transposed):
    rows, columns = sum(part.shape[0] for part in packed), 2 * packed[0].shape[1]
    return packed[0].new_empty((columns, rows) if transposed else (rows, columns), dtype=dtype)


def plain_rebuild(part: Packed, dtype: torch.dtype) -> torch.Tensor:
    """The twin of the kernel in plain torch, for one part: [N, K], divided by its `fp8_scale` if it has one."""
    absmax = part.absmax
    if part.nested_absmax is not None:
        assert part.nested_code is not None
        assert part.nested_offset is not None
        nested = part.nested_absmax.repeat_interleave(NESTED_BLOCK)[: absmax.numel()]
        absmax = part.nested_code[absmax.long()] * nested + part.nested_offset
    index = torch.stack((part.packed >> 4, part.packed & 15), dim=-1).flatten()
    dense = (part.code[index.long()].view(-1, BLOCK) * absmax[:, None]).view(part.packed.shape[0], -1)
    return (dense if part.fp8_scale is None else dense / part.fp8_scale[:, None]).to(dtype)


def fp8_scale(part: Packed) -> torch.Tensor:
    """float32 [N]: the e4m3 scale of each output channel of the dense weight."""
    dense = rebuild_nf4([part], torch.float32)
    return dense.abs().amax(1).clamp_min(1e-12) / FP8_MAX
