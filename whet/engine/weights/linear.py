"""Frozen linear layers: the dense weight in few bytes, as plain tensors that any sharding can cut.

- `nf4` follows QLoRA (Dettmers et al., 2023, arXiv:2305.14314): blocks of 64 weights share one absolute maximum, each
  weight is one of 16 quantiles of a normal distribution; double quantisation stores the maxima in 8 bits too.
- `fp8` is e4m3 (Micikevicius et al., 2022, arXiv:2209.05433) with one scale an output channel. That scale can be folded
  into the incoming gradient, so one copy of the weights serves both directions on FP8 tensor cores
  (`engine.weights.product`).
- `int8` is symmetric with one scale an output channel (the weights of LLM.int8, arXiv:2208.07339, without outliers).

The tensors are ordinary frozen parameters, not a tensor class of their own, so that state dicts, FSDP2 and safetensors
need no special case; FP8 bytes are kept as uint8, and an offset has one dimension, for the same reason. What is derived
from them for FP8 products (`keep_for_fp8`) is a parameter too, so that sharding cuts it. The storages themselves are in
`engine.weights.stored`. Gives up: a weight whose size is no multiple of the block stays dense.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch import nn

from whet.base.extras import require
from whet.base.private import kept_in_fp32
from whet.engine.task import head_names
from whet.engine.weights.fp8 import quantise_fp8
from whet.engine.weights.nf4 import BLOCK, NESTED_BLOCK, Packed, fp8_scale
from whet.engine.weights.stored import INT8_MAX, DenseWeight, Fp8Weight, FrozenWeight, Int8Weight, Nf4Weight


class FrozenLinear(nn.Module):
    """y = x W^T + bias with W [out_features, in_features] stored in few bytes; only x has a gradient.

    Made empty and then filled, so that a loader can make room before it reads.
    """

    storage: ClassVar[str]

    def __init__(self, in_features: int, out_features: int, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias = None if bias is None else _frozen(bias)

    def fill(self, weight: torch.Tensor) -> None:
        """Quantise `weight` [out_features, in_features] into this layer, on the weight's device."""
        raise NotImplementedError

    def reserve(self) -> None:
        """Make room for a weight, without one: what a layer is counted with."""
        raise NotImplementedError

    @property
    def stored(self) -> FrozenWeight:
        """The weight as the tensors that this layer holds now."""
        raise NotImplementedError

    def keep_for_fp8(self, *, both_orders: bool) -> None:
        """Keep what FP8 products would else derive each time. both_orders: also bytes turned round, where the storage
        has such (twice the bytes)."""

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [out_features, in_features] in `dtype`, rebuilt from the codes."""
        return self.stored.dense(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return FrozenProduct.apply(x, self)  # type: ignore[return-value]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, storage={self.storage}"


class Nf4Linear(FrozenLinear):
    """The tensors of `engine.weights.nf4.Packed`; the tables are buffers."""

    storage = "nf4"
    packed: nn.Parameter
    absmax: nn.Parameter
    nested_absmax: nn.Parameter | None
    nested_offset: nn.Parameter | None
    fp8_scale: nn.Parameter | None
    code: torch.Tensor
    nested_code: torch.Tensor | None

    def __init__(
        self, in_features: int, out_features: int, bias: torch.Tensor | None = None, *, double_quant: bool = True
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.double_quant = double_quant
        self.register_parameter("fp8_scale", None)

    def fill(self, weight: torch.Tensor) -> None:
        functional = require("bitsandbytes.functional", "base.storage: nf4")
        packed, state = functional.quantize_4bit(
            weight.detach().contiguous(), blocksize=BLOCK, compress_statistics=self.double_quant, quant_type="nf4"
        )
        self.take(packed, state)

    def reserve(self) -> None:
        blocks = -(-self.in_features * self.out_features // BLOCK)
        self.packed = _frozen(torch.empty(self.out_features, self.in_features // 2, dtype=torch.uint8))
        self.absmax = _frozen(torch.empty(blocks, dtype=torch.uint8 if self.double_quant else torch.float32))
        self.register_buffer("code", torch.empty(16), persistent=False)
        nested = torch.empty(-(-blocks // NESTED_BLOCK)), torch.empty(1), torch.empty(256)
        self.nested_absmax = _frozen(nested[0]) if self.double_quant else None
        self.nested_offset = _frozen(nested[1]) if self.double_quant else None
        self.register_buffer("nested_code", nested[2] if self.double_quant else None, persistent=False)

    def take(self, packed: torch.Tensor, state: Any) -> None:
        """Keep what bitsandbytes quantised: `packed` bytes and its QuantState, from here or from a checkpoint."""
        self.packed = _frozen(packed.reshape(self.out_features, -1))
        self.absmax = _frozen(state.absmax)
        self.register_buffer("code", state.code, persistent=False)
        self.nested_absmax = self.nested_offset = None
        self.register_buffer("nested_code", None, persistent=False)
        if state.nested:
            self.nested_absmax = _frozen(state.state2.absmax)
            self.nested_offset = _frozen(state.offset.reshape(1))
            self.register_buffer("nested_code", state.state2.code, persistent=False)

    def tensors(self) -> Packed:
        """What `engine.weights.nf4` rebuilds the weight from."""
        nested = self.nested_absmax, self.nested_offset, self.code, self.nested_code
        return Packed(self.packed, self.absmax, *nested, self.fp8_scale)

    @property
    def stored(self) -> Nf4Weight:
        return Nf4Weight((self.tensors(),))

    def keep_for_fp8(self, *, both_orders: bool) -> None:
        self.fp8_scale = _frozen(fp8_scale(self.tensors()._replace(fp8_scale=None)))


class Fp8Linear(FrozenLinear):
    """The tensors of `engine.weights.stored.Fp8Weight`."""

    storage = "fp8"
    codes: nn.Parameter
    scale: nn.Parameter
    turned: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: torch.Tensor | None = None) -> None:
        super().__init__(in_features, out_features, bias)
        self.register_parameter("turned", None)

    def fill(self, weight: torch.Tensor) -> None:
        codes, scale = quantise_fp8(weight.detach())
        self.codes, self.scale = _frozen(codes.view(torch.uint8)), _frozen(scale)

    def reserve(self) -> None:
        self.codes = _frozen(torch.empty(self.out_features, self.in_features, dtype=torch.uint8))
        self.scale = _frozen(torch.empty(self.out_features))

    @property
    def stored(self) -> Fp8Weight:
        return Fp8Weight(self.codes, self.scale, self.turned)

    def keep_for_fp8(self, *, both_orders: bool) -> None:
        if both_orders:
            self.turned = _frozen(self.codes.t().contiguous())


class Int8Linear(FrozenLinear):
    """The tensors of `engine.weights.stored.Int8Weight`."""

    storage = "int8"
    codes: nn.Parameter
    scale: nn.Parameter

    def fill(self, weight: torch.Tensor) -> None:
        wide = weight.detach().float()
        scale = wide.abs().amax(1).clamp_min(1e-12) / INT8_MAX
        self.codes = _frozen(torch.round(wide / scale[:, None]).to(torch.int8))
        self.scale = _frozen(scale)

    def reserve(self) -> None:
        self.codes = _frozen(torch.empty(self.out_features, self.in_features, dtype=torch.int8))
        self.scale = _frozen(torch.empty(self.out_features))

    @property
    def stored(self) -> Int8Weight:
        return Int8Weight(self.codes, self.scale)


class FrozenProduct(torch.autograd.Function):
    """x W^T + bias that keeps nothing for backward but the module: W is rebuilt, not saved."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, module: FrozenLinear) -> torch.Tensor:
        ctx.module = module
        return nn.functional.linear(x, module.dense(x.dtype), module.bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor):
        grad = grad_outputs[0]
        return grad @ ctx.module.stored.again().dense(grad.dtype), None


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)


