"""The loss: a sum over learned tokens, divided once by how many there are in the whole optimiser step.

Dividing each micro-batch by its own count weighs a token by the company it keeps, and the result depends on how the
batch was cut (transformers #34191). Summing never does. Only tokens that are learned get logits.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from whet.data.batch.batches import Batch
from whet.engine.compute.attention import Documents
from whet.engine.compute.head import Head, plain_loss


@dataclass(frozen=True)
class Shown:
    """A batch on the device. ids, positions [B, T]; places, targets [M]: where in the flattened batch what is learned.

    Entries that only fill up to a form have target -1. weights: factor on each target's loss, float32 [M], or None.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    documents: Documents | None
    places: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor | None = None

    def tensors(self) -> list[torch.Tensor]:
        """Everything that differs between batches of one form."""
        ends = [] if self.documents is None else [self.documents.cu]
        weights = [] if self.weights is None else [self.weights]
        return [self.ids, self.positions, self.places, self.targets, *weights, *ends]


@dataclass(frozen=True)
class Forward:
    """How the model is called: on which device, in which arithmetic, with which head (None: its own logits).

    prepare: what must happen before the first forward pass of a step, e.g. refreshing copies of weights.
    """

    device: torch.device
    compute: torch.dtype
    autocast: bool
    head: Head | None
    prepare: Callable[[], None] | None = None

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Sum of -log p(target) over the batch's targets, each times its weight, a float32 scalar."""
        return self.loss_of(model, show(batch, self.device))

    def loss_of(self, model: torch.nn.Module, shown: Shown) -> torch.Tensor:
        """The same for a batch that is on the device."""
        context = torch.autocast(self.device.type, self.compute) if self.autocast else contextlib.nullcontext()
        inputs: dict[str, Any] = {"input_ids": shown.ids, "position_ids": shown.positions, "use_cache": False}
        if shown.documents is not None:
            inputs["documents"] = shown.documents
        with context:
            if self.head is not None:
                return self.head.loss(inputs, shown.places, shown.targets, shown.weights)
            logits = model(**inputs).logits.flatten(0, 1)
            return plain_loss(logits[shown.places], shown.targets, shown.weights)


def show(batch: Batch, device: torch.device) -> Shown:
    """Move a batch to the device, filled up to its form; on CUDA without waiting for the copies."""
    places = batch.rows * batch.ids.shape[1] + batch.places
    targets, weights, form, documents = batch.targets, batch.weights, batch.form, None
    bounds = batch.bounds
    if form is not None:
        missing = form.targets - len(targets)
        places = np.concatenate([places, np.zeros(missing, np.int64)])
        targets = np.concatenate([targets, np.full(missing, -1, np.int64)])
        weights = None if weights is None else np.concatenate([weights, np.zeros(missing, np.float32)])
    if bounds is not None:
        ends = bounds if form is None else bounds + (bounds[-1],) * (form.documents + 1 - len(bounds))
        cu = _moved(np.asarray(ends, dtype=np.int32), device)
        if form is not None:
            documents = Documents(cu, form.longest, form.row, None if device.type == "cuda" else bounds)
        else:
            longest = max(end - start for start, end in itertools.pairwise(bounds))
            documents = Documents(cu, longest, bounds=bounds)
    return Shown(
        _moved(batch.ids, device), _moved(batch.positions, device), documents, _moved(places, device),
        _moved(targets, device), None if weights is None else _moved(weights, device),
    )  # fmt: skip


def _moved(array: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
