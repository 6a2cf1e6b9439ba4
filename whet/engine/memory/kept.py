"""What a forward pass keeps for the backward pass, layer by layer: counted on the real model, without memory.

The model runs on tensors that have shapes and no memory (fake tensors), and every tensor that autograd is given to keep
is counted once, under the layer that kept it first. Compiled layers are compiled up to the point where it is decided
what they keep, with the compiler's own rule, and not to code. So the count knows every family, storage and method
without a formula, and needs no GPU. It agrees with what an H200 allocates (docs/log.md). Gives up: models whose control
flow depends on values cannot run without them (some mixtures of experts).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from whet.base.private import other_forward

COUNTING_BACKEND = "aot_eager_decomp_partition"  # inductor's decompositions and its choice of what is kept


@dataclass(frozen=True)
class Kept:
    """Bytes that wait for the backward pass. layers: per token, of each layer in order; outside: per token, outside of
    all layers; fixed: of each layer, whatever the tokens (weights in the arithmetic's type); empty: none."""

    layers: tuple[float, ...]
    outside: float
    fixed: tuple[float, ...] = ()


@dataclass
class _Count:
    """Storages that are kept, each once, with the layer that kept it and its bytes. own: those of the model itself,
    which stay anyhow; current: index of the layer that runs, -1 outside."""

    own: set[torch.UntypedStorage]
    seen: dict[torch.UntypedStorage, tuple[int, int]]
    current: int = -1

    def note(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage not in self.own and storage not in self.seen:
            self.seen[storage] = (self.current, storage.nbytes())
        return tensor


def count_kept(
    layers: Sequence[nn.Module], own: Iterator[torch.Tensor], run: Callable[[], object], *, tokens: int, compiled: bool
) -> Kept:  # fmt: skip
    """What `run`, which runs a model without memory forward over `tokens` tokens, keeps. own: its weights, buffers and
    copies of them; compiled: count the layers as the compiler leaves them.

    tokens: a number that divides no width of the model (a large prime), since that tells what grows with the tokens.
    """
    count = _Count({tensor.untyped_storage() for tensor in own}, {})
    noting = torch.autograd.graph.saved_tensors_hooks(count.note, lambda tensor: tensor)
    with _marked(layers, count, compiled=compiled), noting:
        run()
    kept = [0.0] * (len(layers) + 1)  # the last one: outside
    fixed = [0.0] * (len(layers) + 1)
    for index, nbytes in count.seen.values():
        if nbytes % tokens:
            fixed[index] += nbytes
        else:
            kept[index] += nbytes / tokens
    return Kept(tuple(kept[:-1]), kept[-1], tuple(fixed[:-1]))


@contextlib.contextmanager
def _marked(layers: Sequence[nn.Module], count: _Count, *, compiled: bool) -> Iterator[None]:
    """Inside, `count` knows which layer runs; where asked for, layers are compiled."""
    with contextlib.ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.enter_context(other_forward(layer, _marking(layer, index, count, compiled=compiled)))
        yield


def _marking(layer: nn.Module, index: int, count: _Count, *, compiled: bool) -> Callable[..., Any]:
    inner: Any = layer.forward
    if compiled:
        inner = torch.compile(inner, fullgraph=True, dynamic=False, backend=COUNTING_BACKEND)

    def forward(*args: Any, **kwargs: Any) -> Any:
        before, count.current = count.current, index
        try:
            return inner(*args, **kwargs)
        finally:
            count.current = before

    return forward
