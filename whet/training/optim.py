"""Optimisers: torch's, on the device or on the host, and those with moments of 8 bits.

A parameter may learn at a multiple of the learning rate (`methods.layers.rates`, for LoRA+): it stands in a
group of its own, whose rate is that multiple of the schedule's.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from whet.base.extras import require
from whet.engine.memory.adam_8bit import AdamW8bit
from whet.engine.memory.host_adam import HostAdamW
from whet.methods.layers.rates import rate_ratio
from whet.settings import Train

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
EIGHT_BIT = ("adamw_8bit", "paged_adamw_8bit")


class Optimiser(Protocol):
    """What a step, a checkpoint and the end of a run ask of an optimiser, wherever its state lies."""

    param_groups: list[dict[str, Any]]

    @property
    def exact_weights(self) -> Mapping[torch.nn.Parameter, torch.Tensor]:
        """Weights that it has in more bits than the model, by the model's parameter."""
        ...

    def forget_broken_step(self) -> None:
        """Forget what a step that was broken off has left."""
        ...

    def collect_gradients(self) -> None:
        """Bring the gradients of all backward passes to where `param_groups` has its parameters."""
        ...

    def step(self) -> Any: ...
    def zero_grad(self, set_to_none: bool = True) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...

    def follow_weights(self) -> None:
        """Take over weights that were written from outside."""
        ...

    def hand_back(self) -> None:
        """Leave the exact weights to the model: training is over."""
        ...


class OnDevice:
    """Mixed into an optimiser that updates the model's own parameters: there is nothing to carry."""

    @property
    def exact_weights(self) -> Mapping[torch.nn.Parameter, torch.Tensor]:
        return {}

    def forget_broken_step(self) -> None: ...
    def collect_gradients(self) -> None: ...
    def follow_weights(self) -> None: ...
    def hand_back(self) -> None: ...


@functools.cache
def _on_device(kind: type) -> Any:
    return type(kind.__name__, (OnDevice, kind), {})


def build_optimiser(
    train: Train, parameters: Sequence[torch.nn.Parameter], *, captured: bool = False,
    paged: bool = False, masters: Mapping[torch.nn.Parameter, torch.Tensor] | None = None,
) -> Optimiser:  # fmt: skip
    """The optimiser over trainable parameters; weight decay on matrices only, not on biases or norms.

    captured: the update will be part of a CUDA graph, so each rate is a tensor on the device. paged: moments of 8 bits
    lie in memory that moves between GPU and host (bitsandbytes). masters: not None for AdamW on the host, then the
    float32 weights that are there already (`engine.memory.host_adam`).
    """
    rate = train.learning_rate
    assert rate is not None, "decided before"
    on_device = captured or (train.optim in EIGHT_BIT and not paged)
    groups = _parameter_groups(parameters, rate, train.weight_decay, on_device=on_device)
    if train.optim == "sgd":
        return _on_device(torch.optim.SGD)(groups, lr=rate, momentum=0.9)
    if train.optim == "adafactor":
        return _on_device(torch.optim.Adafactor)(groups, lr=rate)
    beta1 = BETA1 if train.adam_beta1 is None else train.adam_beta1
    beta2 = BETA2 if train.adam_beta2 is None else train.adam_beta2
    epsilon = EPSILON if train.adam_epsilon is None else train.adam_epsilon
    if masters is not None:
        return HostAdamW(groups, masters, lr=rate, betas=(beta1, beta2), eps=epsilon)
    if train.optim == "adamw":
        return _on_device(torch.optim.AdamW)(
            groups, lr=groups[0]["lr"], betas=(beta1, beta2), eps=epsilon, fused=True, capturable=captured
        )
    if not paged:
        return _on_device(AdamW8bit)(groups, lr=groups[0]["lr"], betas=(beta1, beta2), eps=epsilon)
    optim = require("bitsandbytes.optim", f"train.optim: {train.optim}")
    return _on_device(optim.PagedAdamW8bit)(groups, lr=rate, betas=(beta1, beta2), eps=epsilon)


def _parameter_groups(
    parameters: Sequence[torch.nn.Parameter], rate: float, decay: float, *, on_device: bool
) -> list[dict[str, Any]]:
    """Parameters of one weight decay and one rate together: matrices first, then what has one dimension."""
    groups = []
    matrices, vectors = [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]
    for members, its_decay in ((matrices, decay), (vectors, 0.0)):
        for ratio in dict.fromkeys(map(rate_ratio, members)):
            chosen = [parameter for parameter in members if rate_ratio(parameter) == ratio]
            its_rate: Any = torch.tensor(rate * ratio, device=chosen[0].device) if on_device else rate * ratio
            groups.append({"params": chosen, "weight_decay": its_decay, "lr": its_rate, "rate_ratio": ratio})
    return groups


def set_rate(optimiser: Optimiser, rate: float) -> None:
    """Set the learning rate of every group, where it is a tensor in place."""
    for group in optimiser.param_groups:
        its_own = rate * group.get("rate_ratio", 1.0)
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(its_own)
        else:
            group["lr"] = its_own
