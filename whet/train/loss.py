"""The loss: a sum over learned tokens, divided once by how many there are in the whole optimiser step.

Dividing each micro-batch by its own count weighs a token by the company it keeps, and the result depends on how the
batch was cut (transformers #34191). Summing never does. Only tokens that are learned get logits.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from whet.data.batches import Batch
from whet.engine.attention import Documents
from whet.engine.head import Head, plain_loss


@dataclass(frozen=True)
class Forward:
    """How the model is called: on which device, in which arithmetic, with which head (None: its own logits)."""

    device: torch.device
    compute: torch.dtype
    autocast: bool
    head: Head | None

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Sum of -log p(target) over the batch's targets, a float32 scalar."""
        context = torch.autocast(self.device.type, self.compute) if self.autocast else contextlib.nullcontext()
        rows, places, targets = (_tensor(array, self.device) for array in (batch.rows, batch.places, batch.targets))
        with context:
            inputs = model_inputs(batch, self.device)
            if self.head is not None:
                return self.head.loss(inputs, rows, places, targets)
            return plain_loss(model(**inputs).logits[rows, places], targets)


def model_inputs(batch: Batch, device: torch.device) -> dict[str, Any]:
    """What the model is called with: ids and positions [B, T], the documents of a flat row."""
    inputs: dict[str, Any] = {
        "input_ids": _tensor(batch.ids, device),
        "position_ids": _tensor(batch.positions, device),
        "use_cache": False,
    }
    if batch.bounds is not None:
        longest = max(end - start for start, end in zip(batch.bounds, batch.bounds[1:], strict=False))
        cu = torch.tensor(batch.bounds, dtype=torch.int32).to(device, non_blocking=True)
        inputs["documents"] = Documents(batch.bounds, cu, longest)
    return inputs


def _tensor(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)
