"""Attention for generation, registered through transformers' published `AttentionInterface`.

Prompts go the way of transformers' own "sdpa". A single new token is different: with a mask, "sdpa" first copies every
key and value once per query head of its group, which at 4:1 moves five times the bytes of the cache. Here the query
heads of a group become the rows of one small product, so the cache is read once and copied never. Soft-capped scores
(Gemma 2), which "sdpa" leaves out, are computed in plain torch. Gives up: a mask of its own for each head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

CACHED_ATTENTION = "whet_cached"


def attend_cached(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """query [B, Hq, T, D], key and value [B, Hkv, S, D], mask [B, 1, T, S] (bool or added); returns [B, T, Hq, D]."""
    if query.dtype != value.dtype:
        query, key = query.to(value.dtype), key.to(value.dtype)
    if attention_mask is not None and attention_mask.dtype not in (torch.bool, query.dtype):
        attention_mask = attention_mask.to(query.dtype)
    if softcap is not None:
        return _softcapped(query, key, value, attention_mask, scaling, softcap), None
    own_masks = attention_mask is not None and attention_mask.shape[1] != 1
    if query.shape[2] > 1 or own_masks or more.get("position_bias") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
        )
    rows, heads, _, width = query.shape
    grouped = query.reshape(rows, key.shape[1], heads // key.shape[1], width)
    output = scaled_dot_product_attention(grouped, key, value, attention_mask, dropout, scale=scaling)
    return output.reshape(rows, 1, heads, output.shape[-1]), None


def _softcapped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float,
) -> torch.Tensor:
    """softmax(cap tanh(q k / cap)) v; [B, Hq, T, D] in, [B, T, Hq, D] out. No mask means causal."""
    rows, heads, length, width = query.shape
    groups = heads // key.shape[1]
    grouped = query.reshape(rows, key.shape[1], groups * length, width)
    scores = (grouped @ key.transpose(2, 3)) * (width**-0.5 if scaling is None else scaling)
    scores = (torch.tanh(scores / softcap) * softcap).view(rows, heads, length, key.shape[2])
    if mask is None and length > 1:
        mask = torch.ones(length, key.shape[2], dtype=torch.bool, device=key.device).tril(key.shape[2] - length)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    weights = torch.softmax(scores.float(), dim=-1).to(value.dtype)
    output = weights.view(rows, key.shape[1], groups * length, key.shape[2]) @ value
    return output.view(rows, heads, length, value.shape[-1]).transpose(1, 2).contiguous()


AttentionInterface.register(CACHED_ATTENTION, attend_cached)
AttentionMaskInterface.register(CACHED_ATTENTION, sdpa_mask)
