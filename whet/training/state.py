"""The state of a run in progress, and what a step says of itself."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any


@dataclass
class State:
    """Everything that a checkpoint carries besides tensors.

    step, tokens, targets: optimiser steps done, real and learned tokens in them. best_loss, best_step: of the held-out
    evaluations so far. seconds: time of the steps; kept apart from metrics, it is never the same twice. offsets: bytes
    of the log files. next_batch: hash of the rows that come next.
    """

    step: int = 0
    tokens: int = 0
    targets: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0
    seconds: float = 0.0
    offsets: dict[str, int] = field(default_factory=lambda: {"metrics": 0, "timing": 0})
    next_batch: str = ""

    @classmethod
    def from_checkpoint(cls, values: dict[str, Any]) -> State:
        """The state in a checkpoint's values."""
        return cls(**{entry.name: values[entry.name] for entry in fields(cls)})

    @property
    def tokens_per_second(self) -> float:
        """Over all steps so far."""
        return self.tokens / max(self.seconds, 1e-9)

    def note_evaluation(self, loss: float) -> None:
        """Compare a held-out loss with the best one."""
        if self.best_loss is None or loss < self.best_loss:
            self.best_loss, self.best_step = loss, self.step
            self.evaluations_without_gain = 0
        else:
            self.evaluations_without_gain += 1

    def forget_best(self) -> None:
        """Let earlier held-out losses count no more: the method has made another model of it."""
        self.best_loss = self.best_step = None
        self.evaluations_without_gain = 0


@dataclass(frozen=True)
class StepReport:
    """A step that is done. loss: mean over its learned tokens; grad_norm: before clipping; tokens, targets: of the run
    so far; step_tokens, seconds: of this step; memory_bytes: held now; tokens_per_second: of the run."""

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    targets: int
    step_tokens: int
    seconds: float
    total_seconds: float
    memory_bytes: int


@dataclass(frozen=True)
class EvaluationReport:
    """A held-out loss: mean over `targets` learned tokens, after step `step`."""

    step: int
    epoch: float
    loss: float
    targets: int
