"""Quantised layers as plain dense ones for the duration of a block, when the memory is there.

Generation reads every weight for every token. Rebuilding a 4-bit weight each time reads it, writes it dense and reads
it again: more than twice the traffic of a dense weight. One dense copy is exact (the same rebuilt numbers) and is
dropped at the end of the block. Gives up: memory, which is why the room is asked for first.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import nn

from whet.engine.weights.linear import FrozenLinear

ROOM = 1.2  # of the dense bytes: an allocator never packs perfectly


@contextlib.contextmanager
def unpacked(model: nn.Module, wanted: bool | None = None, spare_bytes: int = 0) -> Iterator[bool]:
    """Dense copies of all frozen linears inside, the packed ones back outside; yields whether there are any.

    wanted: None = when free memory exceeds `ROOM` times the dense bytes and `spare_bytes`. That is decided here.
    """
    dtype = model.get_input_embeddings().weight.dtype  # type: ignore[operator,union-attr]
    packed = [(name, module) for name, module in model.named_modules() if isinstance(module, FrozenLinear)]
    if wanted is None:
        bytes_needed = sum(module.in_features * module.out_features for _, module in packed) * dtype.itemsize
        device = next(model.parameters()).device
        wanted = bool(packed) and copies_fit(free_bytes(device), bytes_needed, spare_bytes)
    swapped: list[tuple[nn.Module, str, FrozenLinear]] = []
    try:
        for name, module in packed if wanted else []:
            parent_name, _, child = name.rpartition(".")
            parent = model.get_submodule(parent_name)
            setattr(parent, child, _dense_copy(module, dtype))
            swapped.append((parent, child, module))
        yield bool(swapped)
    finally:
        for parent, child, module in swapped:
            setattr(parent, child, module)


def copies_fit(free_bytes: int, copies_bytes: int, spare_bytes: int) -> bool:
    """Whether dense copies of this size leave `spare_bytes` of the free memory."""
    return free_bytes > ROOM * copies_bytes + spare_bytes


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be had on `device`; 0 when it does not say."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    if device.type == "cpu" and hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 0


def _dense_copy(module: FrozenLinear, dtype: torch.dtype) -> nn.Linear:
    plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    plain.weight = nn.Parameter(module.dense(dtype), requires_grad=False)
    plain.bias = module.bias  # type: ignore[assignment]
    return plain.train(module.training)
