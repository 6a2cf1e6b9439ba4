"""NF4 bytes back into a dense weight: one call for each backend, all giving the same values.

weight = table[code] * absmax, and with double quantisation absmax = nested_table[byte] * nested_absmax + offset. On a
GPU one Triton kernel does both steps in one pass, in any of the forms that a product wants: rows in bf16, or FP8 codes
scaled by a given value for each output channel, in rows or transposed (bitsandbytes needs three launches and a bf16
tensor first). Elsewhere plain torch does it; the two are tested against each other and against bitsandbytes.
Several weights that share an input are rebuilt into one tensor, side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import library

BLOCK = 64
NESTED_BLOCK = 256
TENSORS = 6

Packed = tuple[torch.Tensor | None, ...]


def rebuild_nf4(parts: Sequence[Packed], dtype: torch.dtype) -> torch.Tensor:
    """The dense weights [sum of N, K] in `dtype`; each part as `Nf4Linear.tensors` gives it."""
    return _stack(parts, [], dtype, False)


def rebuild_nf4_as_fp8(parts: Sequence[Packed], scales: Sequence[torch.Tensor], transposed: bool) -> torch.Tensor:
    """e4m3 codes of weight / scale: [sum of N, K], or [K, sum of N]; scales float32 [N] from `fp8_scale`."""
    return _stack(parts, list(scales), torch.float8_e4m3fn, transposed)


def _stack(parts: Sequence[Packed], scales: list[torch.Tensor], dtype: torch.dtype, transposed: bool) -> torch.Tensor:
    present = [[tensor for tensor in column if tensor is not None] for column in zip(*parts, strict=True)]
    return torch.ops.whet.nf4_rebuild(*present, scales, dtype, transposed)


@library.custom_op("whet::nf4_rebuild", mutates_args=())
def _rebuild(
    packed: list[torch.Tensor], absmax: list[torch.Tensor], nested_absmax: list[torch.Tensor],
    nested_offset: list[torch.Tensor], code: list[torch.Tensor], nested_code: list[torch.Tensor],
    scales: list[torch.Tensor], dtype: torch.dtype, transposed: bool,
) -> torch.Tensor:  # fmt: skip
    columns = (packed, absmax, nested_absmax, nested_offset, code, nested_code)
    parts = [tuple(column[i] if column else None for column in columns) for i in range(len(packed))]
    if packed[0].is_cuda:
        from whet.engine.weights.nf4_triton import launch

        return launch(parts, scales, dtype, transposed)
    rows = [plain_rebuild(p, scales[i] if scales else None, dtype) for i, p in enumerate(parts)]
    dense = rows[0] if len(rows) == 1 else torch.cat(rows)
    return dense.t().contiguous() if transposed else dense


@_rebuild.register_fake
def _(packed, absmax, nested_absmax, nested_offset, code, nested_code, scales, dtype, transposed):
    rows, columns = sum(part.shape[0] for part in packed), 2 * packed[0].shape[1]
    return packed[0].new_empty((columns, rows) if transposed else (rows, columns), dtype=dtype)


def plain_rebuild(tensors: Packed, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The twin of the kernel in plain torch, for one part: [N, K]."""
    packed, absmax, nested_absmax, nested_offset, code, nested_code = tensors
    assert packed is not None
    assert absmax is not None
    assert code is not None
    if nested_absmax is not None:
        assert nested_code is not None
        assert nested_offset is not None
        nested = nested_absmax.repeat_interleave(NESTED_BLOCK)[: absmax.numel()]
        absmax = nested_code[absmax.long()] * nested + nested_offset
    index = torch.stack((packed >> 4, packed & 15), dim=-1).flatten()
    dense = (code[index.long()].view(-1, BLOCK) * absmax[:, None]).view(packed.shape[0], -1)
    return (dense if scale is None else dense / scale[:, None]).to(dtype)


def fp8_scale(tensors: Packed) -> torch.Tensor:
    """float32 [N]: the e4m3 scale of each output channel of the dense weight."""
    dense = rebuild_nf4([tensors], torch.float32)
    return dense.abs().amax(1).clamp_min(1e-12) / 448.0
