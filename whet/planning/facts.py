"""Everything that decides how a run sits on the hardware, as plain numbers: nothing here is loaded or measured later.

`decide` reads these and nothing else, so a plan for another card, or for the least free memory of several, is the same
function on other facts. The model is counted on the meta device, with its method attached.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from whet.data.batch.batches import Batches
from whet.engine.device import PACKED, Hardware, Placement
from whet.engine.memory.kept import Kept
from whet.engine.sizes import sizes_of
from whet.engine.weights.linear import frozen_names
from whet.engine.weights.nf4 import BLOCK, NESTED_BLOCK
from whet.methods.experts import expert_parameters
from whet.methods.layers.lora_layer import LoraLinear
from whet.planning.costs import LayerShape, layer_shape

DTYPE_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class ModelFacts:
    """Counts of a model with its method attached.

    trainable, total: parameters. largest_trained: numbers of the largest trained tensor. frozen_bytes: frozen weights
    on the device as they are stored; fp8_bytes: of these, codes that could be kept in both orders. table_bytes,
    head_bytes: input embedding and output head, as far as frozen; head_numbers: weights of the head; tied: they are one
    tensor. short_numbers: weights of linear layers of a model that is trained whole, which autocast casts to bf16
    anyway; else 0. has_peft: PEFT wraps the model. vocabulary: rows of the input embedding, 0 where it has no
    such table. multiplied: weights of the layers that a token is multiplied with, of experts those that it visits.
    base: numbers of the model without its method; largest_dense: bytes of its largest tensor as it is read.
    draws: something drops numbers by torch's generator.
    """

    shape: LayerShape
    trainable: int
    total: int
    largest_trained: int
    frozen_bytes: int
    fp8_bytes: int = 0
    table_bytes: int = 0
    head_bytes: int = 0
    head_numbers: int = 0
    tied: bool = False
    short_numbers: int = 0
    has_peft: bool = False
    vocabulary: int = 0
    multiplied: int = 0
    base: int = 0
    largest_dense: int = 0
    draws: bool = False


@dataclass(frozen=True)
class Work:
    """The batches of a run, and how many optimiser steps are made of them. assumed: the rows are not known, and full
    ones stand for them."""

    batches: Batches[Any]
    steps: int
    assumed: bool = False

    @cached_property
    def largest_tokens(self) -> int:
        """Tokens of the largest forward pass there is."""
        return self.batches.largest_tokens(self.steps)

    @cached_property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return int(self.batches.lengths.sum()) * self.steps // self.batches.steps_per_epoch

    @cached_property
    def is_dense(self) -> bool:
        """All documents have one length."""
        lengths = self.batches.rows.lengths
        return bool(lengths.min() == lengths.max())


@dataclass(frozen=True)
class Facts:
    """What `decide` knows. flat: documents share rows without padding; padded_task: labels, answers or virtual tokens,
    for which the model is called as a whole on padded rows; kept: what the layers keep by the way they run
    (`planning.counted`), as far as it was counted."""

    hardware: Hardware
    placement: Placement
    model: ModelFacts
    work: Work
    flat: bool
    padded_task: bool
    kept: Mapping[str, Kept] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        """The device is a CUDA GPU: memory has a hard end, and kernels can be compiled and captured."""
        return self.hardware.device.type == "cuda"


def count_model(model: Any, network: Any, placement: Placement) -> ModelFacts:
    """Count `model` (a method around or in `network`, a transformers model), both without memory."""
    trained = [p for p in model.parameters() if p.requires_grad]
    linears = {f"{name}.weight": network.get_submodule(name).weight for name in frozen_names(network)}
    packed = {id(p) for p in linears.values() if not p.requires_grad and p.numel() % BLOCK == 0}
    packed = packed if placement.storage in PACKED else set()
    frozen = [p for p in model.parameters() if not p.requires_grad]
    dense = DTYPE_BYTES.get(placement.storage) or DTYPE_BYTES.get(placement.arithmetic, 2)
    stored = sum(_packed_bytes(p, placement) if id(p) in packed else p.numel() * dense for p in frozen)
    table, head = network.get_input_embeddings().weight, network.get_output_embeddings()
    head = getattr(head, "weight", None)
    whole = not hasattr(model, "peft_config") and not frozen
    return ModelFacts(
        shape=layer_shape(network.config, DTYPE_BYTES.get(placement.arithmetic, 2), network),
        trainable=sum(p.numel() for p in trained),
        total=sum(p.numel() for p in model.parameters()),
        largest_trained=max((p.numel() for p in trained), default=0),
        frozen_bytes=stored,
        fp8_bytes=sum(p.numel() for p in frozen if id(p) in packed) if placement.storage == "fp8" else 0,
        table_bytes=0 if table.requires_grad else table.numel() * dense,
        head_bytes=0 if head is None or head.requires_grad else head.numel() * dense,
        head_numbers=0 if head is None else head.numel(),
        tied=head is table,
        short_numbers=sum(p.numel() for p in linears.values()) if whole else 0,
        has_peft=hasattr(model, "peft_config"),
        vocabulary=table.shape[0] if isinstance(network.get_input_embeddings(), nn.Embedding) else 0,
        draws=_draws(model, network),
        base=sum(p.numel() for p in model.parameters()) - (sum(p.numel() for p in trained) if not whole else 0),
        largest_dense=max((p.numel() for p in model.parameters()), default=0) * dense,
        multiplied=_multiplied(network, [weight for weight in linears.values() if weight is not head]),
    )


def _draws(model: nn.Module, network: Any) -> bool:
    """Whether some module drops numbers by torch's generator: all but plain LoRA, which is grouped and has its own."""
    config = network.config.get_text_config()
    shares = [getattr(config, name, 0) for name in ("attention_dropout", "attn_pdrop", "attn_dropout")]
    grouped = {
        dropout for layer in model.modules() if isinstance(layer, LoraLinear) and layer.trains_lora_alone()
        for dropout in layer.lora_dropout.values()
    }  # fmt: skip
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout) and module not in grouped]
    return any(module.p > 0 for module in dropouts) or any(type(share) is float and share > 0 for share in shares)


def _multiplied(network: Any, linears: Sequence[Any]) -> int:
    """Numbers of these weights, and of the experts that a token visits."""
    sizes = sizes_of(network.config)
    share = sizes.visited / sizes.experts if sizes.visited and sizes.experts else 1.0
    return sum(weight.numel() for weight in linears) + int(share * sum(expert_parameters(network).values()))


def _packed_bytes(weight: Any, placement: Placement) -> int:
    """nf4: half a byte a weight and its scales; fp8 and int8: a byte a weight and a float32 an output channel."""
    if placement.storage == "nf4":
        return nf4_bytes(weight.numel(), placement.double_quant)
    return weight.numel() + 4 * weight.shape[0]


def nf4_bytes(weights: int, double_quant: bool) -> int:
    """Bytes of `weights` quantised to nf4: half a byte each and the scales of their blocks."""
    blocks = -(-weights // BLOCK)
    scales = blocks + 4 * -(-blocks // NESTED_BLOCK) + 4 if double_quant else 4 * blocks
    return weights // 2 + scales
