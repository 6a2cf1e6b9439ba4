"""The proof that cached decoding computes what the model computes, made for each model in each of its states."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from whet.engine.answer.decode import DecodingLoop, first_line
from whet.engine.answer.rows import Rows, StopRule
from whet.engine.answer.static_cache import AttentionLayout, StaticCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CLOSE_ENOUGH = 0.05  # of the largest logit, between cached and uncached, in bf16
LENGTH = 16  # slots for the longer prompt and its answer
TOKENS = 3


@torch.inference_mode()
def find_fault(model: PreTrainedModel, layout: AttentionLayout | None) -> str:
    """Why cached decoding cannot be trusted with `model` as it is now; empty when it can.

    Two rows of unequal length, three tokens each, against one uncached forward pass for each row.
    """
    if layout is None:
        return "its layers keep more than keys and values"
    weight: Any = model.get_input_embeddings().weight
    prompts = [[(start + 7 * index) % len(weight) for index in range(length)] for start, length in ((1, 5), (2, 9))]
    rows = Rows(len(prompts), StopRule((), TOKENS), weight.device)
    loop = DecodingLoop(model, rows, StaticCache(layout, len(prompts), LENGTH, weight), graphed=False)
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
            if not distance <= CLOSE_ENOUGH * float(exact.abs().max()):
                return f"cached and uncached logits are {distance:.2g} apart"
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        return first_line(error)
    return ""
