"""What stands in a block in place of a linear layer whose weights a group owns.

It is one of PEFT's layers so far as PEFT asks them two things: to switch the adapter off and on, and by the names of
their children which entries of a state dict are the adapter's (`methods.layers.state` makes such entries).
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from whet.methods.layers.group import LoraGroup


class GroupMember(nn.Module, BaseTunerLayer):
    """Layer `index` of `group`: the same function of [..., in_features] that the layer was, without parameters.

    start: A and B at the start, where `methods.initial` took them out of the base.
    """

    group: LoraGroup

    def __init__(self, group: LoraGroup, index: int, start: Any = None) -> None:
        super().__init__()
        object.__setattr__(self, "group", group)  # a reference: the group is a child of the block, not of this module
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()  # empty: names alone
        self.index, self.start = index, start
        self.in_features, self.out_features = group.shape.inputs, group.shape.sizes[index]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.group.output(self.index, x)

    def enable_adapters(self, enabled: bool) -> None:
        """Let the group add its update or not; for PEFT."""
        self.group.enabled = enabled
        self._disable_adapters = not enabled

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight [N, K]: some models (T5) look at its type."""
        return self.group.base.weight[self._rows()]  # type: ignore[index]

    @property
    def bias(self) -> Any:
        """The layer's [N], or zeros where only others of the group have one."""
        return None if self.group.bias is None else self.group.bias[self._rows()]

    def _rows(self) -> slice:
        start = sum(self.group.shape.sizes[: self.index])
        return slice(start, start + self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"
