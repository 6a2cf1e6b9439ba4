"""A small two-layer network behind a module: y + U f(D y + d) + u.

U and the biases start at zero, so that nothing changes before training. The two products run in the type of y, from
fp32 masters. Gives up: folding into a weight, since f is not linear.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import gelu, linear, relu, silu

if TYPE_CHECKING:
    from collections.abc import Callable

_F: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": relu, "gelu": gelu, "silu": silu, "tanh": torch.tanh,
}  # fmt: skip


class Adapted(nn.Module):
    """y + U f(D y + d) + u, with y [..., H] what base_layer gives; D [S, H], U [H, S]: fp32, cast to y's type."""

    def __init__(self, base_layer: nn.Module, hidden_size: int, size: int, non_linearity: str, like: torch.Tensor):
        super().__init__()
        self.base_layer = base_layer
        self.down = nn.Linear(hidden_size, size, device=like.device, dtype=torch.float32)
        self.up = nn.Linear(size, hidden_size, device=like.device, dtype=torch.float32)
        for zero in (self.up.weight, self.up.bias, self.down.bias):  # a bias could shut a ReLU on all small y
            nn.init.zeros_(zero)
        self.f, self.on = _F[non_linearity], True

    @property
    def weight(self) -> Any:
        """The wrapped layer's: some models (T5) look at its type."""
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        """The wrapped layer's."""
        return self.base_layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base_layer(x)
        if not self.on:
            return y
        low = self.f(linear(y, self.down.weight.to(y.dtype), self.down.bias.to(y.dtype)))
        return y + linear(low, self.up.weight.to(low.dtype), self.up.bias.to(low.dtype))
