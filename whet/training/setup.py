"""What is settled before the first step: placement, rows, decisions, the model with its method attached.

The order is the contract of bad input: the recipe, then the hardware, then the data are checked before any model is
loaded, and a run directory appears only when all of them are good.
"""

from __future__ import annotations

import math
import platform
from dataclasses import dataclass, replace
from typing import Any

import torch

from whet import runs
from whet.base.console import say
from whet.base.errors import UserError
from whet.base.files import write_text
from whet.base.seed import seed_everything
from whet.data.batch.batches import Batches
from whet.data.batch.ledger import Ledger
from whet.data.batch.task_batches import TaskBatches
from whet.data.labels import labels_text
from whet.data.prepare import Prepared, prepare
from whet.data.read.read import check_unchanged
from whet.data.template.template import use_template
from whet.engine.compute.head import find_head
from whet.engine.compute.isolation import check_causality, check_isolation
from whet.engine.device import Placement, device_name, place
from whet.engine.load.load import checkpoint_storage, load_config, load_model, load_tokenizer, longest_input
from whet.engine.memory.host_adam import halve
from whet.engine.task import text_task
from whet.engine.weights.linear import count_parameters
from whet.planning.asked import Asked
from whet.planning.rules import LAYOUT, check, rule_out
from whet.recipe import Parsed, Recipe, to_yaml
from whet.runs import Run
from whet.training.arrange import Arrangement, arrange
from whet.training.loss import Forward
from whet.training.padded import arrange_padded, batches_for, data_for, is_padded
from whet.training.plan import plan
from whet.training.start import start_from_rows
from whet.training.task_loss import task_forward

DECAY_RATIO = 0.2
SEES_AHEAD = 0.01  # of the largest logit; a causal model moves by 0, or by rounding


@dataclass(frozen=True)
class Ready:
    """A run that can begin: its rows, and how many steps they make."""

    run: Run
    existed: bool
    prepared: Prepared
    placement: Placement

    @property
    def recipe(self) -> Recipe:
        return self.run.recipe


def get_ready(parsed: Parsed) -> Ready:
    """Check everything, decide what is auto, and open the run directory. Raises UserError; loads no model."""
    recipe = parsed.recipe
    config = load_config(recipe.model)
    width = getattr(config.get_text_config(), "hidden_size", None)
    stored = checkpoint_storage(recipe.model)
    placement = place(recipe.base, recipe.method.can.storages, width, stored=stored)
    asked = replace(Asked.of(recipe).on(placement), config=config, task=recipe.model.task)
    check(asked)
    tokenizer = load_tokenizer(recipe.model)
    use_template(tokenizer, recipe.model.chat_template)
    prepared = prepare(data_for(recipe), tokenizer, longest_input(config), recipe.model.task, text_task(config))
    prepared.ledger.gate()
    check(replace(asked, task=prepared.task.name, held_out_rows=len(prepared.evaluation)))
    decided = _decided(recipe, prepared, placement)
    facts = {
        "environment.json": environment(placement),
        "data.json": prepared.ledger.as_dict(),
        "plan.json": plan(recipe, tokens=_most_tokens(recipe, prepared), task=prepared.task),
    }
    run, existed = runs.start(parsed, decided, facts)
    began = run.read("data.json") or {}
    if run.finished is None:
        check_unchanged(began.get("files", []), prepared.ledger.files)
    known = began.get("sha256")
    if run.finished is None and known != prepared.ledger.sha256:
        raise UserError(
            "the training rows have changed since this run began", file=str(run.path), field="data.dataset",
            found=f"sha256 {prepared.ledger.sha256[:16]}…", expected=f"sha256 {str(known)[:16]}…",
            fix="put the data back, or start a new run with another output_dir",
        )  # fmt: skip
    return Ready(run, existed, prepared, placement)


def batches_of(ready: Ready) -> Batches | TaskBatches:
    """The training batches in their order."""
    train = ready.recipe.train
    return batches_for(
        ready.prepared.train, ready.recipe.data, size=train.per_device_train_batch_size,
        accumulate=train.gradient_accumulation_steps, seed=train.seed, bins=ready.prepared.bins,
    )  # fmt: skip


