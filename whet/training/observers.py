"""What watches a run and changes nothing: the log files and the progress bar. Only the process that writes has any."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from whet.base.console import Progress, bytes_text, say
from whet.base.errors import UserError
from whet.base.extras import require
from whet.runs import record
from whet.training.state import EvaluationReport, State, StepReport


class Observer:
    """Gets what happens in a run; each method may be left out."""

    def begin(self, state: State, total: int) -> None:
        """Training begins or goes on after `state.step` of `total` steps."""

    def step_done(self, report: StepReport) -> None:
        """A step is done."""

    def evaluated(self, report: EvaluationReport) -> None:
        """A held-out loss was measured."""

    def before_save(self, state: State) -> None:
        """A checkpoint is about to be written: put what it has to know into `state`."""

    def close(self) -> None:
        """Training ended, well or not."""


Callback = Callable[[dict[str, Any]], object] | Observer


class Told(Observer):
    """Hands each record of metrics.jsonl to a function, every step, whatever `logging_steps` is."""

    def __init__(self, tell: Callable[[dict[str, Any]], object]) -> None:
        self.tell = tell

    def step_done(self, report: StepReport) -> None:
        self.tell(_of_step(report))

    def evaluated(self, report: EvaluationReport) -> None:
        self.tell(_of_evaluation(report))


def observer_of(callback: Callback) -> Observer:
    """An observer of a callback. Raises UserError for what is neither observer nor function."""
    if isinstance(callback, Observer):
        return callback
    if not callable(callback):
        raise UserError(
            "a callback is a function", field="callbacks", found=type(callback).__name__,
            expected="a function of a dict with kind, step and loss, or an Observer", fix="callbacks=[print]",
        )  # fmt: skip
    return Told(callback)


def _of_step(report: StepReport) -> dict[str, Any]:
    return {
        "kind": "train", "step": report.step, "epoch": report.epoch, "loss": report.loss,
        "learning_rate": report.learning_rate, "grad_norm": report.grad_norm, "tokens": report.tokens,
        "supervised_tokens": report.targets,
    }  # fmt: skip


def _of_evaluation(report: EvaluationReport) -> dict[str, Any]:
    return {
        "kind": "eval", "step": report.step, "epoch": report.epoch, "eval_loss": report.loss,
        "supervised_tokens": report.targets,
    }  # fmt: skip


class MetricsLog(Observer):
    """metrics.jsonl (a function of the run) and timing.jsonl (of the day), and TensorBoard where it is asked for.

    `begin` takes the files back to the checkpoint, so nothing is ever logged twice; what a file has lost meanwhile is
    said, and stays lost.
    """

    def __init__(self, metrics: Path, timing: Path, *, logging_steps: int, report_to: Sequence[str] = ()) -> None:
        self.logging_steps, self.total = logging_steps, 0
        self._folder = metrics.parent
        self._files: dict[str, BinaryIO] = {"metrics": metrics.open("a+b"), "timing": timing.open("a+b")}
        self._writer: Any = None
        self._board: Any = None
        if "tensorboard" in report_to:
            require("tensorboard", "train.report_to: tensorboard")
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter

    def begin(self, state: State, total: int) -> None:
        self.total = total
        for name, file in self._files.items():
            whole = _kept_bytes(file, state.offsets[name], state.step)
            file.truncate(whole)
            if whole < state.offsets[name]:
                say(f"{name}.jsonl was cut or changed: lines of steps up to {state.step} are missing", style="yellow")
        if self._writer is not None:
            self._board = self._writer(str(self._folder / "tensorboard"), purge_step=state.step + 1)

    def step_done(self, report: StepReport) -> None:
        if report.step % self.logging_steps and report.step != self.total:
            return
        self._write("metrics", _of_step(report))
        self._write("timing", {
            "step": report.step, "seconds": round(report.total_seconds, 4),
            "tokens_per_second": round(report.step_tokens / report.seconds, 1), "memory_bytes": report.memory_bytes,
        })  # fmt: skip

    def evaluated(self, report: EvaluationReport) -> None:
        self._write("metrics", _of_evaluation(report))

    def before_save(self, state: State) -> None:
        offsets = {}
        for name, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            offsets[name] = os.fstat(file.fileno()).st_size
        state.offsets = offsets

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        if self._board is not None:
            self._board.close()

    def _write(self, name: str, values: dict[str, Any]) -> None:
        self._files[name].write(json.dumps(values, allow_nan=False).encode() + b"\n")
        self._files[name].flush()
        if self._board is None:
            return
        for key, value in values.items():
            if key not in ("kind", "step"):
                self._board.add_scalar(key, value, values["step"])


def _kept_bytes(file: BinaryIO, offset: int, step: int) -> int:
    """How much of a log a checkpoint after `step` goes on from: whole lines up to `offset`, and none of a later step.

    A line that is no record stays: those who read the log pass over it.
    """
    file.seek(0)
    kept = 0
    while (line := file.readline()).endswith(b"\n") and kept + len(line) <= offset:
        written = (record(line) or {}).get("step", 0)
        if not isinstance(written, int) or written > step:
            break
        kept += len(line)
    return kept


class ProgressBar(Observer):
    """The bar in the terminal, with loss, speed and memory."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._lowest: float | None = None

    def begin(self, state: State, total: int) -> None:
        self._lowest = state.best_loss
        self._bar = Progress("training", total, state.step)
        self._bar.__enter__()

    def step_done(self, report: StepReport) -> None:
        assert self._bar is not None
        speed = report.tokens / max(report.total_seconds, 1e-9)
        self._bar.advance(
            f"epoch {report.epoch:.2f}  loss {report.loss:.4f}  {speed:,.0f} tok/s  {bytes_text(report.memory_bytes)}"
        )

    def evaluated(self, report: EvaluationReport) -> None:
        lowest = self._lowest is None or report.loss < self._lowest
        note = "the lowest so far" if lowest else f"above the lowest, {self._lowest:.4f}"
        self._lowest = report.loss if lowest else self._lowest
        say(f"step {report.step} (epoch {report.epoch:.2f}): held-out loss {report.loss:.4f}, {note}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None
