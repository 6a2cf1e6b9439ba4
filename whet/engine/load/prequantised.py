"""Checkpoints that bitsandbytes has already quantised, taken byte for byte: no weight is rounded a second time.

transformers reads them into bitsandbytes' own layers (its documented format: packed bytes and a quantisation state for
4 bits, codes and row maxima `SCB` for LLM.int8), and those hand their tensors to our frozen layers without a copy. A
layer that the checkpoint left dense stays dense. Where the recipe asks for another storage the weights are rebuilt and
stored anew, one layer at a time; `load.rebuilding_notice` is for callers to tell. Gives up: fp4, other block sizes and
every other format (GPTQ, AWQ, FP8 checkpoints), which are refused before anything is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from whet.base.errors import UserError
from whet.base.extras import require
from whet.engine.device import PACKED
from whet.engine.load.stream import forget_quantiser, load_plain
from whet.engine.task import CAUSAL, Task
from whet.engine.weights.linear import FrozenLinear, Int8Linear, Nf4Linear, freeze, freeze_linears
from whet.engine.weights.nf4 import BLOCK, NESTED_BLOCK
from whet.engine.weights.stored import INT8_MAX

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def stored_as(config: PreTrainedConfig, source: str) -> str | None:
    """nf4 or int8 for a checkpoint that bitsandbytes quantised, None for a plain one; UserError for other formats."""
    found = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    if found is None:
        return None
    settings: dict[str, Any] = found if isinstance(found, dict) else found.to_dict()
    if settings.get("load_in_8bit"):
        return "int8"
    kind = settings.get("bnb_4bit_quant_type", "fp4") if settings.get("load_in_4bit") else settings.get("quant_method")
    if kind == "nf4":
        return "nf4"
    raise UserError(
        "this checkpoint is quantised in a format that whet does not train on",
        file=source,
        field="model.path",
        found=str(kind),
        expected="plain weights, or bitsandbytes' nf4 or int8",
        fix="give the model that it was made from; base.storage=nf4 quantises it while loading",
    )


def load_quantised(
    source: str, stored: str, storage: str, double_quant: bool, options: dict[str, Any], task: Task = CAUSAL
) -> PreTrainedModel:
    """The checkpoint `source`, which is `stored` as nf4 or int8, in `storage`.

    options: more arguments of `from_pretrained`, among them the dtype of what is dense.
    """
    require("bitsandbytes", "a checkpoint that bitsandbytes quantised")
    network = load_plain(source, options, task)
    quantiser: Any = network.hf_quantizer
    head = network.get_output_embeddings()
    for name in [name for name, _ in network.named_modules()]:
        module = network.get_submodule(name)
        frozen = _taken(module, stored, source)
        if frozen is None:
            continue
        kept: nn.Module = frozen
        if module is head or stored != storage:
            kept = linear = _thawed(frozen, options["dtype"])
            if module is not head and storage in PACKED:
                kept = freeze(linear, storage, double_quant) or linear
        network.set_submodule(name, kept)
    forget_quantiser(network, quantiser)
    if stored != storage and storage in PACKED:
        freeze_linears(network, storage, double_quant)
    return network


def _taken(module: nn.Module, stored: str, source: str) -> FrozenLinear | None:
    """Our layer around the tensors of one of bitsandbytes' layers, or None for any other module."""
    layers = require("bitsandbytes.nn", "a checkpoint that bitsandbytes quantised")
    if not isinstance(module, layers.Linear4bit if stored == "nf4" else layers.Linear8bitLt):
        return None
    weight: Any = module.weight
    columns, rows = int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    bias = None if module.bias is None else module.bias.detach()  # type: ignore[union-attr]
    if stored == "int8":
        whole = Int8Linear(columns, rows, bias)  # type: ignore[arg-type]
        whole.codes = nn.Parameter(weight.data, requires_grad=False)
        whole.scale = nn.Parameter(weight.SCB.float().reshape(-1) / INT8_MAX, requires_grad=False)
        return whole
    state = weight.quant_state
    nested = state.state2.blocksize if state.nested else NESTED_BLOCK
    if (state.blocksize, nested, state.quant_type) != (BLOCK, NESTED_BLOCK, "nf4"):
        raise UserError(
            "this checkpoint was quantised in other blocks than whet computes with",
            file=source,
            found=f"{state.quant_type}, blocks of {state.blocksize} and {nested}",
            expected=f"nf4, blocks of {BLOCK} and {NESTED_BLOCK}",
            fix="give the model that it was made from; base.storage=nf4 quantises it while loading",
        )
    packed = Nf4Linear(columns, rows, bias, double_quant=state.nested)  # type: ignore[arg-type]
    packed.take(weight.data.view(torch.uint8), state)
    return packed


def _thawed(frozen: FrozenLinear, dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(frozen.in_features, frozen.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(frozen.dense(dtype))
    linear.bias = None if frozen.bias is None else nn.Parameter(frozen.bias.to(dtype))  # type: ignore[assignment]
    return linear
