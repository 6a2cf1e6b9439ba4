"""Causal text: -log p of each learned token, of flat rows or padded ones.

Only tokens that are learned get logits, through the fused head where the model allows it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from whet.data.batch.text_batches import TextBatch
from whet.engine.compute.attention import Documents
from whet.engine.compute.head import Head, plain_losses
from whet.training.objective.objective import Objective


@dataclass(frozen=True)
class TextOnDevice:
    """Text on the device. ids, positions [B, T]; targets [M]: learned tokens, predicted at `indices` [M] of the
    flattened batch.

    Entries that only fill up to a form have target -1. weights: factor on each target's loss, float32 [M], or None.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    documents: Documents | None
    indices: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor | None = None

    def tensors(self) -> list[torch.Tensor]:
        """Everything that differs between batches of one form."""
        ends = [] if self.documents is None else [self.documents.cu]
        weights = [] if self.weights is None else [self.weights]
        return [self.ids, self.positions, self.indices, self.targets, *weights, *ends]


@dataclass(frozen=True)
class TextObjective(Objective[TextBatch, TextOnDevice]):
    """Causal text, flat or padded. head: the fused output head, or None: the model's own logits."""

    head: Head | None = None

    def worth(self, batch: TextBatch) -> float:
        return worth_of_tokens(batch)

    def to_device(self, batch: TextBatch) -> TextOnDevice:
        move, form = self.arithmetic.move, batch.form
        indices, targets, weights = batch.rows * batch.ids.shape[1] + batch.columns, batch.targets, batch.weights
        if form is not None:
            missing = form.targets - len(targets)
            indices = np.concatenate([indices, np.zeros(missing, np.int64)])
            targets = np.concatenate([targets, np.full(missing, -1, np.int64)])
            weights = None if weights is None else np.concatenate([weights, np.zeros(missing, np.float32)])
        return TextOnDevice(
            move(batch.ids), move(batch.positions), self._documents(batch), move(indices), move(targets),
            None if weights is None else move(weights),
        )  # fmt: skip

    def losses(self, model: torch.nn.Module, on_device: TextOnDevice) -> torch.Tensor:
        inputs: dict[str, Any] = {"input_ids": on_device.ids, "use_cache": False}
        if on_device.documents is not None:  # padded rows have the model's own positions, which RoBERTa counts from 2
            inputs |= {"position_ids": on_device.positions, "documents": on_device.documents}
        with self.arithmetic.context():
            if self.head is not None:
                return self.head.losses(inputs, on_device.indices, on_device.targets, on_device.weights)
            logits = model(**inputs).logits.flatten(0, 1)
            return plain_losses(logits[on_device.indices], on_device.targets, on_device.weights)

    def _documents(self, batch: TextBatch) -> Documents | None:
        """Boundaries of the documents of a flat row, as many as its form has; None for padded rows."""
        bounds, form = batch.bounds, batch.form
        if bounds is None:
            return None
        if form is None:
            longest = max(end - start for start, end in itertools.pairwise(bounds))
            return Documents(self.arithmetic.move(np.asarray(bounds, dtype=np.int32)), longest, bounds=bounds)
        ends = bounds + (bounds[-1],) * (form.documents + 1 - len(bounds))
        cu = self.arithmetic.move(np.asarray(ends, dtype=np.int32))
        return Documents(cu, form.longest, form.row, None if self.device.type == "cuda" else bounds)


def worth_of_tokens(batch: TextBatch) -> float:
    """The learned tokens of a batch of text, each by its weight."""
    return len(batch.targets) if batch.weights is None else float(batch.weights.sum(dtype=np.float64))
