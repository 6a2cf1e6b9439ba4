"""Two ways of a computation compared layer by layer, each layer given what it was given the first time.

In bf16 two right ways are a rounding apart in each layer, and a deep model can make anything of that by its last one:
from some depth on, logits no longer tell a rounding from a fault. So in the second run every layer reads what it read
in the first, and what it adds to its input is compared there. Gives up: a model whose layers cannot be found, or are
given their hidden states under another name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

HIDDEN = "hidden_states"  # what transformers calls a layer's input
ROUNDING = 2.0**-7  # of a number in bf16, when it is rounded once or twice on each side


@dataclass(frozen=True)
class LayerCalls:
    """The input and the output [..., H] of each call of a layer, in the order of the calls."""

    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]


def layer_calls(layers: Sequence[nn.Module], run: Callable[[], object], forced: LayerCalls | None = None) -> LayerCalls:
    """What the layers read and give while `run` runs the model. forced: calls whose inputs they read instead of their
    own. Raises LookupError where a layer is given no hidden states, or is called another number of times."""
    calls = LayerCalls([], [])
    with _hooked(layers, calls, forced):
        run()
    if not calls.inputs or (forced is not None and len(calls.outputs) != len(forced.outputs)):
        raise LookupError(f"{len(calls.outputs)} calls of layers")
    return calls


@contextlib.contextmanager
def _hooked(layers: Sequence[nn.Module], calls: LayerCalls, forced: LayerCalls | None) -> Iterator[None]:
    def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        hidden = args[0] if args else kwargs.get(HIDDEN)
        if not isinstance(hidden, torch.Tensor):
            raise LookupError(f"{type(layer).__name__} is given no {HIDDEN}")
        if forced is not None:
            hidden = forced.inputs[len(calls.inputs)].clone()
        calls.inputs.append(hidden.clone())  # some layers write over their input
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {HIDDEN: hidden})

    def after(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls.outputs.append((output[0] if isinstance(output, tuple) else output).clone())

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    handles += [layer.register_forward_hook(after) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def largest_distance(first: LayerCalls, second: LayerCalls) -> float:
    """How far apart what a layer adds to its input is in two runs from the same inputs: the median over tokens, as a
    share of the largest number that it adds to a token, of the layer where it is largest; infinite for NaN."""
    distances = [0.0]
    for hidden, one, other in zip(first.inputs, first.outputs, second.outputs, strict=True):
        added = (one.float() - hidden.float()).flatten(0, -2)
        apart = (one.float() - other.float()).abs().flatten(0, -2).amax(-1)
        floor = ROUNDING * one.float().abs().flatten(0, -2).amax(-1)
        share = ((apart - floor).clamp_min(0) / added.abs().max().clamp_min(1e-30)).median()
        distances.append(float(share) if torch.isfinite(share) else float("inf"))
    return max(distances)
