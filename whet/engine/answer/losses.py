"""Sessions that measure how surprised a model is by texts that stand already: the loss of each row's targets.

Rows are computed one by one, by the model's own forward pass as it stands, so that no padding and no neighbour can
touch a number; logits are kept from the first target on. Gives up: speed on short rows, of which an evaluation has some
hundreds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from whet.base.errors import UserError
from whet.engine.answer.encoder_decoder import start_id
from whet.engine.answer.state import Session

POSITIONS_TOGETHER = 1024  # whose distributions are held in float32 at once
FEWEST_POSITIONS = 64  # where memory runs out
Ids = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Scored:
    """A row whose loss is asked. ids: [T]; weights: of each token as a target, float32 [T], the first one 0.

    source: what an encoder reads, None for a decoder.
    """

    ids: Ids
    weights: NDArray[np.float32]
    source: Ids | None = None


class LossSession(Session):
    """Asks a decoder, an encoder-decoder, or PEFT's model around one."""

    def __init__(self, model: Any, base_only: Callable[[], AbstractContextManager[None]] | None = None) -> None:
        super().__init__(model, base_only)
        self._positions = POSITIONS_TOGETHER

    def losses(self, rows: Iterable[Scored], done: Callable[[int], None] | None = None) -> list[float]:
        """The weighted sum of -log p over the targets of each row, in nats. UserError: a loss that is not finite."""
        self._prepare()
        found = []
        for number, row in enumerate(rows, 1):
            loss = self._alone(partial(self._loss, row), "the loss of one row", len(row.ids))
            if not np.isfinite(loss):
                raise UserError(
                    "the model answers with NaN or infinity", row=number,
                    fix="train again with a lower train.learning_rate",
                )  # fmt: skip
            found.append(loss)
            if done is not None:
                done(1)
        return found

    def _loss(self, row: Scored) -> float:
        return _loss(self.model, row, self._positions)

    def _leaner(self) -> bool:
        """Half as many distributions at once; a row's own are the same."""
        if self._positions <= FEWEST_POSITIONS:
            return False
        self._positions //= 2
        return True


@torch.inference_mode()
def _loss(model: Any, row: Scored, together: int) -> float:
    targets = np.flatnonzero(row.weights)
    if not len(targets):
        return 0.0
    device = next(model.parameters()).device
    compute = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    ids = torch.as_tensor(np.asarray(row.ids, np.int64), device=device)[None]
    # As in training: what was trained may be kept in fp32 beside a base in bf16.
    with torch.autocast(device.type, compute, enabled=compute != torch.float32):
        if row.source is not None:
            source = torch.as_tensor(np.asarray(row.source, np.int64), device=device)[None]
            shifted = torch.cat([ids.new_full((1, 1), start_id(model)), ids[:, :-1]], dim=1)
            output = model(
                input_ids=source, attention_mask=torch.ones_like(source), decoder_input_ids=shifted, use_cache=False
            )
            logits, first = output.logits[0, -ids.shape[1] :], 0
        else:
            first = int(targets[0])
            known = signature(model.forward).parameters
            kept = ids.shape[1] - first + 1
            last = {"logits_to_keep": kept} if "logits_to_keep" in known else {}
            logits = model(input_ids=ids, use_cache=False, **last).logits[0, -kept:-1]
    wanted = ids[0, first:]
    weights = torch.as_tensor(np.asarray(row.weights[first:], np.float32), device=device)
    return _summed(logits, wanted, weights, together)


def _summed(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, together: int) -> float:
    """logits [T, V], targets [T], weights [T]; together: of them in float32 at once."""
    each = [
        torch.nn.functional.cross_entropy(part.float(), wanted, reduction="none")
        for part, wanted in zip(logits.split(together), targets.split(together), strict=True)
    ]
    # As the sums of POSITIONS_TOGETHER, however many were computed at once: the order of additions is theirs.
    losses = torch.cat(each).double() * weights
    return sum(float(part.sum()) for part in losses.split(POSITIONS_TOGETHER))


def weight_of(rows: Sequence[Scored]) -> NDArray[np.float64]:
    """The summed weight of the targets of each row."""
    return np.asarray([float(row.weights.sum(dtype=np.float64)) for row in rows])
