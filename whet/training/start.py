"""Methods that start from the rows: their first weights come from what the layers read (EVA, CorDA).

They are shown the rows of the first steps, in the order of training, once each. Gives up: a setting for how many; the
papers use a few hundred rows, and four steps of a usual batch hold that many tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

DATA_STEPS = 4


def start_from_rows(method: Any, model: torch.nn.Module, forward: Any, batches: Any) -> None:
    """Let a method that wants it see the batches of the first steps; others are left alone."""
    if not method.wants_data:
        return
    shown = [batch for index in range(min(DATA_STEPS, batches.steps_per_epoch)) for batch in batches.step(index)]
    method.prepare(model, [(partial(forward.loss, model, batch), _real(batch, forward.device)) for batch in shown])


def _real(batch: Any, device: torch.device) -> torch.Tensor | None:
    """Which places [B, T] are no padding; None for all."""
    if hasattr(batch, "mask"):
        return torch.from_numpy(batch.mask).to(device)
    if batch.bounds is not None:
        return None
    ends = np.asarray(batch.lengths)[:, None]
    return torch.from_numpy(np.arange(batch.ids.shape[1])[None] < ends).to(device)
