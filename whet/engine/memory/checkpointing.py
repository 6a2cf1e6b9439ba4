"""Gradient checkpointing: layers that keep only their input and run again in the backward pass.

Chen et al., 2016 (arXiv:1604.06174). It goes through the switch that transformers' GradientCheckpointingLayer offers on
each layer: `gradient_checkpointing` and `_gradient_checkpointing_func`. Ours is a function of the reentrant kind,
because it lies outside the layer's compiled call, keeps exactly one tensor per layer, and that tensor can wait on the
host (`engine.memory.stash`). A layer whose class lacks the switch gets it from a subclass made for that instance, as
FSDP2's `fully_shard` does: no class is changed, and names in the state dict stay. The last layer should never be
chosen: its activations are needed at once, so to drop them saves nothing (`planning.costs`).

Gives up: `torch.autograd.grad`, hooks that count the gradients of a weight, and a second backward (training calls
`loss.backward()` once). Of the contexts around forward only autocast is brought back, not e.g. `sdpa_kernel`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import GradientCheckpointingLayer

from whet.base.errors import UserError
from whet.base.private import checkpoint_with, is_compiled, swap_class
from whet.engine.layers import decoder_layers
from whet.engine.memory.rerun import autocast_now, drawn_again, has_moved, random_state_of
from whet.engine.memory.stash import Stash


def checkpoint_layers(network: nn.Module, layers: Sequence[int] | None = None, *, offload: bool = False) -> list[int]:
    """Let the layers with these indices keep only their input; None: all but the last, (): none. Returns them.

    offload: inputs wait in host memory, all but that of the last chosen layer, which is needed first. Active in
    training mode with gradients enabled only. May be called again; the last call holds. Raises UserError for a layer
    that does not exist.
    """
    stack = decoder_layers(network)
    chosen = sorted(set(range(len(stack) - 1) if layers is None else layers))
    if any(not 0 <= index < len(stack) for index in chosen):
        raise UserError(
            "there is no such layer", found=str([c for c in chosen if not 0 <= c < len(stack)]),
            expected=f"0 to {len(stack) - 1}", fix="name layers that the model has",
        )  # fmt: skip
    stash = Stash() if offload else None
    for index, layer in enumerate(stack):
        if index in chosen and not isinstance(layer, GradientCheckpointingLayer):
            swap_class(layer, GradientCheckpointingLayer, "Recomputed")
        if isinstance(layer, GradientCheckpointingLayer):
            checkpoint: Any = CheckpointedCall(stash, away=offload and index != max(chosen, default=-1))
            layer.gradient_checkpointing = index in chosen
            checkpoint_with(layer, checkpoint)
    return chosen


@dataclass(frozen=True)
class Slot:
    """Stands in kept arguments for the tensor that backward puts there."""

    index: int


class CheckpointedCall:
    """What a layer calls in place of itself: `checkpoint(partial(layer, **kwargs), hidden, *args)`.

    stash: shared by the layers whose inputs are offloaded; away: whether this layer's is. random: whether the layer
    draws random numbers, as its first run shows; their state is kept only then.
    """

    def __init__(self, stash: Stash | None = None, *, away: bool = False) -> None:
        self.stash, self.away = stash, away
        self.random: bool | None = None

    def __call__(self, call: functools.partial[Any], *args: Any) -> Any:
        given = list(_tensors((args, call.keywords)))
        grows = [t for t in given if t.requires_grad]
        if not torch.is_grad_enabled() or not (grows or any(p.requires_grad for p in _owner(call).parameters())):
            return call(*args)
        if not args or not isinstance(args[0], torch.Tensor):
            raise TypeError("a recomputed layer takes its hidden states [B, T, H] as the first positional argument")
        inputs = [args[0], *{id(t): t for t in grows if t is not args[0]}.values()]
        # The output must ask for a gradient even where only the layer's own weights do.
        anchor = torch.empty(0, requires_grad=True, device=args[0].device)
        output = Rerun.apply(anchor, self, call, args, *inputs)
        if len(given) != len(list(_tensors((args, call.keywords)))):
            raise UserError(
                "layers of this model hand each other tensors beside their output, so they cannot be run again",
                found=type(_owner(call)).__name__, expected="layers that only read their arguments",
                fix="turn gradient checkpointing off, or choose layers that do not",
            )  # fmt: skip
        return output


class Rerun(torch.autograd.Function):
    """A layer's forward that keeps its differentiable inputs alone; backward runs the layer again with a graph."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, kept: CheckpointedCall, call: Any, args: Any, *inputs: torch.Tensor):
        slots = {id(tensor): Slot(index) for index, tensor in enumerate(inputs)}
        ctx.inner, ctx.arguments = call.func, _replace((args, call.keywords), slots)
        ctx.autocast = autocast_now(inputs[0].device.type)
        before = None if kept.random is False else random_state_of(inputs[0].device)
        output = _first_run(call, args, ctx.arguments, inputs)
        if before is not None and kept.random is None:
            kept.random = has_moved(before, random_state_of(inputs[0].device))
        ctx.random = before if kept.random else None
        ctx.stash = kept.stash
        ctx.stashed = kept.stash.put(inputs[0]) if kept.stash is not None and kept.away else None
        ctx.save_for_backward(*(inputs if ctx.stashed is None else inputs[1:]))
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor | None):
        inputs = ctx.saved_tensors
        if ctx.stashed is not None:
            inputs = (ctx.stash.get(ctx.stashed), *inputs)
        elif ctx.stash is not None:
            ctx.stash.expect()
        wanted = ctx.needs_input_grad[4:]
        fresh = [tensor.detach().requires_grad_(want) for tensor, want in zip(inputs, wanted, strict=True)]
        args, kwargs = _fill(ctx.arguments, fresh)
        with torch.enable_grad(), ctx.autocast(), drawn_again(ctx.random, fresh[0].device):
            output = ctx.inner(*args, **kwargs)
        outputs = output if isinstance(output, tuple) else (output,)
        pairs = [(o, g) for o, g in zip(outputs, grad_outputs, strict=True) if g is not None and o.requires_grad]
        torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
        return None, None, None, None, *(tensor.grad for tensor in fresh)


