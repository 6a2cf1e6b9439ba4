"""Sequence to sequence: -log p of each token of an answer, which an encoder-decoder writes after reading a source."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from whet.data.batch.padded_batches import SequencePairBatch
from whet.engine.compute.head import plain_losses
from whet.training.objective.padded_rows import PaddedObjective


@dataclass(frozen=True)
class SequencePairsOnDevice:
    """Sources and answers. inputs: of encoder and decoder, by name; targets [N]: the answers'
    tokens, predicted at (rows, columns)."""

    inputs: dict[str, torch.Tensor]
    rows: torch.Tensor
    columns: torch.Tensor
    targets: torch.Tensor

    def tensors(self) -> list[torch.Tensor]:
        return [*self.inputs.values(), self.rows, self.columns, self.targets]


@dataclass(frozen=True)
class Seq2SeqObjective(PaddedObjective[SequencePairBatch, SequencePairsOnDevice]):
    """Losses of answers. start: the token that the decoder begins with."""

    start: int = 0

    def worth(self, batch: SequencePairBatch) -> float:
        return len(batch.targets)

    def to_device(self, batch: SequencePairBatch) -> SequencePairsOnDevice:
        move, mask = self.arithmetic.move, batch.answer_mask
        before = np.full_like(batch.answers, self.start)  # what the decoder reads: the answer, one token later
        before[:, 1:] = np.where(mask, batch.answers, self.pad)[:, :-1]
        inputs = self.inputs(batch.ids, batch.mask)
        inputs |= {"decoder_input_ids": move(before), "decoder_attention_mask": move(mask).long()}
        rows, columns = np.nonzero(mask)
        return SequencePairsOnDevice(inputs, move(rows), move(columns), move(batch.targets))

    def losses(self, model: torch.nn.Module, on_device: SequencePairsOnDevice) -> torch.Tensor:
        length = on_device.inputs["decoder_input_ids"].shape[1]
        with self.arithmetic.context():  # virtual tokens of the method come first
            logits = self.call(model, on_device.inputs).logits[:, -length:]
            return plain_losses(logits[on_device.rows, on_device.columns], on_device.targets)

    def probe(self) -> dict[str, torch.Tensor]:
        inputs = super().probe()
        return inputs | {"decoder_input_ids": inputs["input_ids"]}
