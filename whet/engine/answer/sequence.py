"""Greedy answers of an encoder-decoder model, by transformers' own `generate`.

The static decoding of `engine.answer.decode` is for decoders alone. Sources of similar length are encoded together
under an attention mask; an answer is cut at the model's end token. Settings of a model's generation_config that are no
part of greedy decoding (beams, penalties, shortest length) are left out; tokens that it forces at the start, as
multilingual models do, are part of what it was trained on and stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from whet.base.console import say

Row = Sequence[int] | NDArray[np.integer[Any]]


def answer_sources(
    model: Any,
    sources: Sequence[Row],
    *,
    max_new_tokens: int,
    batch_size: int,
    done: Callable[[int], None] | None = None,
    streamer: Any = None,
) -> list[list[int]]:
    """The ids written for each source (encoder token ids), without start and end token, in the order given.

    `done` is called with the number of finished ones; fewer are answered together when memory runs out. streamer: a
    transformers streamer for a single source.
    """
    order = sorted(range(len(sources)), key=lambda index: -len(sources[index]))
    answers: list[list[int]] = [[] for _ in sources]
    size, start, was_training = batch_size, 0, model.training
    model.eval()
    try:
        while start < len(order):
            chosen = order[start : start + size]
            rows = _written(model, [sources[index] for index in chosen], max_new_tokens, size, streamer)
            if rows is None:
                size = (size + 1) // 2
                say(f"out of memory: answering {size} sources together")
                continue
            for index, row in zip(chosen, rows, strict=True):
                answers[index] = row
            start += len(chosen)
            if done is not None:
                done(len(chosen))
    finally:
        model.train(was_training)
    return answers


@torch.inference_mode()
def answer_log_probabilities(model: Any, source: Row, reply: Sequence[int]) -> torch.Tensor:
    """[len(reply) + 1, V] float32: the distribution of each token of the reply and of the one after it."""
    device = next(model.parameters()).device
    ids = torch.as_tensor(np.asarray(source, dtype=np.int64), device=device)[None]
    written = torch.tensor([[start_id(model), *reply]], device=device)
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=written, use_cache=False)
    return torch.log_softmax(output.logits[0, -len(reply) - 1 :].float(), -1)


def start_id(model: Any) -> int:
    """The token that the decoder starts from."""
    for settings in (model.generation_config, model.config):
        for name in ("decoder_start_token_id", "bos_token_id"):
            if isinstance(found := getattr(settings, name, None), int):
                return found
    return 0


def end_ids(model: Any) -> list[int]:
    """The tokens that end an answer; [] when the model has none."""
    for settings in (model.generation_config, model.config):
        found = getattr(settings, "eos_token_id", None)
        if found is not None:
            return [found] if isinstance(found, int) else list(found)
    return []


def _written(model: Any, group: Sequence[Row], max_new_tokens: int, size: int, streamer: Any) -> list[list[int]] | None:
    """The ids of the group's answers, or None when memory ran out and fewer rows may fit."""
    device, ends = next(model.parameters()).device, end_ids(model)
    pad = model.config.pad_token_id
    pad = (ends or [0])[0] if pad is None else pad
    ids = torch.full((len(group), max(map(len, group))), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(group):
        ids[place, : len(row)] = torch.as_tensor(np.asarray(row, dtype=np.int64))
        mask[place, : len(row)] = 1
    try:
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), max_new_tokens=max_new_tokens,
                do_sample=False, num_beams=1, repetition_penalty=1.0, encoder_repetition_penalty=1.0,
                no_repeat_ngram_size=0, encoder_no_repeat_ngram_size=0, min_length=0,
                eos_token_id=ends or None, pad_token_id=pad, decoder_start_token_id=start_id(model), use_cache=True,
                **({} if streamer is None else {"streamer": streamer}),
            )  # fmt: skip
        return [_until(row[1:], ends) for row in output.tolist()]
    except torch.OutOfMemoryError:
        if size == 1:
            raise
    torch.cuda.empty_cache()  # out of the handler, where the failed call's tensors are gone
    return None


def _until(ids: list[int], ends: list[int]) -> list[int]:
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]
