"""Diff pruning: a sparse difference to the base is learned (Guo et al., 2020, arXiv:2012.07463).

W' = W + z w, with a gate z for every number of w, and in the structured form times one for its whole tensor. Gates are
hard-concrete (Louizos et al., 2018, arXiv:1712.01312): a stretched, clamped sigmoid of noise, so that exact zeros have
a probability, and the expected number of non-zeros, which is penalised, has a gradient. After a share of the steps the
largest differences are kept, as many as `density` allows, and trained on with that mask: the mask lives in gates so far
out that noise cannot move them, so a checkpoint needs nothing else. Saved are places and differences.

W + z w is computed through `torch.nn.utils.parametrize` on the instance. Gives up: memory, about 32 bytes a parameter
for w, gates, gradients and AdamW's moments, and as much again for a moment of the step; CUDA graphs; packed storages.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import nn
from torch.nn.utils import parametrize

from whet.base.config import config, setting
from whet.engine.group import set_rate_ratio
from whet.engine.linear import linear_names
from whet.engine.task import CAUSAL, Task
from whet.methods.capability import DENSE, Capability
from whet.methods.delta import DIFFERENCES, PLACES, InPlaceMethod, holders, plain_name, train_only, trained_values
from whet.methods.structure import new_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOW, HIGH = -1.5, 1.5  # what the sigmoid is stretched to, and log alpha at the start: the authors' values
LOG_ALPHA = 5.0
DECIDED = 30.0  # log alpha of a gate that noise cannot move: log(u / (1 - u)) stays within 14
LEARNED = 10.0  # as far as learning takes log alpha, so that the two are told apart
NOISE_EDGE = 1e-6


def hard_concrete(log_alpha: torch.Tensor, random: bool) -> torch.Tensor:
    """Gates in [0, 1]: drawn anew, or the ones that are used without noise."""
    noise: torch.Tensor | float = 0.0
    if random:
        noise = torch.logit(torch.rand_like(log_alpha), eps=NOISE_EDGE)
    return (torch.sigmoid(noise + log_alpha) * (HIGH - LOW) + LOW).clamp(0, 1)


def open_probability(log_alpha: torch.Tensor) -> torch.Tensor:
    """The probability that a drawn gate is not zero."""
    return torch.sigmoid(log_alpha - math.log(-LOW / HIGH))


class Diff(nn.Module):
    """base + z w. weights: w, in the base's shape; gates: log alpha of each, flat, since vectors are not decayed;
    group: log alpha of the tensor as a whole, or None; all fp32."""

    def __init__(self, base: torch.Tensor, structured: bool, rate_ratio: float) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros_like(base, dtype=torch.float32))
        self.gates = nn.Parameter(torch.full((base.numel(),), LOG_ALPHA, device=base.device))
        self.group = nn.Parameter(torch.full((), LOG_ALPHA, device=base.device)) if structured else None
        for parameter in (self.gates, self.group):
            if parameter is not None:
                set_rate_ratio(parameter, rate_ratio)

    def forward(self, base: torch.Tensor) -> torch.Tensor:
        return (base.float() + self.difference(self.training)).to(base.dtype)

    def difference(self, random: bool) -> torch.Tensor:
        """z w, with gates drawn anew or without noise."""
        z = hard_concrete(self.gates, random).view_as(self.weights)
        return (z if self.group is None else z * hard_concrete(self.group, random)) * self.weights

    def expected(self) -> torch.Tensor:
        """The expected number of non-zeros."""
        each = open_probability(self.gates).sum()
        return each if self.group is None else each * open_probability(self.group)

    @torch.no_grad()
    def keep(self, mask: torch.Tensor) -> None:
        """Fix the gates: open where `mask` is true, shut elsewhere; the differences of the open ones stay."""
        self.weights.copy_(self.difference(False) * mask.view_as(self.weights))
        self.gates.copy_(torch.where(mask, DECIDED, -DECIDED))
        if self.group is not None:
            self.group.fill_(DECIDED)

    @torch.no_grad()
    def bound(self) -> None:
        """Keep what is learned within LEARNED."""
        for parameter in (self.gates, self.group):
            if parameter is not None:
                parameter.clamp_(-LEARNED, LEARNED)

    @property
    def fixed(self) -> bool:
        """Whether the gates are decided."""
        return bool(self.gates.detach().abs().min() > (DECIDED + LEARNED) / 2)


@config
class DiffPruning(InPlaceMethod):
    """Learn a sparse difference to the weights."""

    name: Literal["diff_pruning"] = setting("diff_pruning", "Learn a sparse difference to the weights.")
    density: Annotated[float, Gt(0), Le(1)] = setting(0.005, "Share of the parameters that may differ in the end.")
    parameters: Literal["all", "linear"] = setting("all", "all, or those of linear layers but the output head.")
    structured: bool = setting(True, "Also a gate for each tensor as a whole.")
    sparsity_weight: Annotated[float, Ge(0)] = setting(
        40.0, "Times the expected share of non-zeros is added to the loss (the paper: 1.25e-7 a parameter)."
    )
    gate_rate_ratio: Annotated[float, Gt(0)] = setting(1000.0, "Gates learn at this many times the learning rate.")
    fixed_mask_ratio: Annotated[float, Ge(0), Lt(1)] = setting(
        0.3, "Share of the steps, the last ones, that train only the differences which are kept; 0: none."
    )

    capability: ClassVar[Capability] = Capability(
        storages=DENSE, mergeable=True, peft_format=False, vllm=False, learning_rate=1e-4, shardable=False
    )

    def attach(self, network: PreTrainedModel, task: Task = CAUSAL) -> nn.Module:
        """The same network, frozen, with gated differences on it and a new head trainable."""
        head = new_head(network)
        train_only(network, head)
        linear = tuple(f"{name}." for name in linear_names(network)) if self.parameters == "linear" else ("",)
        places = holders(network)
        for name, parameter in list(network.named_parameters()):
            if name in head or ".parametrizations." in name or not name.startswith(linear):
                continue
            diff = Diff(parameter, self.structured, self.gate_rate_ratio).train(network.training)
            for module, leaf in places[id(parameter)]:
                parametrize.register_parametrization(module, leaf, diff, unsafe=True)
        return network

    def penalty(self, model: Any) -> torch.Tensor:
        """sparsity_weight times the expected share of non-zeros."""
        diffs = _diffs(model)
        total = sum(diff.weights.numel() for diff in diffs)
        return self.sparsity_weight / total * torch.stack([diff.expected() for diff in diffs]).sum()

    def before_step(self, model: Any, done: float) -> bool:
        """Project once the share `done` of the steps reaches the last phase."""
        diffs = _diffs(model)
        if diffs[0].fixed:
            return False
        for diff in diffs:
            diff.bound()
        last_phase = bool(self.fixed_mask_ratio) and done >= 1 - self.fixed_mask_ratio
        if last_phase:
            self.settle(model)
        return last_phase

    @torch.no_grad()
    def settle(self, model: Any) -> None:
        """Keep the largest differences, as many as the density allows; nothing happens when that is done."""
        diffs = _diffs(model)
        if diffs[0].fixed:
            return
        sizes = torch.cat([diff.difference(False).abs().flatten() for diff in diffs])
        kept = torch.zeros_like(sizes, dtype=torch.bool)
        kept[sizes.topk(max(1, int(self.density * len(sizes)))).indices] = True
        kept &= sizes > 0
        for diff, mask in zip(diffs, kept.split([diff.weights.numel() for diff in diffs]), strict=True):
            diff.keep(mask)

    @torch.no_grad()
    def tensors(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Places (int32 where they fit) and differences of each tensor that has any; a new head by its values."""
        found = {name: value for name, value in trained_values(model).items() if ".parametrizations." not in name}
        for name, original in model.named_parameters():
            owner, _, leaf = name.rpartition(".")
            if leaf != "original" or original.requires_grad:
                continue
            flat = model.get_submodule(owner)[0].difference(False).flatten()  # type: ignore[index,operator]
            places = flat.nonzero().flatten()
            if len(places):
                short = torch.int32 if len(flat) < 2**31 else torch.int64
                found[plain_name(name) + PLACES] = places.to(short)
                found[plain_name(name) + DIFFERENCES] = flat[places]
        return found


def _diffs(model: nn.Module) -> list[Diff]:
    return [module for module in model.modules() if isinstance(module, Diff)]
