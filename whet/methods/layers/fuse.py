"""Plain LoRA layers put into groups (`methods.layers.group`), on the instance.

Which layers share an input is found by running the model once, not looked up. Gives up: layers that want more than
plain LoRA, or differ in rank, stand alone or go through PEFT's own layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from whet.base.errors import UserError
from whet.base.private import version_of
from whet.engine.weights.joined import Nf4Rows, can_join, join
from whet.engine.weights.linear import FrozenLinear
from whet.methods.layers.group import Groups, LoraGroup, Shape
from whet.methods.layers.rates import rate_ratio, set_rate_ratio

if TYPE_CHECKING:
    from whet.methods.layers.lora_layer import LoraLinear

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)  # another child would change what these compute


@dataclass(frozen=True)
class Arithmetic:
    """compute: the type of the products; fp8: multiply quantised weights on FP8 tensor cores; keep_transposed: keep fp8
    bytes in both orders."""

    compute: torch.dtype
    fp8: bool
    keep_transposed: bool


def fuse(
    model: nn.Module, *, compute: torch.dtype, fp8: bool = False, keep_transposed: bool = False,
    run: Callable[[], object] | None = None, seed: int = 0,
) -> Groups:  # fmt: skip
    """Put every plain LoRA layer of `model` into a group, on this instance. Call it when the model is on its device and
    not sharded; what is trained is among `model.parameters()` afterwards, under other names and in other tensors.

    fp8: multiply quantised weights on FP8 tensor cores; keep_transposed: keep fp8 bytes in both orders (twice the
    bytes, no turning round in each step). run: runs the model once; None: on 8 token ids. seed: of dropout. Raises
    UserError for a model whose parameters are sharded.
    """
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):  # a DTensor
        raise UserError(
            "LoRA layers can no longer be put into groups when their weights are sharded",
            fix="call fuse first, then fully_shard",
        )  # fmt: skip
    arithmetic = Arithmetic(compute, fp8, keep_transposed)
    # names, not layers: each layer is let go when its group has taken its weights
    return Groups([_replace(model, names, arithmetic) for names in _named(model, _sharing(model, run))], seed)


def _named(model: nn.Module, groups: Sequence[Sequence[nn.Module]]) -> list[list[list[str]]]:
    """The groups with all names of a layer in its place."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return [[names[layer] for layer in layers] for layers in groups]


@torch.no_grad()
def _replace(model: nn.Module, layer_names: Sequence[list[str]], arithmetic: Arithmetic) -> LoraGroup:
    """Put one group into the model in place of these layers. layer_names: all names of each."""
    from whet.methods.layers.member import GroupMember

    layers: list[Any] = [model.get_submodule(names[0]) for names in layer_names]
    block = _block(model, layer_names[0][0])
    members = tuple(names[0][len(block) + 1 :] if block else names[0] for names in layer_names)
    group = _group(layers, members, arithmetic).train(layers[0].training)
    for index, (layer, names) in enumerate(zip(layers, layer_names, strict=True)):
        member = GroupMember(group, index, getattr(layer, "start", None)).train(layer.training)
        for name in names:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, member)
    name = "_".join(["lora", *(member.replace(".", "_") for member in members)])
    owner = model.get_submodule(block)
    assert not hasattr(owner, name), name
    owner.add_module(name, group)
    return group


def _block(model: nn.Module, layer_name: str) -> str:
    """The name of the innermost module around a layer that may have another child."""
    name = layer_name.rpartition(".")[0]
    while isinstance(model.get_submodule(name), CONTAINERS):
        name = name.rpartition(".")[0]
    return name


def _group(layers: Sequence[Any], members: tuple[str, ...], arithmetic: Arithmetic) -> LoraGroup:
    first, adapter = layers[0], layers[0].plain_adapter()
    sizes = tuple(layer.out_features for layer in layers)
    shape = Shape(first.in_features, sizes, first.r[adapter], float(first.scaling[adapter]), arithmetic.compute)
    a, b = (torch.cat([_matrices(layer)[which] for layer in layers]) for which in (0, 1))
    bases = [layer.base_layer for layer in layers]
    biases = [base.bias for base in bases]
    bias = None
    if any(one is not None for one in biases):
        filled = [a.new_zeros(size) if one is None else one for one, size in zip(biases, sizes, strict=True)]
        bias = torch.cat([one.to(arithmetic.compute) for one in filled])
    base = join(bases)
    group = LoraGroup(base, bias, a, b, shape, members, adapter)
    group.dropout = _dropout(first)
    narrow = [size for size in (shape.inputs, *sizes) if size % 16]  # which FP8 cores do not take
    if arithmetic.fp8 and not narrow and isinstance(base, FrozenLinear | Nf4Rows):
        group.fp8 = True
        base.keep_for_fp8(both_orders=arithmetic.keep_transposed)
    for parameter, matrix in zip((group.a, group.b), _matrices(first), strict=True):
        set_rate_ratio(parameter, rate_ratio(matrix))
    return group


def _matrices(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    adapter = layer.plain_adapter()
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def _dropout(layer: Any) -> float:
    return float(getattr(layer.lora_dropout[layer.plain_adapter()], "p", 0.0))


@torch.no_grad()
def _sharing(model: nn.Module, run: Callable[[], object] | None) -> list[list[LoraLinear]]:
    """The trained plain LoRA layers in groups that read the same tensor, in the order in which the model calls them;
    without those whose output the model changes in place."""
    from whet.methods.layers.lora_layer import LoraLinear

    layers = [module for module in model.modules() if isinstance(module, LoraLinear) and module.trains_lora_alone()]
    if not layers:
        return []
    calls: list[tuple[LoraLinear, torch.Tensor]] = []
    outputs: list[tuple[LoraLinear, torch.Tensor, int]] = []

    def look(layer: Any, args: tuple[Any, ...]) -> None:
        calls.append((layer, args[0]))

    def note(layer: Any, _: object, output: torch.Tensor) -> None:
        outputs.append((layer, output, version_of(output)))

    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    hooks += [layer.register_forward_hook(note) for layer in layers]
    was_training = model.training
    model.eval()
    try:
        if run is not None:
            run()
        else:
            device = next(model.parameters()).device
            model(input_ids=torch.zeros(1, 8, dtype=torch.long, device=device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    # Some models scale what a layer gives in place (Longformer), and the parts of a joint product cannot be changed so.
    changed = {layer for layer, output, version in outputs if version_of(output) != version}
    for layer in changed:
        layer.changed_in_place = True
    calls = [(layer, x) for layer, x in calls if layer not in changed]
    parents = {child: parent for parent in model.modules() for child in parent.children()}
    groups: list[list[LoraLinear]] = []
    grouped: set[LoraLinear] = set()
    shared: torch.Tensor | None = None
    for layer, x in calls:
        if layer in grouped:
            continue
        grouped.add(layer)
        first = groups[-1][0] if groups else None
        if first is not None and x is shared and parents[first] is parents[layer] and _alike(first, layer):
            groups[-1].append(layer)
        else:
            groups.append([layer])
            shared = x
    return groups


def _alike(first: LoraLinear, layer: LoraLinear) -> bool:
    """Whether two layers of one module can be one product."""
    one, other = first.plain_adapter(), layer.plain_adapter()
    return (
        one == other
        and first.in_features == layer.in_features
        and first.r[one] == layer.r[one]
        and first.scaling[one] == layer.scaling[one]
        and _dropout(first) == _dropout(layer)
        and [rate_ratio(matrix) for matrix in _matrices(first)] == [rate_ratio(matrix) for matrix in _matrices(layer)]
        and can_join(first.base_layer, layer.base_layer)
    )
