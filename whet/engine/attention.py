"""Attention for training, registered through transformers' published `AttentionInterface`.

Two layouts, neither needs a mask tensor:
- padded, [B, H, T, D], right-padded: causality alone hides the padding, which comes after every real token;
- flat, [1, H, T, D]: documents laid end to end, told apart by `documents`; each attends only within itself.
So padding costs nothing and packing cannot contaminate. Generation, which pads on the left, uses transformers' own
"sdpa"; `ATTENTION` is for training and loss. A model whose layers do not pass `documents` on is found by
`engine.isolation` before the first step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

ATTENTION = "whet"
FUSED_TYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Documents:
    """Boundaries of the documents in a flat row. bounds: 0, end of the 1st, ...; cu: the same on the device, int32."""

    bounds: tuple[int, ...]
    cu: torch.Tensor
    longest: int

    @property
    def lengths(self) -> list[int]:
        """Tokens of each document."""
        return [end - start for start, end in zip(self.bounds, self.bounds[1:], strict=False)]


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    documents: Documents | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query [B, Hq, T, D], key and value [B, Hkv, T, D]; returns [B, T, Hq, D] as transformers expects it."""
    if query.dtype != value.dtype:  # under autocast, rotary positions leave query and key in fp32
        query, key = query.to(value.dtype), key.to(value.dtype)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    fused = query.is_cuda and query.dtype in FUSED_TYPES and softcap is None and attention_mask is None
    if documents is not None and fused:
        return _varlen(query, key, value, documents, scaling, sliding_window), None
    given = query.dtype
    if query.device.type == "cpu" and given == torch.bfloat16:  # its backward pass takes twice as long in bf16
        query, key, value = query.float(), key.float(), value.float()
    lengths = [query.shape[2]] if documents is None else documents.lengths
    pieces = [
        _one(q, k, v, attention_mask, scaling, dropout, sliding_window, softcap)
        for q, k, v in zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    ]
    output = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)
    return output.transpose(1, 2).to(given), None


def _one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Causal attention of one document, or of padded rows: [B, H, T, D] in and out."""
    if softcap is not None:
        return _softcapped(query, key, value, scaling, softcap, sliding_window, mask)
    length = query.shape[2]
    if mask is None and sliding_window is not None and length > sliding_window:
        mask = _band(length, sliding_window, query.device)
    return scaled_dot_product_attention(query, key, value, mask, dropout, is_causal=mask is None, scale=scaling)


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: Documents,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """All documents in one kernel call; [1, H, T, D] in, [1, T, H, D] out."""
    from torch.nn.attention.varlen import varlen_attn

    window = (-1, 0) if sliding_window is None else (sliding_window - 1, 0)
    output = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        documents.cu,
        documents.cu,
        documents.longest,
        documents.longest,
        scale=scaling,
        window_size=window,
    )
    assert isinstance(output, torch.Tensor)
    return output.unsqueeze(0)


def _softcapped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    softcap: float,
    sliding_window: int | None,
    attention_mask: torch.Tensor | None,
) -> torch.Tensor:
    """softmax(cap tanh(q k / cap)) v as in Gemma 2; no fused kernel of torch has it."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.tanh((query @ key.transpose(2, 3)) * scale / softcap) * softcap
    length = query.shape[2]
    allowed = _band(length, sliding_window or length, query.device) if attention_mask is None else attention_mask
    if allowed.dtype == torch.bool:
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    else:
        scores = scores + allowed
    return torch.softmax(scores.float(), dim=-1).to(query.dtype) @ value


def _band(length: int, window: int, device: torch.device) -> torch.Tensor:
    """[T, T], True where query i may look at key j: i - window < j <= i."""
    index = torch.arange(length, device=device)
    distance = index[:, None] - index[None, :]
    return (distance >= 0) & (distance < window)


def _mask(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """No mask tensor unless the caller brings one: `documents` and causality say it all."""
    if attention_mask is None:
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, _mask)
