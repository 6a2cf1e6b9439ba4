"""What a model with a head for labels says of rows: logits, and from them probabilities and decisions.

Rows of similar length are computed together, padded on the right under an attention mask, so that a row's answer does
not depend on what stands beside it. Methods with virtual tokens hand a decoder embeddings, of which its head takes the
last, padding or not: with them only rows of one length share a batch. A model without a padding token gets one row at
a time. Given up: the order of additions, hence the last bits, still varies with a batch's shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from inspect import signature
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from whet.base.console import say
from whet.base.errors import UserError
from whet.engine.task import Task

Row = Sequence[int] | NDArray[np.integer[Any]]


def logits(
    model: Any, rows: Sequence[Row], types: Sequence[Row] | None = None, *, batch_size: int,
    done: Callable[[int], None] | None = None,
) -> NDArray[np.float32]:  # fmt: skip
    """[R, C] float32 for `rows` of token ids, in the order given; C is 1 for a regression.

    model: a transformers model with a head for sequences, or PEFT's around one. types: the token types of each row,
    for pairs of texts; a model that knows none does not get them. `done` is called with the number of finished rows;
    fewer are computed together when memory runs out. UserError: an answer that is not finite.
    """
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    found: list[NDArray[np.float32] | None] = [None] * len(rows)
    device, pad, start = next(model.parameters()).device, _padding(model), 0
    size, padded = (1 if pad is None else batch_size), not _has_virtual_tokens(model)
    was_training = model.training
    model.eval()
    try:
        while start < len(order):
            chosen = _group(rows, order, start, size, padded=padded)
            given = [np.asarray(rows[index], np.int64) for index in chosen]
            inputs = {"input_ids": _filled(given, pad or 0), "attention_mask": _filled(map(np.ones_like, given), 0)}
            if types is not None and _knows_types(model):
                inputs["token_type_ids"] = _filled([np.asarray(types[index], np.int64) for index in chosen], 0)
            values = _computed(model, inputs, device, size)
            if values is None:
                size = (size + 1) // 2
                say(f"out of memory: {size} rows together")
                continue
            for index, value in zip(chosen, values, strict=True):
                found[index] = value
            start += len(chosen)
            if done is not None:
                done(len(chosen))
    finally:
        model.train(was_training)
    result = np.stack(found) if rows else np.zeros((0, model.config.num_labels), np.float32)  # type: ignore[arg-type]
    if not np.isfinite(result).all():
        raise UserError(
            "the model answers with NaN or infinity", row=int(np.argmin(np.isfinite(result).all(axis=1))) + 1,
            fix="train again with a lower train.learning_rate",
        )  # fmt: skip
    return result


def probabilities(task: Task, found: NDArray[np.float32]) -> NDArray[np.float64]:
    """[R, C]: over the classes of a row (they sum to 1), or of each label by itself. ValueError for a regression."""
    if task.name == "multi_label":
        return np.exp(-np.logaddexp(0, -found.astype(np.float64)))
    if task.name != "classification":
        raise ValueError(f"a {task.name} has no probabilities")
    shifted = np.exp(found.astype(np.float64) - found.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def decided(task: Task, found: NDArray[np.float32]) -> NDArray[Any]:
    """The likeliest class int64 [R], labels of a probability over one half as 0/1 int64 [R, C], or values [R]."""
    if task.name == "multi_label":
        return (found > 0).astype(np.int64)
    return found[:, 0] if task.name == "regression" else found.argmax(axis=1)


def _padding(model: Any) -> int | None:
    """The token that the model takes for padding."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    return config.pad_token_id


def _has_virtual_tokens(model: Any) -> bool:
    return getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)


def _group(rows: Sequence[Row], order: list[int], start: int, size: int, *, padded: bool) -> list[int]:
    chosen = order[start : start + size]
    if padded:
        return chosen
    longest = len(rows[chosen[0]])
    return [index for index in chosen if len(rows[index]) == longest]


def _filled(rows: Iterable[NDArray[np.int64]], with_what: int) -> torch.Tensor:
    """[rows, longest] int64, each row filled up on the right."""
    return torch.nn.utils.rnn.pad_sequence([torch.from_numpy(row) for row in rows], True, with_what)


def _knows_types(model: Any) -> bool:
    network = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "token_type_ids" in signature(network.forward).parameters


def _computed(
    model: Any, inputs: dict[str, torch.Tensor], device: torch.device, size: int
) -> NDArray[np.float32] | None:
    """[rows of the group, C], or None when memory ran out and fewer rows may fit."""
    compute = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    # As in training: what was trained may be kept in fp32 beside a base in bf16.
    mixed = compute != torch.float32
    try:
        with torch.inference_mode(), torch.autocast(device.type, compute, enabled=mixed):
            output = model(**{name: tensor.to(device) for name, tensor in inputs.items()})
        return output.logits.float().cpu().numpy()
    except torch.OutOfMemoryError:
        if size == 1:
            raise
    torch.cuda.empty_cache()  # out of the handler, where the failed call's tensors are gone
    return None
