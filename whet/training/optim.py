"""Optimisers: torch's, on the device or on the host, and bitsandbytes' 8-bit ones on a CUDA GPU.

A parameter may learn at a multiple of the learning rate (`methods.layers.group.rate_ratio`, for LoRA+): it stands in a
group of its own, whose rate is that multiple of the schedule's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from whet.base.extras import require
from whet.engine.memory.host_adam import HostAdamW
from whet.methods.layers.group import rate_ratio
from whet.settings import Train

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


def build_optimiser(
    train: Train, matrices: Sequence[torch.nn.Parameter], vectors: Sequence[torch.nn.Parameter], rate: float, *,
    captured: bool = False, masters: Mapping[torch.nn.Parameter, torch.Tensor] | None = None,
) -> torch.optim.Optimizer:  # fmt: skip
    """The optimiser over the trainable parameters; weight decay on matrices only, not on biases or norms.

    captured: the update will be part of a CUDA graph, so each rate is a tensor on the device. masters: not None for
    AdamW on the host, then the float32 weights that are there already (`engine.memory.host_adam`).
    """
    groups = []
    for parameters, decay in ((matrices, train.weight_decay), (vectors, 0.0)):
        for ratio in dict.fromkeys(map(rate_ratio, parameters)):
            chosen = [parameter for parameter in parameters if rate_ratio(parameter) == ratio]
            shown = torch.tensor(rate * ratio, device=chosen[0].device) if captured else rate * ratio
            groups.append({"params": chosen, "weight_decay": decay, "lr": shown, "rate_ratio": ratio})
    if train.optim == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=0.9)
    if train.optim == "adafactor":
        return torch.optim.Adafactor(groups, lr=rate)
    beta1 = BETA1 if train.adam_beta1 is None else train.adam_beta1
    beta2 = BETA2 if train.adam_beta2 is None else train.adam_beta2
    epsilon = EPSILON if train.adam_epsilon is None else train.adam_epsilon
    if masters is not None:
        return HostAdamW(groups, masters, lr=rate, betas=(beta1, beta2), eps=epsilon)
    if train.optim == "adamw":
        return torch.optim.AdamW(
            groups, lr=groups[0]["lr"], betas=(beta1, beta2), eps=epsilon, fused=True, capturable=captured
        )
    optim = require("bitsandbytes.optim", f"train.optim: {train.optim}")
    kind = optim.AdamW8bit if train.optim == "adamw_8bit" else optim.PagedAdamW8bit
    return kind(groups, lr=rate, betas=(beta1, beta2), eps=epsilon)


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group, where it is a tensor in place."""
    for group in optimiser.param_groups:
        its_own = rate * group.get("rate_ratio", 1.0)
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(its_own)
        else:
            group["lr"] = its_own
