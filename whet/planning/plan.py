"""`whet plan`: what a recipe will need, before any weight is loaded; a model's config.json is enough.

The same facts and the same decision as in training: `plan_run` counts the model on the meta device with its method
attached, looks at the hardware, and decides. Where the rows are not known, full rows are assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from whet.base.errors import UserError
from whet.data.batch.batches import Cut, Order
from whet.data.batch.rows import Rows
from whet.data.batch.text_batches import TextBatches
from whet.engine.compute.readable import check_readable
from whet.engine.device import PACKED, Hardware, Placement, find_hardware, resolve_placement
from whet.engine.load.left_out import left_out_notice
from whet.engine.load.load import checkpoint_storage, empty_model, load_config, longest_input
from whet.engine.memory.kept import Kept
from whet.engine.sizes import HIDDEN, largest, sizes_of
from whet.engine.task import Task, text_task
from whet.engine.weights.linear import frozen_names
from whet.methods.experts import expert_notices, expert_parameters, is_trained
from whet.planning.asked import Asked, Structure
from whet.planning.cards import hardware_of
from whet.planning.counted import count_layers
from whet.planning.decide import compiles, decide, groups_lora
from whet.planning.facts import Facts, Work, count_model
from whet.planning.layout import Layout
from whet.planning.options import decide_anyway, fits, options_of
from whet.planning.pace import pace_of
from whet.planning.phases import Phases, phases_of
from whet.planning.rule import Rule
from whet.planning.rules import OF_ANY_MACHINE, RULES, check, decided
from whet.planning.several import check_cards, on_several
from whet.planning.unfit import check_code
from whet.recipe import Recipe
from whet.settings import Train

USUAL_LENGTH = 2048
ASSUMED_STEPS = 1000


@dataclass(frozen=True)
class Plan:
    """How a recipe would run: the facts, and the layout that follows from them; asked: the facts of the rules; notices:
    what a person should know of parts that are left out."""

    recipe: Recipe
    task: Task
    asked: Asked
    facts: Facts
    layout: Layout
    notices: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """trainable_params, all_params, memory by class (bytes, of training), phases (bytes by phase and class),
        peak_bytes by phase, free_bytes and fits (None: no hard end), host_bytes of training, host by phase, disk, the
        layout, and what they rest on."""
        placement, model, layout = self.facts.placement, self.facts.model, self.layout
        assumed: dict[str, Any] = {
            "task": self.task.name,
            "device": placement.device.type,
            "storage": placement.storage,
            "compute": placement.arithmetic,
            "tokens_per_forward": layout.tokens,
            "optimiser": layout.optim,
            "gradient_checkpointing": layout.mode.checkpointed_layers > 0,
            "hardware": self.facts.hardware.name,
            "activations": "counted on the model" if self.facts.kept else "estimated from its sizes",
        }
        phases = phases_of(self.recipe, self.facts, layout, sizes_of(self.asked.config))
        if self.task.labels:
            assumed["labels"] = len(self.task.labels)
        return {
            "model": self.recipe.model.path, "method": self.recipe.method.name, "trainable_params": model.trainable,
            "all_params": model.total, "memory": layout.memory, "phases": phases.device, "peak_bytes": phases.peaks,
            "free_bytes": self.facts.hardware.free_bytes, "fits": self._fits(phases), "host_bytes": layout.host_bytes,
            "host": phases.host, "disk": phases.disk, "layout": layout.as_dict(), "assumed": assumed,
            "notices": list(self.notices),
        }  # fmt: skip

    def with_options(self, cards: int = 1) -> dict[str, Any]:
        """`as_dict`, how long it takes (`planning.pace`), what other layouts of the recipe would take
        (`planning.options`), and what several cards would need (`planning.several`)."""
        check_cards(cards)
        found = self.as_dict() | pace_of(self.facts, self.layout).as_dict()
        found |= options_of(decided(self.asked), self.facts, self.layout)
        return found if cards == 1 else found | {"several": on_several(self.facts, self.layout, cards)}

    def _fits(self, phases: Phases) -> bool | None:
        """Whether all that training does fits: what comes after it may be done elsewhere, or in smaller batches."""
        free, found = self.facts.hardware.free_bytes, fits(self.facts, self.layout)
        return found if free is None else bool(found) and max(phases.peaks["load"], phases.peaks["evaluate"]) <= free


def resolve_base(recipe: Recipe, config: Any, hardware: Hardware | None = None) -> tuple[Hardware, Placement]:
    """The device and the placement of a recipe's base model. hardware: None looks at this machine. Raises UserError."""
    hardware = hardware or find_hardware(recipe.base.device)
    width = largest(config.get_text_config(), *HIDDEN)
    stored = checkpoint_storage(recipe.model)
    storages = recipe.method.can.storages
    return hardware, resolve_placement(recipe.base, storages, width, stored=stored, hardware=hardware)


