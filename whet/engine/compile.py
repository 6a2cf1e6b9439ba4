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

import torch
from torch import nn

from whet.engine.recompute import decoder_layers

COMPILE_SECONDS = 40.0
GAIN = 0.35  # share of an uncompiled step that compiling saves, measured on an H100 (docs/log.md)
USUAL_RATE = 3e14  # operations a second of an uncompiled step on a data centre GPU


def compile_layers(network: nn.Module, *, whole: bool = True) -> int:
    """Compile the decoder layers of `network`, on the instances; returns how many. Nothing happens until they run.

    whole: refuse breaks in the graph; tiled MLPs are breaks.
    """
    layers = decoder_layers(network)
    for layer in layers:
        layer.compile(fullgraph=whole, dynamic=False)
    return len(layers)


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Inside, compiled layers run as they were written: for shapes that would each be compiled anew."""
    with torch.compiler.set_stance("force_eager"):
        yield


def worth_compiling(parameters: int, tokens: int) -> bool:
    """Whether `tokens` through a model of `parameters` take so long that compiling pays: 6 operations each."""
    return GAIN * 6 * parameters * tokens / USUAL_RATE > COMPILE_SECONDS
