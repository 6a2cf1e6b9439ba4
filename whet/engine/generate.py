"""Batched greedy generation and streaming, through transformers' own `generate` on the model as it stands.

Training attention reads the documents of a flat row; generation pads on the left and keeps a cache, so it runs on
transformers' "sdpa", switched for the time of the call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from whet.engine.attention import ATTENTION

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextlib.contextmanager
def generating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode and sdpa attention inside, what was before outside."""
    was_training = model.training
    model.eval()
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(ATTENTION)
        model.train(was_training)


def answer(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    done: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Greedy continuation of each prompt (token ids), without the stop token, in the order given.

    Prompts of similar length are answered together; `done` is called with the number of finished ones.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: list[list[int]] = [[] for _ in prompts]
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            rows = _greedy(model, [prompts[index] for index in chosen], stop_ids, max_new_tokens)
            for index, row in zip(chosen, rows, strict=True):
                answers[index] = _until(row, stop_ids)
            if done is not None:
                done(len(chosen))
    return answers


def stream(
    model: PreTrainedModel, prompt: Sequence[int], *, stop_ids: Sequence[int], max_new_tokens: int, streamer: Any
) -> list[int]:
    """Greedy continuation of one prompt, handed to a transformers `streamer` token by token."""
    with torch.inference_mode(), generating(model):
        rows = _generate(model, [prompt], stop_ids, max_new_tokens, streamer=streamer)
    return _until(rows[0], stop_ids)


def _greedy(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], max_new_tokens: int
) -> list[list[int]]:
    with generating(model):
        return _generate(model, prompts, stop_ids, max_new_tokens)


def _generate(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], max_new_tokens: int, **more: Any
) -> list[list[int]]:
    device = next(model.parameters()).device
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), int(stop_ids[0]), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
        mask[row, longest - len(prompt) :] = 1
    output = model.generate(  # type: ignore[operator]
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=list(stop_ids),
        pad_token_id=int(stop_ids[0]),
        use_cache=True,
        **more,
    )
    return output[:, longest:].tolist()  # type: ignore[index,union-attr]


def _until(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    for place, token in enumerate(ids):
        if token in stop_ids:
            return ids[:place]
    return ids
