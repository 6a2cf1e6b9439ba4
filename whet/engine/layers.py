"""Where the layers of a transformer are, found in its structure."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import GradientCheckpointingLayer

from whet.base.errors import UserError


def decoder_layers(network: nn.Module) -> list[nn.Module]:
    """The decoder's layers in order: the longest outermost ModuleList of one class, or of checkpointing layers.

    Raises UserError when there is none.
    """
    get = getattr(network, "get_decoder", None)
    found = get() if callable(get) else None
    top = found if isinstance(found, nn.Module) else network
    stacks = list(_stacks(top)) or list(_stacks(network))
    if not stacks:
        raise UserError(
            "the model has no list of like layers", found=type(network).__name__, expected="a decoder of layers",
            fix="turn recompute, offload and tiling off",
        )  # fmt: skip
    return max(stacks, key=len)


def _stacks(module: nn.Module) -> Iterator[list[nn.Module]]:
    # Outermost only: a mixture of experts has more experts in a layer than layers.
    for child in module.children():
        layers = list(child) if isinstance(child, nn.ModuleList) else []
        alike = len({type(layer) for layer in layers}) == 1
        if layers and (alike or all(isinstance(layer, GradientCheckpointingLayer) for layer in layers)):
            yield layers
        else:
            yield from _stacks(child)
