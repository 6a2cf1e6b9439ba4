"""The error where a model's weights do not fit in memory: what they take as they are stored, and in fewer bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from whet.base.amounts import bytes_text
from whet.base.out_of_memory import CLOSE_OTHERS
from whet.engine.device import DTYPES, PACKED, Placement
from whet.engine.load.stream import ELEMENT_BYTES
from whet.engine.memory.scarce import NoRoom, free_text
from whet.engine.weights.linear import frozen_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def no_room_to_load(network: PreTrainedModel, placement: Placement, source: str) -> NoRoom:
    """network: the model without memory."""
    needed = weight_bytes(network, placement.storage, placement.compute)
    fewer = {one: weight_bytes(network, one, placement.compute) for one in PACKED}
    smallest = min(fewer, key=lambda one: fewer[one])
    packs = placement.storage not in PACKED or fewer[smallest] < 0.9 * needed
    smaller = f"base.storage={smallest} ({bytes_text(fewer[smallest])}); or " if packs else "a smaller model; or "
    return NoRoom(
        "the model does not fit in memory", file=source, field="base.storage",
        found=f"{bytes_text(needed)} of {placement.storage} weights; {free_text(placement.device)}",
        expected=f"more than {bytes_text(needed)} free", fix=f"{smaller}{CLOSE_OTHERS}; or base.device=cpu",
    )  # fmt: skip


def weight_bytes(network: PreTrainedModel, storage: str, compute: torch.dtype) -> int:
    """Bytes of the weights of `network` where its linear layers are stored so."""
    dense = DTYPES["fp32"] if storage == "fp32" else compute
    total = sum(parameter.numel() for parameter in network.parameters())
    if storage not in PACKED:
        return total * dense.itemsize
    names = frozen_names(network)
    packed = sum(network.get_parameter(f"{name}.weight").numel() for name in names)
    return int(packed * ELEMENT_BYTES[storage]) + (total - packed) * dense.itemsize
