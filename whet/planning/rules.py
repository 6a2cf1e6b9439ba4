"""What cannot hold together (to be replaced by the table)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from whet.base.errors import UserError
from whet.data.config import Data
from whet.engine.device import Placement
from whet.engine.task import Task, check_task
from whet.planning.facts import method_facts
from whet.recipe import Recipe
from whet.settings import Train

FLAT_ONLY = ("compile", "cuda_graphs", "fit_micro_batches", "activation_offload", "tile_mlp")


def check(recipe: Recipe, placement: Placement, config: Any, task: Task | None = None) -> None:
    check_optimiser(recipe.train, placement.device)
    facts = method_facts(recipe.method, new_tokens=bool(recipe.model.new_tokens))
    check_arrangement(
        recipe.train, placement.device, padded=recipe.data.padding_free is False, uncaptured=facts.uncapturable
    )
    if recipe.train.offload_optimizer and facts.follows_updates:
        raise UserError(
            f"{recipe.method.name} reads the gradients on the device after each update",
            field="train.offload_optimizer", found="true", expected="false or auto", fix="remove the line",
        )  # fmt: skip
    if task is None and recipe.model.task is not None:
        task = Task(recipe.model.task)
    if task is not None:
        check_recipe(recipe, config, task)


def asks_for_memory_mode(train: Train) -> bool:
    return bool(train.gradient_checkpointing or train.activation_offload or train.tile_mlp)


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


def check_arrangement(train: Train, device: torch.device, *, padded: bool, uncaptured: str | None = None) -> None:
    """Raise UserError for a setting that could not take effect on the device, or beside another one.

    padded: batches are laid out with padding, so their shapes are many; uncaptured: why no step of this method
    can be captured, or None.
    """
    if train.cuda_graphs:
        for holds, field, why, fix in (
            (uncaptured is not None, "train.cuda_graphs", uncaptured or "", "train.cuda_graphs=auto"),
            (train.optim != "adamw", "train.optim", "only adamw can be captured in a CUDA graph", "train.optim=adamw"),
            (train.offload_optimizer, "train.cuda_graphs", "an update on the host cannot be captured",
             "train.cuda_graphs=auto"),
            (asks_for_memory_mode(train), "train.cuda_graphs", "steps that run layers again or in tiles cannot be captured",  # noqa: E501
             "train.cuda_graphs=auto"),
        ):  # fmt: skip
            if holds:
                raise UserError(
                    why, field=field, found=train.optim if field == "train.optim" else "true",
                    expected="adamw, or train.cuda_graphs auto" if field == "train.optim" else "auto or false", fix=fix,
                )  # fmt: skip
    for name in ("compile", "cuda_graphs", "fit_micro_batches"):
        if getattr(train, name) and device.type != "cuda":
            raise UserError(
                "this runs on CUDA only", field=f"train.{name}", found="true", expected="auto", fix="remove the line"
            )
        if getattr(train, name) and padded:
            raise UserError(
                "padded batches have too many shapes for this", field=f"train.{name}", found="true", expected="auto",
                fix="data.padding_free=true, or remove the line",
            )  # fmt: skip
    if (train.activation_offload or train.tile_mlp) and train.gradient_checkpointing is False:
        raise UserError(
            "this needs recomputed layers", field="train.gradient_checkpointing", found="false",
            expected="true or auto", fix="train.gradient_checkpointing=true",
        )  # fmt: skip


def rows_for(recipe: Recipe) -> Data:
    """The data settings as the method allows them. Raises UserError for rows laid out as it cannot read them."""
    data, method = recipe.data, recipe.method
    if method.can.inside:
        return data
    for name in ("packing", "padding_free"):
        if getattr(data, name):
            raise UserError(
                f"{method.name} puts its own tokens in front of each row, so no two documents can share one",
                field=f"data.{name}", found="true", expected="false or auto", fix="remove the line",
            )  # fmt: skip
    return replace(data, packing=False, padding_free=False)


def check_recipe(recipe: Recipe, config: Any, task: Task) -> None:
    """Raise UserError where model, method or settings cannot be used for the task; loads nothing."""
    check_task(task.name, config)
    able = recipe.method.can.tasks
    if task.name not in able:
        raise UserError(
            f"the method {recipe.method.name} cannot be used for this task", field="model.task", found=task.name,
            expected=", ".join(able), fix="method=lora can",
        )  # fmt: skip
    if recipe.model.new_tokens and not recipe.method.can.new_tokens:
        raise UserError(
            f"{recipe.method.name} does not train the rows of new tokens, which would stay as they start",
            field="model.new_tokens", found=", ".join(recipe.model.new_tokens), expected="[]",
            fix="remove them, or method.name=lora",
        )  # fmt: skip
    if task.name != "causal" and recipe.model.chat_template is not None:
        raise UserError(
            f"rows of the task {task.name} are not rendered by a template", field="model.chat_template",
            found=recipe.model.chat_template, expected="auto", fix="remove the line",
        )  # fmt: skip
    if recipe.train.gradient_checkpointing and not recipe.method.can.recomputes:
        raise UserError(
            f"{recipe.method.name} trains a cache, and layers that are run again have none",
            field="train.gradient_checkpointing", found="true", expected="false or auto", fix="remove the line",
        )  # fmt: skip
    if recipe.train.compile and not recipe.method.can.compiles:
        raise UserError(
            f"the layers of {recipe.method.name} with these settings are not one graph", field="train.compile",
            found="true", expected="auto or false", fix="remove the line",
        )  # fmt: skip
    if task.name != "causal" or not recipe.method.can.inside:
        for name in FLAT_ONLY:
            if getattr(recipe.train, name):
                raise UserError(
                    "this is for text in rows without padding", field=f"train.{name}",
                    found=str(getattr(recipe.train, name)).lower(), expected="auto", fix="remove the line",
                )  # fmt: skip
        if recipe.base.fp8_head:
            raise UserError(
                "this is for the output head of text in rows without padding", field="base.fp8_head", found="true",
                expected="false", fix="remove the line",
            )  # fmt: skip
