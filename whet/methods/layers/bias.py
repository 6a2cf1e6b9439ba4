"""A packed linear layer whose bias is trained: its own is frozen with its codes, so one is added by a layer around.

Gives up: one more launch a layer than a bias inside of the product.
"""

from __future__ import annotations

import torch
from torch import nn

from whet.engine.weights.linear import FrozenLinear


class TrainedBias(nn.Module):
    """base_layer(x) + bias: a packed layer whose bias [N] is trained."""

    def __init__(self, base_layer: FrozenLinear) -> None:
        super().__init__()
        assert base_layer.bias is not None
        self.bias = nn.Parameter(base_layer.bias.detach().float())
        base_layer.bias = None
        self.base_layer = base_layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base_layer(x)
        return y + self.bias.to(y.dtype)
