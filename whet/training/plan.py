"""`whet plan`: what a recipe will need, before any weight is loaded; a model's config.json is enough."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from whet.engine.compute.head import CHUNK_LOGITS
from whet.engine.device import PACKED, place
from whet.engine.load.load import checkpoint_storage, empty_model, load_config, longest_input
from whet.engine.task import Task
from whet.engine.weights.linear import frozen_names
from whet.planning.asked import Asked, Structure
from whet.planning.memory import Sizes, plan_memory
from whet.planning.rules import STORAGE, STRUCTURE, TASK, check
from whet.recipe import Recipe
from whet.training.padded import assumed_task, is_padded

USUAL_LENGTH = 2048


def plan(recipe: Recipe, *, tokens: int | None = None, task: Task | None = None) -> dict[str, Any]:
    """trainable_params, all_params, memory by class (bytes), peak_bytes, and the assumptions they rest on.

    tokens: of the largest forward pass, when the data are known; else rows times data.max_length (auto: 2,048).
    task: what the data are for, when they are known. Raises UserError for a task that the model or method cannot do.
    """
    config = load_config(recipe.model)
    task = task or assumed_task(recipe, config)
    asked = replace(Asked.of(recipe), config=config, task=task.name)
    check(asked, TASK)
    model = empty_model(recipe.model, "fp32", task)
    width = getattr(model.config.get_text_config(), "hidden_size", None)
    stored = checkpoint_storage(recipe.model)
    placement = place(recipe.base, recipe.method.can.storages, width, stored=stored)
    check(asked.on(placement), STORAGE)
    readable = longest_input(model.config)
    length = recipe.data.max_length or min(readable or USUAL_LENGTH, USUAL_LENGTH)
    packed = frozen_names(model) if placement.storage in PACKED else []
    with torch.device("meta"):
        attached = recipe.method.attach(model, task)
    check(replace(asked, structure=Structure.of(model, attached, packed)), STRUCTURE)
    halved = placement.autocast and recipe.method.can.whole_model and not is_padded(recipe, task)
    waiting = {
        "embedding": placement.offload_embedding, "head": placement.offload_head,
        "optimizer": bool(recipe.train.offload_optimizer), "halved": halved,
    }  # fmt: skip
    sizes = Sizes(
        storage=placement.storage,
        compute=placement.arithmetic,
        double_quant=placement.double_quant,
        optimiser=recipe.train.optim,
        tokens=tokens or recipe.train.per_device_train_batch_size * length,
        checkpointing=bool(recipe.train.gradient_checkpointing),
        chunk_logits=0 if task.labelled else CHUNK_LOGITS[placement.device.type],
        on_host=frozenset(name for name, there in waiting.items() if there),
    )
    found = plan_memory(attached, sizes)
    assumed = {
        "task": task.name,
        "device": placement.device.type,
        "storage": sizes.storage,
        "compute": sizes.compute,
        "tokens_per_forward": sizes.tokens,
        "optimiser": sizes.optimiser,
        "gradient_checkpointing": sizes.checkpointing,
    }
    if task.labels:
        assumed["labels"] = len(task.labels)
    return {"model": recipe.model.path, "method": recipe.method.name, **found, "assumed": assumed}


def show(found: dict[str, Any]) -> None:
    """The plan for people."""
    from rich.table import Table

    from whet.base.console import bytes_text, console, say

    trainable, total = found["trainable_params"], found["all_params"]
    say(f"{found['model']}: {trainable:,} of {total:,} parameters are trained ({100 * trainable / total:.2f} %)")
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(justify="right")
    for name, count in found["memory"].items():
        table.add_row(name, bytes_text(count))
    table.add_row("together", bytes_text(found["peak_bytes"]), style="bold")
    if found["host_bytes"]:
        table.add_row("in host memory", bytes_text(found["host_bytes"]))
    console().print(table)
    assumed = found["assumed"]
    say(
        f"an estimate for {assumed['tokens_per_forward']:,} tokens in a forward pass, {assumed['storage']} weights and "
        f"{assumed['compute']} arithmetic on {assumed['device']}; what torch itself needs comes on top",
        style="dim",
    )
