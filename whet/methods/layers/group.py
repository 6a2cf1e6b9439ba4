"""LoRA over all linear layers that read one input, as one product: query, key and value; gate and up.

Side by side their weights make one matrix, their A one, and their B one block-diagonal matrix. A group of G layers then
costs three products forward and five backward instead of 3 G and 5 G, the input is read once, and the update is added
in place into the output that the frozen product has just written. Backward keeps the input [T, K], which the norm
before it keeps anyway, and the rank-r product [T, G r].

A group is a module of the block that the layers were in, and owns their weights as parameters; in place of each layer a
`methods.layers.member.GroupMember` asks it for its part. So `parameters()` tells all that is trained, and sharding,
moving and counting need to know nothing of groups. Files have PEFT's names (`methods.layers.state`).

Products run in the arithmetic's type. The copies of A and B in that type, B's with its zeros, are made once a step for
all groups of one shape, in a few launches (`Copies`). A group uses them only while they are those of the very
parameters that it has; where others took their place (`fully_shard` puts gathered ones in for the forward pass) it
makes its copies anew in every forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from whet.base.private import copy_all
from whet.engine.compute.dropout import Draws, keyed_dropout
from whet.engine.weights.joined import joined_weight
from whet.engine.weights.product import backward_product, forward_product
from whet.engine.weights.stored import FrozenWeight


class GroupProduct(torch.autograd.Function):
    """y = x W^T + bias + scale (low A^T) B^T.

    x [T, K]; low: what A reads, x after dropout, or None for x itself; a [G r, K] and b [sum of N, r]: float32, the
    leaves, read only by their copies: `copy_b` [sum of N, G r] is block-diagonal and has the scale in it; sizes: N of
    each layer; storage: the class of W, whose tensors are `weight`; fp8: multiply W on FP8 tensor cores.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, low: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, copy_a: torch.Tensor,
        copy_b: torch.Tensor, bias: torch.Tensor | None, sizes: tuple[int, ...], scale: float, fp8: bool,
        storage: type[FrozenWeight], *weight: torch.Tensor | None,
    ):  # fmt: skip
        reduced = (x if low is None else low) @ copy_a.t()
        y = forward_product(storage.of(weight), x, bias, (reduced, copy_b), fp8=fp8)
        ctx.save_for_backward(x if low is None else low, reduced, copy_a, copy_b, *weight)
        ctx.sizes, ctx.scale, ctx.fp8, ctx.storage, ctx.dropped = sizes, scale, fp8, storage, low is not None
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor):
        low, reduced, copy_a, copy_b, *weight = ctx.saved_tensors
        grad = grad_outputs[0]
        grad_reduced = grad @ copy_b
        grad_x = grad_low = None
        if ctx.needs_input_grad[0]:
            update = None if ctx.dropped else (grad_reduced, copy_a.t())
            grad_x = backward_product(ctx.storage.of(weight), grad, update, fp8=ctx.fp8)
            if ctx.dropped:
                grad_low = grad_reduced @ copy_a
        grad_a = _product_in_fp32(grad_reduced.t(), low)
        grad_b = _diagonal_blocks(grad.t() @ reduced, ctx.sizes) * ctx.scale
        return (grad_x, grad_low, grad_a, grad_b, *([None] * (7 + len(weight))))


