"""Training, on one screen: get ready, build, resume or start, step, look, save, finish.

The same call on the same recipe continues an unfinished run to the bit and leaves a finished one alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from whet.base.console import Progress, bytes_text, say
from whet.base.errors import UserError
from whet.base.files import whole_directory, write_json
from whet.data.batch.batches import Cut
from whet.data.batch.make import make_batches
from whet.data.template.goldens import FILE as CONTRACT
from whet.data.template.goldens import write_contract
from whet.engine.memory.host_adam import HostAdamW
from whet.engine.memory.used import keep_freed_memory, peak_bytes, used_bytes
from whet.recipe import Parsed, fingerprint
from whet.runs import LABELS, Run
from whet.training import checkpoint
from whet.training.arrange import Arrangement
from whet.training.captured import GraphSteps
from whet.training.checkpoint import Identity
from whet.training.interrupt import CtrlC
from whet.training.optim import build_optimiser, set_rate
from whet.training.record import Recorder
from whet.training.schedule import learning_rate
from whet.training.setup import Ready, batches_of, build_model, get_ready, show_ledger
from whet.training.shrink import TRIED_ON, free_memory, no_room, ran_out, try_out
from whet.training.step import NotFinite, Pending, Steps, held_out_loss

MAX_EVAL_TOKENS = 500_000


@dataclass
class State:
    """What a checkpoint carries besides tensors. seconds is kept apart: it is never the same twice."""

    step: int = 0
    tokens: int = 0
    targets: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0
    seconds: float = 0.0
    offsets: dict[str, int] = field(default_factory=lambda: {"metrics": 0, "timing": 0})
    next_batch: str = ""


@dataclass(frozen=True)
class Launched:
    """A step under way, and the state after it: rate, step, tokens and learned tokens so far."""

    pending: Pending
    rate: float
    step: int
    tokens: int
    targets: int


class Stopped(Exception):
    """Ctrl-C: the run was saved and can be continued."""


def train(parsed: Parsed) -> Run:
    """Train what the recipe says; returns the run. Raises UserError, NotFinite (as UserError) and Stopped."""
    for note in parsed.notes:
        say(note, style="dim")
    keep_freed_memory()
    ready = get_ready(parsed)
    if ready.run.finished is not None:
        say(f"{ready.run.path} is finished ({ready.run.finished['steps']} steps): nothing to do")
        return ready.run
    show_ledger(ready.prepared.ledger)
    model, ready, arranged = build_model(ready)
    loop = Loop(ready, model, arranged)
    try:
        with arranged.running():
            loop.fit()
    except NotFinite as problem:
        raise _not_finite(problem, ready) from problem
    finally:
        loop.recorder.close()
    return ready.run


class Loop:
    """The state of a run in progress and the few things that are done with it."""

    def __init__(self, ready: Ready, model: torch.nn.Module, arranged: Arrangement) -> None:
        self.ready, self.model, self.arranged, self.objective = ready, model, arranged, arranged.objective
        self.run, self.settings = ready.run, ready.recipe.train
        self.batches, self.plain_batches = arranged.batches, batches_of(ready)
        self.total = self.settings.max_steps or 0
        self.held_out = _evaluation_batches(ready)
        assert self.settings.learning_rate is not None
        self.method = ready.recipe.method
        self.optimiser = build_optimiser(
            self.settings,
            arranged.matrices,
            arranged.vectors,
            self.settings.learning_rate,
            captured=arranged.graphs,
            masters=arranged.masters,
        )
        self.steps: GraphSteps | Steps
        if arranged.graphs:
            self.steps = GraphSteps(model, self.optimiser, self.objective, self.settings.max_grad_norm)
        else:
            self.steps = self._plain_steps()
        self.identity = Identity(fingerprint(ready.recipe), ready.prepared.ledger.sha256)
        self.recorder = Recorder(self.run.metrics, self.run.timing, self.settings.report_to)
        self.state = State()
        self.method.begin(model, self.optimiser, self.total, lambda: self.state.step)
        self.launched: Launched | None = None
        self.clock = time.perf_counter()
        self.interrupted = False

    def fit(self) -> None:
        """Step until the last one, early stopping or Ctrl-C; then keep the best and write it."""
        self._resume()
        with Progress("training", self.total, self.state.step) as bar, CtrlC(self._interrupt):
            self.clock, began = time.perf_counter(), self.state.step
            while self.state.step < self.total and not self._enough():
                first = self.launched is None and self.state.step == began
                self._step(bar)
                if first:
                    self._settle(bar)
                    self._try_largest()
                    self.clock = time.perf_counter()
                looks, saves = self._due()
                if looks or saves:
                    self._settle(bar)
                if looks:
                    self._evaluate()
                if looks or saves or self._enough():
                    self._save()
                self.clock = time.perf_counter() if looks or saves else self.clock
                if self.interrupted:
                    raise Stopped(f"stopped after step {self.state.step} of {self.total}; the same command continues")
        self._finish("early_stopping" if self._enough() else "completed")

    def _interrupt(self) -> None:
        self.interrupted = True

    def _step(self, bar: Progress) -> None:
        """Launch the next step, then look at the one before it: it is done while this one runs."""
        index = self.state.step
        rate = learning_rate(
            index,
            self.total,
            peak=self.settings.learning_rate or 0.0,
            shape=self.settings.lr_scheduler_type,
            warmup_ratio=self.settings.warmup_ratio,
            decay_ratio=self.settings.decay_ratio or 0.0,
        )
        set_rate(self.optimiser, rate)
        if self.method.before_step(self.model, index / self.total):
            self.state.best_loss = self.state.best_step = None
            self.state.evaluations_without_gain = 0
        pending, batches = self._launch(index)
        self._settle(bar)
        self.state.step += 1
        self.state.tokens += sum(batch.tokens for batch in batches)
        self.state.targets += sum(len(batch.targets) for batch in batches)
        self.launched = Launched(pending, rate, self.state.step, self.state.tokens, self.state.targets)
        if self.objective.device.type == "cpu":  # it is done by now, and the next launch would count as its time
            self._settle(bar)

    def _launch(self, index: int) -> tuple[Pending, list[Any]]:
        """The step under way and its micro-batches, cut until they fit into the memory."""
        while True:
            batches = self.batches.step(index)
            launch = partial(self.steps.step, batches, index + 1)
            try:
                return (self.arranged.first(launch) if self.launched is None else launch()), batches
            except RuntimeError as error:
                if not ran_out(error):
                    raise
            self._cut(index)  # here the failed step is let go with all it held

    def _cut(self, index: int) -> None:
        """Continue in smaller micro-batches. Raises UserError where a single row does not fit."""
        free_memory(self.optimiser)
        before = self.batches.step(index)
        found = self.batches.smaller(self.total)
        if found is None:
            largest = max(before, key=lambda batch: batch.ids.size)
            raise no_room(before, _places(largest.sources[:3], self.ready))
        say(f"out of memory in step {index + 1}, with up to {max(b.ids.size for b in before):,} tokens at once: going "
            f"on with {found.accumulate} instead of {self.batches.accumulate} forward passes a step; the result is "
            "the same", style="yellow")  # fmt: skip
        self.batches = found
        self.steps = self._plain_steps()
        facts = self.run.read("arrangement.json") or {}
        self.run.write("arrangement.json", facts | {
            "micro_batches": found.accumulate, "cuda_graphs": False,
            "out_of_memory": [*facts.get("out_of_memory", []), {"step": index + 1, "micro_batches": found.accumulate}],
        })  # fmt: skip

    def _plain_steps(self) -> Steps:
        penalty = partial(self.method.penalty, self.model) if self.method.penalised else None
        return Steps(self.model, self.optimiser, self.objective, self.settings.max_grad_norm, penalty)

    def _try_largest(self) -> None:
        """Run the largest batch of the run once, so that memory runs out now or never."""
        while self.objective.device.type in TRIED_ON:
            step = self.batches.largest_step(self.total)
            if step is None:
                break
            try:
                try_out(self.model, self.optimiser, self.batches.step(step), self.objective)
                break
            except RuntimeError as error:
                if not ran_out(error):
                    raise
            self._cut(step)

    def _settle(self, bar: Progress) -> None:
        """Wait for the step that was launched last, and log it."""
        if self.launched is None:
            return
        launched, self.launched = self.launched, None
        stepped = launched.pending.read()
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        self.state.seconds += seconds
        step, device = launched.step, self.objective.device
        if step % self.settings.logging_steps == 0 or step == self.total:
            self.recorder.metric(
                kind="train", step=step, epoch=round(step / self.batches.steps_per_epoch, 6), loss=stepped.loss,
                learning_rate=launched.rate, grad_norm=stepped.grad_norm, tokens=launched.tokens,
                supervised_tokens=launched.targets,
            )  # fmt: skip
            self.recorder.time(
                step=step, seconds=round(self.state.seconds, 4), tokens_per_second=round(stepped.tokens / seconds, 1),
                memory_bytes=used_bytes(device),
            )  # fmt: skip
        speed = launched.tokens / max(self.state.seconds, 1e-9)
        bar.advance(f"loss {stepped.loss:.4f}  {speed:,.0f} tok/s  {bytes_text(used_bytes(device))}")

    def _due(self) -> tuple[bool, bool]:
        """Whether the held-out loss is to be measured now, and whether a checkpoint is due."""
        step = self.state.step
        ending = step == self.total or self.interrupted
        looks = (step % (self.settings.eval_steps or self.total) == 0 or step == self.total) and bool(self.held_out)
        return looks, ending or step % (self.settings.save_steps or self.total) == 0

    def _evaluate(self) -> None:
        """Measure and record the held-out loss."""
        step = self.state.step
        loss, targets = held_out_loss(self.model, self.held_out, self.objective)
        if not math.isfinite(loss):
            raise UserError(
                f"the held-out loss after step {step} is not finite", file=str(self.run.path), found=str(loss),
                expected="a finite number",
                fix="lower train.learning_rate, or base.compute=fp32; look at the held-out rows",
            )  # fmt: skip
        epoch = round(step / self.batches.steps_per_epoch, 6)
        self.recorder.metric(kind="eval", step=step, epoch=epoch, eval_loss=loss, supervised_tokens=targets)
        if self.state.best_loss is None or loss < self.state.best_loss:
            self.state.best_loss, self.state.best_step = loss, step
            self.state.evaluations_without_gain = 0
        else:
            self.state.evaluations_without_gain += 1

    def _enough(self) -> bool:
        patience = self.settings.early_stopping_patience
        return patience is not None and self.state.evaluations_without_gain >= patience

    def _save(self) -> None:
        self.state.offsets = self.recorder.offsets()
        self.state.next_batch = self._next_batch()
        values = dict(vars(self.state))
        checkpoint.save(self.run.checkpoints, self.state.step, self.model, self.optimiser, values, self.identity)
        best = [self.state.best_step] if self.state.best_step is not None else []
        checkpoint.prune(self.run.checkpoints, self.state.step, self.settings.save_total_limit, best)

    def _next_batch(self) -> str:
        """Of the rows that come next, however they are cut into forward passes."""
        return self.plain_batches.step(self.state.step)[0].sha256() if self.state.step < self.total else ""

    def _resume(self) -> None:
        self.run.checkpoints.mkdir(parents=True, exist_ok=True)
        for place in (self.run.path, self.run.checkpoints):
            checkpoint.sweep(place)
        path, complaints = checkpoint.latest(self.run.checkpoints, self.identity)
        for complaint in complaints:
            say(complaint, style="yellow")
        if path is not None:
            values = checkpoint.load(path, self.model, self.optimiser)
            self.state = State(**{name: values[name] for name in State.__dataclass_fields__})
            if self._next_batch() != self.state.next_batch:
                raise UserError(
                    "the next batch is not the one that the checkpoint was about to train on", file=str(path),
                    fix="the rows or their order changed; start a new run with another output_dir",
                )  # fmt: skip
            say(f"continuing {self.run.path} after step {self.state.step} of {self.total}")
        self.recorder.rewind(self.state.offsets)

    def _finish(self, stop: str) -> None:
        """Keep the best weights if wanted, write them, and mark the run finished as the very last thing."""
        best = self.state.best_step
        if self.settings.load_best_model_at_end and best is not None and best != self.state.step:
            checkpoint.load_weights(self.run.checkpoints / f"step-{best}", self.model, self.optimiser)
            say(f"keeping step {best}, the lowest held-out loss ({self.state.best_loss:.4f})")
        kept = best if self.settings.load_best_model_at_end and best is not None else self.state.step
        if isinstance(self.optimiser, HostAdamW):
            self.optimiser.release()
        self.method.settle(self.model)  # after the best weights are back: they may be from before it would be settled
        tokeniser = self.ready.prepared.tokeniser
        with whole_directory(self.run.trained) as directory:
            self.method.save(self.model, directory)  # type: ignore[arg-type]
            tokeniser.tokenizer.save_pretrained(str(directory))
            task = self.ready.prepared.task
            if task.name != "causal":
                write_json(directory / LABELS, {"task": task.name, "labels": list(task.labels)})
            if tokeniser.template is not None:
                write_contract(tokeniser, directory / CONTRACT)
        self.run.write("finished.json", self._summary(stop, kept))
        speed = self.state.tokens / max(self.state.seconds, 1e-9)
        say(f"trained {self.state.step} steps, {self.state.tokens:,} tokens in {self.state.seconds:.1f} s "
            f"({speed:,.0f} tok/s) -> {self.run.trained}")  # fmt: skip

    def _summary(self, stop: str, kept: int) -> dict[str, Any]:
        from whet.engine.weights.linear import count_parameters

        trainable, total = count_parameters(self.model)
        return {
            "steps": self.state.step,
            "kept_step": kept,
            "best_step": self.state.best_step,
            "best_eval_loss": self.state.best_loss,
            "stopped": stop,
            "seconds": round(self.state.seconds, 3),
            "tokens": self.state.tokens,
            "supervised_tokens": self.state.targets,
            "tokens_per_second": round(self.state.tokens / max(self.state.seconds, 1e-9), 1),
            "trainable_params": trainable,
            "all_params": total,
            "peak_memory_bytes": peak_bytes(self.objective.device),
        }


def _evaluation_batches(ready: Ready) -> list[Any]:
    """The held-out rows in batches of similar length, up to a bound on their tokens; each row stands alone."""
    rows = ready.prepared.evaluation
    settings, data = ready.recipe.train, ready.recipe.data
    batches = make_batches(rows, data, seed=0, cut=Cut(settings.per_device_train_batch_size))
    chosen, tokens = [], 0
    for units in batches.all() if len(rows) else []:
        tokens += int(rows.lengths[units].sum())
        if tokens > MAX_EVAL_TOKENS:
            break
        chosen.append(batches.batch(units))
    return chosen


def _not_finite(problem: NotFinite, ready: Ready) -> UserError:
    """Say where a loss or gradient broke: step, and the first rows of that step by file and line."""
    names = _places(problem.rows[:3], ready)
    return UserError(
        f"the {problem.what} of step {problem.step} is not finite; nothing was updated",
        file=str(ready.run.path),
        found=f"rows of that step: {names}",
        expected="a finite number",
        fix="lower train.learning_rate, or base.compute=fp32; the last checkpoint is intact",
    )


def _places(rows: Sequence[int], ready: Ready) -> str:
    """Where rows of the training data come from, by file and row."""
    sources = ready.prepared.train.sources
    places = [ready.prepared.train_examples[int(sources[row])] for row in rows]
    return "; ".join(f"{example.file} row {example.row}" for example in places)
