"""Carrying out a layout on a loaded model: groups, tables on the host, gradient checkpointing, tiles, compilation.

None of it changes what is computed. What is decided stands in the layout; here is no choice but where a layer turns out
not to compile, which only trying can tell.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from whet.base.console import bytes_text, say
from whet.base.out_of_memory import ran_out
from whet.base.private import compile_errors
from whet.engine.compute.attention import fastest_attention
from whet.engine.compute.compile import compile_layers, forget_compilation, lean_activations
from whet.engine.compute.head import Head
from whet.engine.memory.checkpointing import checkpoint_layers
from whet.engine.memory.host_tables import offload_embedding
from whet.engine.memory.tiles import tile_mlp
from whet.methods.layers.fuse import fuse
from whet.methods.layers.group import Groups
from whet.planning.layout import Layout
from whet.planning.plan import Plan
from whet.planning.rules import LOADED, check
from whet.training.captured import side_stream
from whet.training.objective.objective import Objective
from whet.training.objective.text import TextObjective

T = TypeVar("T")
Masters = Mapping[torch.nn.Parameter, torch.Tensor]


@dataclass(frozen=True)
class Loaded:
    """A model in memory with its method attached. network: the transformers model; model: what the method made of it;
    masters: exact weights that are on the host already; named_attention: what the config of a whole model has to name
    when it is saved, if anything."""

    network: Any
    model: torch.nn.Module
    masters: Masters
    named_attention: str = ""


@dataclass(frozen=True)
class Arranged:
    """A model that is laid out to be trained, its objective, and its batches in the layout's forms.

    masters: None where the optimiser is on the device, else the exact weights that are on the host already. groups: how
    many products the LoRA layers make, 0 where they stand alone. named_attention: as in `Loaded`.
    """

    layout: Layout
    network: Any
    model: torch.nn.Module
    objective: Objective
    batches: Any
    masters: Masters | None
    groups: int
    named_attention: str = ""

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.objective.device

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """The parameters that the optimiser updates."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """What holds while steps run: the fastest attention, a stream for capture, what compiled layers keep."""
        with fastest_attention(self.device), side_stream(self.device), lean_activations(self.layout.lean):
            yield

    def first(self, step: Callable[[], T]) -> T:
        """Run the first step of this process; where a layer cannot be compiled, say so and run it uncompiled."""
        try:
            return step()
        except compile_errors() as problem:
            if not self.layout.compile_layers or ran_out(problem):
                raise
            reason = str(problem).strip().splitlines()[0]
            say(f"this model's layers cannot be compiled, so they run as they are ({reason})", style="yellow")
            forget_compilation(self.network)
            for parameter in self.trained:
                parameter.grad = None
            return step()

    def as_dict(self) -> dict[str, Any]:
        """The layout as it was carried out, for layout.json."""
        return self.layout.as_dict() | {"groups": self.groups}


def apply(plan: Plan, loaded: Loaded, objective: Objective) -> Arranged:
    """Lay out a loaded model as planned. Raises UserError where its output head is not what the settings need."""
    layout, placement, network, model = plan.layout, plan.facts.placement, loaded.network, loaded.model
    if layout.padded_task:
        _train_in_fp32(model)
    groups = _grouped(plan, loaded, objective)
    if groups is not None:
        objective = replace(objective, refresh=groups.refresh, draws=groups.draws)
    if isinstance(objective, TextObjective):
        objective = replace(objective, head=_placed_head(objective.head, plan, network))
    if placement.offload_embedding:
        offload_embedding(network)
    keep_less(layout, network)
    if layout.compile_layers:
        compile_layers(network, tokens=layout.tokens, whole=not layout.mode.tile_tokens)
    batches = plan.facts.work.batches.with_cut(layout.cut)
    masters = loaded.masters if layout.offload_optimizer else None
    arranged = Arranged(
        layout, network, model, objective, batches, masters, 0 if groups is None else len(groups),
        loaded.named_attention,
    )  # fmt: skip
    if placement.device.type == "cuda":
        _say(layout)
    return arranged


def _train_in_fp32(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()


def _grouped(plan: Plan, loaded: Loaded, objective: Objective) -> Groups | None:
    """The LoRA layers in groups that read one input, or None where there are none."""
    placement, layout = plan.facts.placement, plan.layout
    if not layout.group_lora:
        return None
    groups = fuse(
        loaded.model, compute=placement.compute, fp8=placement.fp8, keep_transposed=layout.keep_transposed,
        run=lambda: objective.run_once(loaded.model), seed=plan.recipe.train.seed,
    )  # fmt: skip
    return groups if len(groups) else None


def _placed_head(head: Head | None, plan: Plan, network: Any) -> Head | None:
    """The output head in FP8 and on the host, where that is asked for. Raises UserError where it cannot be."""
    placement = plan.facts.placement
    if head is not None and placement.fp8_head:
        head = head.in_fp8(network, both_orders=plan.layout.keep_transposed)
    in_fp8 = head is not None and head.fp8 is not None
    check(replace(plan.asked, head_alone=head is not None, head_in_fp8=in_fp8), LOADED)
    return head.on_host(network) if head is not None and placement.offload_head else head


def keep_less(layout: Layout, network: Any) -> None:
    """Gradient checkpointing and tiles; padded tasks have transformers' own switch, for all layers."""
    mode = layout.mode
    if mode.checkpointed_layers and layout.padded_task:
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    elif mode.checkpointed_layers:
        checkpoint_layers(network, range(mode.checkpointed_layers), offload=mode.offload)
    if mode.tile_tokens:
        tile_mlp(network, mode.tile_tokens)


def _say(layout: Layout) -> None:
    forms, mode = ", ".join(f"{form.tokens:,}" for form in layout.cut.forms), layout.mode
    words = [f"{layout.cut.accumulate} forward pass(es) a step"]
    words += [f"of {forms} tokens"] if forms else [] if layout.flat else [f"of {layout.cut.size} padded rows"]
    words += ["layers compiled (the first steps take long)"] if layout.compile_layers else []
    words += ["steps captured as CUDA graphs"] if layout.cuda_graphs else []
    words += [f"gradient checkpointing of {mode.checkpointed_layers} layers"] if mode.checkpointed_layers else []
    words += ["their inputs in host memory"] if mode.offload else []
    words += ["lean activations"] if layout.lean else []
    words += ["the optimiser in host memory, so no CUDA graphs"] if layout.offload_optimizer else []
    free, total = torch.cuda.mem_get_info()
    say(", ".join(words) + f"; {bytes_text(total - free)} of {bytes_text(total)} in use", style="dim")
