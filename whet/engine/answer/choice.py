"""The choice of the next token from the logits of a row.

Sampling belongs here: one more function of this form, whose temperatures stand in tensors of one number for each row
and whose generator is registered with the graph that captures it (`decode.DecodingLoop.capture`); `Decoder` passes the
function on, and transformers' own `generate`, which is asked without a graph, has to be told the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Choose = Callable[[torch.Tensor], torch.Tensor]  # logits [B, V] to token ids [B], all on the device


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """The likeliest token of each row: logits [B, V] to ids [B]."""
    return logits.argmax(-1)
