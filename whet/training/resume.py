"""The checkpoints of a run: written, pruned, and continued from."""

from __future__ import annotations

from typing import Any

import torch

from whet.base.console import say
from whet.base.errors import UserError
from whet.base.files import sweep
from whet.runs import Run
from whet.settings import Train
from whet.training import checkpoint
from whet.training.checkpoint import Identity
from whet.training.optim import Optimiser
from whet.training.state import State


class Checkpoints:
    """The checkpoints of one run, of its model and optimiser. batches: as the recipe cuts them, not as they are run."""

    def __init__(
        self, run: Run, identity: Identity, model: torch.nn.Module, optimiser: Optimiser, batches: Any, settings: Train
    ) -> None:
        self.run, self.identity, self.model, self.optimiser = run, identity, model, optimiser
        self.batches, self.settings = batches, settings

    def save(self, state: State) -> None:
        """Write a checkpoint and remove those that are not kept."""
        state.next_batch = self._next_batch(state)
        checkpoint.save(self.run.checkpoints, state.step, self.model, self.optimiser, dict(vars(state)), self.identity)
        self._prune(state)

    def resume(self) -> State | None:
        """Restore the newest valid checkpoint; None where there is none. Raises UserError where other rows come next
        than the checkpoint was about to train on."""
        self.run.checkpoints.mkdir(parents=True, exist_ok=True)
        for folder in (self.run.path, self.run.checkpoints):
            sweep(folder)
        path, complaints = checkpoint.latest(self.run.checkpoints, self.identity)
        for complaint in complaints:
            say(complaint, style="yellow")
        if path is None:
            return None
        state = State.from_checkpoint(checkpoint.load(path, self.model, self.optimiser))
        # Nothing was to come next when it was written: it was the end of the run then.
        goes_on = not state.next_batch and state.step < (self.settings.max_steps or 0)
        if not goes_on and self._next_batch(state) != state.next_batch:
            raise UserError(
                "the next batch is not the one that the checkpoint was about to train on", file=str(path),
                fix="the rows or their order changed; start a new run with another output_dir",
            )  # fmt: skip
        self._prune(state)  # a process that was killed in between could not
        say(f"continuing {self.run.path} after step {state.step} of {self.settings.max_steps}")
        if goes_on:
            say("the run was finished; its learning rate goes on as the schedule of "
                f"{self.settings.max_steps} steps has it, so the result is not that of one run of this length",
                style="yellow")  # fmt: skip
        return state

    def _prune(self, state: State) -> None:
        best = [state.best_step] if state.best_step is not None else []
        checkpoint.prune(self.run.checkpoints, state.step, self.settings.save_total_limit, best)

    def damage(self, step: int) -> str | None:
        """Why the checkpoint of a step cannot be trusted, or None."""
        return checkpoint.damage(self.run.checkpoints / f"step-{step}")

    def load_weights(self, step: int) -> None:
        """Restore the trained weights alone, as they were after `step`."""
        checkpoint.load_weights(self.run.checkpoints / f"step-{step}", self.model, self.optimiser)

    def _next_batch(self, state: State) -> str:
        """Hash of the rows that come next, however they are cut into forward passes."""
        if state.step >= (self.settings.max_steps or 0):
            return ""
        return self.batches.step(state.step)[0].sha256()
