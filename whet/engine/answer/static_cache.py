"""Keys and values in the same memory from the first token of an answer to the last, and which models that suits.

transformers' own static layers keep their length each for itself (three small launches a layer and token) and let a
rolling window take another Python path once it is full, which a captured step cannot follow. Here all layers share one
cursor on the device, and a window is a mask over a cache of full length. Gives up: the memory that rolling would save.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import CacheLayerMixin

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Cursor:
    """Where the layers' caches stand, shared by all. slot: [1] on the device, written next; reach: slots to read."""

    length: int
    slot: torch.Tensor
    reach: int = 0
    filling: bool = False


class Slots(CacheLayerMixin):
    """Keys and values [B, Hkv, L, D] of one layer, in the same memory from the first token to the last."""

    is_compileable = True

    def __init__(self, cursor: Cursor) -> None:
        super().__init__()
        self.cursor = cursor

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate from the first keys and values seen: they know heads, widths and types."""
        length = self.cursor.length
        self.keys = key_states.new_zeros(*key_states.shape[:2], length, key_states.shape[3])
        self.values = value_states.new_zeros(*value_states.shape[:2], length, value_states.shape[3])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the new states [B, Hkv, T, D]; returns what attention reads, the prompt itself while it is filled in."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        if self.cursor.filling:
            self.keys[:, :, : key_states.shape[2]] = key_states
            self.values[:, :, : value_states.shape[2]] = value_states
            return key_states, value_states
        self.keys.index_copy_(2, self.cursor.slot, key_states)
        self.values.index_copy_(2, self.cursor.slot, value_states)
        return self.keys[:, :, : self.cursor.reach], self.values[:, :, : self.cursor.reach]

    def keep(self, rows: torch.Tensor) -> None:
        """Forget all rows but `rows`."""
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = self.keys[rows], self.values[rows]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """While a prompt is filled in, it sees itself; later masks are made here and not by transformers."""
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.cursor.length


@dataclass(frozen=True)
class Layers:
    """Kinds of attention in a model. by_name: whether it wants a mask for each kind by its name."""

    count: int
    kinds: frozenset[str]
    window: int | None
    by_name: bool


def layers_of(model: PreTrainedModel) -> Layers | None:
    """The attention layers, or None for a model that keeps something else than keys and values of each layer."""
    text = model.config.get_text_config(decoder=True)
    named = getattr(text, "layer_types", None)
    window = getattr(text, "sliding_window", None)
    kinds = frozenset(named or ["full_attention" if window is None else "sliding_attention"])
    unusual = ("attention_chunk_size", "num_kv_shared_layers", "is_encoder_decoder")
    if kinds - {"full_attention", "sliding_attention"} or any(getattr(text, name, None) for name in unusual):
        return None
    return Layers(text.num_hidden_layers, kinds, window if "sliding_attention" in kinds else None, named is not None)


def generation_bytes(model: PreTrainedModel, rows: int, tokens: int) -> int:
    """Bytes that generating takes beside the weights: the cache of `rows` x `tokens`, and one forward pass over it."""
    text: Any = model.config.get_text_config(decoder=True)
    item: Any = model.get_input_embeddings().weight.dtype.itemsize  # type: ignore[union-attr]
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    kept = 2 * text.num_hidden_layers * (getattr(text, "num_key_value_heads", None) or heads) * width
    wide = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    passing = 3 * wide + 6 * text.hidden_size + 3 * heads * width
    return item * rows * (tokens * (kept + passing) + 4 * text.vocab_size)
