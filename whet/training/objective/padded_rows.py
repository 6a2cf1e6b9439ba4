"""The common part of the objectives of padded rows: how rows, their mask and the padding token reach a model.

Places that only fill up are masked, and hold the model's padding token, by which heads of decoders find the last real
token and RoBERTa its positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic

import numpy as np
import torch

from whet.training.objective.objective import PROBE_TOKENS, B, D, Objective


@dataclass(frozen=True)
class PaddedObjective(Objective[B, D], Generic[B, D]):
    """Losses of padded rows. pad: the token that fills rows up; cached: the model takes `use_cache`."""

    pad: int = 0
    cached: bool = True

    def inputs(self, ids: np.ndarray, mask: np.ndarray) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask` on the device, both int64 [B, T]."""
        move = self.arithmetic.move
        return {"input_ids": move(np.where(mask, ids, self.pad)), "attention_mask": move(mask).long()}

    def call(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> Any:
        """The model's output for tensors by their names."""
        return model(**inputs, **({"use_cache": False} if self.cached else {}))

    def run_once(self, model: torch.nn.Module) -> None:
        """Run the model on a few token ids, for whoever watches its layers."""
        with self.arithmetic.context():
            self.call(model, self.probe())

    def probe(self) -> dict[str, torch.Tensor]:
        """The inputs of `run_once`: one row without padding."""
        ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device=self.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
