"""Labels of texts: one class, several labels, or a number for each row.

A row counts as one whatever its task: with several labels its loss is the mean over them.

Methods that put virtual tokens in front of a row hand embeddings to the model, and then a decoder's head cannot see
where the padding begins: there, rows of one length are computed together and nothing is padded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from whet.data.batch.padded_batches import LabelledBatch
from whet.engine.task import TaskName
from whet.training.objective.padded_rows import PaddedObjective


@dataclass(frozen=True)
class LabelsOnDevice:
    """Rows with labels. parts: (inputs of the model by name, targets), each a forward pass."""

    parts: tuple[tuple[dict[str, torch.Tensor], torch.Tensor], ...]

    def tensors(self) -> list[torch.Tensor]:
        return [tensor for inputs, targets in self.parts for tensor in (*inputs.values(), targets)]


@dataclass(frozen=True)
class LabelObjective(PaddedObjective[LabelledBatch, LabelsOnDevice]):
    """Losses of labelled rows. typed: the model takes token types; end: the token that a row must have for the model to
    read it, or None; apart: rows of unlike length are not mixed, and losses come in the order of length."""

    task: TaskName = "classification"
    typed: bool = False
    end: int | None = None
    apart: bool = False

    def worth(self, batch: LabelledBatch) -> float:
        return len(batch.targets)

    def to_device(self, batch: LabelledBatch) -> LabelsOnDevice:
        return LabelsOnDevice(tuple(self._part(part) for part in (by_length(batch) if self.apart else [batch])))

    def losses(self, model: torch.nn.Module, on_device: LabelsOnDevice) -> torch.Tensor:
        with self.arithmetic.context():
            return torch.cat([
                label_losses(self.task, self.call(model, inputs).logits, targets)
                for inputs, targets in on_device.parts
            ])  # fmt: skip

    def probe(self) -> dict[str, torch.Tensor]:
        inputs = super().probe()
        if self.end is not None:
            inputs["input_ids"][:, -1] = self.end
        return inputs

    def _part(self, batch: LabelledBatch) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        inputs = self.inputs(batch.ids, batch.mask)
        if self.typed and batch.types is not None:
            inputs["token_type_ids"] = self.arithmetic.move(batch.types)
        return inputs, self.arithmetic.move(batch.targets)


def label_losses(task: TaskName, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Loss of each row, float32 [B], of logits [B, C] (a value: [B, 1]) and targets as in `LabelledBatch`:
    cross-entropy, binary cross-entropy averaged over the labels of a row, or squared error."""
    wide = logits.float()
    if task == "classification":
        return cross_entropy(wide, targets, reduction="none")
    if task == "multi_label":
        return binary_cross_entropy_with_logits(wide, targets, reduction="none").mean(1)
    assert task == "regression", task
    return (wide.squeeze(-1) - targets).square()


def by_length(batch: LabelledBatch) -> list[LabelledBatch]:
    """The rows of a batch in batches without padding."""
    lengths = batch.mask.sum(1)
    parts = []
    for length in np.unique(lengths):
        rows = np.flatnonzero(lengths == length)
        types = None if batch.types is None else batch.types[rows, :length]
        parts.append(replace(
            batch, ids=batch.ids[rows, :length], mask=batch.mask[rows, :length], types=types,
            targets=batch.targets[rows], sources=tuple(batch.sources[row] for row in rows),
            tokens=int(length) * len(rows),
        ))  # fmt: skip
    return parts
