"""The LoRA layer that PEFT is given for whet's models.

It is one autograd function over any frozen weight: plain composition (`linear(x) + scale * B(A(x))`) writes the output
twice and keeps three activations; here the update is accumulated into the output that the frozen product has just
written, and backward keeps the input [T, K] and the rank-r product [T, r] alone. With a quantised base the dense weight
is rebuilt for each product and never kept. What PEFT can do beyond the plain case (mixed batches, several adapters,
merged weights, variants) runs through PEFT's own layer, of which this is a subclass. Most training goes one step
further and computes layers that read the same input together (`methods.layers.group`).
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn

from whet.engine.weights.linear import dense_weight
from whet.methods.layers.dora import DoraVariant


class LoraFunction(torch.autograd.Function):
    """y = x W^T + bias + scale (x A^T) B^T for x [..., K], W [N, K] frozen, A [r, K], B [N, r]; returns [..., N]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, base: nn.Module, a: torch.Tensor, b: torch.Tensor, scale: float):
        flat = x.reshape(-1, x.shape[-1])
        weight = dense_weight(base, x.dtype)
        bias = base.bias
        output = torch.nn.functional.linear(flat.view(x.shape), weight, bias)  # type: ignore[arg-type]
        reduced = flat @ a.to(x.dtype).t()
        output.view(-1, output.shape[-1]).addmm_(reduced, b.to(x.dtype).t(), alpha=scale)
        ctx.save_for_backward(flat, reduced, a, b)
        ctx.base, ctx.scale, ctx.input_shape = base, scale, x.shape
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor):
        flat, reduced, a, b = ctx.saved_tensors
        grad = grad_outputs[0].reshape(-1, grad_outputs[0].shape[-1])
        grad_reduced = (grad @ b.to(grad.dtype)) * ctx.scale
        grad_a = (grad_reduced.t() @ flat).to(a.dtype)
        grad_b = (grad.t() @ reduced).to(b.dtype) * ctx.scale
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ dense_weight(ctx.base, grad.dtype)
            grad_x.addmm_(grad_reduced, a.to(grad.dtype))
            grad_x = grad_x.view(ctx.input_shape)
        return grad_x, None, grad_a, grad_b, None


class LoraLinear(PeftLinear):
    """PEFT's LoRA layer, the plain case computed by `LoraFunction`.

    changed_in_place: the model scales or adds to what the layer gives, which a result of `LoraFunction` may not allow.
    """

    changed_in_place = False

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """PEFT's variants, DoRA being ours: its own needs a dense weight."""
        return {**super().lora_variants, ("use_dora",): DoraVariant}

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        name = self.plain_adapter()
        if name is None or args or any(value is not None for value in kwargs.values()):
            return super().forward(x, *args, **kwargs)
        if torch.is_autocast_enabled(x.device.type):  # in-place products are not cast for us
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.training and not isinstance(self.lora_dropout[name], nn.Identity):
            return super().forward(x)
        output: Any = LoraFunction.apply(
            x, self.base_layer, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        )
        return output.clone() if self.changed_in_place else output

    def trains_lora_alone(self) -> bool:
        """Whether LoRA is all that is asked for, and it is trained, in float32."""
        name = self.plain_adapter()
        if name is None:
            return False
        weight = self.lora_A[name].weight
        return bool(weight.requires_grad) and weight.dtype == torch.float32

    def plain_adapter(self) -> str | None:
        """The one active adapter when nothing but plain LoRA is asked for, else None."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return None
        name = self.active_adapters[0]
        return name if self._is_lora_alone(name) else None

    def _is_lora_alone(self, name: str) -> bool:
        """Whether A and B are all that is trained here: no variant, no bias of theirs or of the base."""
        if name not in self.lora_A or name in self.lora_variant or self.lora_bias[name]:
            return False
        bias = self.base_layer.bias
        return bias is None or not bias.requires_grad
