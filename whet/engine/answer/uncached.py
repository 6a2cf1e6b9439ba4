"""Greedy answers with no cache: the whole text is read again for every token.

The last resort, for families whose cache or positions transformers' own `generate` gets wrong: what is computed is
what training computes. Gives up: speed; a token costs as much as reading all that is before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from whet.engine.answer.choice import greedy
from whet.engine.answer.rows import StopRule
from whet.engine.compute.probe import uncached


@torch.inference_mode()
def answer_uncached(
    model: Any, prompts: Sequence[Sequence[int]], rule: StopRule, streamer: Any = None
) -> list[list[int]]:
    """Ids for each of several prompts of one length, with what follows a stop token."""
    device = next(model.parameters()).device
    ids = torch.tensor([*map(list, prompts)], device=device)
    start, stops = ids.shape[1], torch.tensor(sorted(rule.stop_ids), device=device)
    finished = torch.zeros(len(ids), dtype=torch.bool, device=device)
    if streamer is not None:
        streamer.put(ids.cpu())
    while ids.shape[1] - start < rule.max_new_tokens and not bool(finished.all()):
        chosen = greedy(model(input_ids=ids, **uncached(model)).logits[:, -1])
        ids = torch.cat([ids, chosen[:, None]], dim=1)
        finished |= torch.isin(chosen, stops)
        if streamer is not None:
            streamer.put(chosen.cpu())
    if streamer is not None:
        streamer.end()
    return ids[:, start:].tolist()
