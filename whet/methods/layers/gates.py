"""A sparse difference to a weight: base + z w, with a learned gate z for each number of w and one for its tensor.

Gates are hard-concrete (Louizos et al., 2018, arXiv:1712.01312): a stretched, clamped sigmoid of noise, so that exact
zeros have a probability, and the expected number of non-zeros has a gradient. A mask that is decided lives in gates so
far out that noise cannot move them. The sum is computed through `torch.nn.utils.parametrize` on the instance. Gives up:
memory, a number and a gate for each of the base; and CUDA graphs.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.utils import parametrize

from whet.methods.layers.rates import rate_ratio, set_rate_ratio

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

    def __init__(self, base: torch.Tensor, structured: bool, rate_ratio: float, dense_rate_ratio: float) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros_like(base, dtype=torch.float32))
        set_rate_ratio(self.weights, dense_rate_ratio)
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


def add_difference(
    places: list[tuple[nn.Module, str]], base: nn.Parameter, *, structured: bool, rate_ratio: float,
    dense_rate_ratio: float, training: bool,
) -> None:  # fmt: skip
    """One gated difference to `base` in all modules that hold it, under the names that they have for it.

    rate_ratio: of the gates; dense_rate_ratio: of the differences, until `at_full_rate` takes it away.
    """
    diff = Diff(base, structured, rate_ratio, dense_rate_ratio).train(training)
    for module, leaf in places:
        parametrize.register_parametrization(module, leaf, diff, unsafe=True)


def differences_of(model: nn.Module) -> list[Diff]:
    """All of a model, in order."""
    return [module for module in model.modules() if isinstance(module, Diff)]


def at_full_rate(optimiser: torch.optim.Optimizer, model: nn.Module) -> None:
    """Before each update, let differences whose mask is fixed learn at the learning rate itself."""
    diffs = differences_of(model)
    there = {id(diff.weights) for diff in diffs}
    smallest = min(diffs, key=lambda diff: diff.gates.numel())

    def before(*_: object) -> None:
        if smallest.fixed:  # read off the gates, so that a resumed run knows it too
            for group in (g for g in optimiser.param_groups if any(id(p) in there for p in g["params"])):
                group["lr"] /= rate_ratio(group["params"][0])

    optimiser.register_step_pre_hook(before)


def expected_nonzeros(model: nn.Module) -> tuple[torch.Tensor, int]:
    """(expected number of non-zeros in a model, a scalar with its gradient; how many numbers have a gate)."""
    diffs = differences_of(model)
    return torch.stack([diff.expected() for diff in diffs]).sum(), sum(diff.weights.numel() for diff in diffs)


@torch.no_grad()
def keep_largest(model: nn.Module, density: float) -> None:
    """Fix the gates: open for the largest differences of the model, a share `density` of them; shut for the rest."""
    diffs = differences_of(model)
    sizes = torch.cat([diff.difference(False).abs().flatten() for diff in diffs])
    kept = torch.zeros_like(sizes, dtype=torch.bool)
    kept[sizes.topk(max(1, int(density * len(sizes)))).indices] = True
    kept &= sizes > 0
    for diff, mask in zip(diffs, kept.split([diff.weights.numel() for diff in diffs]), strict=True):
        diff.keep(mask)


@torch.no_grad()
def sparse_values(model: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Name of each parameter that differs to the places (int32 where they fit, in the flattened tensor) and values of
    its difference."""
    found = {}
    for name, original in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if leaf != "original" or original.requires_grad:
            continue
        flat = model.get_submodule(owner)[0].difference(False).flatten()  # type: ignore[index,operator]
        places = flat.nonzero().flatten()
        if len(places):
            found[name] = places.to(torch.int32 if len(flat) < 2**31 else torch.int64), flat[places]
    return found
