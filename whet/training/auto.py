"""The settings that a recipe leaves open and the rows or the hardware decide, each with its reason.

What decides how the model sits on the hardware is not here: that is the layout (`planning.decide`).
"""

from __future__ import annotations

import math
from typing import Any

from whet.data.prepare import Prepared
from whet.engine.device import Placement
from whet.recipe import Recipe

DECAY_RATIO = 0.2
Decided = dict[str, tuple[object, str]]


def decide_settings(recipe: Recipe, prepared: Prepared, placement: Placement, config: Any = None) -> Decided:
    """Dotted path to (value, reason) of every open setting. config: of the model, None: unknown."""
    train, method = recipe.train, recipe.method
    decided = dict(prepared.decided) | _of_base(recipe, placement)
    if train.learning_rate is None:
        rate, why = method.can.rate_for(config)
        decided["train.learning_rate"] = (rate, f"usual for {method.name}{why}")
    decided |= {f"method.{name}": entry for name, entry in method.decided().items()}
    decided |= _of_steps(recipe, prepared)
    if train.lr_scheduler_type == "warmup_stable_decay" and train.decay_ratio is None:
        decided["train.decay_ratio"] = (DECAY_RATIO, "the last fifth")
    decided |= {path: entry for path, entry in _of_rows(recipe).items() if path not in prepared.decided}
    return decided


def _of_base(recipe: Recipe, placement: Placement) -> Decided:
    """Device, arithmetic and storage."""
    decided: Decided = {}
    resolved = {"device": placement.device.type, "compute": placement.arithmetic, "storage": placement.storage}
    for name, value in resolved.items():
        if getattr(recipe.base, name) is None:
            decided[f"base.{name}"] = (value, placement.reasons.get(f"base.{name}", "follows from base.storage"))
    if recipe.base.double_quant is None and placement.storage == "nf4":
        decided["base.double_quant"] = (True, "usual for nf4")
    return decided


def _of_steps(recipe: Recipe, prepared: Prepared) -> Decided:
    """How many optimiser steps there are, and when to look and to save."""
    train, decided = recipe.train, {}
    per_step = train.per_device_train_batch_size * train.gradient_accumulation_steps
    units = len(prepared.bins) if prepared.bins is not None else len(prepared.train)
    per_epoch = math.ceil(units / per_step)
    if train.max_steps is None:
        steps = math.ceil(per_epoch * train.num_train_epochs)
        decided["train.max_steps"] = (steps, f"{train.num_train_epochs:g} epochs of {per_epoch} steps")
    if train.eval_steps is None:
        decided["train.eval_steps"] = (per_epoch, "once an epoch")
    if train.save_steps is None:
        decided["train.save_steps"] = (train.eval_steps or per_epoch, "with every evaluation")
    return decided


def _of_rows(recipe: Recipe) -> Decided:
    """How rows share a batch."""
    if recipe.method.can.inside:
        usual = (True, "the model passed the isolation check")
        return {} if recipe.data.padding_free is not None else {"data.padding_free": usual}
    why = f"{recipe.method.name} puts tokens in front of each row"
    return {f"data.{name}": (False, why) for name in ("packing", "padding_free")}
