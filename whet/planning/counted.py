"""What the layers of a recipe's model keep for the backward pass, found by running it without memory.

The model is built as training would build it (storage, method, groups of LoRA layers, arithmetic) on tensors without
memory, one or two layers of each kind, and `engine.memory.kept` counts. Counting costs seconds, so what was found is
remembered by its content: model, method, arithmetic and versions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from whet.base.cache import cache_directory
from whet.base.content import digest_of
from whet.base.errors import UserError
from whet.base.files import read_json, write_json
from whet.base.private import compile_errors, without_memory
from whet.engine.compute.attention import ATTENTION, Documents
from whet.engine.compute.compile import lean_activations
from whet.engine.compute.proven_attention import set_attention
from whet.engine.device import PACKED, Placement
from whet.engine.layers import decoder_layers
from whet.engine.load.load import attention_of, empty_model, load_config
from whet.engine.memory.kept import Kept, count_kept
from whet.engine.task import CAUSAL, takes
from whet.engine.weights.linear import frozen_names, hollow
from whet.methods.layers.fuse import fuse
from whet.methods.layers.group import LoraGroup
from whet.recipe import Recipe

EAGER, COMPILED, LEAN = "uncompiled", "compiled", "compiled, lean"
TOKENS = 4099  # of the pass that is counted: a prime
MOST_REMEMBERED = 200
UNCOUNTABLE = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, NotImplementedError, AssertionError)


def way_of(*, compiled: bool, lean: bool) -> str:
    """The way in which layers run, as `count_layers` calls it."""
    return LEAN if compiled and lean else COMPILED if compiled else EAGER


def count_layers(recipe: Recipe, placement: Placement, *, compiled: bool, grouped: bool) -> dict[str, Kept]:
    """What the layers of a causal model keep, by the way they run: uncompiled, or compiled and compiled lean.

    grouped: LoRA layers that read one input are one product. Empty for a model that cannot run without values, or
    whose attention is not whet's.
    """
    config = load_config(recipe.model)
    if attention_of(CAUSAL, config) != ATTENTION:
        return {}
    facts = [config.to_dict(), recipe.model.new_tokens, repr(recipe.method), placement.storage, placement.arithmetic,
             placement.double_quant, placement.autocast, grouped, TOKENS]  # fmt: skip
    versions = [version(name) for name in ("whet", "torch", "transformers", "peft")]
    found = {}
    for way in (COMPILED, LEAN) if compiled else (EAGER,):
        kept = _remembered(
            digest_of([way, *versions, repr(facts)]), lambda way=way: _try(recipe, placement, way, grouped)
        )
        if kept is not None:
            found[way] = kept
    return found


def _remembered(key: str, count: Any) -> Kept | None:
    """The entry of `key` on disk, else what `count` finds, which is then written there."""
    place = cache_directory()
    file = None if place is None else place / "layers.json"
    entries: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        found = read_json(file) if file is not None else {}
        entries = found if isinstance(found, dict) else {}
    with contextlib.suppress(KeyError, TypeError, ValueError):
        entry = entries[key]
        return Kept(tuple(map(float, entry["layers"])), float(entry["outside"]), tuple(map(float, entry["fixed"])))
    kept = count()
    if file is not None and kept is not None:
        newest = dict([*entries.items(), (key, asdict(kept))][-MOST_REMEMBERED:])
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_json(file, newest)
    return kept


def _try(recipe: Recipe, placement: Placement, way: str, grouped: bool) -> Kept | None:
    """The count, or None where the model cannot run without values."""
    try:
        with lean_activations(way == LEAN):
            return _count(recipe, placement, compiled=way != EAGER, grouped=grouped)
    except (*UNCOUNTABLE, UserError, compile_errors()):
        return None
    finally:
        if way != EAGER:
            torch.compiler.reset()


def _count(recipe: Recipe, placement: Placement, *, compiled: bool, grouped: bool) -> Kept:
    dense = "fp32" if placement.storage == "fp32" or placement.compute == torch.float32 else "bf16"
    network: Any = empty_model(recipe.model, dense)
    set_attention(network, ATTENTION)
    with torch.device("meta"):
        _pack(network, placement)
        model = recipe.method.attach(network)
    stack = decoder_layers(network)
    chosen = _representatives(stack)
    _keep_only(network, stack, sorted(set(chosen)))
    short = torch.autocast("cpu", placement.compute, enabled=placement.autocast)
    with without_memory(), short:
        model.to_empty(device="cpu")
        if grouped:
            ids = torch.zeros(1, 8, dtype=torch.long)
            fuse(model, compute=placement.compute, fp8=placement.fp8, run=lambda: model(input_ids=ids, use_cache=False))
        model.train()
        layers = [stack[index] for index in sorted(set(chosen))]
        kept = count_kept(layers, _own(model), lambda: _forward(network, model), tokens=TOKENS, compiled=compiled)
    place = {index: number for number, index in enumerate(sorted(set(chosen)))}
    numbers = [place[index] for index in chosen]
    return Kept(tuple(kept.layers[n] for n in numbers), kept.outside, tuple(kept.fixed[n] for n in numbers))


def _representatives(layers: Sequence[nn.Module]) -> list[int]:
    """For each layer the index of one that keeps as much: the second of its kind, as the first may keep what all
    share."""
    kinds: dict[Any, list[int]] = {}
    found = []
    for index, layer in enumerate(layers):
        shapes = tuple((name, tuple(tensor.shape)) for name, tensor in layer.named_parameters())
        alike = kinds.setdefault((type(layer), shapes), [])
        alike.append(index)
        found.append(alike[min(len(alike) - 1, 1)])
    return found


def _keep_only(network: nn.Module, layers: Sequence[nn.Module], indices: Sequence[int]) -> None:
    """Leave only these layers in the stack of the network."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.ModuleList) and len(child) == len(layers) and child[0] is layers[0]:
                setattr(parent, name, nn.ModuleList([child[index] for index in indices]))


def _pack(network: Any, placement: Placement) -> None:
    """Put layers of the placement's storage, without weights, in place of the linear ones."""
    if placement.storage not in PACKED:
        return
    for name in frozen_names(network):
        parent_name, _, child = name.rpartition(".")
        parent = network.get_submodule(parent_name)
        linear = getattr(parent, child)
        frozen = hollow(linear, placement.storage, placement.double_quant) if isinstance(linear, nn.Linear) else None
        if frozen is not None:
            frozen.reserve()
            setattr(parent, child, frozen)


def _own(model: nn.Module) -> Iterator[torch.Tensor]:
    """The weights and buffers of a model, and the copies that its groups have of some."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        if isinstance(module, LoraGroup) and module.copy is not None:
            yield from (module.copy.a, module.copy.b)


def _forward(network: Any, model: nn.Module) -> Any:
    """A pass over two documents, as far as the hidden states."""
    ids = torch.zeros(1, TOKENS, dtype=torch.long)
    bounds = torch.zeros(3, dtype=torch.int32)
    documents = Documents(bounds, TOKENS, counted=True)
    decoder = network.get_decoder() if hasattr(network, "get_decoder") else network
    inner: Any = decoder if decoder is not network and takes(decoder, "input_ids") else model
    return inner(input_ids=ids, position_ids=ids, documents=documents, use_cache=False)