def plan_recipe(recipe: Recipe, gpu: str | None = None) -> Plan:
    """The plan of a recipe whose rows are not read, perhaps for another machine than this. gpu: the name of a card, or
    its memory, that need not be here. A layout that does not fit is a plan as well. Raises UserError."""
    config = load_config(recipe.model)
    task = assumed_task(recipe, config)
    if gpu is not None and recipe.base.device not in (None, "cuda"):
        raise UserError(
            "the recipe asks for another device than a GPU", field="base.device", found=str(recipe.base.device),
            expected="cuda or auto with --gpu", fix="leave out --gpu, or base.device=auto",
        )  # fmt: skip
    hardware, placement = resolve_base(recipe, config, None if gpu is None else hardware_of(gpu))
    work = assumed_work(recipe, config, task)
    return plan_run(recipe, hardware, placement, task=task, work=work, rules=OF_ANY_MACHINE, choose=decide_anyway)


def plan_run(
    recipe: Recipe, hardware: Hardware, placement: Placement, *, task: Task, work: Work,
    rules: Sequence[Rule] = RULES, choose: Callable[[Train, Facts], Layout] = decide,
) -> Plan:  # fmt: skip
    """The plan of a recipe over the batches of `work`. choose: takes the layout. Raises UserError where one of `rules`
    is broken, by the recipe or the model's structure, and where `choose` finds none that fits."""
    asked = Asked.of(recipe, task=task.name, config=load_config(recipe.model)).on(hardware, placement)
    check(asked, rules)
    network = empty_model(recipe.model, "fp32", task)
    check_readable(network)
    check_code(network, task, recipe.train)
    packed = frozen_names(network) if placement.storage in PACKED else []
    experts = expert_parameters(network)
    with torch.device("meta"):
        model = recipe.method.attach(network, task)
    wanted = getattr(recipe.method, "target_parameters", ())
    left_out = expert_notices(
        experts, sum(parameter.numel() for parameter in network.parameters()), packed=bool(packed),
        trained=[one for one in experts if recipe.method.can.whole_model or is_trained(one, wanted)],
    )  # fmt: skip
    notice = left_out_notice(recipe.model, network)
    left_out = (*left_out, *(() if notice is None else (notice,)))
    asked = replace(asked, structure=Structure.of(network, model, packed))
    check(asked, rules)
    facts = Facts(
        hardware=hardware, placement=placement, model=count_model(model, network, placement), work=work,
        flat=bool(work.batches.flat), padded_task=asked.padded,
    )  # fmt: skip
    train = decided(asked)
    facts = replace(facts, kept=_counted(recipe, train, facts))
    layout = choose(train, facts)
    check(replace(asked, can_capture=layout.cuda_graphs), rules)
    return Plan(recipe, task, asked, facts, layout, left_out)


def _counted(recipe: Recipe, train: Train, facts: Facts) -> dict[str, Kept]:
    """What the layers keep, where memory has a hard end and rows share a batch without padding; else nothing."""
    if not facts.on_gpu or not facts.flat or facts.padded_task:
        return {}
    grouped = groups_lora(train, facts)
    kept = count_layers(recipe, facts.placement, compiled=compiles(train, facts), grouped=grouped)
    return {way: one for way, one in kept.items() if len(one.layers) == facts.model.shape.layers}


def assumed_task(recipe: Recipe, config: Any) -> Task:
    """The task of a recipe whose rows are not read: as it says, else what the model is built for; two classes."""
    name = recipe.model.task or text_task(config)
    return Task(name, ("0", "1") if name in ("classification", "multi_label") else ())


def assumed_work(recipe: Recipe, config: Any, task: Task) -> Work:
    """Full rows of data.max_length tokens (auto: up to 2,048), all learned."""
    readable = longest_input(config)
    length = recipe.data.max_length or min(readable or USUAL_LENGTH, USUAL_LENGTH)
    train = recipe.train
    count = train.per_device_train_batch_size * train.gradient_accumulation_steps
    rows = Rows.gather((index, np.zeros(length, np.int32), np.ones(length, bool)) for index in range(count))
    cut = Cut(train.per_device_train_batch_size, train.gradient_accumulation_steps)
    flat = recipe.data.padding_free is not False and not Asked.of(recipe, task=task.name).padded
    return Work(TextBatches(rows, flat=flat, order=Order(0), cut=cut), train.max_steps or ASSUMED_STEPS, assumed=True)
