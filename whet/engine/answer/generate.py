"""Batched greedy generation and streaming: the best token at each step, nothing else.

The model is used as it stands: `engine.answer.decode` runs it with a static cache (captured in a CUDA graph where there
is one), on dense copies of quantised layers when they fit (`engine.weights.unpacked`). A model that it cannot prove
right goes to transformers' own `generate`, and so does PEFT's model around one, in groups of one length. Training
attention reads the documents of a flat row and has no cache, so generation switches to
`engine.compute.cached_attention` for the time of the call. Penalties in a model's generation_config are no part of
greedy decoding and are left out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from whet.base.console import say
from whet.base.errors import UserError
from whet.base.private import attention_name, has_sdpa
from whet.engine.answer.decode import Decoder, padded, proven
from whet.engine.answer.static_cache import generation_bytes, layers_of
from whet.engine.compute.cached_attention import CACHED_ATTENTION
from whet.engine.weights.unpacked import unpacked

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A group of prompts and the rows of a full group to the ids of each answer.
Generate = Callable[[Sequence[Sequence[int]], int], list[list[int]]]


@dataclass(frozen=True)
class Way:
    """How answers are computed; None = whet decides. None of it changes what is computed.

    static: our loop (True: without proving it on the model first) rather than transformers' `generate`; graphed: fixed
    shapes, captured in a CUDA graph where there is one; compiled: the step goes through torch.compile first, about a
    minute for a large model; dense: one dense copy of quantised layers.
    """

    static: bool | None = None
    graphed: bool | None = None
    compiled: bool = False
    dense: bool | None = None


USUAL = Way()


@contextlib.contextmanager
def generating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode and attention with a cache inside, what was before outside."""
    was_training, attention = model.training, attention_name(model)
    model.eval()
    # Without sdpa of its own a model has scores that only its eager attention knows, as with attention sinks.
    model.set_attn_implementation(CACHED_ATTENTION if has_sdpa(model) else "eager")
    try:
        yield
    finally:
        model.set_attn_implementation(attention)
        model.train(was_training)


def answer(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    done: Callable[[int], None] | None = None,
    way: Way = USUAL,
) -> list[list[int]]:
    """Greedy continuation of each prompt (token ids), without the stop token, in the order given.

    Prompts of similar length are answered together, the longest first, and fewer together when memory runs out; `done`
    is called with the number of finished ones. Without `stop_ids` every answer has `max_new_tokens`.
    """
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    answers: list[list[int]] = [[] for _ in prompts]
    if not prompts or max_new_tokens < 1:
        return answers
    if not prompts[order[-1]]:
        raise UserError(
            f"prompt {order[-1] + 1} of {len(prompts)} has no tokens, so the model has nothing to answer to",
            field="messages", found="an empty prompt, and a tokenizer without a begin token",
            expected="one token or more", fix="use model.chat_template=chatml or alpaca, or a prompt that is not empty",
        )  # fmt: skip
    size, start = min(batch_size, len(prompts)), 0
    with _ready(model, stop_ids, max_new_tokens, size, len(prompts[order[0]]), way) as generate:
        while start < len(order):
            chosen = order[start : start + size]
            if _wrapped(model):  # padding would stand between the virtual tokens and the prompt
                chosen = [index for index in chosen if len(prompts[index]) == len(prompts[chosen[0]])]
            rows = _answered(generate, [prompts[index] for index in chosen], size)
            if rows is None:
                size = (size + 1) // 2
                say(f"out of memory: answering {size} prompts together")
                continue
            for index, row in zip(chosen, rows, strict=True):
                answers[index] = _until(row, stop_ids)
            start += len(chosen)
            if done is not None:
                done(len(chosen))
    return answers


def stream(
    model: PreTrainedModel,
    prompt: Sequence[int],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    streamer: Any,
    way: Way = USUAL,
) -> list[int]:
    """Greedy continuation of one prompt, handed to a transformers `streamer` (or None) token by token."""
    if max_new_tokens < 1:
        return []
    with _ready(model, stop_ids, max_new_tokens, 1, len(prompt), way, streamer) as generate:
        return _until(generate([prompt], 1)[0], stop_ids)


@contextlib.contextmanager
def _ready(
    model: PreTrainedModel, stop_ids: Sequence[int], max_new_tokens: int, rows: int, longest: int, way: Way,
    streamer: Any = None,
) -> Iterator[Generate]:  # fmt: skip
    """Yields what turns a group of prompts into ids, while the model is set up for it."""
    spare = generation_bytes(model, rows, longest + max_new_tokens)
    with torch.inference_mode(), generating(model), unpacked(model, way.dense, spare):
        static = False if _wrapped(model) else way.static
        layers = layers_of(model) if static else None if static is False else proven(model)
        if layers is None:
            yield lambda group, _: _generate(model, group, stop_ids, max_new_tokens, streamer=streamer)
            return
        decoder = Decoder(model, layers, stop_ids, max_new_tokens, way.graphed, way.compiled)
        if streamer is None:
            yield decoder.answer
            return

        def streamed(group: Sequence[Sequence[int]], rows: int) -> list[list[int]]:
            streamer.put(torch.tensor([*group]))
            found = decoder.answer(group, rows, streamer.put)
            streamer.end()
            return found

        yield streamed


def _wrapped(model: Any) -> bool:
    """Whether a method answers through PEFT's model around the network, with virtual tokens in front."""
    return hasattr(model, "get_base_model")


def _answered(generate: Generate, group: Sequence[Sequence[int]], size: int) -> list[list[int]] | None:
    """The ids of the group's answers, or None when memory ran out and fewer rows may fit."""
    try:
        return generate(group, size)
    except torch.OutOfMemoryError:
        if size == 1:
            raise
    torch.cuda.empty_cache()  # out of the handler, where the failed call's tensors are gone
    return None


def _generate(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], max_new_tokens: int, **more: Any
) -> list[list[int]]:
    """The same by transformers' `generate`."""
    device = next(model.parameters()).device
    pad = int(stop_ids[0]) if stop_ids else 0
    ids, real = padded(prompts, len(prompts), pad)
    if not stop_ids:
        more["min_new_tokens"] = max_new_tokens
    output = model.generate(  # type: ignore[operator]
        input_ids=ids.to(device),
        attention_mask=real.long().to(device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=pad,
        use_cache=True,
        **more,
    )
    return output[:, ids.shape[1] :].tolist()  # type: ignore[index,union-attr]


def _until(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    for place, token in enumerate(ids):
        if token in stop_ids:
            return ids[:place]
    return ids
