"""Causal text of methods that put virtual tokens in front of each row (prompt tuning, P-tuning, prefix tuning).

Rows are padded, and the model, called through its method, may return more positions than there are tokens: the virtual
ones come first, so positions are counted from the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from whet.data.batch.text_batches import TextBatch
from whet.engine.compute.head import plain_losses
from whet.training.objective.padded_rows import PaddedObjective
from whet.training.objective.text import worth_of_tokens


@dataclass(frozen=True)
class VirtualTextOnDevice:
    """Padded text. inputs: ids and mask [B, T]; targets [N]: learned tokens, predicted at (rows, columns); weights:
    factor on each target's loss, float32 [N], or None."""

    inputs: dict[str, torch.Tensor]
    rows: torch.Tensor
    columns: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor | None

    def tensors(self) -> list[torch.Tensor]:
        weights = [] if self.weights is None else [self.weights]
        return [*self.inputs.values(), self.rows, self.columns, self.targets, *weights]


@dataclass(frozen=True)
class VirtualTextObjective(PaddedObjective[TextBatch, VirtualTextOnDevice]):
    """-log p of each learned token of padded text behind virtual tokens."""

    def worth(self, batch: TextBatch) -> float:
        return worth_of_tokens(batch)

    def to_device(self, batch: TextBatch) -> VirtualTextOnDevice:
        move, mask = self.arithmetic.move, batch.mask
        if mask is None:
            mask = np.ones(batch.ids.shape, bool)
        return VirtualTextOnDevice(
            self.inputs(batch.ids, mask), move(batch.rows), move(batch.columns), move(batch.targets),
            None if batch.weights is None else move(batch.weights),
        )  # fmt: skip

    def losses(self, model: torch.nn.Module, on_device: VirtualTextOnDevice) -> torch.Tensor:
        length = on_device.inputs["input_ids"].shape[1]
        with self.arithmetic.context():
            logits = self.call(model, on_device.inputs).logits[:, -length:]
            chosen = logits[on_device.rows, on_device.columns]
            return plain_losses(chosen, on_device.targets, on_device.weights)
