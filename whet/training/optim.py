"""Optimisers: torch's, on the device or on the host, and bitsandbytes' 8-bit ones on a CUDA GPU.

A parameter may learn at a multiple of the learning rate (`methods.layers.rates`, for LoRA+): it stands in a
group of its own, whose rate is that multiple of the schedule's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from whet.base.errors import UserError
from whet.base.extras import require
from whet.engine.memory.host_adam import HostAdamW
from whet.methods.layers.rates import rate_ratio
from whet.settings import Train

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


def check_optimiser(train: Train, device: torch.device) -> None:
    """Refuse settings that could not take effect. Raises UserError; loads nothing."""
    adam = train.optim in ("adamw", "adamw_8bit", "paged_adamw_8bit")
    for name in ("adam_beta1", "adam_beta2", "adam_epsilon"):
        if getattr(train, name) is not None and not adam:
            raise UserError(
                f"{train.optim} has no such setting", field=f"train.{name}", found=str(getattr(train, name)),
                expected="auto", fix="train.optim=adamw, or remove the line",
            )  # fmt: skip
    if train.decay_ratio is not None and train.lr_scheduler_type != "warmup_stable_decay":
        raise UserError(
            f"the {train.lr_scheduler_type} schedule has no decay phase", field="train.decay_ratio",
            found=str(train.decay_ratio), expected="auto",
            fix="train.lr_scheduler_type=warmup_stable_decay, or remove the line",
        )  # fmt: skip
    if train.offload_optimizer and train.optim != "adamw":
        raise UserError(
            f"{train.optim} has no form on the host", field="train.offload_optimizer", found=f"true with {train.optim}",
            expected="adamw", fix="train.optim=adamw, or train.offload_optimizer=auto",
        )  # fmt: skip
    if train.optim.endswith("8bit") and device.type != "cuda":
        raise UserError(
            "8-bit optimisers run on CUDA only", field="train.optim", found=f"{train.optim} on {device.type}",
            expected="adamw, adafactor or sgd", fix="train.optim=adamw",
        )  # fmt: skip


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
