"""Training from a recipe to a finished run: get ready, load, apply the layout, step, look, save, finish.

The same call on the same recipe continues an unfinished run to the bit and leaves a finished one alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from whet.base.console import say
from whet.base.errors import UserError
from whet.base.lock import DirectoryLock
from whet.base.out_of_memory import CLOSE_OTHERS
from whet.engine.memory.scarce import free_text, refusing
from whet.engine.memory.used import keep_freed_memory
from whet.recipe import Parsed, fingerprint
from whet.runs import Run, run_directory
from whet.training.apply import Arranged, apply
from whet.training.checkpoint import Identity
from whet.training.finish import finish
from whet.training.held_out import held_out_of
from whet.training.launch import Launcher
from whet.training.load import load
from whet.training.loop import Loop
from whet.training.objective.choose import objective_for
from whet.training.observers import MetricsLog, Observer, ProgressBar
from whet.training.optim import build_optimiser
from whet.training.relief import Relief, no_room_to_train
from whet.training.resume import Checkpoints
from whet.training.setup import Ready, get_ready, print_ledger
from whet.training.start import start_from_rows
from whet.training.step import NotFinite


def train(parsed: Parsed, more: Sequence[Observer] = ()) -> Run:
    """Train what the recipe says; returns the run. more: observers of the caller's. Raises UserError, NotFinite (as
    UserError) and Stopped."""
    for note in parsed.notes:
        say(note, style="dim")
    keep_freed_memory()
    with DirectoryLock(run_directory(parsed.recipe)) as lock:
        ready = get_ready(parsed, lock)
        if ready.run.finished is not None:
            say(f"{ready.run.path} is finished ({ready.run.finished['steps']} steps): nothing to do")
            return ready.run
        print_ledger(ready.prepared.ledger)
        with refusing(partial(_no_room, ready)):
            arranged, ready = build(ready)
        with watching(ready, more) as observers, _naming_rows(ready), arranged.running():
            loop = make_loop(ready, arranged, observers)
            reason = loop.fit()
        loop.launcher.release_graphs()
        with refusing(partial(_not_finished, ready)):
            finish(ready, loop.launcher.arranged, loop.checkpoints, loop.state, reason)
    return ready.run


def build(ready: Ready) -> tuple[Arranged, Ready]:
    """Load the model and lay it out; returns it with the run, which may have been laid out anew. Raises UserError."""
    loaded, ready = load(ready)
    recipe, plan = ready.recipe, ready.plan
    placement = plan.facts.placement
    objective = objective_for(
        loaded.network, placement, plan.task, padded=not plan.facts.flat, virtual=not recipe.method.can.inside
    )
    start_from_rows(recipe.method, loaded.model, objective, ready.batches)
    arranged = apply(plan, loaded, objective)
    ready.run.write("layout.json", arranged.as_dict())
    return arranged, ready


def make_loop(ready: Ready, arranged: Arranged, observers: Sequence[Observer]) -> Loop:
    """The loop over a model that is laid out."""
    recipe = ready.recipe
    train, method = recipe.train, recipe.method
    layout = arranged.layout
    optimiser = build_optimiser(
        train, arranged.trained, captured=layout.cuda_graphs, paged=layout.page_optimizer, masters=arranged.masters
    )
    run = ready.run

    def note(entries: dict[str, Any]) -> None:
        run.write("layout.json", (run.read("layout.json") or {}) | entries)

    launcher = Launcher(
        arranged, optimiser, Relief(ready.plan, note, ready.name_rows), total=train.max_steps or 0,
        max_grad_norm=train.max_grad_norm,
        penalty=partial(method.penalty, arranged.model) if method.penalised else None,
    )  # fmt: skip
    identity = Identity(fingerprint(recipe), ready.prepared.ledger.sha256)
    checkpoints = Checkpoints(ready.run, identity, arranged.model, optimiser, ready.batches, train)
    return Loop(train, method, launcher, checkpoints, held_out_of(ready), observers)


def _no_room(ready: Ready) -> UserError:
    """The error where the model is loaded, and what is trained does not fit beside it."""
    return no_room_to_train(ready.plan, str(ready.run.path))


def _not_finished(ready: Ready) -> UserError:
    """The error where the result could not be gathered after the last step."""
    return UserError(
        "memory ran out while the result was written; every step is done and saved", file=str(ready.run.path),
        found=free_text(ready.plan.facts.placement.device), expected="room for the trained weights once more",
        fix=f"{CLOSE_OTHERS}; the same command writes it",
    )  # fmt: skip


@contextlib.contextmanager
def watching(ready: Ready, more: Sequence[Observer] = ()) -> Iterator[list[Observer]]:
    """The observers of a run, closed at the end of the block."""
    train, run = ready.recipe.train, ready.run
    log = MetricsLog(run.metrics, run.timing, logging_steps=train.logging_steps, report_to=train.report_to)
    observers = [log, ProgressBar(), *more]
    try:
        yield observers
    finally:
        for observer in observers:
            observer.close()


@contextlib.contextmanager
def _naming_rows(ready: Ready) -> Iterator[None]:
    """Turn a loss or gradient that is not finite into an error with step and rows."""
    try:
        yield
    except NotFinite as problem:
        raise UserError(
            f"the {problem.what} of step {problem.step} is not finite; nothing was updated",
            file=str(ready.run.path),
            found=f"rows of that step: {ready.name_rows(problem.rows[:3])}",
            expected="a finite number",
            fix="lower train.learning_rate, or base.compute=fp32; the last checkpoint is intact",
        ) from problem