def _product_in_fp32(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left [M, K] @ right [K, N] in float32, written so by the product itself where the device can."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()


def _diagonal_blocks(wide: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """The blocks [N, r] on the diagonal of [sum of N, G r], one below the other: float32 [sum of N, r]."""
    r, start, blocks = wide.shape[1] // len(sizes), 0, []
    for index, size in enumerate(sizes):
        blocks.append(wide[start : start + size, index * r : (index + 1) * r].float())
        start += size
    return torch.cat(blocks)


@dataclass(frozen=True)
class Shape:
    """What groups must have in common to be copied together. inputs: K; sizes: outputs N of each layer; scale: of the
    update; compute: the type of the arithmetic."""

    inputs: int
    sizes: tuple[int, ...]
    r: int
    scale: float
    compute: torch.dtype


@dataclass(frozen=True)
class Copy:
    """A and B in the arithmetic's type, as `GroupProduct` reads them, and the parameters that they were made of."""

    a: torch.Tensor
    b: torch.Tensor
    of_a: nn.Parameter
    of_b: nn.Parameter

    def __deepcopy__(self, memo: Any) -> None:
        """A copy of the model goes without: it has parameters of its own, and nobody would bring these up to them."""


@dataclass
class Waiting:
    """Outputs that were computed for x and have not been asked for yet."""

    x: torch.Tensor | None = None
    outputs: list[torch.Tensor] = field(default_factory=list)


class LoraGroup(nn.Module):
    """Several linear layers of one input and their LoRA.

    base: what `engine.weights.joined.join` made of their weights; bias [sum of N] in the arithmetic's type, or None; a
    [G r, K], b [sum of N, r]: float32, of one layer below those of the other. members: where the layers stand, from
    the module that this one is a child of; adapter: PEFT's name of it; enabled: whether the update is added. draws and
    number: what the masks of its dropout depend on.
    """

    copy: Copy | None = None
    bias: nn.Parameter | None

    def __init__(
        self, base: nn.Module, bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, shape: Shape,
        members: tuple[str, ...], adapter: str,
    ) -> None:  # fmt: skip
        super().__init__()
        self.base = base
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        self.shape, self.members, self.adapter = shape, members, adapter
        self.dropout, self.fp8, self.enabled = 0.0, False, True
        self.waiting = Waiting()
        self.draws, self.number = Draws(a.device, 0), torch.zeros((), dtype=torch.int32, device=a.device)

    def output(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """The output [..., N] of layer `index` for x [..., K]: all are computed when the first is asked for."""
        sizes, waiting = self.shape.sizes, self.waiting
        if len(sizes) == 1:
            return self(x)
        if index == 0:
            waiting.x, waiting.outputs = x, list(self(x).split(sizes, dim=-1))
        elif waiting.x is not x:  # the model does something between them that it did not do when it was looked at
            return self(x).split(sizes, dim=-1)[index]
        y = waiting.outputs[index]
        if index == len(sizes) - 1:
            waiting.x, waiting.outputs = None, []
        return y

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., sum of N] for x [..., K]."""
        shape = self.shape
        x = x.to(shape.compute)
        if not self.enabled:
            return linear(x, joined_weight(self.base).dense(x.dtype), self.bias)
        flat = x.reshape(-1, x.shape[-1])
        drops = self.dropout and self.training
        low = keyed_dropout(flat, self.dropout, self.draws, self.number) if drops else None
        weight = joined_weight(self.base)
        y = GroupProduct.apply(
            flat, low, self.a, self.b, *self._copies(), self.bias, shape.sizes, shape.scale, self.fp8, type(weight),
            *weight.tensors(),
        )  # fmt: skip
        return y.view(*x.shape[:-1], y.shape[-1])  # type: ignore[union-attr]

    def _copies(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B as `GroupProduct` reads them."""
        copy = self.copy
        if copy is not None and copy.of_a is self.a and copy.of_b is self.b:
            return copy.a, copy.b
        self.copy = None
        shape = self.shape
        b = (self.b.detach() * shape.scale).to(shape.compute)
        return self.a.detach().to(shape.compute), torch.block_diag(*b.split(shape.sizes))

    def extra_repr(self) -> str:
        return f"{', '.join(self.members)}, r={self.shape.r}, scale={self.shape.scale:g}, fp8={self.fp8}"


class Copies:
    """The copies of all groups of one shape: a [L, G r, K], and b [L, sum of N, G r], times the scale."""

    def __init__(self, shape: Shape, groups: Sequence[LoraGroup]) -> None:
        wide, device = len(shape.sizes) * shape.r, groups[0].a.device
        self.shape, self.groups = shape, groups
        self.a = torch.empty(len(groups), wide, shape.inputs, device=device, dtype=shape.compute)
        self.b = torch.zeros(len(groups), sum(shape.sizes), wide, device=device, dtype=shape.compute)
        for index, group in enumerate(groups):
            group.copy = Copy(self.a[index], self.b[index], group.a, group.b)

    def hold(self) -> bool:
        """Whether they are still those of the groups' parameters; if they are not, the groups are rid of them."""
        if all(g.copy is not None and g.copy.of_a is g.a and g.copy.of_b is g.b for g in self.groups):
            return True
        for group in self.groups:
            group.copy = None
        return False

    @torch.no_grad()
    def refresh_b(self) -> None:
        """Bring those of B up to the parameters, in 1 + G launches."""
        shape, start = self.shape, 0
        rows = torch.stack([group.b for group in self.groups])
        for index, size in enumerate(shape.sizes):
            block = slice(start, start + size)
            torch.mul(rows[:, block], shape.scale, out=self.b[:, block, index * shape.r : (index + 1) * shape.r])
            start += size


class Groups:
    """The groups of a model. draws: what all their dropout masks depend on, None where nothing is dropped."""

    def __init__(self, groups: Sequence[LoraGroup], seed: int = 0) -> None:
        self._groups = list(groups)
        draws = Draws(groups[0].a.device, seed) if any(group.dropout for group in groups) else None
        self.draws = draws
        if draws is not None:
            for number, group in enumerate(groups):
                group.draws = draws
                group.number.fill_(number)
        shapes: dict[Shape, list[LoraGroup]] = {}
        for group in groups:
            shapes.setdefault(group.shape, []).append(group)
        self._copies = [Copies(shape, alike) for shape, alike in shapes.items()]
        self.refresh()

    def __len__(self) -> int:
        return len(self._groups)

    def refresh(self) -> None:
        """Bring the copies up to date; to be called before the forward passes of a step. Copies whose parameters were
        replaced are dropped for good."""
        self._copies = [copies for copies in self._copies if copies.hold()]
        with torch.no_grad():
            slices = [slice_of_a for copies in self._copies for slice_of_a in copies.a.unbind()]
            copy_all(slices, [group.a for copies in self._copies for group in copies.groups])
        for copies in self._copies:
            copies.refresh_b()
