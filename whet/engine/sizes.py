"""The sizes of a model, read from its config in one place: planning, the cache and loading ask here.

Families call them by several names, give one number for the model, a list with one for each layer, or layers of their
own, and leave out what follows from the rest. A size is the largest of the layers, since memory is what it is for; it
is None where the config does not say or says 0 or less. Nothing here stops a run: what is unknown is estimated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

HIDDEN = ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "emb_dim", "dim_model")
INNER = ("intermediate_size", "ffn_dim", "decoder_ffn_dim", "d_ff", "n_inner", "hidden_dim", "ffn_hidden_size", "dff")
LAYERS = ("num_hidden_layers", "decoder_layers", "num_layers", "n_layer", "n_layers")
HEADS = ("num_attention_heads", "decoder_attention_heads", "n_head", "n_heads", "num_heads")
READABLE = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")


@dataclass(frozen=True)
class Sizes:
    """Sizes of the part of a model that reads and writes text. hidden, layers: estimated where they are unknown.

    intermediate: of the experts that a token visits where there are several; gated: the config names it, as those of
    SwiGLU-like layers do. heads, kv_heads, head_dim: None for a model without attention heads. experts, visited: of a
    mixture, and of these by each token.
    """

    hidden: int
    layers: int
    intermediate: int
    gated: bool
    heads: int | None
    kv_heads: int | None
    head_dim: int | None
    vocabulary: int | None
    experts: int | None = None
    visited: int | None = None


def sizes_of(config: Any, network: Any = None) -> Sizes:
    """The sizes of a transformers config. network: the model, for what the config does not say; it may be without
    memory."""
    text = config.get_text_config(decoder=True)
    hidden = largest(text, *HIDDEN) or _width(network) or 1024
    heads = largest(text, *HEADS)
    named = largest(text, "intermediate_size")
    intermediate = named or largest(text, *INNER)
    visited = largest(text, "num_experts_per_tok", "moe_topk", "moe_k")
    of_expert = largest(text, "moe_intermediate_size", "expert_ffn_hidden_size") or named
    if visited and of_expert:
        intermediate = visited * of_expert
    return Sizes(
        hidden=hidden, layers=largest(text, *LAYERS) or 1, intermediate=intermediate or 4 * hidden,
        gated=named is not None, heads=heads, kv_heads=largest(text, "num_key_value_heads") or heads,
        head_dim=largest(text, "head_dim", "d_kv") or (max(1, hidden // heads) if heads else None),
        vocabulary=largest(text, "vocab_size"),
        experts=largest(text, "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
        visited=visited,
    )  # fmt: skip


def longest_text(config: Any) -> int | None:
    """How many positions a config says that there are, or None."""
    return largest(config.get_text_config(), *READABLE)


def largest(config: Any, *names: str) -> int | None:
    """The largest value of the first of `names` that the config gives a number above 0, over all layers."""
    for name in names:
        numbers = [int(value) for value in _values(config, name) if value > 0]
        if numbers:
            return max(numbers)
    return None


def _values(config: Any, name: str) -> Iterator[int | float]:
    """All numbers that a config or its layers have under a name."""
    apart = getattr(config, "per_layer_attributes", None) or ()
    owners = list(config.per_layer_config) if name in apart else [config]
    for owner in owners:
        value = getattr(owner, name, None)
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int | float) and not isinstance(number, bool):
                yield number


def _width(network: Any) -> int | None:
    """The width of a model's input embedding."""
    table = None if network is None else getattr(network.get_input_embeddings(), "weight", None)
    return None if table is None else int(table.shape[-1])
