"""Everything that is known before a model is loaded: rows, settings, the plan with its layout, the run directory.

The order is the contract of bad input: the recipe, then the hardware, then the data are checked before any model is
loaded, and a run directory appears only when all of them are good.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from whet import runs
from whet.adapters.further import (
    START,
    check_labels,
    check_same_start,
    start_directory,
    start_facts,
    with_starting_adapter,
)
from whet.base.console import bytes_text, say
from whet.base.errors import UserError
from whet.base.lock import DirectoryLock
from whet.base.outputs import output_directory
from whet.data.batch.batches import Batches, Cut
from whet.data.batch.ledger import Ledger
from whet.data.batch.make import make_batches
from whet.data.labels import labels_text
from whet.data.prepare import Prepared, prepare
from whet.data.read.read import check_unchanged
from whet.engine.device import Hardware, Placement
from whet.engine.load.headers import check_checkpoint
from whet.engine.load.load import checkpoint_storage, load_config, longest_input
from whet.engine.task import text_task
from whet.inputs import inputs_of_recipe
from whet.planning.asked import Asked
from whet.planning.facts import Work
from whet.planning.idle import idle
from whet.planning.memory import OPTIMISER_BYTES
from whet.planning.plan import Plan, plan_run, resolve_base
from whet.planning.rules import check, data_for_method
from whet.recipe import Parsed, Recipe, resolve
from whet.runs import Run, chat_tokenizer
from whet.training.auto import decide_settings
from whet.training.ids import check_ids


@dataclass(frozen=True)
class Ready:
    """A run that can begin: its rows, and how it will sit on the hardware."""

    run: Run
    prepared: Prepared
    plan: Plan

    @property
    def recipe(self) -> Recipe:
        """The recipe with every open setting decided."""
        return self.run.recipe

    @property
    def batches(self) -> Batches[Any]:
        """The training batches as the recipe cuts them, in their order."""
        return self.plan.facts.work.batches

    def name_rows(self, rows: Sequence[int]) -> str:
        """Where rows of the training data come from, by file and row."""
        sources = self.prepared.train.sources
        examples = [self.prepared.train_examples[int(sources[row])] for row in rows]
        return "; ".join(f"{example.file} row {example.row}" for example in examples)


def get_ready(parsed: Parsed, lock: DirectoryLock | None = None) -> Ready:
    """Check everything, decide what is open, and make the run directory. Raises UserError; loads no model.

    lock: as in `runs.start`.
    """
    parsed = with_starting_adapter(parsed)
    recipe = parsed.recipe
    _check_output(parsed)
    config = load_config(recipe.model)
    hardware, placement = resolve_base(recipe, config)
    asked = Asked.of(recipe, config=config, task=recipe.model.task).on(hardware, placement)
    check(asked)
    tokenizer = chat_tokenizer(recipe.model)
    prepared = prepare(data_for_method(recipe), tokenizer, longest_input(config), recipe.model.task, text_task(config))
    prepared.ledger.gate()
    check(replace(asked, task=prepared.task.name, held_out_rows=len(prepared.evaluation)))
    decided = decide_settings(recipe, prepared, placement, config)
    resolved = resolve(recipe, {path: value for path, (value, _) in decided.items()})
    for sentence in idle(recipe, resolved, len(prepared.evaluation), prepared.task.name):
        say(f"! {sentence}", style="yellow")
    plan = plan_of(resolved, prepared, hardware, placement)
    _check_disk(plan, runs.run_directory(recipe))
    started = start_facts(recipe)
    if started:
        check_labels(start_directory(str(recipe.model.adapter)), prepared.task.labels)
    check_ids(prepared, plan.facts.model.vocabulary)
    facts = {
        "environment.json": environment(hardware, placement),
        "data.json": prepared.ledger.as_dict(),
        "plan.json": plan.as_dict(),
        **({START: started} if started else {}),
    }
    check_checkpoint(recipe.model, prepared.task, plain=checkpoint_storage(recipe.model) is None)
    run = runs.start(resolved, parsed.origins, decided, facts, lock)
    check_same_start(run)
    _check_same_rows(run, prepared.ledger)
    return Ready(run, prepared, plan)


def _check_output(parsed: Parsed) -> None:
    """Refuse an output_dir that is, or lies above, something that the recipe reads; its own recipe.yaml may be."""
    directory, inputs = runs.run_directory(parsed.recipe), inputs_of_recipe(parsed)
    if (directory / "origins.json").is_file():
        own = (directory / "recipe.yaml").absolute()
        inputs = [one for one in inputs if one.path.absolute() != own]
    output_directory(directory, inputs, "output_dir")


def _check_disk(plan: Plan, directory: Path) -> None:
    """Refuse a disk without room for one checkpoint and the result; a finished run writes nothing more."""
    if (directory / "finished.json").is_file():
        return
    above = next(place for place in (directory, *directory.absolute().parents) if place.exists())
    needed = int((8 + OPTIMISER_BYTES[plan.layout.optim]) * plan.facts.model.trainable)
    free = shutil.disk_usage(above).free
    if free < needed:
        raise UserError(
            "the disk has no room for a checkpoint and the result", file=str(directory), field="output_dir",
            found=f"{bytes_text(free)} free", expected=f"at least {bytes_text(needed)}",
            fix="free some space, or give an output_dir on another disk",
        )  # fmt: skip


def plan_of(recipe: Recipe, prepared: Prepared, hardware: Hardware, placement: Placement) -> Plan:
    """The plan of a recipe without open settings over its rows."""
    train = recipe.train
    cut = Cut(train.per_device_train_batch_size, train.gradient_accumulation_steps)
    batches = make_batches(prepared.train, recipe.data, seed=train.seed, cut=cut, bins=prepared.bins)
    work = Work(batches, train.max_steps or 1)
    return plan_run(recipe, hardware, placement, task=prepared.task, work=work)


def _check_same_rows(run: Run, ledger: Ledger) -> None:
    """Raise UserError where the rows of an unfinished run have changed since it began."""
    if run.finished is not None:
        return
    began = run.read("data.json") or {}
    check_unchanged(began.get("files", []), ledger.files)
    if began.get("sha256") != ledger.sha256:
        raise UserError(
            "the training rows have changed since this run began", file=str(run.path), field="data.dataset",
            found=f"sha256 {ledger.sha256[:16]}…", expected=f"sha256 {str(began.get('sha256'))[:16]}…",
            fix="put the data back, or start a new run with another output_dir",
        )  # fmt: skip


def environment(hardware: Hardware, placement: Placement) -> dict[str, Any]:
    """Versions and hardware, flat."""
    from importlib.metadata import PackageNotFoundError, version

    versions: dict[str, Any] = {}
    for package in ("whet", "torch", "transformers", "peft", "tokenizers", "safetensors", "bitsandbytes"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions | {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": placement.device.type,
        "device_name": hardware.name,
        "compute": placement.arithmetic,
        "storage": placement.storage,
        "threads": torch.get_num_threads(),
    }


def print_ledger(ledger: Ledger) -> None:
    """Print the lines of the ledger that a person should see before the first step."""
    share = 100 * ledger.supervised_tokens / max(1, ledger.tokens)
    say(f"data: {ledger.rows_train:,} rows to learn from, {ledger.rows_eval:,} held out ({ledger.format})")
    if ledger.labels:
        say(f"task: {ledger.task}, {labels_text(ledger.task, ledger.labels)}")
    else:
        say(f"learned: {ledger.supervised_tokens:,} of {ledger.tokens:,} tokens ({share:.0f} %)")
    for note in ledger.notes:
        say(f"! {note}", style="yellow")
    if ledger.added:
        say(f"added: {ledger.added['rows']:,} of the rows to learn from")
    for name, benchmark in ledger.benchmarks.items():
        if benchmark["rows_learned"]:
            say(f"  {benchmark['rows_learned']:,} rows to learn from stand in {name}", style="yellow")
    for count, text in (
        (len(ledger.dropped), "rows dropped (data.json names each)"),
        (ledger.tokens_lost, "tokens lost to data.max_length"),
        (ledger.rows_without_end_of_turn, "rows whose end of turn is not learned: the model may not know when to stop"),
        (ledger.contradictory_rows, "rows whose text stands in another row with another label"),
        (ledger.rows_on_both_sides, "rows stand on both sides of the split: held-out scores will flatter"),
    ):
        if count:
            say(f"  {count:,} {text}", style="yellow")
