"""Keys and values in the same memory from the first token of an answer to the last, and the models that this suits.

transformers' own static layers keep their length each for itself (three small launches a layer and token) and let a
rolling window take another Python path once it is full, which a captured step cannot follow. Here all layers share one
position on the device, and a window is a mask over a cache of full length. Gives up: the memory that rolling would
save. A position for each row, for rows that come and go, changes `CachePosition`, `LayerCache.update` and
`StaticCache.masks` here, and who moves it: `rows` and `decode`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from whet.engine.sizes import Sizes, largest, sizes_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class AttentionLayout:
    """Number and kinds of the attention layers of a model. by_name: it wants a mask for each kind by its name."""

    layers: int
    kinds: frozenset[str]
    window: int | None
    by_name: bool


def attention_layout(model: PreTrainedModel) -> AttentionLayout | None:
    """The attention layers, or None for a model that keeps something else than keys and values of each layer."""
    text = model.config.get_text_config(decoder=True)
    names = getattr(text, "layer_types", None)
    if sizes_of(model.config).heads is None or getattr(text, "per_layer_attributes", None):
        return None
    window = largest(text, "sliding_window")
    kinds = frozenset(names or ["full_attention" if window is None else "sliding_attention"])
    unusual = ("attention_chunk_size", "num_kv_shared_layers", "is_encoder_decoder")
    if kinds - {"full_attention", "sliding_attention"} or any(getattr(text, name, None) for name in unusual):
        return None
    sliding = window if "sliding_attention" in kinds else None
    return AttentionLayout(sizes_of(model.config).layers, kinds, sliding, names is not None)


@dataclass
class CachePosition:
    """Where the caches of all layers stand. slot: [1] on the device, written next; reach: slots to read."""

    length: int
    slot: torch.Tensor
    reach: int
    filling: bool = False


class LayerCache(CacheLayerMixin):
    """Keys and values [B, Hkv, L, D] of one layer, in the same memory from the first token to the last."""

    is_compileable = True

    def __init__(self, position: CachePosition) -> None:
        super().__init__()
        self.position = position

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate from the first keys and values seen: they know heads, widths and types."""
        length = self.position.length
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
        if self.position.filling:
            self.keys[:, :, : key_states.shape[2]] = key_states
            self.values[:, :, : value_states.shape[2]] = value_states
            return key_states, value_states
        self.keys.index_copy_(2, self.position.slot, key_states)
        self.values.index_copy_(2, self.position.slot, value_states)
        return self.keys[:, :, : self.position.reach], self.values[:, :, : self.position.reach]

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
        return self.position.length


class StaticCache:
    """The caches of all layers for B rows and L slots, and the slots that each row may read.

    `states` is what a model of transformers takes as past_key_values; readable [B, 1, 1, L] is 0 for slots that hold a
    token of the row and -inf else, in the type and on the device of `like`.
    """

    def __init__(self, layout: AttentionLayout, rows: int, length: int, like: torch.Tensor) -> None:
        self.layout = layout
        self.readable = torch.zeros(rows, 1, 1, length, dtype=like.dtype, device=like.device)
        self.slots = torch.arange(length, device=like.device)
        self.position = CachePosition(length, torch.zeros(1, dtype=torch.long, device=like.device), length)
        self.layers = [LayerCache(self.position) for _ in range(layout.layers)]
        self.states = Cache(layers=[*self.layers])

    @property
    def bytes(self) -> int:
        """Bytes of the keys and values that were allocated."""
        tensors = [tensor for layer in self.layers if layer.is_initialized for tensor in (layer.keys, layer.values)]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    @contextlib.contextmanager
    def filling(self, real: torch.Tensor) -> Iterator[None]:
        """Inside, the model reads prompts into the first slots. real: bool [B, T], False for padding."""
        width = real.shape[1]
        self.position.slot.fill_(width - 1)
        self.readable.fill_(float("-inf"))
        self.readable[:, 0, 0, :width].masked_fill_(real, 0.0)
        self.position.filling = True
        try:
            yield
        finally:
            self.position.filling = False

    def open_slot(self) -> None:
        """Let every row read the slot that is written next."""
        self.readable.index_fill_(3, self.position.slot, 0.0)

    def advance(self) -> None:
        """Move on to the next slot."""
        self.position.slot.add_(1)

    def masks(self) -> Any:
        """Masks [B, 1, 1, reach] that are added to the scores, by kind of layer where the model wants them so."""
        reach = self.position.reach
        full = self.readable[..., :reach]
        masks = {"full_attention": full, "sliding_attention": full}
        window = self.layout.window
        if window is not None and window < self.position.length:
            behind = self.slots[:reach] <= self.position.slot - window
            masks["sliding_attention"] = full.masked_fill(behind, float("-inf"))
        if self.layout.by_name:
            return {kind: masks[kind] for kind in self.layout.kinds}
        return masks[next(iter(self.layout.kinds))]

    def keep(self, rows: torch.Tensor) -> None:
        """Forget all rows but `rows`."""
        self.readable = self.readable[rows]
        for layer in self.layers:
            layer.keep(rows)

    def tensors(self) -> list[torch.Tensor]:
        """All that a step changes, but keys and values in slots that are not yet readable."""
        return [self.readable, self.position.slot]


def generation_bytes(model: PreTrainedModel, rows: int, tokens: int) -> int:
    """Bytes that generating takes beside the weights: the cache of `rows` x `tokens`, and one forward pass over it."""
    table: Any = model.get_input_embeddings().weight  # type: ignore[union-attr]
    sizes = sizes_of(model.config, model)
    numbers = sum(generation_numbers(sizes, rows, tokens))
    return table.dtype.itemsize * (numbers + 4 * rows * (sizes.vocabulary or table.shape[0]))


def generation_numbers(sizes: Sizes, rows: int, tokens: int) -> tuple[int, int]:
    """(numbers in the cache of `rows` x `tokens`, numbers that a forward pass over them holds at once)."""
    width = sizes.head_dim or sizes.hidden
    cached = 2 * sizes.layers * (sizes.kv_heads or 1) * width
    passing = 3 * sizes.intermediate + 6 * sizes.hidden + 3 * (sizes.heads or 1) * width
    return rows * tokens * cached, rows * tokens * passing
