"""LoRA over all linear layers that read one input, as one product: query, key and value; gate and up.

Side by side their weights make one matrix, their A one, and their B one block-diagonal matrix. A group of G layers then
costs three products forward and five backward instead of 3 G and 5 G, the input is read once, and the update is added
in place into the output that the frozen product has just written. Backward keeps the input [T, K], which the norm
before it keeps anyway, and the rank-r product [T, G r].

The fp32 master weights of all groups of one shape lie in one `Bank`, a row of it a group; PEFT's own lora_A and lora_B
become views of that row, so files, merging and switching see them as ever. The row is the leaf that gradients and the
optimiser know; where B learns at a rate of its own (LoRA+, see `rate_ratio`), it is two leaves, one for all A and one
for all B. Its copy in the arithmetic's type is refreshed once a step, in a few launches for the whole model.

Which layers share an input is found by running the model on a few tokens, not looked up. Gives up: layers that want
more than plain LoRA, or differ in rank, stand alone or go through PEFT's own layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.functional import dropout

from whet.engine.weights.linear import Fp8Linear, FrozenLinear, Int8Linear, Nf4Linear
from whet.engine.weights.nf4 import fp8_scale
from whet.engine.weights.product import Tensors, backward_product, forward_product


class GroupProduct(torch.autograd.Function):
    """y = x W^T + bias + scale (low A^T) B^T.

    x [T, K]; low: what A reads, x after dropout, or None for x itself; leaf: float32, the row of the bank, or its A
    with `leaf_b` for its B, read only by their copies a [G r, K], which has the scale in it, and b [N, G r]
    block-diagonal; sizes: N of each layer; weights: as `kind` lists them.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, low: torch.Tensor | None, leaf: torch.Tensor, leaf_b: torch.Tensor | None,
        a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, kind: str, sizes: tuple[int, ...], scale: float,
        *weights: torch.Tensor | None,
    ):  # fmt: skip
        reduced = (x if low is None else low) @ a.t()
        y = forward_product(kind, x, weights, bias, (reduced, b))
        ctx.save_for_backward(x if low is None else low, reduced, a, b, *weights)
        ctx.kind, ctx.sizes, ctx.scale, ctx.dropped, ctx.apart = kind, sizes, scale, low is not None, leaf_b is not None
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor):
        low, reduced, a, b, *weights = ctx.saved_tensors
        grad = grad_outputs[0]
        grad_reduced = grad @ b
        grad_x = grad_low = None
        if ctx.needs_input_grad[0]:
            grad_x = backward_product(ctx.kind, grad, weights, None if ctx.dropped else (grad_reduced, a.t()))
            if ctx.dropped:
                grad_low = grad_reduced @ a
        grads = _leaf_gradients(grad_reduced.t() @ low, grad.t() @ reduced, ctx.sizes, ctx.scale, apart=ctx.apart)
        return (grad_x, grad_low, *grads, *([None] * (6 + len(weights))))


