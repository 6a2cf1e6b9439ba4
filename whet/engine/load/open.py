"""Open a model for answering: what a run trained (the base with its adapter, or a model of its own), or a plain one."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from whet.base.errors import UserError
from whet.engine.compute.proven_attention import attention_notice
from whet.engine.config import Base, Model
from whet.engine.device import PACKED, Placement, resolve_placement
from whet.engine.load.load import checkpoint_storage, load_model, rebuilding_notice
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
    """A model that is loaded for answering.

    network: the transformers model, its layers changed when there is an adapter; wrapped: what the method made of it,
    or None for a whole model of its own; method: None for a plain model; notices: for the caller to tell a person.
    """

    network: PreTrainedModel
    wrapped: Any | None
    placement: Placement
    method: Opens | None = None
    task: Task = CAUSAL
    notices: tuple[str, ...] = ()

    def base_only(self) -> contextlib.AbstractContextManager[None]:
        """The model without what was trained, inside the block. UserError for a plain model."""
        if self.method is None:
            raise UserError("a plain model has nothing to switch off", fix="ask it as it is")
        return self.method.base_only(self.wrapped)

    @property
    def answering(self) -> Any:
        """The model to ask: the network itself, unless the method works through a wrapper of its own."""
        works_inside = self.wrapped is None or self.method is None or self.method.can.inside
        return self.network if works_inside else self.wrapped


def answering_placement(model: Model, base: Base) -> Placement:
    """Where and how `model` answers: as it was trained, but in fp32 on a CPU, where exactness costs little."""
    compute = None if base.compute == "fp8" else base.compute
    open_settings = Base(device=base.device, storage=base.storage, compute=compute)
    placement = resolve_placement(open_settings, ANSWERING, stored=checkpoint_storage(model))
    if placement.device.type != "cpu":
        return placement
    storage = placement.storage if placement.storage in PACKED else "fp32"
    return Placement(placement.device, storage, torch.float32, base.double_quant is not False, placement.reasons)


def open_model(model: Model, placement: Placement, task: Task = CAUSAL) -> Opened:
    """A plain model, loaded as `placement` says."""
    network = load_model(model, placement, task)
    return Opened(network, None, placement, None, task, _notices(model, placement, network))


def open_trained(model: Model, base: Base, trained: Path, method: Opens, task: Task = CAUSAL) -> Opened:
    """The base model with what `method` left in `trained`, or that model. UserError when nothing is there."""
    check_trained(trained)
    whole = Model(path=str(trained)) if method.can.whole_model else model
    placement = answering_placement(whole, base)
    network = load_model(whole, placement, task)
    wrapped = None if method.can.whole_model else method.load(network, trained, task)
    return Opened(network, wrapped, placement, method, task, _notices(whole, placement, network))


def check_trained(trained: Path) -> None:
    """UserError when training has left nothing in `trained` yet."""
    if not trained.is_dir():
        raise UserError(
            "this run has not been trained yet", file=str(trained), expected="what whet train writes at the end",
            fix="whet train RECIPE finishes it",
        )  # fmt: skip


def _notices(model: Model, placement: Placement, network: PreTrainedModel) -> tuple[str, ...]:
    found = rebuilding_notice(model, placement), attention_notice(network)
    return tuple(notice for notice in found if notice is not None)