def build_model(ready: Ready) -> tuple[torch.nn.Module, Ready, Arrangement]:
    """Seed, load, attach the method, check isolation, arrange for speed; returns the model in training mode."""
    recipe, placement = ready.recipe, ready.placement
    seed_everything(recipe.train.seed)
    task = ready.prepared.task
    padded = is_padded(recipe, task)
    halved = bool(recipe.train.offload_optimizer) and recipe.method.can.whole_model and placement.autocast
    loaded = placement
    if halved and not padded and not recipe.model.from_config:  # random weights are drawn where they always are
        loaded = replace(placement, device=torch.device("cpu"))
    network = load_model(recipe.model, loaded, task)
    model = recipe.method.attach(network, task)
    if padded:
        return _padded(ready, network, model)
    masters = {} if recipe.train.offload_optimizer else None
    if halved:
        masters = halve(network, placement.device, placement.compute)
    ready = _isolated(ready, model, network.get_input_embeddings().weight.shape[0])  # type: ignore[union-attr]
    autocast = placement.compute if placement.autocast else None
    forward = Forward(placement.device, placement.compute, placement.autocast, find_head(network, autocast=autocast))
    _say_parameters(model)
    model.train()
    batches = batches_of(ready)
    assert isinstance(batches, Batches)
    start_from_rows(recipe.method, model, forward, batches)
    train = rule_out(replace(Asked.of(ready.recipe).on(placement), task=task.name))
    arranged = arrange(train, placement, model, network, forward, batches, steps=train.max_steps or 1, masters=masters)
    ready.run.write("arrangement.json", arranged.facts)
    return model, ready, arranged


def _padded(ready: Ready, network: Any, model: torch.nn.Module) -> tuple[torch.nn.Module, Ready, Arrangement]:
    """The rest of `build_model` for tasks and methods whose rows are padded."""
    recipe = ready.recipe
    forward = task_forward(network, ready.placement, ready.prepared.task, virtual=not recipe.method.can.inside)
    _say_parameters(model)
    model.train()
    batches = batches_of(ready)
    start_from_rows(recipe.method, model, forward, batches)
    arranged = arrange_padded(recipe.train, ready.placement, model, network, forward, batches)
    on_host = bool(recipe.train.offload_optimizer)
    facts = arranged.facts | {"offload_optimizer": on_host}
    arranged = replace(arranged, facts=facts, masters={} if on_host else None)
    ready.run.write("arrangement.json", arranged.facts)
    return model, ready, arranged


def _say_parameters(model: torch.nn.Module) -> None:
    trainable, total = count_parameters(model)
    say(f"trainable parameters: {trainable:,} of {total:,} ({100 * trainable / total:.2f} %)")


