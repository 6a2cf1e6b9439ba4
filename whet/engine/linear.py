"""Frozen linear layers: the dense weight in few bytes, as plain tensors that any sharding can cut.

`nf4` follows QLoRA (Dettmers et al., 2023, arXiv:2305.14314): blocks of 64 weights share one absolute maximum, each
weight is one of 16 quantiles of a normal distribution; double quantisation stores the maxima in 8 bits too.
bitsandbytes computes both directions; whet keeps the result as ordinary frozen parameters, not as its own tensor
class, so that state dicts, FSDP2 and safetensors need no special case. Gives up: a weight whose size is no multiple
of the block stays dense.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from whet.base.extras import require

BLOCK = 64
NESTED_BLOCK = 256


class FrozenLinear(nn.Module):
    """y = x W^T + bias with W [out_features, in_features] stored as 4-bit codes; only x has a gradient."""

    def __init__(self, linear: nn.Linear, double_quant: bool) -> None:
        super().__init__()
        functional = require("bitsandbytes.functional", "base.storage: nf4")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        packed, state = functional.quantize_4bit(
            linear.weight.detach().contiguous(),
            blocksize=BLOCK,
            compress_statistics=double_quant,
            quant_type="nf4",
        )
        self.packed = _frozen(packed.reshape(self.out_features, -1))
        self.absmax = _frozen(state.absmax)
        self.register_buffer("code", state.code, persistent=False)
        self.nested_absmax = self.nested_offset = None
        if state.nested:
            self.nested_absmax = _frozen(state.state2.absmax)
            self.nested_offset = _frozen(state.offset.reshape(()))
            self.register_buffer("nested_code", state.state2.code, persistent=False)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [out_features, in_features] in `dtype`, rebuilt from the codes."""
        functional = require("bitsandbytes.functional", "base.storage: nf4")
        nested: dict[str, Any] = {}
        if self.nested_absmax is not None:
            nested["offset"] = self.nested_offset
            nested["state2"] = functional.QuantState(
                absmax=self.nested_absmax, code=self.nested_code, blocksize=NESTED_BLOCK, dtype=torch.float32
            )
        state = functional.QuantState(
            absmax=self.absmax,
            shape=torch.Size((self.out_features, self.in_features)),
            code=self.code,
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=dtype,
            **nested,
        )
        return functional.dequantize_4bit(self.packed.reshape(-1, 1), state)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return FrozenProduct.apply(x, self)  # type: ignore[return-value]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, storage=nf4"


class FrozenProduct(torch.autograd.Function):
    """x W^T + bias that keeps nothing for backward but the module: W is rebuilt, not saved."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, module: FrozenLinear) -> torch.Tensor:
        ctx.module = module
        return nn.functional.linear(x, module.dense(x.dtype), module.bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor):
        grad = grad_outputs[0]
        return grad @ ctx.module.dense(grad.dtype), None


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)


def dense_weight(linear: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """The weight [out, in] of a plain or a frozen linear layer, in `dtype`."""
    if isinstance(linear, FrozenLinear):
        return linear.dense(dtype)
    weight = linear.weight
    assert isinstance(weight, torch.Tensor)
    return weight.to(dtype)


def linear_names(model: nn.Module) -> list[str]:
    """Full names of the linear layers of a transformer, without its output head."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()  # type: ignore[operator]
    kinds = (nn.Linear, FrozenLinear, Conv1D)
    return [name for name, module in model.named_modules() if isinstance(module, kinds) and module is not head]


def freeze_to_nf4(model: nn.Module, double_quant: bool) -> int:
    """Replace every linear layer but the output head by its nf4 form, on this instance; returns how many.

    One layer at a time, so that the dense and the packed weights never stand side by side for more than one layer.
    """
    replaced = 0
    for name in linear_names(model):
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        linear = getattr(parent, child)
        if isinstance(linear, nn.Linear) and linear.weight.numel() % BLOCK == 0:
            setattr(parent, child, FrozenLinear(linear, double_quant))
            replaced += 1
    return replaced


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; a packed weight counts as the weights it stands for."""
    packed_names: set[int] = set()
    total = 0
    for module in model.modules():
        if isinstance(module, FrozenLinear):
            total += module.in_features * module.out_features
            hidden = (module.packed, module.absmax, module.nested_absmax, module.nested_offset)
            packed_names |= {id(p) for p in hidden if p is not None}
    plain = [p for p in model.parameters() if id(p) not in packed_names]
    trainable = sum(p.numel() for p in plain if p.requires_grad)
    return trainable, total + sum(p.numel() for p in plain)
