"""Sessions with a model that labels rows: its logits, and from them probabilities and decisions.

Rows of similar length are computed together, padded on the right under an attention mask, so that a row's answer does
not depend on what stands beside it; a family whose answers change all the same gets rows of one length only. Methods
with virtual tokens hand a decoder embeddings, of which its head takes the last, padding or not: with them, too, only
rows of one length share a batch. A model without a padding token gets one row at a time. Given up: the order of
additions, hence the last bits, still varies with a batch's shape.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from whet.base.errors import UserError
from whet.engine.answer.batches import in_batches
from whet.engine.answer.state import Session
from whet.engine.compute.probe import sees_padding
from whet.engine.task import Task, reads_types

Row = Sequence[int] | NDArray[np.integer[Any]]


class LabelSession(Session):
    """Asks a transformers model with a head for sequences, or PEFT's around one."""

    _apart = False  # rows of unlike length share no batch

    def _set_up(self, undo: contextlib.ExitStack) -> None:
        super()._set_up(undo)
        self._apart = _has_virtual_tokens(self.model) or sees_padding(self.model)

    def logits(
        self, rows: Sequence[Row], types: Sequence[Row] | None = None, *, batch_size: int,
        done: Callable[[int], None] | None = None,
    ) -> NDArray[np.float32]:  # fmt: skip
        """[R, C] float32 for `rows` of token ids, in the order given; C is 1 for a regression.

        types: the token types of each row, for pairs of texts; a model that knows none does not get them. `done` is
        called with the number of finished rows; fewer are computed together when memory runs out. UserError: an answer
        that is not finite.
        """
        self._prepare()
        model, pad = self.model, padding_token(self.model)

        def values_of(batch: list[int], _: int) -> list[NDArray[np.float32]]:
            chosen = [np.asarray(rows[index], np.int64) for index in batch]
            inputs = {"input_ids": filled_up(chosen, pad or 0), "attention_mask": filled_up(map(np.ones_like, chosen))}
            if types is not None and reads_types(model):
                inputs["token_type_ids"] = filled_up(np.asarray(types[index], np.int64) for index in batch)
            return [*_logits(model, inputs)]

        values = in_batches(
            [len(row) for row in rows], 1 if pad is None else batch_size, values_of, done=done,
            equal_lengths=self._apart,
            scarce=self._scarce(lambda size: f"out of memory: {size} rows together", "labelling one row"),
        )  # fmt: skip
        result = np.stack(values) if values else np.zeros((0, model.config.num_labels), np.float32)
        if not np.isfinite(result).all():
            raise UserError(
                "the model answers with NaN or infinity", row=int(np.argmin(np.isfinite(result).all(axis=1))) + 1,
                fix="train again with a lower train.learning_rate",
            )  # fmt: skip
        return result


def probabilities(task: Task, logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """[R, C]: over the classes of a row (they sum to 1), or of each label by itself. ValueError for a regression."""
    if task.name == "multi_label":
        return np.exp(-np.logaddexp(0, -logits.astype(np.float64)))
    if task.name != "classification":
        raise ValueError(f"a {task.name} has no probabilities")
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def decisions(task: Task, logits: NDArray[np.float32]) -> NDArray[Any]:
    """The likeliest class int64 [R], labels of a probability over one half as 0/1 int64 [R, C], or values [R]."""
    if task.name == "multi_label":
        return (logits > 0).astype(np.int64)
    return logits[:, 0] if task.name == "regression" else logits.argmax(axis=1)


def padding_token(model: Any) -> int | None:
    """The token that the model takes for padding."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    return config.pad_token_id


def filled_up(rows: Iterable[NDArray[np.int64]], value: int = 0) -> torch.Tensor:
    """[rows, longest] int64, each row filled up on the right with `value`."""
    return torch.nn.utils.rnn.pad_sequence([torch.from_numpy(row) for row in rows], True, value)


def _has_virtual_tokens(model: Any) -> bool:
    return getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)


def _logits(model: Any, inputs: dict[str, torch.Tensor]) -> NDArray[np.float32]:
    """[rows of the batch, C]."""
    device = next(model.parameters()).device
    compute = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    # As in training: what was trained may be kept in fp32 beside a base in bf16.
    mixed = compute != torch.float32
    with torch.inference_mode(), torch.autocast(device.type, compute, enabled=mixed):
        output = model(**{name: tensor.to(device) for name, tensor in inputs.items()})
    return output.logits.float().cpu().numpy()
