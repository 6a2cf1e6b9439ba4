"""Several frozen linear layers that read one input as one: the rows of one below those of the other.

Codes with one scale an output channel, and dense weights, become one tensor. The blocks of nf4 do not end with the rows
and their maxima have offsets of their own, so such layers stay apart and are multiplied together
(`engine.weights.nf4`). Biases are left to the caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from whet.engine.weights.linear import Fp8Linear, FrozenLinear, Int8Linear, Nf4Linear, stored_weight
from whet.engine.weights.stored import FrozenWeight, Nf4Weight


class Nf4Rows(nn.ModuleList):
    """nf4 layers of one width as one weight."""

    @property
    def stored(self) -> Nf4Weight:
        """Their weights, one below the other."""
        return Nf4Weight(tuple(layer.tensors() for layer in self))  # type: ignore[operator]

    def keep_for_fp8(self, *, both_orders: bool) -> None:
        """As `FrozenLinear.keep_for_fp8`."""
        for layer in self:
            layer.keep_for_fp8(both_orders=both_orders)  # type: ignore[operator]


def can_join(one: nn.Module, other: nn.Module) -> bool:
    """Whether two linear layers of one width can be one."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Nf4Linear) and isinstance(other, Nf4Linear):
        return one.double_quant == other.double_quant
    return isinstance(one, FrozenLinear) or one.weight.dtype == other.weight.dtype  # type: ignore[union-attr]


@torch.no_grad()
def join(linears: Sequence[nn.Module]) -> nn.Module:
    """The weights of layers that `can_join` as one frozen module without bias; the layers are used up: what can be
    kept of them is not copied."""
    layers: list[Any] = list(linears)
    for layer in layers:
        layer.bias = None
    first = layers[0]
    if isinstance(first, Nf4Linear):
        return Nf4Rows(layers)
    if len(layers) == 1:
        return first
    columns, rows = first.in_features, sum(layer.out_features for layer in layers)
    if isinstance(first, Fp8Linear | Int8Linear):
        whole: Any = type(first)(columns, rows, None)
        whole.codes, whole.scale = _rows(layers, "codes"), _rows(layers, "scale")
    else:
        whole = nn.Linear(columns, rows, bias=False, device="meta")
        whole.weight = _rows(layers, "weight")
    return whole


def _rows(linears: Sequence[Any], name: str) -> nn.Parameter:
    return nn.Parameter(torch.cat([getattr(linear, name) for linear in linears]), requires_grad=False)


def joined_weight(module: nn.Module) -> FrozenWeight:
    """The weight of what `join` made, as the tensors that it holds now."""
    return module.stored if isinstance(module, Nf4Rows) else stored_weight(module)
