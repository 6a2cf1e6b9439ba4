"""What watches a run and changes nothing: the log files and the progress bar. Only the process that writes has any."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from whet.base.console import Progress, bytes_text, say
from whet.base.extras import require
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


class MetricsLog(Observer):
    """metrics.jsonl (a function of the run) and timing.jsonl (of the day), and TensorBoard where it is asked for.

    `begin` takes the files back to the checkpoint's offsets, so nothing is ever logged twice.
    """

    def __init__(self, metrics: Path, timing: Path, *, logging_steps: int, report_to: Sequence[str] = ()) -> None:
        self.logging_steps, self.total = logging_steps, 0
        self._files = {"metrics": metrics.open("a", encoding="utf-8"), "timing": timing.open("a", encoding="utf-8")}
        self._board: Any = None
        if "tensorboard" in report_to:
            require("tensorboard", "train.report_to: tensorboard")
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(metrics.parent / "tensorboard"))

    def begin(self, state: State, total: int) -> None:
        self.total = total
        for name, file in self._files.items():
            file.flush()
            os.ftruncate(file.fileno(), state.offsets[name])

    def step_done(self, report: StepReport) -> None:
        if report.step % self.logging_steps and report.step != self.total:
            return
        self._write("metrics", {
            "kind": "train", "step": report.step, "epoch": report.epoch, "loss": report.loss,
            "learning_rate": report.learning_rate, "grad_norm": report.grad_norm, "tokens": report.tokens,
            "supervised_tokens": report.targets,
        })  # fmt: skip
        self._write("timing", {
            "step": report.step, "seconds": round(report.total_seconds, 4),
            "tokens_per_second": round(report.step_tokens / report.seconds, 1), "memory_bytes": report.memory_bytes,
        })  # fmt: skip

    def evaluated(self, report: EvaluationReport) -> None:
        self._write("metrics", {
            "kind": "eval", "step": report.step, "epoch": report.epoch, "eval_loss": report.loss,
            "supervised_tokens": report.targets,
        })  # fmt: skip

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
        self._files[name].write(json.dumps(values, allow_nan=False) + "\n")
        self._files[name].flush()
        if self._board is None:
            return
        for key, value in values.items():
            if key not in ("kind", "step"):
                self._board.add_scalar(key, value, values["step"])


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
