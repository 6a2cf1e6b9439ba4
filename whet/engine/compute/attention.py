"""Attention for training, registered through transformers' published `AttentionInterface`.

Two layouts, neither needs a mask tensor:
- padded, [B, H, T, D], right-padded: causality alone hides the padding, which comes after every real token;
- flat, [1, H, T, D]: documents laid end to end, told apart by `documents`; each attends only within itself.
So padding costs nothing and packing cannot contaminate. Which kernel computes it on a GPU depends on the documents:
where all have one length the row is seen as dense rows and cuDNN is fastest (1.7 times the flash kernel on an H100);
where they differ, the flash kernel for rows of unequal length. Neither copies keys for grouped queries. Gemma 2's soft
cap runs in FlexAttention, whose scores are compiled with it.

No mask function is registered on purpose: transformers then makes no mask, and looks at no position on the host, as a
captured step could not. So a 2-D `attention_mask` has no effect here; generation, which pads on the left, uses an
attention of its own. What a model would have put into its mask is found by `engine.compute.proven_attention` when it is
loaded, a model whose layers do not pass `documents` on by `engine.compute.isolation` before the first step, and a
keyword that changes scores in a way unknown here is an error.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from whet.base.private import flash_attention

ATTENTION = "whet"
FUSED_TYPES = (torch.float16, torch.bfloat16)
# Keywords that reach attention and change nothing of what it computes; `is_causal` where it is not False.
INERT = frozenset((
    "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "return_dict",
    "logits_to_keep", "is_causal", "deterministic", "output_router_logits", "layer_idx", "past_key_values",
))  # fmt: skip


@dataclass(frozen=True)
class Documents:
    """The documents of a flat row of T tokens.

    cu: int32 [D + 1] on the device: 0, end of the 1st, ..., T; ends may repeat (empty documents, to keep D the same).
    longest: an upper bound of their tokens. row: their length if all have the same and fill the row, else 0.
    bounds: the same as cu on the host, for devices that need it (None on CUDA). counted: the pass is only counted, on
    tensors without memory, and goes through the kernel of a GPU whatever their device.
    """

    cu: torch.Tensor
    longest: int
    row: int = 0
    bounds: tuple[int, ...] | None = None
    counted: bool = False

    def lengths(self) -> list[int]:
        """Tokens of each document, from `bounds`."""
        bounds = tuple(self.cu.tolist()) if self.bounds is None else self.bounds
        return [end - start for start, end in itertools.pairwise(bounds) if end > start]


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
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """query [B, Hq, T, D], key and value [B, Hkv, T, D]; returns [B, T, Hq, D] as transformers expects it.

    Raises TypeError for a keyword that would change what is computed.
    """
    check_keywords(more)
    if documents is not None and attention_mask is not None:
        raise TypeError("a mask of the model's own, which knows no documents that share a row")
    if query.dtype != value.dtype:  # under autocast, rotary positions leave query and key in fp32
        query, key = query.to(value.dtype), key.to(value.dtype)
    if documents is not None and documents.counted:
        return _varlen(query, key, value, documents, scaling, sliding_window), None
    fused = query.is_cuda and query.dtype in FUSED_TYPES and attention_mask is None
    if documents is not None and documents.row:
        return _rows(query, key, value, documents.row, scaling, sliding_window, softcap), None
    if fused and documents is not None:
        if softcap is not None:
            return _flexible(query, key, value, documents, scaling, sliding_window, softcap), None
        return _varlen(query, key, value, documents, scaling, sliding_window), None
    lengths = [query.shape[2]] if documents is None else documents.lengths()
    given = query.dtype
    if not query.is_cuda:  # once for all documents
        key, value = _repeated(query, key, value)
    if query.device.type == "cpu" and given == torch.bfloat16:  # its backward pass takes twice as long in bf16
        query, key, value = query.float(), key.float(), value.float()
    pieces = [
        _one(q, k, v, attention_mask, scaling, dropout, sliding_window)
        if softcap is None
        else _softcapped(q, k, v, scaling, softcap, sliding_window, attention_mask)
        for q, k, v in zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    ]
    output = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)
    return output.transpose(1, 2).contiguous().to(given), None


def check_keywords(given: Mapping[str, Any]) -> None:
    """Raise TypeError for what whet's attention would ignore although it changes the scores or who sees whom."""
    for name, value in given.items():
        if value is not None and (name not in INERT or (name == "is_causal" and value is False)):
            raise TypeError(f"its layers ask attention for {name}, which whet's own does not compute")


def _rows(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, length: int, scaling: float | None,
    sliding_window: int | None, softcap: float | None,
) -> torch.Tensor:  # fmt: skip
    """Documents of one length as dense rows: [1, H, T, D] in, [1, T, H, D] out."""
    given = query.dtype
    if query.device.type == "cpu":
        query, key, value = query.float(), key.float(), value.float()
    q, k, v = (t.transpose(1, 2).unflatten(1, (-1, length)).flatten(0, 1).transpose(1, 2) for t in (query, key, value))
    if softcap is None:
        output = _one(q, k, v, None, scaling, 0.0, sliding_window)
    else:
        output = _softcapped(q, k, v, scaling, softcap, sliding_window, None)
    return output.transpose(1, 2).reshape(1, query.shape[2], query.shape[1], -1).to(given)


@contextlib.contextmanager
def fastest_attention(device: torch.device) -> Iterator[None]:
    """Prefer torch's backends in the order of their speed on this device, inside the block."""
    if device.type != "cuda":
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if torch.cuda.get_device_capability(device) >= (9, 0):
        order.insert(0, SDPBackend.CUDNN_ATTENTION)
    with sdpa_kernel(order, set_priority=True):
        yield


def _one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
) -> torch.Tensor:
    """Causal attention of one document, or of padded rows: [B, H, T, D] in and out."""
    length = query.shape[2]
    if mask is None and sliding_window is not None and length > sliding_window:
        mask = _band(length, sliding_window, query.device)
    grouped = query.is_cuda and query.shape[1] != key.shape[1]
    if not grouped:
        key, value = _repeated(query, key, value)
    return scaled_dot_product_attention(
        query, key, value, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
    )


def _repeated(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values once for every query head."""
    groups = query.shape[1] // key.shape[1]
    if groups == 1:
        return key, value
    return key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: Documents,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """All documents in one kernel call; [1, H, T, D] in, [1, T, H, D] out. The kernel shares keys among query heads."""
    q, k, v = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    return flash_attention(q, k, v, documents.cu, documents.longest, scaling, sliding_window).unsqueeze(0)


def _flexible(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents, scaling: float | None,
    sliding_window: int | None, softcap: float,
) -> torch.Tensor:  # fmt: skip
    """Soft-capped attention of a flat row: [1, H, T, D] in, [1, T, H, D] out."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length = query.shape[2]
    place = torch.arange(length, device=query.device)
    document = torch.searchsorted(documents.cu[1:].contiguous(), place.to(torch.int32), right=True)
    window = sliding_window or length

    def allowed(batch, head, i, j):
        return (document[i] == document[j]) & (j <= i) & (i - j < window)

    def capped(score, batch, head, i, j):
        return softcap * torch.tanh(score / softcap)

    mask = create_block_mask(allowed, None, None, length, length, device=query.device)
    run = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    output = run(query, key, value, capped, mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1])
    return output.transpose(1, 2).contiguous()


@functools.cache
def _compiled_flex():
    """FlexAttention outside of a compiled layer: uncompiled it would build the whole score matrix."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


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
    key, value = _repeated(query, key, value)
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


AttentionInterface.register(ATTENTION, attend)
