"""The loss: a sum over learned tokens, divided once by how many there are in the whole optimiser step.

Dividing each micro-batch by its own count weighs a token by the company it keeps, and the result depends on how the
batch was cut (transformers #34191). Summing never does. Only the logits that predict a learned token are computed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from whet.data.batches import Batch
from whet.engine.attention import Documents


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


def summed_loss(model: torch.nn.Module, batch: Batch, device: torch.device, *, keeps: bool) -> torch.Tensor:
    """Sum of -log p(target) over the batch's targets, a float32 scalar. keeps: the model computes chosen logits only."""
    inputs = model_inputs(batch, device)
    columns = _tensor(batch.columns, device)
    if keeps:
        logits = model(**inputs, logits_to_keep=columns).logits
    else:
        logits = model(**inputs).logits[:, columns]
    rows, places = (_tensor(pick, device) for pick in batch.picks)
    chosen = logits[0] if logits.shape[0] == 1 and len(places) == logits.shape[1] else logits[rows, places]
    return cross_entropy(chosen.float(), _tensor(batch.targets, device), reduction="sum")


def _tensor(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)