def _leaf_gradients(
    grad_a: torch.Tensor, grad_b: torch.Tensor, sizes: tuple[int, ...], scale: float, *, apart: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradient of a bank's row, float32: A [G r, K], then the diagonal blocks [N, r] of B [sum of N, G r].

    apart: as two, of A and of B; else as one and None.
    """
    r = grad_a.shape[0] // len(sizes)
    blocks, start = [grad_a.flatten().float() * scale], 0
    for index, size in enumerate(sizes):
        blocks.append(grad_b[start : start + size, index * r : (index + 1) * r].float().flatten())
        start += size
    return (blocks[0], torch.cat(blocks[1:])) if apart else (torch.cat(blocks), None)


@dataclass(frozen=True)
class Shape:
    """What groups must agree on to share a bank. sizes: outputs N of each layer; inputs: K; scale: of the update."""

    inputs: int
    sizes: tuple[int, ...]
    r: int
    scale: float

    @property
    def a_numbers(self) -> int:
        return len(self.sizes) * self.r * self.inputs

    @property
    def numbers(self) -> int:
        return self.a_numbers + self.r * sum(self.sizes)


class Bank:
    """master float32 [L, numbers]; a [L, G r, K] (times the scale) and b [L, N, G r], its copies in the
    arithmetic's type."""

    def __init__(self, shape: Shape, count: int, device: torch.device, dtype: torch.dtype) -> None:
        wide = len(shape.sizes) * shape.r
        self.shape = shape
        self.master = torch.empty(count, shape.numbers, device=device)
        self.a = torch.empty(count, wide, shape.inputs, device=device, dtype=dtype)
        self.b = torch.zeros(count, sum(shape.sizes), wide, device=device, dtype=dtype)

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the copies up to the master weights."""
        shape, count = self.shape, len(self.master)
        torch.mul(self.master[:, : shape.a_numbers].view_as(self.a), shape.scale, out=self.a)
        start, place = 0, shape.a_numbers
        for index, size in enumerate(shape.sizes):
            block = self.b[:, start : start + size, index * shape.r : (index + 1) * shape.r]
            block.copy_(self.master[:, place : place + size * shape.r].view(count, size, shape.r))
            start, place = start + size, place + size * shape.r


@dataclass
class Group:
    """One product of the model. layers: in the order in which the model calls them; the first one computes for all."""

    layers: list[Any]
    kind: str
    scale: float
    dropout: float
    sizes: tuple[int, ...]
    weights: Tensors
    bias: torch.Tensor | None
    leaf: nn.Parameter
    leaf_b: nn.Parameter | None
    a: torch.Tensor
    b: torch.Tensor
    seen: torch.Tensor | None = None
    waiting: list[torch.Tensor] = field(default_factory=list)

    def output(self, place: int, x: torch.Tensor) -> torch.Tensor:
        """The output of layer `place` for x [..., K]: all are computed when the first is asked for."""
        if len(self.sizes) == 1:
            return self.product(x)
        if place == 0:
            self.seen = x
            self.waiting = list(self.product(x).split(self.sizes, dim=-1))
        elif self.seen is not x:  # the model does something between them that the probe did not see
            return self.product(x).split(self.sizes, dim=-1)[place]
        y = self.waiting[place]
        if place == len(self.sizes) - 1:
            self.seen, self.waiting = None, []
        return y

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """[..., sum of N] for x [..., K]."""
        x = x.to(self.a.dtype)
        flat = x.reshape(-1, x.shape[-1])
        low = dropout(flat, self.dropout) if self.dropout and self.layers[0].training else None
        y = GroupProduct.apply(
            flat, low, self.leaf, self.leaf_b, self.a, self.b, self.bias, self.kind, self.sizes, self.scale,
            *self.weights,
        )  # fmt: skip
        return y.view(*x.shape[:-1], y.shape[-1])  # type: ignore[union-attr]


@dataclass(frozen=True)
class Fused:
    """leaves: what the optimiser trains in place of the LoRA parameters of the groups; rest: the other parameters."""

    banks: list[Bank]
    groups: list[Group]
    rest: list[nn.Parameter]

    @property
    def leaves(self) -> list[nn.Parameter]:
        return [leaf for group in self.groups for leaf in (group.leaf, group.leaf_b) if leaf is not None]

    def refresh(self) -> None:
        """Bring the arithmetic's copies up to date; to be called before the forward passes of a step."""
        for bank in self.banks:
            bank.refresh()


def fuse(
    model: nn.Module,
    *,
    compute: torch.dtype,
    fp8: bool = False,
    keep_transposed: bool = False,
    adapter: str = "default",
) -> Fused:
    """Put every plain LoRA layer of `model` into a group, on this instance. Call it when the model is on its device.

    fp8: multiply quantised weights on FP8 tensor cores; keep_transposed: keep fp8 bytes in both orders (twice the
    bytes, no turning round in each step). The trainable parameters that are in no group are in `rest`.
    """
    found = _sharing(model, adapter)
    shapes: dict[Shape, list[list[Any]]] = {}
    for layers in found:
        sizes = tuple(layer.out_features for layer in layers)
        shapes.setdefault(_shape(layers, sizes, adapter), []).append(layers)
    banks, groups = [], []
    for shape, members in shapes.items():
        bank = Bank(shape, len(members), members[0][0].lora_A[adapter].weight.device, compute)
        banks.append(bank)
        for index, layers in enumerate(members):
            leaves = _adopt(bank, index, layers, adapter)
            group = _group(layers, adapter, leaves, bank, index, fp8=fp8, keep_transposed=keep_transposed)
            groups.append(group)
            for place, layer in enumerate(layers):
                layer.group, layer.place = group, place
    inside = {id(p) for group in groups for layer in group.layers for p in _matrices(layer, adapter)}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in inside]
    fused = Fused(banks, groups, rest)
    fused.refresh()
    return fused


def _shape(layers: list[Any], sizes: tuple[int, ...], adapter: str) -> Shape:
    first = layers[0]
    return Shape(first.in_features, sizes, first.r[adapter], float(first.scaling[adapter]))


