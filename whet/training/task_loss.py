"""The losses of padded tasks: sums over rows with labels or over tokens of answers, divided once for the whole step.

As in `training.loss` the sum is what makes a step exact however it is cut. A row counts as one whatever its task: with
several labels its loss is the mean over them. Places that only fill up are masked, and hold the model's padding token,
by which heads of decoders find the last real token and RoBERTa its positions.

Methods that put virtual tokens in front of a row hand embeddings to the model, and then a decoder's head cannot see
where the padding begins: there, rows of one length are computed together and nothing is padded.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from whet.base.errors import UserError
from whet.data.batch.batches import Batch
from whet.data.batch.task_batches import LabelBatch, PairBatch
from whet.engine.compute.head import plain_loss
from whet.engine.device import Placement
from whet.engine.task import Task, TaskName, kind_of
from whet.training.loss import Forward


@dataclass(frozen=True)
class TaskForward(Forward):
    """How a model with padded rows is called. pad: what fills rows up; start: the decoder's first token, for seq2seq.

    end: the token that a row must have for the model to read it; cached: the model takes `use_cache`; typed: it takes
    token types; apart: rows of unlike length are not mixed.
    """

    task: TaskName = "classification"
    pad: int = 0
    start: int = 0
    end: int | None = None
    cached: bool = False
    typed: bool = False
    apart: bool = False

    def loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        """Summed loss of a LabelBatch, a PairBatch, or a padded Batch of text; a float32 scalar."""
        context = torch.autocast(self.device.type, self.compute) if self.autocast else contextlib.nullcontext()
        with context:
            if isinstance(batch, PairBatch):
                return self._answers(model, batch)
            if isinstance(batch, Batch):
                return self._text(model, batch)
            parts = by_length(batch) if self.apart else [batch]
            return torch.stack([self._labels(model, part) for part in parts]).sum()

    def _labels(self, model: torch.nn.Module, batch: LabelBatch) -> torch.Tensor:
        inputs = self._inputs(batch.ids, batch.mask)
        if self.typed and batch.types is not None:
            inputs["token_type_ids"] = self._moved(batch.types)
        return label_loss(self.task, model(**inputs).logits, self._moved(batch.targets))

    def _answers(self, model: torch.nn.Module, batch: PairBatch) -> torch.Tensor:
        shown = np.full_like(batch.answers, self.start)
        shown[:, 1:] = np.where(batch.answer_mask, batch.answers, self.pad)[:, :-1]
        mask = self._moved(batch.answer_mask)
        inputs = self._inputs(batch.ids, batch.mask)
        inputs |= {"decoder_input_ids": self._moved(shown), "decoder_attention_mask": mask.long()}
        logits = model(**inputs).logits[:, -batch.answers.shape[1] :]
        return plain_loss(logits[mask], self._moved(batch.targets))

    def _text(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Text, learned by a method with virtual tokens: they come first, so places are counted from the end."""
        length = batch.ids.shape[1]
        ends = np.asarray(batch.lengths)[:, None]
        logits = model(**self._inputs(batch.ids, np.arange(length)[None] < ends)).logits[:, -length:]
        weights = None if batch.weights is None else self._moved(batch.weights)
        chosen = logits[self._moved(batch.rows), self._moved(batch.places)]
        return plain_loss(chosen, self._moved(batch.targets), weights)

    def _inputs(self, ids: np.ndarray, mask: np.ndarray) -> dict[str, Any]:
        inputs: dict[str, Any] = {
            "input_ids": self._moved(np.where(mask, ids, self.pad)), "attention_mask": self._moved(mask).long(),
        }  # fmt: skip
        return inputs | ({"use_cache": False} if self.cached else {})

    def _moved(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)


def label_loss(task: TaskName, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed over rows, in float32, of logits [B, C] (a value: [B, 1]) and targets as in `LabelBatch`: cross-entropy,
    binary cross-entropy averaged over the labels of a row, or squared error."""
    wide = logits.float()
    if task == "classification":
        return cross_entropy(wide, targets, reduction="sum")
    if task == "multi_label":
        return binary_cross_entropy_with_logits(wide, targets, reduction="none").mean(1).sum()
    assert task == "regression", task
    return (wide.squeeze(-1) - targets).square().sum()


def by_length(batch: LabelBatch) -> list[LabelBatch]:
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


def task_forward(network: Any, placement: Placement, task: Task, *, virtual: bool) -> TaskForward:
    """How to call `network`, a transformers model of the task. virtual: its method puts tokens in front of a row.

    Raises UserError where an encoder-decoder does not say how an answer starts.
    """
    config = network.config
    text, kind = config.get_text_config(), kind_of(config)
    start = 0
    if task.name == "seq2seq":
        start = getattr(config, "decoder_start_token_id", None)
        start = network.generation_config.decoder_start_token_id if start is None else start
        if start is None:
            raise UserError(
                "the model does not say which token starts an answer", field="model.path",
                expected="decoder_start_token_id in config.json", fix="add it; T5 starts with its padding token",
            )  # fmt: skip
    pad = text.pad_token_id
    return TaskForward(
        placement.device, placement.compute, placement.compute != torch.float32, None, task=task.name,
        pad=0 if pad is None or pad < 0 else pad, start=start,
        end=config.eos_token_id if task.labelled and kind == "encoder_decoder" else None, cached=kind != "encoder",
        typed=(getattr(config, "type_vocab_size", None) or 0) > 1,
        apart=virtual and task.labelled and kind == "decoder",
    )  # fmt: skip
