"""Memory before anything is loaded: arithmetic on the real modules, made without memory on the meta device.

Parameters are counted, not guessed. Activations are an estimate from the shapes of a decoder layer (hidden states,
attention, feed-forward, as in Korthikanti et al., 2022, arXiv:2205.05198); the full planner is a later step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from whet.engine.weights.linear import frozen_names
from whet.engine.weights.nf4 import BLOCK, NESTED_BLOCK
from whet.planning.costs import Cost, embedding_cost, head_cost, optimiser_cost

DTYPE_BYTES = {"fp32": 4, "bf16": 2}
OPTIMISER_BYTES = {"adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2, "adafactor": 0.1, "sgd": 4}


@dataclass(frozen=True)
class Sizes:
    """What the plan depends on beyond the model. tokens: in one forward pass; chunk_logits: logits alive at once.

    on_host: what waits in host memory: embedding, head, optimizer, and halved where the optimiser there lets the
    linear layers of the device be bf16.
    """

    storage: str
    compute: str
    double_quant: bool
    optimiser: str
    tokens: int
    checkpointing: bool
    chunk_logits: int
    on_host: frozenset[str] = frozenset()


def plan_memory(model: nn.Module, sizes: Sizes) -> dict[str, Any]:
    """trainable_params, all_params, memory by class in bytes, their sum, and host_bytes beside them.

    `model` has its method attached. Classes are of the device.
    """
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    compute = DTYPE_BYTES.get(sizes.compute, 2)  # fp8 products have bf16 activations
    frozen = _frozen_bytes(model, sizes)
    memory = {
        "frozen weights": frozen,
        "trained weights": trainable * 4,
        "gradients": trainable * 4,
        "optimiser": int(trainable * OPTIMISER_BYTES[sizes.optimiser]),
        "activations": _activation_bytes(model, sizes, compute),
        "logits": sizes.chunk_logits * (4 + compute),
    }
    host = 0
    for name, cost in _host_costs(model, sizes).items():
        memory[name] += cost.device_bytes
        host += cost.host_bytes
    if "optimizer" in sizes.on_host:
        kept = 2 * (_halved(model) if "halved" in sizes.on_host else 0)
        memory |= {"trained weights": trainable * 4 - kept, "gradients": _largest(model) * 8, "optimiser": 0}
        host += optimiser_cost(trainable).host_bytes
    return {
        "trainable_params": trainable,
        "all_params": total,
        "memory": memory,
        "peak_bytes": sum(memory.values()),
        "host_bytes": host,
    }


def _host_costs(model: Any, sizes: Sizes) -> dict[str, Cost]:
    """What the frozen embedding and head cost where they wait on the host, by the class of memory they are counted in.

    A head is there while the loss is computed, beside its logits.
    """
    network = model.get_base_model() if hasattr(model, "get_base_model") else model
    itemsize = DTYPE_BYTES.get(sizes.storage) or DTYPE_BYTES.get(sizes.compute, 2)
    table, head = network.get_input_embeddings().weight, network.get_output_embeddings()
    tied = head is not None and head.weight is table
    costs: dict[str, Cost] = {}
    frozen = Cost()
    rows, width = table.shape
    if "embedding" in sizes.on_host or ("head" in sizes.on_host and tied):
        frozen += embedding_cost(rows, width, sizes.tokens, itemsize)
    if "head" in sizes.on_host and head is not None:
        rows, width = head.weight.shape
        cost = head_cost(rows, width, itemsize)
        frozen += Cost(host_bytes=cost.host_bytes) if tied else cost
        costs["logits"] = Cost(device_bytes=-cost.device_bytes)
    return costs | {"frozen weights": frozen}


def _halved(model: Any) -> int:
    """Weights of linear layers, which the device may keep in bf16 where the host has them exactly."""
    return sum(model.get_submodule(name).weight.numel() for name in frozen_names(model))


def _largest(model: nn.Module) -> int:
    return max((p.numel() for p in model.parameters() if p.requires_grad), default=0)


def nf4_bytes(weights: int, double_quant: bool) -> int:
    """Bytes of `weights` quantised to nf4: half a byte each and the scales of their blocks."""
    blocks = -(-weights // BLOCK)
    scales = blocks + 4 * -(-blocks // NESTED_BLOCK) + 4 if double_quant else 4 * blocks
    return weights // 2 + scales


def _frozen_bytes(model: nn.Module, sizes: Sizes) -> int:
    frozen = [p for p in model.parameters() if not p.requires_grad]
    if sizes.storage in DTYPE_BYTES:
        return sum(p.numel() for p in frozen) * DTYPE_BYTES[sizes.storage]
    network = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    linears = {f"{name}.weight" for name in frozen_names(network) if not name.endswith(("lora_A", "lora_B"))}
    packed = plain = 0
    for name, parameter in network.named_parameters():  # type: ignore[union-attr]
        if parameter.requires_grad:
            continue
        if name in linears and parameter.numel() % BLOCK == 0:
            packed += _packed_bytes(parameter, sizes)
        else:
            plain += parameter.numel() * DTYPE_BYTES.get(sizes.compute, 2)
    return packed + plain


def _packed_bytes(weight: nn.Parameter, sizes: Sizes) -> int:
    """nf4: half a byte a weight and its scales; fp8 and int8: a byte a weight and a float32 an output channel."""
    if sizes.storage == "nf4":
        return nf4_bytes(weight.numel(), sizes.double_quant)
    return weight.numel() + 4 * weight.shape[0]


def _activation_bytes(model: nn.Module, sizes: Sizes, compute: int) -> int:
    """What the backward pass needs of every layer, or of one layer and the inputs of all with recomputation."""
    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    hidden, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    heads = getattr(config, "num_attention_heads", 1)
    head = getattr(config, "head_dim", None) or hidden // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    attention = head * (2 * heads + 2 * groups)
    # Inputs of norms, projections and residuals (6 hidden), queries to output, gate, up, product and their input.
    per_token = (6 * hidden + attention + 4 * inner) * compute + 4 * hidden
    if sizes.checkpointing:
        return sizes.tokens * (per_token + layers * hidden * compute)
    return sizes.tokens * per_token * layers
