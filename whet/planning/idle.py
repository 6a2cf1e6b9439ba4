"""Say which settings do nothing with the rows that there are: looks that never come, choices among nothing.

None of them is wrong, and a recipe may serve several sets of rows; but whoever asked for a look every hundred steps and
gets none should read why. What one setting does to another is in `without_effect`.
"""

from __future__ import annotations

from collections.abc import Iterator

from whet.engine.task import LABELLED, TaskName
from whet.recipe import Recipe


def idle(asked: Recipe, resolved: Recipe, held_out_rows: int, task: TaskName) -> Iterator[str]:
    """A sentence for each setting that was asked for and does nothing. resolved: the recipe with all decided."""
    train, steps = asked.train, resolved.train.max_steps or 0
    if train.eval_steps is not None and not held_out_rows:
        yield f"train.eval_steps={train.eval_steps}: without effect, no row is held out"
    elif train.eval_steps is not None and train.eval_steps > steps:
        yield f"train.eval_steps={train.eval_steps}: the run has {steps:,} steps, so the only look is at its end"
    if train.save_steps is not None and train.save_steps > steps:
        yield f"train.save_steps={train.save_steps}: the run has {steps:,} steps, so the only checkpoint is at its end"
    if train.logging_steps > max(1, steps):
        yield f"train.logging_steps={train.logging_steps}: the run has {steps:,} steps, so only the last is written"
    patience, looks = train.early_stopping_patience, steps // (resolved.train.eval_steps or steps or 1)
    if patience is not None and looks <= patience:
        yield f"train.early_stopping_patience={patience}: without effect, the run has {looks:,} evaluations"
    if train.warmup_steps is not None and train.warmup_steps >= steps > 1:
        yield f"train.warmup_steps={train.warmup_steps}: the run has {steps:,} steps, so the rate never falls"
    if task in LABELLED and asked.eval.max_new_tokens is not None:
        yield f"eval.max_new_tokens={asked.eval.max_new_tokens}: without effect, labels are not written as text"
