"""A model's first layer with random numbers in it: what a family's code does is asked before its weights are read.

Whether a token sees the ones after it, whether a row's answer changes beside a longer one, and whether a row of any
length can be trained on: that is decided by code and config, and weights of any value show it. Asked are families that
compute attention by themselves; where it can be chosen, it is compared with the model's own whenever a model is loaded
(`proven_attention`). Gives up: layers of more numbers than are worth a wait, and models that do not run with one layer
or a short table of tokens. They are asked the same once they are loaded.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from whet.base.private import takes_attention
from whet.engine.compute.isolation import check_causality
from whet.engine.compute.probe import FAILURES, ODD_LENGTH, first_line, probe_inputs, sees_padding
from whet.engine.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 64  # rows of the table that is left
MOST_NUMBERS = 500_000_000  # 2 GB, and a few seconds of random numbers
_NO_NUMBER = -77  # in a tensor of integers
_ERRORS = (ValueError, TypeError, AttributeError, LookupError, AssertionError)  # raised by code, and not by torch


@dataclass(frozen=True)
class Shown:
    """What the first layer shows of a model.

    untrainable: why no row of any length can be trained on, or nothing; moved: the largest change of an earlier logit
    when the last token changes, as a share of the largest; beside: whether a row's answer changes beside a longer one.
    """

    untrainable: str = ""
    moved: float = 0.0
    beside: bool = False


def shown_by_code(network: PreTrainedModel, task: Task) -> Shown:
    """What the code of `network`, a model without memory, shows before its weights are read; nothing where it is not
    asked."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # of the CPU, where the excerpt lies
        first = excerpt(network)
        if first is None or not _answers(first):
            return Shown()
        if reason := _untrainable(first):
            return Shown(untrainable=reason)
        if task.labelled:  # their rows share a batch only where they are kept apart
            return Shown()
        causal = task.name == "causal"
        try:
            moved = check_causality(first, TOKENS, flat=False) if causal else 0.0
        except FAILURES:
            return Shown()
        return Shown("", moved, sees_padding(first, masked=not causal))


def excerpt(network: PreTrainedModel) -> PreTrainedModel | None:
    """A copy of `network` on the CPU with one layer of each stack and random weights, and few tokens where it would be
    too large; None for a model whose attention can be chosen, one that is still too large, and one that cannot be made
    so."""
    if takes_attention(type(network)):
        return None
    first = copy.deepcopy(network)
    _cut(first)
    try:
        if _numbers(first) > MOST_NUMBERS:
            first.resize_token_embeddings(TOKENS, mean_resizing=False)
        text, rows = first.config.get_text_config(), first.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr]
        if (getattr(text, "pad_token_id", None) or 0) >= rows:  # type: ignore[operator]
            text.pad_token_id = 0
        return first.eval() if _numbers(first) <= MOST_NUMBERS and _filled(first) else None
    except FAILURES:
        return None


def _numbers(first: nn.Module) -> int:
    return sum(parameter.numel() for parameter in first.parameters())


@torch.no_grad()
def _filled(first: PreTrainedModel) -> bool:
    """Fill the model as its family does, and its matrices with numbers by which a layer says as much as it is given: a
    family's own start is nearly silent. False where a buffer stays as it was, which may be a mask that lies ready."""
    first.to_empty(device="cpu")
    for parameter in first.parameters():
        parameter.zero_()
    for buffer in first.buffers():
        buffer.fill_(torch.nan if buffer.is_floating_point() else False if buffer.dtype == torch.bool else _NO_NUMBER)
    first.initialize_weights()
    first.tie_weights()
    for parameter in first.parameters():
        if parameter.ndim >= 2:
            parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return all(_is_filled(buffer) for buffer in first.buffers())


def _is_filled(buffer: torch.Tensor) -> bool:
    if buffer.is_floating_point():
        return not bool(buffer.isnan().any())
    return bool(buffer.any()) if buffer.dtype == torch.bool else not bool((buffer == _NO_NUMBER).any())


def _cut(module: nn.Module) -> None:
    """Leave the first layer of every outermost list of layers."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            del child[1:]
        else:
            _cut(child)


@torch.inference_mode()
def _answers(first: Any) -> bool:
    """Whether the excerpt works at all."""
    try:
        return bool(first(**probe_inputs(first, ODD_LENGTH)).logits.isfinite().all())
    except FAILURES:
        return False


def _untrainable(first: Any) -> str:
    """Why a row that can be read cannot be trained on (Reformer), or nothing."""
    first.train()
    try:
        with torch.no_grad():
            first(**probe_inputs(first, ODD_LENGTH))
    except _ERRORS as error:
        return first_line(error)
    except FAILURES:
        return ""
    finally:
        first.eval()
    return ""
