"""Freeze: train chosen layers or names and leave the rest as it is; and feature extraction, the head alone.

The last layers are the ones that adapt most (Howard & Ruder, 2018, arXiv:1801.06146; Lee et al., 2019,
arXiv:1911.03090), and nothing in front of the first trained layer takes part in the backward pass. Gives up: packed
storages, whose weights cannot be trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from whet.base.config import config, setting
from whet.base.console import say
from whet.base.errors import UserError
from whet.engine.task import Task
from whet.methods.capability import ANY, DENSE, Capability
from whet.methods.in_place import InPlaceMethod
from whet.methods.structure import chosen_names, layer_stacks, new_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CAN = Capability(storages=DENSE, mergeable=True, peft_format=False, vllm=False, learning_rate=5e-5)


@config
class Freeze(InPlaceMethod):
    """Train the last layers, or whatever is named, and freeze the rest."""

    name: Literal["freeze"] = setting("freeze", "Train chosen layers and freeze the rest.")
    layers: int | list[int] = setting(
        2, "How many of the last layers are trained (of encoder and decoder each), or a list of indices from 0."
    )
    modules: str | list[str] = setting(
        [], "More to train: a list of name patterns (norm, layers.0.mlp, *.bias), or a regular expression."
    )
    train_embeddings: bool = setting(False, "Also train the input embedding (and a head that is tied to it).")
    train_head: bool = setting(False, "Also train the output head; a new head for labels always is.")

    capability: ClassVar[Capability] = CAN

    def chosen(self, network: PreTrainedModel, task: Task) -> list[str]:
        """Names in the chosen layers, of the chosen names, and of a new head. Raises UserError."""
        names = [name for name, _ in network.named_parameters()]
        prefixes = tuple(f"{layer}." for layer in self._layers(network))
        wanted = {name for name in names if prefixes and name.startswith(prefixes)} | set(new_head(network))
        if self.modules:
            wanted |= set(chosen_names(names, self.modules, "method.modules"))
        if self.train_embeddings:
            wanted |= _names_in(network, network.get_input_embeddings())
        if self.train_head and network.get_output_embeddings() is not None:
            wanted |= output_head(network)
        if not wanted:
            raise UserError(
                "nothing is left to train", field="method.layers", found=str(self.layers),
                expected="at least one layer, module, the embedding or the head", fix="method.layers=2",
            )  # fmt: skip
        return [name for name in names if name in wanted]

    def _layers(self, network: PreTrainedModel) -> list[str]:
        found = []
        for stack in layer_stacks(network):
            count = len(stack)
            if isinstance(self.layers, list):
                indices, good = self.layers, all(-count <= index < count for index in self.layers)
            else:
                indices, good = list(range(count - self.layers, count)), 0 <= self.layers <= count
            if not good:
                raise UserError(
                    "the model has no such layers", field="method.layers", found=str(self.layers),
                    expected=f"a number up to {count}, or a list of indices from {-count} to {count - 1}",
                    fix=f"method.layers={min(2, count)}",
                )  # fmt: skip
            found += [stack[index][0] for index in indices]
        return found


@config
class Head(InPlaceMethod):
    """Feature extraction: train the head alone on what the frozen model computes."""

    name: Literal["head"] = setting("head", "Train the head alone: the new one for labels, else the output head.")

    capability: ClassVar[Capability] = Capability(
        storages=ANY, mergeable=True, peft_format=False, vllm=False, learning_rate=1e-3
    )

    def chosen(self, network: PreTrainedModel, task: Task) -> list[str]:
        """Names of the head's parameters. A head that is tied to the embedding is trained with it, which is said."""
        found = new_head(network) or sorted(output_head(network))
        if not found:
            raise UserError(
                "this model has no head of its own", field="method.name", found=type(network).__name__,
                expected="a model with an output head or a classifier", fix="method.name=freeze",
            )  # fmt: skip
        return found


def output_head(network: PreTrainedModel) -> set[str]:
    """Names of the output head's parameters; says so when they are the embedding's too."""
    head, embedding = network.get_output_embeddings(), network.get_input_embeddings()
    if head is None:
        return set()
    if getattr(head, "weight", None) is getattr(embedding, "weight", 0):
        say("the output head is tied to the input embedding: they are one tensor and are trained as one", style="dim")
    return _names_in(network, head)


def _names_in(network: PreTrainedModel, module: object) -> set[str]:
    """Names of the parameters that `module` has; a tied one by the first name that it has in the network."""
    held = {id(parameter) for parameter in module.parameters()}  # type: ignore[attr-defined]
    return {name for name, parameter in network.named_parameters() if id(parameter) in held}
