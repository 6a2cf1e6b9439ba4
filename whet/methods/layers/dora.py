"""DoRA (Liu et al., 2024, arXiv:2402.09353) on any frozen weight: LoRA turns each output, its length is trained apart.

y = m / |W + s B A| * (W + s B A) x + bias, the norm taken over the inputs of each output and held constant in the
backward pass (section 4.3). PEFT's own variant reads a dense `weight` and sends an identity matrix of the input's width
through A and B in every forward pass; here the dense weight is rebuilt from whatever the base is stored as, and the
product of B and A is one matrix product. Merging, files and names stay PEFT's.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn
from torch.nn.functional import linear

from whet.engine.weights.linear import dense_weight


@torch.no_grad()
def row_norms(base: nn.Module, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """|W + scale B A| of each output, float32 [N]."""
    if a.is_meta:  # counted, not computed; autocast does not know the device
        return a.new_empty(b.shape[0])
    with torch.autocast(a.device.type, enabled=False):
        return torch.addmm(dense_weight(base, torch.float32), b.float(), a.float(), alpha=scale).norm(dim=1)


class Magnitude(DoraLinearLayer):
    """weight [N]: the trained length of each output's weights."""

    def update_layer(
        self, *, base_layer: nn.Module, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float,
        place_on_cpu: bool = False,
    ) -> None:  # fmt: skip
        self.weight = nn.Parameter(row_norms(base_layer, lora_A, lora_B, scaling).to(lora_A.device))


class DoraVariant(DoraLinearVariant):
    """What PEFT's LoRA layer calls in place of its own DoRA."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        if not module.lora_magnitude_vector:
            module.adapter_layer_names = (*module.adapter_layer_names, "lora_magnitude_vector")
        magnitude = Magnitude(fan_in_fan_out=False)
        magnitude.update_layer(
            base_layer=module.get_base_layer(), lora_A=module.lora_A[adapter_name].weight,
            lora_B=module.lora_B[adapter_name].weight, scaling=module.scaling[adapter_name],
        )  # fmt: skip
        module.lora_magnitude_vector[adapter_name] = magnitude

    @staticmethod
    def forward(module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        base, dropout = module.get_base_layer(), module.lora_dropout[active_adapter]
        a, b = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        scale = module.scaling[active_adapter]
        x, bias = x.to(result.dtype), base.bias
        dense = result if bias is None else result - bias
        if module.training and not isinstance(dropout, nn.Identity):
            x = dropout(x)
            dense = base(x) if bias is None else base(x) - bias
        factor = module.lora_magnitude_vector[active_adapter].weight / row_norms(base, a, b, scale)
        low = linear(linear(x, a.to(x.dtype)), b.to(x.dtype))
        more = (factor - 1).to(dense.dtype) * dense + (factor * scale).to(low.dtype) * low
        return result + more