def _first_run(call: functools.partial[Any], args: Any, arguments: Any, inputs: Sequence[torch.Tensor]) -> Any:
    """The layer's output without a graph. A compiled layer makes its graph and drops it at once.

    Compiled without gradients it would be another program, which costs a second compilation, rounds otherwise and need
    not draw the same dropout masks.
    """
    if not is_compiled(_owner(call)):
        return call(*args)
    with torch.enable_grad():
        again, kwargs = _fill(arguments, [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in inputs])
        output = call.func(*again, **kwargs)
    if isinstance(output, tuple):
        return tuple(part.detach() if isinstance(part, torch.Tensor) else part for part in output)
    return output.detach()


def _owner(call: functools.partial[Any]) -> nn.Module:
    return cast("Any", call.func).__self__


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested tuples, lists and mappings."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _replace(value: Any, slots: dict[int, Slot]) -> Any:
    """`value` with slots where those tensors were; what holds none of them stays the same object."""
    if isinstance(value, torch.Tensor):
        return slots.get(id(value), value)
    if not any(id(tensor) in slots for tensor in _tensors(value)):
        return value
    if isinstance(value, Mapping):
        return {key: _replace(item, slots) for key, item in value.items()}
    return type(value)([_replace(item, slots) for item in value])


def _fill(value: Any, tensors: Sequence[torch.Tensor]) -> Any:
    if isinstance(value, Slot):
        return tensors[value.index]
    if type(value) is dict:
        return {key: _fill(item, tensors) for key, item in value.items()}
    return type(value)([_fill(item, tensors) for item in value]) if type(value) in (list, tuple) else value
