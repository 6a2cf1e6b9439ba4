"""The refusal of models whose own code cannot be trained as a recipe asks: they see ahead, or do not keep rows apart.

Asked twice, with the same answers: of a model's first layer before its weights are read, and of the model itself when
it is loaded, which also finds what only the whole model shows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from whet.base.errors import UserError
from whet.engine.compute.excerpt import shown_by_code
from whet.engine.compute.readable import cannot_read
from whet.engine.task import Task
from whet.settings import Train

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SEES_AHEAD = 0.01  # of the largest logit; a causal model moves by 0, or by rounding


def check_code(network: PreTrainedModel, task: Task, train: Train) -> None:
    """Raise UserError where the first layer of `network`, which is without memory, shows that it cannot be trained."""
    shown = shown_by_code(network, task)
    if shown.untrainable:
        raise cannot_read(network, shown.untrainable)
    check_moved(shown.moved)
    check_beside(shown.beside, train)


def check_moved(moved: float) -> None:
    """Raise UserError where earlier logits moved by more than rounding when the last token changed; moved: by which
    share of the largest."""
    if moved > SEES_AHEAD:
        raise UserError(
            "the model sees the tokens that it should predict: its attention has no causal mask", field="model.path",
            found=f"earlier logits moved by {100 * moved:.2g} % when the last token changed", expected="0",
            fix="give a decoder; for a family that should be one, please report it",
        )  # fmt: skip


def check_beside(beside: bool, train: Train) -> None:
    """Raise UserError where rows share a batch, and a row's answer changes beside a longer one."""
    size = train.per_device_train_batch_size
    if size > 1 and beside:
        raise UserError(
            "in this family a row's loss changes with the rows beside it, because it is filled up to their length",
            field="train.per_device_train_batch_size", found=str(size), expected="1",
            fix=f"train.per_device_train_batch_size=1 train.gradient_accumulation_steps="
            f"{size * train.gradient_accumulation_steps}, which is the same step",
        )  # fmt: skip