def environment(placement: Placement) -> dict[str, Any]:
    """Versions and hardware, flat."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, Any] = {}
    for package in ("whet", "torch", "transformers", "peft", "tokenizers", "safetensors", "bitsandbytes"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found | {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": placement.device.type,
        "device_name": device_name(placement.device),
        "compute": placement.arithmetic,
        "storage": placement.storage,
        "threads": torch.get_num_threads(),
    }


def show_ledger(ledger: Ledger) -> None:
    """The lines of the ledger that a person should see before the first step."""
    share = 100 * ledger.supervised_tokens / max(1, ledger.tokens)
    say(f"data: {ledger.rows_train:,} rows to learn from, {ledger.rows_eval:,} held out ({ledger.format})")
    if ledger.labels:
        say(f"task: {ledger.task}, {labels_text(ledger.task, ledger.labels)}")
    else:
        say(f"learned: {ledger.supervised_tokens:,} of {ledger.tokens:,} tokens ({share:.0f} %)")
    if ledger.added:
        say(f"added: {ledger.added['rows']:,} of the rows to learn from")
    for name, found in ledger.benchmarks.items():
        if found["rows_learned"]:
            say(f"  {found['rows_learned']:,} rows to learn from stand in {name}", style="yellow")
    for count, text in (
        (len(ledger.dropped), "rows dropped (data.json names each)"),
        (ledger.tokens_lost, "tokens lost to data.max_length"),
        (ledger.rows_without_end_of_turn, "rows whose end of turn is not learned: the model may not know when to stop"),
        (ledger.contradictory_rows, "rows whose text stands in another row with another label"),
        (ledger.rows_on_both_sides, "rows stand on both sides of the split: held-out scores will flatter"),
    ):
        if count:
            say(f"  {count:,} {text}", style="yellow")


def _most_tokens(recipe: Recipe, prepared: Prepared) -> int:
    """Tokens of the largest forward pass there can be: the longest rows together, or full packed rows."""
    size = recipe.train.per_device_train_batch_size
    if prepared.bins is not None:
        return size * prepared.max_length
    if prepared.train.labels is not None or prepared.train.answers is not None:
        return TaskBatches(prepared.train, size=size, accumulate=1, seed=0).largest()
    return int(sum(sorted(prepared.train.lengths.tolist(), reverse=True)[:size]))


def _decided(recipe: Recipe, prepared: Prepared, placement: Placement) -> dict[str, tuple[object, str]]:
    """Every auto setting with the value it gets and why."""
    train, method, decided = recipe.train, recipe.method, dict(prepared.decided)
    settled = {
        "base.device": placement.device.type, "base.compute": placement.arithmetic, "base.storage": placement.storage,
    }  # fmt: skip
    for path, value in settled.items():
        if getattr(recipe.base, path.partition(".")[2]) is None:
            decided[path] = (value, placement.reasons.get(path, "follows from base.storage"))
    if recipe.base.double_quant is None and placement.storage == "nf4":
        decided["base.double_quant"] = (True, "usual for nf4")
    if train.learning_rate is None:
        decided["train.learning_rate"] = (method.can.learning_rate, f"usual for {method.name}")
    if method.name == "lora" and method.lora_alpha is None:
        decided["method.lora_alpha"] = (2.0 * method.r, "2 * r")
    per_step = train.per_device_train_batch_size * train.gradient_accumulation_steps
    units = len(prepared.bins) if prepared.bins is not None else len(prepared.train)
    per_epoch = math.ceil(units / per_step)
    if train.max_steps is None:
        decided["train.max_steps"] = (
            math.ceil(per_epoch * train.num_train_epochs),
            f"{train.num_train_epochs:g} epochs of {per_epoch} steps",
        )
    if train.eval_steps is None:
        decided["train.eval_steps"] = (per_epoch, "once an epoch")
    if train.save_steps is None:
        every = train.eval_steps or per_epoch
        decided["train.save_steps"] = (every, "with every evaluation")
    if train.lr_scheduler_type == "warmup_stable_decay" and train.decay_ratio is None:
        decided["train.decay_ratio"] = (DECAY_RATIO, "the last fifth")
    decided |= {path: entry for path, entry in _layout(recipe).items() if path not in prepared.decided}
    return decided


def _layout(recipe: Recipe) -> dict[str, tuple[object, str]]:
    """How rows share a batch, where the recipe leaves it open."""
    if recipe.method.can.inside:
        usual = (True, "the model passed the isolation check")
        return {} if recipe.data.padding_free is not None else {"data.padding_free": usual}
    why = f"{recipe.method.name} puts tokens in front of each row"
    return {f"data.{name}": (False, why) for name in ("packing", "padding_free")}


def _isolated(ready: Ready, model: torch.nn.Module, vocabulary: int) -> Ready:
    """Run the isolation check where documents share a row; fall back to padding where whet may decide."""
    autocast = ready.placement.compute if ready.placement.autocast else None
    flat = bool(ready.recipe.data.padding_free)
    moved = check_causality(model, vocabulary, flat=flat, autocast=autocast)
    if moved > SEES_AHEAD:
        raise UserError(
            "the model sees the tokens that it should predict: its attention has no causal mask", field="model.path",
            found=f"earlier logits moved by {100 * moved:.2g} % when the last token changed", expected="0",
            fix="give a decoder; for a family that should be one, please report it",
        )  # fmt: skip
    if not flat:
        return ready
    found = check_isolation(model, vocabulary, autocast=autocast)
    if found.holds:
        return ready
    origins = ready.run.read("origins.json") or {}
    if ready.prepared.bins is not None or origins["data.padding_free"]["origin"] != "decided":
        raise UserError(
            "the model lets documents that share a row see each other", field="data.packing",
            found=f"logits moved by {found.moved:.2g}", expected="0", fix="data.packing=false data.padding_free=false",
        )  # fmt: skip
    say("the model's attention cannot keep documents apart in one row: training padded instead", style="yellow")
    recipe = runs.resolve(ready.recipe, {"data.padding_free": False})
    write_text(ready.run.path / "recipe.yaml", to_yaml(recipe))
    why = "the model did not pass the isolation check"
    origins["data.padding_free"] = {"value": False, "origin": "decided", "reason": why}
    ready.run.write("origins.json", origins)
    check(Asked.of(recipe).on(ready.placement), LAYOUT)
    return Ready(Run(ready.run.path, recipe), ready.existed, ready.prepared, ready.placement)
