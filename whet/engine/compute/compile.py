"""Compiled decoder layers: one compilation for all layers of a kind, whole graph, fixed shapes.

Compiling layer by layer, not the model, costs the time of one layer however deep the model is, and leaves everything
between the layers as transformers wrote it. It is what fuses norm, rotary positions, activation and the quantisation
that follows them into single passes over memory. Gives up: tens of seconds before the first step, once for every form
that batches have; short runs are better off without (`worth_compiling`). Held-out loss and generation, whose shapes
vary, run uncompiled (`uncompiled`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from whet.base.private import activation_budget, undo_compile
from whet.engine.layers import decoder_layers

COMPILE_SECONDS = 40.0  # two forms; one took 10 to 25 s on an H100 (docs/log.md)
FEW_TOKENS = 4096  # up to here starting a kernel costs as much as running it
LEAN_BUDGET = 0.8  # share of the activations that the compiler may keep, of what it would keep by itself
GAIN = 0.35  # share of an uncompiled step that compiling saves: assumed, not yet measured
USUAL_RATE = 3e14  # operations a second of an uncompiled step on a data centre GPU: assumed as well


def compile_layers(network: nn.Module, *, tokens: int = FEW_TOKENS + 1, whole: bool = True) -> int:
    """Compile the decoder layers of `network`, on the instances; returns how many. Nothing happens until they run.

    tokens: in a forward pass; few ones get small kernels joined. whole: refuse breaks in the graph; tiled MLPs are
    breaks.
    """
    from whet.engine.compute.swiglu import FuseSwiglu  # it needs inductor, which takes a second to import

    layers = decoder_layers(network)
    options: dict[str, Any] = {"post_grad_custom_post_pass": FuseSwiglu()}
    if tokens <= FEW_TOKENS:
        options["combo_kernels"] = True
    for layer in layers:
        layer.compile(fullgraph=whole, dynamic=False, options=options)
    return len(layers)


@contextlib.contextmanager
def lean_activations(lean: bool) -> Iterator[None]:
    """Layers that are compiled inside keep less for the backward pass, and make cheap things again: the product of gate
    and up, normed inputs. On an H100 that saves 30 % of an 8B layer's activations for 0.8 % of its time at 8,192
    tokens (docs/log.md)."""
    if not lean:
        yield
        return
    with activation_budget(LEAN_BUDGET):
        yield


def forget_compilation(network: nn.Module) -> None:
    """Let the layers of `network` run as they were written again."""
    for layer in decoder_layers(network):
        undo_compile(layer)


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Inside, compiled layers run as they were written: for shapes that would each be compiled anew."""
    with torch.compiler.set_stance("force_eager"):
        yield


def worth_compiling(parameters: int, tokens: int) -> bool:
    """Whether `tokens` through a model of `parameters` take so long that compiling pays: 6 operations each."""
    return GAIN * 6 * parameters * tokens / USUAL_RATE > COMPILE_SECONDS
