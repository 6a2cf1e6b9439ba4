"""The product with a frozen weight, both ways: y = x W^T and dx = dy W, for each pair of storage and arithmetic.

FP8 both ways from one copy of the weights: W = diag(s) Q with one scale s an output channel. Forward, x is quantised
row by row and s is an outer scale of the product. Backward, dx = (dy * s) Q: s is folded into dy before dy is quantised
row by row, so Q needs no second quantisation; only its bytes are turned round. e4m3 in both directions: the gradient of
LoRA is nearer to exact with it than with e5m2. NF4 and int8 weights are rebuilt as FP8 codes at once
(`engine.weights.stored`). Everything is plain torch on purpose: inside a compiled layer the quantisation of x is fused
into the norm or the activation that makes x. Gives up: on hardware without FP8 the same arithmetic is emulated, slowly.
"""

from __future__ import annotations

import torch
from torch import library
from torch.nn.functional import linear

from whet.base.private import scaled_mm
from whet.engine.weights.fp8 import quantise_fp8
from whet.engine.weights.stored import FrozenWeight

WIDEST_RANK = 128  # above it the low-rank product is no longer bound by memory, and cuBLAS is as good
LONG = 8192  # from here on cuBLAS multiplies faster without scales of rows and columns than with them (docs/log.md)
Update = tuple[torch.Tensor, torch.Tensor]


def forward_product(
    weight: FrozenWeight, x: torch.Tensor, bias: torch.Tensor | None, update: Update | None = None, *, fp8: bool = False
) -> torch.Tensor:
    """x [T, K] times the weight [N, K]: [T, N] in x's type. fp8: multiply on FP8 tensor cores.

    update: a [T, r] and b [N, r]; a b^T is added.
    """
    if not fp8:
        return _added(linear(x, weight.dense(x.dtype), bias), update)
    codes, scale = weight.fp8_rows()
    rows, row_scale = quantised_rows(x, None)
    return scaled_product(rows, row_scale, codes, scale, bias, x.dtype, update)


def backward_product(
    weight: FrozenWeight, grad: torch.Tensor, update: Update | None = None, *, fp8: bool = False
) -> torch.Tensor:
    """grad [T, N] times the weight [N, K]: [T, K] in grad's type. update: a [T, r] and b [K, r]; a b^T is added."""
    weight = weight.again()
    if not fp8:
        return _added(grad @ weight.dense(grad.dtype), update)
    codes, scale = weight.fp8_columns()
    rows, row_scale = quantised_rows(grad, scale)
    return scaled_product(rows, row_scale, codes, None, None, grad.dtype, update)


def quantised_rows(x: torch.Tensor, channel: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 codes of x [T, N] (times `channel` [N]) and the scale of each row [T].

    In a compiled layer the plain form is fused with what makes x; a kernel of its own would only stand in the way.
    """
    if x.is_cuda and not torch.compiler.is_compiling():
        from whet.engine.weights.rows_triton import quantise_rows

        return quantise_rows(x if x.stride(1) == 1 else x.contiguous(), channel)
    return quantise_fp8(x if channel is None else x.float() * channel)


def scaled_product(
    rows: torch.Tensor, row_scale: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor | None,
    bias: torch.Tensor | None, dtype: torch.dtype, update: Update | None = None,
) -> torch.Tensor:  # fmt: skip
    """(rows * row_scale) (codes * scale)^T + bias + a b^T: rows e4m3 [T, K], codes e4m3 [N, K]; [T, N] in `dtype`.

    Where the update passes over the result anyhow, it can bring the scales with it.
    """
    if not rows.is_cuda:
        wide = codes.float() if scale is None else codes.float() * scale[:, None]
        product = (rows.float() * row_scale[:, None]) @ wide.t()
        return _added((product if bias is None else product + bias).to(dtype), update)
    if update is not None and bias is None and rows.shape[1] >= LONG and dtype == torch.bfloat16:
        one = torch.ones((), dtype=torch.float32, device=rows.device)
        raw = scaled_mm(rows, codes.t(), one, one, dtype)
        return add_product(raw, *update, of_row=row_scale, of_column=scale)
    column = torch.ones(codes.shape[0], dtype=torch.float32, device=rows.device) if scale is None else scale
    product = scaled_mm(rows, codes.t(), row_scale[:, None], column[None, :], dtype, bias)
    return _added(product, update)


def _added(y: torch.Tensor, update: Update | None) -> torch.Tensor:
    return y if update is None else add_product(y, *update)


def add_product(
    y: torch.Tensor, a: torch.Tensor, b: torch.Tensor, of_row: torch.Tensor | None = None,
    of_column: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """y + a b^T, written over y: y [T, N], a [T, r], b [N, r]. y must be fresh.

    of_row float32 [T], of_column float32 [N]: y is multiplied by them first.
    """
    if not y.is_cuda and not torch.compiler.is_compiling():
        return _plain_sum(y, a, b, of_row, of_column)
    torch.ops.whet.add_product_(y, a, b, of_row, of_column)
    return y


def _plain_sum(
    y: torch.Tensor, a: torch.Tensor, b: torch.Tensor, of_row: torch.Tensor | None, of_column: torch.Tensor | None
) -> torch.Tensor:
    if of_row is None and of_column is None:
        return y.addmm_(a, b.t())
    wide = y.float() if of_row is None else y.float() * of_row[:, None]
    wide = wide if of_column is None else wide * of_column
    return y.copy_(wide.addmm_(a.float(), b.float().t()))  # rounded once, as the kernel does


@library.custom_op("whet::add_product_", mutates_args=("y",))
def _add_product(
    y: torch.Tensor, a: torch.Tensor, b: torch.Tensor, of_row: torch.Tensor | None = None,
    of_column: torch.Tensor | None = None,
) -> None:  # fmt: skip
    if y.is_cuda and y.dtype != torch.float32 and a.shape[1] <= WIDEST_RANK:
        from whet.engine.weights.rows_triton import add_low_rank

        add_low_rank(y, a if a.stride(1) == 1 else a.contiguous(), b, of_row, of_column)
    else:
        _plain_sum(y, a, b, of_row, of_column)


@_add_product.register_fake
def _(y, a, b, of_row=None, of_column=None):
    return None
