"""Open what a run trained: the base model with its adapter, or the trained model itself, ready to answer."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from whet.base.errors import UserError
from whet.engine.config import Base, Model
from whet.engine.device import PACKED, Placement, resolve_placement
from whet.engine.load.load import checkpoint_storage, load_model
from whet.engine.task import CAUSAL, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ANSWERING = ("fp32", "bf16", "fp8", "int8", "nf4")


class Opens(Protocol):
    """What opening needs of the method that was trained (see `methods.method.Method`)."""

    @property
    def can(self) -> Any: ...
    def load(self, network: PreTrainedModel, directory: Path, task: Task) -> Any: ...
    def base_only(self, model: Any) -> contextlib.AbstractContextManager[None]: ...


@dataclass(frozen=True)
class Opened:
    """network: the transformers model, its layers changed when there is an adapter; wrapped: what the method made of
    it, or None for a whole model of its own."""

    network: PreTrainedModel
    wrapped: Any | None
    placement: Placement
    method: Opens

    def base_only(self) -> contextlib.AbstractContextManager[None]:
        """The model without what was trained, inside the block."""
        return self.method.base_only(self.wrapped)

    @property
    def answering(self) -> Any:
        """The model to ask: the network itself, unless the method works through a wrapper of its own."""
        return self.network if self.wrapped is None or self.method.can.inside else self.wrapped


def answering(model: Model, base: Base) -> Placement:
    """Where and how `model` answers: as it was trained, but in fp32 on a CPU, where exactness costs little."""
    compute = None if base.compute == "fp8" else base.compute
    open_settings = Base(device=base.device, storage=base.storage, compute=compute)
    placement = resolve_placement(open_settings, ANSWERING, stored=checkpoint_storage(model))
    if placement.device.type != "cpu":
        return placement
    storage = placement.storage if placement.storage in PACKED else "fp32"
    return Placement(placement.device, storage, torch.float32, base.double_quant is not False, placement.reasons)


def open_trained(model: Model, base: Base, trained: Path, method: Opens, task: Task = CAUSAL) -> Opened:
    """The base model with what `method` left in `trained`, or that model. UserError when nothing is there."""
    if not trained.is_dir():
        raise UserError(
            "this run has not been trained yet", file=str(trained), expected="what whet train writes at the end",
            fix="whet train RECIPE finishes it",
        )  # fmt: skip
    whole = Model(path=str(trained)) if method.can.whole_model else model
    placement = answering(whole, base)
    network = load_model(whole, placement, task)
    if method.can.whole_model:
        return Opened(network, None, placement, method)
    return Opened(network, method.load(network, trained, task), placement, method)
