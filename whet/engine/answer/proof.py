"""The proof that cached decoding computes what the model computes, made for each model in each of its states."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from whet.base.out_of_memory import ran_out
from whet.engine.answer.decode import DecodingLoop, padded
from whet.engine.answer.rows import Rows, StopRule
from whet.engine.answer.static_cache import AttentionLayout, StaticCache
from whet.engine.compute.probe import FAILURES, first_line, row_length, tolerance, uncached

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 3
FORCED = 1  # the token that every row goes on with, so that rows stay comparable


@torch.inference_mode()
def find_fault(model: PreTrainedModel, layout: AttentionLayout | None) -> str:
    """Why cached decoding cannot be trusted with `model` as it is now; empty when it can.

    Two rows of unequal length, three tokens each, against one uncached forward pass for each row.
    """
    if layout is None:
        return "its layers keep more than keys and values"
    weight: Any = model.get_input_embeddings().weight
    prompts = _prompts(model)
    rows = Rows(len(prompts), StopRule((), TOKENS), weight.device)
    slots = len(prompts[1]) + TOKENS + 4
    loop = DecodingLoop(model, rows, StaticCache(layout, len(prompts), slots, weight), graphed=False)
    try:
        cached = [loop.fill(prompts)]
        for _ in range(TOKENS - 1):
            loop.accept(cached[-1])
            cached.append(loop.next_logits())
        tokens = rows.answers.tolist()
        for row, prompt in enumerate(prompts):
            ids = torch.tensor([prompt + tokens[row][: TOKENS - 1]], device=weight.device)
            exact = model(input_ids=ids, use_cache=False).logits[0, -TOKENS:].float()
            ours = torch.stack([logits[row] for logits in cached]).float()
            distance = float((ours - exact).abs().max())
            if not distance <= tolerance(model) * float(exact.abs().max()):
                return f"cached and uncached logits are {distance:.2g} apart"
    except FAILURES as error:
        if ran_out(error):
            raise
        return _reason(error)
    return ""


@torch.inference_mode()
def find_generation_fault(model: Any) -> str:
    """Why transformers' own `generate` cannot be trusted with `model`, asked one prompt; empty where it can.

    A family may count its positions otherwise there than in a forward pass, or keep a cache that is not what it read.
    """
    prompt = _prompts(model)[1]
    try:
        ours = _generated(model, [prompt])[0]
    except FAILURES as error:
        if ran_out(error):
            raise
        return first_line(error)
    ids = torch.tensor([[*prompt, FORCED]], device=ours.device)
    exact = model(input_ids=ids, **uncached(model)).logits[0, -1].float()
    distance = float((ours - exact).abs().max())
    near = distance <= tolerance(model) * float(exact.abs().max())
    return "" if near else f"the logits of its generate are {distance:.2g} from those of a forward pass"


@torch.inference_mode()
def mixes_rows(model: Any) -> bool:
    """Whether an answer of transformers' own `generate` depends on what stands beside its prompt in the batch.

    Padding on the left moves the state of a recurrent layer, and positions that a family counts from the first column.
    """
    prompts = _prompts(model)
    together = _generated(model, prompts)
    for row, prompt in enumerate(prompts):
        exact, ours = _generated(model, [prompt])[0], together[row]
        if not bool((exact - ours).abs().max() <= tolerance(model) * exact.abs().max()):
            return True
    return False


def _generated(model: Any, prompts: list[list[int]]) -> torch.Tensor:
    """[B, V] float32: the logits of the second new token, after a first one that is the same for all."""
    device = next(model.parameters()).device
    ids, real = padded(prompts, len(prompts), 0)
    output = model.generate(
        input_ids=ids.to(device), attention_mask=real.long().to(device), max_new_tokens=2, min_new_tokens=2,
        do_sample=False, num_beams=1, forced_bos_token_id=None, forced_eos_token_id=None, eos_token_id=None,
        pad_token_id=0, output_logits=True, return_dict_in_generate=True, prefix_allowed_tokens_fn=lambda *_: [FORCED],
    )  # fmt: skip
    return output.logits[1].float()


def _prompts(model: Any) -> list[list[int]]:
    """Two prompts of unequal length, the second longer than every short window."""
    count = len(model.get_input_embeddings().weight)
    lengths = (1, 5), (2, row_length(model.config) - TOKENS)
    return [[(start + 7 * index) % count for index in range(length)] for start, length in lengths]


def _reason(error: BaseException) -> str:
    """What an error says of a model whose cache or inputs are of another form than the loop's."""
    return f"its layers do not work with a cache of keys and values alone ({first_line(error)})"