def _matrices(layer: Any, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def rate_ratio(parameter: torch.Tensor) -> float:
    """How many times the learning rate this parameter learns at: 1, unless its method gave it a rate of its own."""
    return float(getattr(parameter, "rate_ratio", 1.0))


def set_rate_ratio(parameter: torch.Tensor, ratio: float) -> None:
    """Let this parameter learn at `ratio` times the learning rate. To be called before `fuse` and the optimiser."""
    parameter.rate_ratio = ratio  # type: ignore[attr-defined]


def _adopt(bank: Bank, index: int, layers: Sequence[Any], adapter: str) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Move the layers' matrices into the bank's row and make them views of it; returns the row as a leaf, or two."""
    row = bank.master[index]
    matrices = [_matrices(layer, adapter)[0] for layer in layers] + [_matrices(layer, adapter)[1] for layer in layers]
    start = 0
    with torch.no_grad():
        for matrix in matrices:
            view = row[start : start + matrix.numel()].view_as(matrix)
            view.copy_(matrix)
            matrix.data = view
            start += matrix.numel()
    ratio_a, ratio_b = rate_ratio(matrices[0]), rate_ratio(matrices[-1])
    if ratio_a == ratio_b:
        leaves = (nn.Parameter(row), None)
    else:
        leaves = (nn.Parameter(row[: bank.shape.a_numbers]), nn.Parameter(row[bank.shape.a_numbers :]))
        set_rate_ratio(leaves[1], ratio_b)
    set_rate_ratio(leaves[0], ratio_a)
    return leaves


def _group(
    layers: list[Any], adapter: str, leaves: tuple[nn.Parameter, nn.Parameter | None], bank: Bank, index: int, *,
    fp8: bool, keep_transposed: bool,
) -> Group:  # fmt: skip
    bases = [layer.base_layer for layer in layers]
    kind, weights = _side_by_side(bases, fp8=fp8, keep_transposed=keep_transposed)
    biases = [base.bias for base in bases]
    bias = None
    if any(one is not None for one in biases):
        filled = [bank.a.new_zeros(base.out_features) if base.bias is None else base.bias for base in bases]
        bias = torch.cat([one.detach().to(bank.a.dtype) for one in filled])
    return Group(
        layers=layers, kind=kind, scale=bank.shape.scale, dropout=_rate(layers[0], adapter),
        sizes=bank.shape.sizes, weights=weights, bias=bias, leaf=leaves[0], leaf_b=leaves[1], a=bank.a[index],
        b=bank.b[index],
    )  # fmt: skip


def _side_by_side(bases: list[Any], *, fp8: bool, keep_transposed: bool) -> tuple[str, Tensors]:
    """The weights of layers of one storage as one, without a second copy: each layer keeps a view of its rows."""
    first = bases[0]
    fp8 = fp8 and all(base.in_features % 16 == 0 and base.out_features % 16 == 0 for base in bases)  # as FP8 cores want
    if isinstance(first, Nf4Linear):
        each = [[*base.tensors(), *([fp8_scale(base.tensors())] if fp8 else [])] for base in bases]
        return ("nf4+fp8" if fp8 else "nf4"), [tensor for tensors in each for tensor in tensors]
    if isinstance(first, Fp8Linear | Int8Linear):
        codes = _joined([base.codes for base in bases])
        scale = _joined([base.scale for base in bases])
        kept = [codes.t().contiguous()] if fp8 and keep_transposed and isinstance(first, Fp8Linear) else []
        return first.storage + ("+fp8" if fp8 else ""), [codes, scale, *kept]
    return "dense", [_joined([base.weight for base in bases])]


def _joined(parameters: list[nn.Parameter]) -> torch.Tensor:
    """The parameters end to end along their rows; each becomes a view of the result."""
    if len(parameters) == 1:
        return parameters[0].detach()
    joined = torch.cat([parameter.detach() for parameter in parameters])
    start = 0
    for parameter in parameters:
        parameter.data = joined[start : start + parameter.shape[0]]
        start += parameter.shape[0]
    return joined


def _rate(layer: Any, adapter: str) -> float:
    return float(getattr(layer.lora_dropout[adapter], "p", 0.0))


@torch.no_grad()
def _sharing(model: nn.Module, adapter: str) -> list[list[Any]]:
    """The plain LoRA layers in groups that read the same tensor, in the order in which the model calls them."""
    from whet.methods.layers.lora_layer import LoraLinear

    parents = {child: parent for parent in model.modules() for child in parent.children()}
    layers = [module for module in model.modules() if isinstance(module, LoraLinear) and module.is_plain(adapter)]
    calls: list[tuple[Any, torch.Tensor]] = []
    hooks = [layer.register_forward_pre_hook(lambda layer, args: calls.append((layer, args[0]))) for layer in layers]
    was_training = model.training
    model.eval()
    try:
        device = next(p.device for p in model.parameters())
        model(input_ids=torch.zeros(1, 8, dtype=torch.long, device=device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    groups: list[list[Any]] = []
    inputs: list[torch.Tensor] = []
    grouped: set[Any] = set()
    for layer, x in calls:
        if layer in grouped:
            continue
        grouped.add(layer)
        if groups and inputs[-1] is x and _alike(groups[-1][0], layer, adapter, parents):
            groups[-1].append(layer)
        else:
            groups.append([layer])
            inputs.append(x)
    return groups


def _alike(first: Any, layer: Any, adapter: str, parents: dict[nn.Module, nn.Module]) -> bool:
    """Whether two layers of one module can be one product."""
    a, b = first.base_layer, layer.base_layer
    return (
        parents[first] is parents[layer]
        and type(a) is type(b)
        and first.in_features == layer.in_features
        and first.r[adapter] == layer.r[adapter]
        and first.scaling[adapter] == layer.scaling[adapter]
        and _rate(first, adapter) == _rate(layer, adapter)
        and (isinstance(a, FrozenLinear) or a.weight.dtype == b.weight.dtype)
        and not (isinstance(a, Nf4Linear) and a.double_quant != b.double_quant)
    )
