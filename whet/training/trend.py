"""Is training over too early? A loss that still falls steeply at the end says that more of it would help.

Read from the held-out losses where there are some, else from the training losses. The fall of the last fifth of the run
counts, and only while the last held-out loss is the lowest: a model that has begun to memorise is not told to go on.
Gives up: a schedule that ends near zero flattens every curve, so a run that would gain a little is not named.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

LAST_SHARE = 0.2  # of the run, whose fall is looked at
STEEP = 0.03  # of the loss before; a held-out loss moves by less from chance once it is flat
STEEP_TRAINING = 0.1  # single steps are noisy: means of a tenth of the run are compared
FEWEST_STEPS = 20


def still_falling(lines: Iterable[Mapping[str, Any]]) -> str | None:
    """A sentence for people about the lines of metrics.jsonl, or None."""
    records = list(lines)
    held_out = [(r["step"], r["eval_loss"]) for r in records if r.get("kind") == "eval"]
    steps = [(r["step"], r["loss"]) for r in records if r.get("kind") == "train"]
    fall = _of_held_out(held_out) if held_out else _of_training(steps)
    if fall is None:
        return None
    what = "held-out" if held_out else "training"
    return (f"the {what} loss still falls at the end (by {100 * fall:.0f} % in the last part): more epochs "
            "(train.num_train_epochs) or a higher rate (train.learning_rate) would learn more")  # fmt: skip


def _of_held_out(points: Sequence[tuple[int, float]]) -> float | None:
    last_step, last = points[-1]
    before = [loss for step, loss in points[:-1] if step <= (1 - LAST_SHARE) * last_step]
    if not before or last > min(loss for _, loss in points) or last_step < FEWEST_STEPS or before[-1] <= 0:
        return None
    fall = 1 - last / before[-1]
    return fall if fall >= STEEP else None


def _of_training(points: Sequence[tuple[int, float]]) -> float | None:
    part = len(points) // 10
    if part < FEWEST_STEPS // 10 or points[-1][0] < 10 * FEWEST_STEPS:
        return None
    losses = [loss for _, loss in points]
    late, before = sum(losses[-part:]) / part, sum(losses[-3 * part : -2 * part]) / part
    if before <= 0:
        return None
    fall = 1 - late / before
    return fall if fall >= STEEP_TRAINING else None
