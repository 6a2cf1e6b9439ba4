"""Open what a run trained: the base model with its adapter, or the trained model itself, ready to answer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from whet.base.errors import UserError
from whet.engine.config import Base, Model
from whet.engine.device import PACKED, Placement, place
from whet.engine.load import checkpoint_storage, load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ANSWERING = ("fp32", "bf16", "fp8", "int8", "nf4")


@dataclass(frozen=True)
class Opened:
    """network: the transformers model, its layers wrapped when there is an adapter; wrapped: PEFT's model or None."""

    network: PreTrainedModel
    wrapped: object | None
    placement: Placement

    @contextlib.contextmanager
    def base_only(self) -> Iterator[None]:
        """The model without its adapter, inside the block."""
        if self.wrapped is None:
            raise UserError("a fully trained model has no adapter to switch off", fix="compare with the base model")
        with self.wrapped.disable_adapter():  # type: ignore[attr-defined]
            yield


def answering(model: Model, base: Base) -> Placement:
    """Where and how `model` answers: as it was trained, but in fp32 on a CPU, where exactness costs little."""
    compute = None if base.compute == "fp8" else base.compute
    open_settings = Base(device=base.device, storage=base.storage, compute=compute)
    placement = place(open_settings, ANSWERING, stored=checkpoint_storage(model))
    if placement.device.type != "cpu":
        return placement
    storage = placement.storage if placement.storage in PACKED else "fp32"
    return Placement(placement.device, storage, torch.float32, base.double_quant is not False, placement.reasons)


def open_trained(model: Model, base: Base, trained: Path, *, adapter: bool) -> Opened:
    """The base model with the adapter in `trained`, or the model in `trained`. UserError when it is not there."""
    if not trained.is_dir():
        raise UserError(
            "this run has not been trained yet", file=str(trained), expected="what whet train writes at the end",
            fix="whet train RECIPE finishes it",
        )  # fmt: skip
    whole = model if adapter else Model(path=str(trained))
    placement = answering(whole, base)
    network = load_model(whole, placement)
    if not adapter:
        return Opened(network, None, placement)
    from whet.engine.adapter import attach_adapter

    return Opened(network, attach_adapter(network, trained), placement)
