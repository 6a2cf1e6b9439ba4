"""What a run is asked to be, and what is known so far of the machine, the model and the rows: the facts of `rules`.

Facts come one after the other (the recipe, the machine, the rows, the model without weights), and `None` stands for one
that is not known yet. They are plain values, so that a rule about a GPU can be tried on a machine without one.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

    from whet.data.config import Data
    from whet.engine.config import Base, Model
    from whet.engine.device import Placement
    from whet.engine.task import TaskName
    from whet.methods.all import Method
    from whet.recipe import Recipe
    from whet.settings import Train


@dataclass(frozen=True, kw_only=True)
class Structure:
    """What rules ask of a model with its method attached; no weight is needed for it.

    embedding_obstacle, head_obstacle: why the table must stay on the device, or None. tied: they are one tensor.
    head_frozen: the head is a linear layer that is not trained. trained_whole: the first layer that the storage packs
    and the method trains whole, or None. reruns: the layers can be run again in the backward pass.
    """

    embedding_obstacle: str | None = None
    head_obstacle: str | None = None
    tied: bool = False
    head_frozen: bool = True
    trained_whole: str | None = None
    reruns: bool = True

    @classmethod
    def of(cls, network: Any, attached: nn.Module, packed: Collection[str]) -> Structure:
        """network: the model inside of `attached`, which is it with its method; packed: the layers that the storage
        takes, by name."""
        from torch import nn

        from whet.engine.memory.host_tables import embedding_obstacle, head_obstacle, is_tied

        head = network.get_output_embeddings()
        trained = head is not None and any(parameter.requires_grad for parameter in head.parameters())
        return cls(
            embedding_obstacle=embedding_obstacle(network),
            head_obstacle=head_obstacle(network),
            tied=is_tied(network),
            head_frozen=isinstance(head, nn.Linear) and not trained,
            trained_whole=next(_packed_and_trained(attached, packed), None),
            reruns=network.supports_gradient_checkpointing,
        )


def _packed_and_trained(attached: nn.Module, packed: Collection[str]):
    for name, parameter in attached.named_parameters():
        owner = re.sub(r"\.modules_to_save\.\w+", "", name.removeprefix("base_model.model.")).rpartition(".")[0]
        if parameter.requires_grad and ".modules_to_save." in name and owner in packed:
            yield owner


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The sections of a recipe, and the facts.

    storage, compute: of the base, with nothing left open. device: cuda | mps | cpu; device_name: what it calls itself;
    has_fp8: it multiplies FP8 in hardware. config: of the model. task: what is learned. held_out_rows: how many.
    structure: of the model with its method. Known only when the model is loaded: head_alone, the loss can be computed
    from the output head; head_in_fp8, its products can run in FP8; can_capture, the steps of the chosen layout can
    be CUDA graphs.
    """

    model: Model
    base: Base
    method: Method
    data: Data
    train: Train
    storage: str | None = None
    compute: str | None = None
    device: str | None = None
    device_name: str = ""
    has_fp8: bool = False
    config: PreTrainedConfig | None = None
    task: TaskName | None = None
    held_out_rows: int | None = None
    structure: Structure | None = None
    head_alone: bool | None = None
    head_in_fp8: bool | None = None
    can_capture: bool | None = None

    @classmethod
    def of(cls, recipe: Recipe) -> Asked:
        """What a recipe says, with no fact known yet."""
        return cls(model=recipe.model, base=recipe.base, method=recipe.method, data=recipe.data, train=recipe.train)

    def on(self, placement: Placement) -> Asked:
        """The same with what is known of the machine and of the base on it."""
        from whet.engine.device import device_name, has_fp8

        device = placement.device
        return replace(
            self, storage=placement.storage, compute=placement.arithmetic, device=device.type,
            device_name=device_name(device), has_fp8=has_fp8(device),
        )  # fmt: skip

    @property
    def padded(self) -> bool:
        """Whether rows go through the model's own loss with padding: for a task other than text, or a method whose
        tokens stand in front of each row. The task must be known."""
        return self.task != "causal" or not self.method.can.inside

    @property
    def built(self) -> Structure:
        """`structure`, where it is known."""
        assert self.structure is not None
        return self.structure