def dense_weight(linear: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """The weight [out, in] of a plain or a frozen linear layer, in `dtype`."""
    return stored_weight(linear).dense(dtype)


def stored_weight(linear: nn.Module) -> FrozenWeight:
    """The weight of a plain or a frozen linear layer as the tensors that it holds now."""
    if isinstance(linear, FrozenLinear):
        return linear.stored
    assert isinstance(linear.weight, torch.Tensor)
    return DenseWeight(linear.weight)


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes x W^T + b and nothing else: a subclass of nn.Linear that gives something else (a
    router, BitLinear) does not."""
    return isinstance(module, FrozenLinear) or _is_linear_class(type(module))


@functools.cache
def _is_linear_class(kind: type[nn.Module]) -> bool:
    """The same of a class. One with a forward of its own is tried on a layer of 4 by 3: Falcon's gives what nn.Linear
    does, and what cannot be made or gives another result is none."""
    from transformers.pytorch_utils import Conv1D

    if kind.forward in (nn.Linear.forward, Conv1D.forward):
        return True
    if not issubclass(kind, nn.Linear):
        return False
    try:
        with torch.no_grad(), torch.device("cpu"):  # a plan counts its model without memory
            x, tried = torch.linspace(-2, 2, 20).view(5, 4), kind(4, 3)
            given = tried(x)
        return isinstance(given, torch.Tensor) and torch.allclose(
            given, nn.functional.linear(x, tried.weight, tried.bias)
        )
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError):
        return False


def linear_names(model: nn.Module) -> list[str]:
    """Full names of the linear layers of a transformer, without its output head or classifier.

    One whose weight the module above reads past its forward (in torch's MultiheadAttention) is none of them: what is
    put in its place would be bypassed.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    new = tuple(f"{name}." for name in head_names(model))
    read_by_parent = {id(inner) for module in model.modules() if isinstance(module, nn.MultiheadAttention)
                      for inner in module.modules()}  # fmt: skip
    return [
        name for name, module in model.named_modules()
        if is_linear(module) and module is not head and id(module) not in read_by_parent
        and not f"{name}.".startswith(new)
    ]  # fmt: skip


def frozen_names(model: nn.Module) -> list[str]:
    """Of these, the ones that a storage may take: not those that the architecture wants in full precision (T5's wo)."""
    kept = kept_in_fp32(model)
    return [name for name in linear_names(model) if kept.isdisjoint(name.split("."))]


def hollow(linear: nn.Linear, storage: str, double_quant: bool = True) -> FrozenLinear | None:
    """An empty frozen layer in the shape of `linear`, or None where its size does not fit the storage."""
    columns, rows = linear.in_features, linear.out_features
    bias = None if linear.bias is None else linear.bias.detach()
    if storage == "nf4":
        fits = columns * rows % BLOCK == 0 and columns % 2 == 0
        return Nf4Linear(columns, rows, bias, double_quant=double_quant) if fits else None
    if storage == "fp8":
        return Fp8Linear(columns, rows, bias) if columns % 16 == 0 and rows % 16 == 0 else None
    assert storage == "int8", storage
    return Int8Linear(columns, rows, bias)


def freeze(linear: nn.Linear, storage: str, double_quant: bool = True) -> FrozenLinear | None:
    """The frozen form of one linear layer, or None where its size does not fit the storage."""
    frozen = hollow(linear, storage, double_quant)
    if frozen is not None:
        frozen.fill(linear.weight)
    return frozen


def freeze_linears(model: nn.Module, storage: str, double_quant: bool = True) -> int:
    """Replace every linear layer but the output head by its frozen form, on this instance; returns how many.

    One layer at a time, so that dense and packed weights never stand side by side for more than one layer.
    """
    replaced = 0
    for name in frozen_names(model):
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        linear = getattr(parent, child)
        frozen = freeze(linear, storage, double_quant) if isinstance(linear, nn.Linear) else None
        if frozen is not None:
            setattr(parent, child, frozen)
            replaced += 1
    return replaced


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; a packed weight counts as the weights it stands for."""
    packed: set[int] = set()
    total = 0
    for module in model.modules():
        if isinstance(module, FrozenLinear):
            total += module.in_features * module.out_features
            packed |= {id(p) for name, p in module.named_parameters() if name != "bias"}
    plain = [p for p in model.parameters() if id(p) not in packed]
    trainable = sum(p.numel() for p in plain if p.requires_grad)
    return trainable, total + sum(p.numel() for p in plain)
