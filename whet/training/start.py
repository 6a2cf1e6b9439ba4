"""Methods that start from the rows: their first weights come from what the layers read (EVA, CorDA).

They run over the rows of the first steps, in the order of training, once each. Gives up: a setting for how many; the
papers use a few hundred rows, and four steps of a usual batch hold that many tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from whet.data.batch.batches import Batch, Batches
from whet.training.objective.objective import Objective

DATA_STEPS = 4


def start_from_rows(method: Any, model: torch.nn.Module, objective: Objective[Any, Any], batches: Batches[Any]) -> None:
    """Let a method that wants it see the batches of the first steps; others are left alone."""
    if not method.wants_data:
        return
    first = [batch for index in range(min(DATA_STEPS, batches.steps_per_epoch)) for batch in batches.step(index)]
    method.prepare(model, [(partial(objective.loss, model, batch), _mask(batch, objective.device)) for batch in first])


def _mask(batch: Batch, device: torch.device) -> torch.Tensor | None:
    """True where `ids` [B, T] are no padding; None: everywhere."""
    return None if batch.mask is None else torch.from_numpy(batch.mask).to(device)
