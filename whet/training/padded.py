"""The plain route: tasks whose rows are padded, and methods that work through a wrapper around the model.

LoRA groups are fused here too. Forms, compilation and graphs are for flat rows of text: padded batches have too many
shapes to be prepared one by one. Their memory is not planned: `auto` keeps all activations, and running layers again is
transformers' own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from whet.base.console import say
from whet.data.batch.batches import Batches
from whet.data.batch.rows import Rows
from whet.data.batch.task_batches import TaskBatches
from whet.data.config import Data
from whet.engine.device import Placement
from whet.engine.memory.host_tables import offload_embedding
from whet.engine.task import Task, text_task
from whet.recipe import Recipe
from whet.settings import Train
from whet.training.arrange import Arrangement, fused_groups, keeps_both, split_trained
from whet.training.task_loss import TaskForward


def is_padded(recipe: Recipe, task: Task) -> bool:
    """Whether a run takes this route."""
    return task.name != "causal" or not recipe.method.can.inside


def data_for(recipe: Recipe) -> Data:
    """The data settings as the method allows them."""
    return recipe.data if recipe.method.can.inside else replace(recipe.data, packing=False, padding_free=False)


def assumed_task(recipe: Recipe, config: Any) -> Task:
    """The task of a recipe whose rows are not read: as it says, else what the model is built for; two classes."""
    name = recipe.model.task or text_task(config)
    return Task(name, ("0", "1") if name in ("classification", "multi_label") else ())


def batches_for(
    rows: Rows, data: Data, *, size: int, accumulate: int, seed: int, bins: Any = None
) -> Batches | TaskBatches:
    """Batches of `rows`, whatever they are."""
    if rows.labels is not None or rows.answers is not None:
        return TaskBatches(rows, size=size, accumulate=accumulate, seed=seed)
    by_length = data.order == "short_first"
    return Batches(
        rows, bins, size=size, accumulate=accumulate, flat=bool(data.padding_free), seed=seed, by_length=by_length
    )


def arrange_padded(
    train: Train, placement: Placement, model: nn.Module, network: Any, forward: TaskForward,
    batches: Batches | TaskBatches,
) -> Arrangement:  # fmt: skip
    """Lay out `model` (with its method; `network` inside it) for padded batches; what is trained is kept in fp32."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    fused = fused_groups(train, placement, model, keeps_both(placement), Probe(model, forward))
    matrices, vectors = split_trained(fused, model)
    if placement.offload_embedding:
        offload_embedding(network)
    if fused is not None:
        forward = replace(forward, prepare=fused.refresh)
    if train.gradient_checkpointing:
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    facts: dict[str, Any] = {
        "groups": 0 if fused is None else len(fused.groups), "compile": False, "cuda_graphs": False,
        "micro_batches": batches.accumulate, "padded": True, "lean_activations": False, "forms": [],
        "gradient_checkpointing": bool(train.gradient_checkpointing),
    }  # fmt: skip
    if placement.device.type == "cuda":
        say(f"{batches.accumulate} forward pass(es) a step of {batches.size} padded rows", style="dim")
    return Arrangement(forward, batches, matrices, vectors, False, facts, network)  # type: ignore[arg-type]


class Probe(nn.Module):
    """`model`, to be called with token ids alone, as the search for layers that share an input does."""

    def __init__(self, model: nn.Module, forward: TaskForward) -> None:
        super().__init__()
        self.model, self.how = model, forward

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
        """The model's own output."""
        if self.how.end is not None:
            input_ids = input_ids.index_fill(1, input_ids.new_tensor([input_ids.shape[1] - 1]), self.how.end)
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        if self.how.task == "seq2seq":
            inputs["decoder_input_ids"] = input_ids
        if self.how.cached:
            inputs["use_cache"] = use_cache
        with torch.autocast(self.how.device.type, self.how.compute, enabled=self.how.autocast):
            return self.model(**inputs)
