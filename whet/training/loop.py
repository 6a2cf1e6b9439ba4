"""The loop: step, look at the held-out rows, save, until the last step, early stopping or Ctrl-C.

Who watches is an observer, what is saved is `Checkpoints`, how a step is started and cut is the launcher. A step is
launched before the one before it is read: the host prepares while the device computes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from whet.base.errors import UserError
from whet.base.out_of_memory import CLOSE_OTHERS
from whet.engine.memory.scarce import free_text
from whet.engine.memory.used import used_bytes
from whet.methods.method import Method
from whet.settings import Train
from whet.training.held_out import HeldOut
from whet.training.interrupt import CtrlC
from whet.training.launch import Launcher
from whet.training.observers import Observer
from whet.training.optim import set_rate
from whet.training.resume import Checkpoints
from whet.training.schedule import learning_rate
from whet.training.state import EvaluationReport, State, StepReport
from whet.training.step import Pending


class Stopped(Exception):
    """Ctrl-C: the run was saved and can be continued."""


@dataclass(frozen=True)
class Launched:
    """A step on its way, its learning rate, and the run's steps, tokens and learned tokens after it."""

    pending: Pending
    rate: float
    step: int
    tokens: int
    targets: int


class Loop:
    """A run in progress."""

    def __init__(
        self, settings: Train, method: Method, launcher: Launcher, checkpoints: Checkpoints, held_out: HeldOut,
        observers: Sequence[Observer],
    ) -> None:  # fmt: skip
        self.settings, self.method, self.launcher = settings, method, launcher
        self.checkpoints, self.held_out, self.observers = checkpoints, held_out, observers
        self.total = settings.max_steps or 0
        self.state = State()
        self.launched: Launched | None = None
        self.clock = 0.0
        self.interrupted = False
        method.begin(launcher.arranged.model, launcher.optimiser, self.total, lambda: self.state.step)

    def fit(self) -> str:
        """Step to the end; returns why it ended: completed or early_stopping. Raises Stopped, NotFinite, UserError."""
        self.state = self.launcher.with_room(self.checkpoints.resume, self._not_continued) or State()
        for observer in self.observers:
            observer.begin(self.state, self.total)
        with CtrlC(self._interrupt):
            self._wind_clock()
            self._first_step()
            while not self._ended():
                self._step()
                self._look_and_save()
        return "early_stopping" if self._is_enough() else "completed"

    def _first_step(self) -> None:
        """The first step of this process, by itself: after it memory has been asked for all that it will hold."""
        if self._ended():
            return
        self._step()
        self._read_step()
        self.launcher.try_largest()
        self._wind_clock()
        self._look_and_save()

    def _step(self) -> None:
        """Launch the next step, then read the one before it: it is done while this one runs."""
        index, settings = self.state.step, self.settings
        rate = learning_rate(
            index,
            self.total,
            peak=settings.learning_rate or 0.0,
            shape=settings.lr_scheduler_type,
            warmup_steps=settings.warmup_steps or 0,
            decay_ratio=settings.decay_ratio or 0.0,
        )
        set_rate(self.launcher.optimiser, rate)
        if self.method.before_step(self.launcher.arranged.model, index / self.total):
            self.state.forget_best()
        pending, batches = self.launcher.launch(index)
        self._read_step()
        self.state.step += 1
        self.state.tokens += sum(batch.tokens for batch in batches)
        self.state.targets += sum(len(batch.targets) for batch in batches)
        self.launched = Launched(pending, rate, self.state.step, self.state.tokens, self.state.targets)
        if self.launcher.arranged.device.type == "cpu":  # it is done, and the next launch would count as its time
            self._read_step()

    def _read_step(self) -> None:
        """Wait for the step that was launched last, and report it."""
        if self.launched is None:
            return
        launched, self.launched = self.launched, None
        stepped = launched.pending.read()
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        self.state.seconds += seconds
        report = StepReport(
            step=launched.step, epoch=self._epoch(launched.step), loss=stepped.loss, learning_rate=launched.rate,
            grad_norm=stepped.grad_norm, tokens=launched.tokens, targets=launched.targets, step_tokens=stepped.tokens,
            seconds=seconds, total_seconds=self.state.seconds, memory_bytes=used_bytes(self.launcher.arranged.device),
        )  # fmt: skip
        for observer in self.observers:
            observer.step_done(report)

    def _look_and_save(self) -> None:
        """Measure the held-out loss and write a checkpoint, where they are due."""
        looks, saves = self._due()
        if not (looks or saves):
            return
        self._read_step()
        if looks:
            self._evaluate()
        self._save()
        self._wind_clock()
        if self.interrupted:
            raise Stopped(f"stopped after step {self.state.step} of {self.total}; the same command continues")

    def _due(self) -> tuple[bool, bool]:
        """(the held-out loss is to be measured now, a checkpoint is to be written)."""
        step, last = self.state.step, self.state.step == self.total
        looks = (step % (self.settings.eval_steps or self.total) == 0 or last) and bool(self.held_out.batches)
        return looks, last or self.interrupted or step % (self.settings.save_steps or self.total) == 0

    def _evaluate(self) -> None:
        arranged, step = self.launcher.arranged, self.state.step
        release = self.launcher.release_graphs
        loss, targets = self.held_out.measure(arranged.model, arranged.objective, step, release)
        self.state.note_evaluation(loss)
        report = EvaluationReport(step, self._epoch(step), loss, targets)
        for observer in self.observers:
            observer.evaluated(report)

    def _save(self) -> None:
        for observer in self.observers:
            observer.before_save(self.state)
        self.launcher.with_room(partial(self.checkpoints.save, self.state), self._not_written)

    def _not_written(self) -> UserError:
        return UserError(
            f"the checkpoint of step {self.state.step} could not be gathered: memory ran out",
            file=str(self.checkpoints.run.checkpoints), found=free_text(self.launcher.arranged.device),
            expected="room for the trained weights once more",
            fix=f"{CLOSE_OTHERS}; the same command goes on from the checkpoint before it",
        )  # fmt: skip

    def _not_continued(self) -> UserError:
        return UserError(
            "the checkpoint does not fit in memory beside the model", file=str(self.checkpoints.run.checkpoints),
            found=free_text(self.launcher.arranged.device), expected="the memory that the run had when it began",
            fix=f"{CLOSE_OTHERS}; then the same command; or train.offload_optimizer=true in a new run",
        )  # fmt: skip

    def _ended(self) -> bool:
        return self.state.step >= self.total or self._is_enough()

    def _is_enough(self) -> bool:
        patience = self.settings.early_stopping_patience
        return patience is not None and self.state.evaluations_without_gain >= patience

    def _epoch(self, step: int) -> float:
        return round(step / self.launcher.batches.steps_per_epoch, 6)

    def _interrupt(self) -> None:
        self.interrupted = True

    def _wind_clock(self) -> None:
        """Let the time of the next step begin now."""
        self.clock = time.perf_counter()
