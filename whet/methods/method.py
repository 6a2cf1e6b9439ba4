"""What every method offers, and what most of them share: a PEFT adapter around the model.

A method is a frozen config with its behaviour; training, evaluation and shipping know no more of it than this. A new
method is one file with one class and one name in `methods.all`.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, ClassVar

from whet.base.errors import UserError
from whet.base.files import read_json, write_json
from whet.engine.task import CAUSAL, Task
from whet.methods.capability import Capability
from whet.methods.targets import shared_names

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import torch
    from torch import nn
    from transformers import PreTrainedModel

    # Runs the model once; which places [B, T] are no padding, None for all.
    Pass = tuple[Callable[[], object], torch.Tensor | None]


# What PEFT raises for a model or options that a method cannot take.
REFUSALS = (ValueError, TypeError, NotImplementedError, ImportError, KeyError, AttributeError)


class Method:
    """The behaviour of a method. Subclasses are configs (`base.config.config`) with a Literal `name`."""

    name: Any
    capability: ClassVar[Capability]

    @property
    def can(self) -> Capability:
        """The capability of the method with these settings."""
        return self.capability

    def decided(self) -> dict[str, tuple[object, str]]:
        """The settings that the recipe leaves open and the method itself decides: name to (value, reason)."""
        return {}

    @property
    def follows_share(self) -> bool:
        """True if what happens in a step depends on the share of the run that is done, so that a run has one length."""
        return type(self).before_step is not Method.before_step

    def attach(self, network: PreTrainedModel, task: Task = CAUSAL) -> nn.Module:
        """Freeze `network`, add what is trained, and return the model to train. Raises UserError."""
        raise NotImplementedError

    @property
    def wants_data(self) -> bool:
        """Whether `prepare` must be called between `attach` and the first step."""
        return False

    def prepare(self, model: Any, passes: list[Pass]) -> None:
        """Start from what the layers read while each of `passes` runs the model once over training rows."""
        raise NotImplementedError

    def save(self, model: Any, directory: Path) -> None:
        """Write what was trained to an existing directory, as safetensors and JSON."""
        raise NotImplementedError

    def check_saved(self, model: Any, directory: Path, empty: PreTrainedModel, task: Task = CAUSAL) -> None:
        """Raise UserError unless `directory` holds what is trained in `model`, to the bit, as `load` will read it.

        empty: the network without memory, which gets the adapter as an answering one does.
        """
        raise NotImplementedError

    def make_room(self, network: PreTrainedModel, directory: Path) -> None:
        """Let a freshly loaded `network` have what the adapter in `directory` was trained on, before `attach`."""

    def start_from(self, model: Any, directory: Path) -> int:
        """Give what `attach` added the numbers in `directory`, to the bit; returns how many tensors. UserError."""
        raise UserError(
            f"what {self.name} trained cannot be trained further by itself", field="model.adapter",
            found=str(directory), fix="merge it, and train on the merged model",
        )  # fmt: skip

    def load(self, network: PreTrainedModel, directory: Path, task: Task = CAUSAL) -> nn.Module:
        """Put what `save` wrote on a freshly loaded `network`; returns the model, in evaluation mode."""
        raise NotImplementedError

    def base_only(self, model: Any) -> contextlib.AbstractContextManager[None]:
        """Inside, a model that `load` returned answers as the base model does."""
        raise UserError(f"a {self.name} run has nothing to switch off", fix="compare with the base model")

    def fold(self, network: PreTrainedModel, directory: Path, task: Task = CAUSAL) -> PreTrainedModel:
        """`network`, plain and dense, with what `save` wrote folded into its weights: a plain model."""
        raise NotImplementedError

    def begin(self, model: Any, optimiser: Any, steps: int, step: Callable[[], int]) -> None:
        """Called once, before a checkpoint is read and the first step is made. optimiser: its hooks are the place for
        what must happen between an update and the clearing of the gradients, and what is put into its state is in every
        checkpoint; steps: of the whole run; step: how many are done. Raises UserError."""

    def before_step(self, model: Any, done: float) -> bool:
        """Called before each step with the share of the steps that are done; returns whether it made another model of
        it, so that held-out losses up to here say nothing of what will be saved."""
        return False

    def penalty(self, model: Any) -> torch.Tensor | None:
        """What is added to the loss of a step, a scalar with its gradient, or None."""
        return None

    @property
    def penalised(self) -> bool:
        """Whether something is added to the loss, which a captured step would leave out."""
        return type(self).penalty is not Method.penalty

    def finalize(self, model: Any) -> None:
        """Called once after the last step, before the weights are written."""


def refused_by_peft(name: str, error: Exception) -> UserError:
    """The error for a model or options that PEFT does not take."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UserError(
        f"PEFT cannot put {name} on this model: {reason}", field="method", found=name,
        expected=f"a model and options that PEFT's {name} takes",
        fix="change the method's options, or method.name=lora" if name != "lora"
        else "name other layers in method.target_modules, or method.name=full",
    )  # fmt: skip


def check_updates(optimiser: torch.optim.Optimizer, parameter: torch.nn.Parameter, name: str) -> None:
    """Raise UserError unless the optimiser updates this parameter of the model itself, not a copy of it on the host:
    a method that changes parameters between the steps would change what the next update overwrites."""
    if not any(parameter is one for group in optimiser.param_groups for one in group["params"]):
        raise UserError(
            f"{name} changes what it trains between the steps, and the optimiser would not see it",
            field="train.offload_optimizer", found="true", expected="false", fix="train.offload_optimizer=false",
        )  # fmt: skip


class PeftMethod(Method):
    """A method that PEFT owns: its adapter format, its switching, its merging."""

    def peft_config(self, network: PreTrainedModel, task: Task) -> Any:
        """PEFT's config for `network`. Raises UserError."""
        raise NotImplementedError

    def attach(self, network: PreTrainedModel, task: Task = CAUSAL) -> nn.Module:
        """PEFT's model around `network`; `network` itself is frozen, its layers are wrapped on the instance."""
        from whet.methods.layers.adapter import wrap

        made = self.peft_config(network, task)
        try:
            return wrap(network, made, task)
        except REFUSALS as error:
            raise refused_by_peft(self.name, error) from error

    def save(self, model: Any, directory: Path) -> None:
        """Write the adapter in PEFT's format. Where the model is sharded every rank must call."""
        from whet.engine.load.new_tokens import new_token_ids
        from whet.methods.layers.state import saved_state

        # PEFT would write whole tables because they have grown, beside the rows that were trained
        tables = False if new_token_ids(model.get_base_model()) else "auto"
        state = saved_state(model)
        model.save_pretrained(str(directory), state_dict=state, save_embedding_layers=tables)
        config = directory / "adapter_config.json"
        write_json(config, {name: _ordered(value) for name, value in read_json(config).items()})

    def check_saved(self, model: Any, directory: Path, empty: PreTrainedModel, task: Task = CAUSAL) -> None:
        """Compare the file with what PEFT says of the model, and put it on `empty`, where names and shapes must fit."""
        import torch
        from peft import get_peft_model_state_dict

        from whet.methods.layers.adapter import WEIGHTS, attach_adapter
        from whet.methods.layers.state import saved_state
        from whet.methods.saved import compare_tensors

        wanted = get_peft_model_state_dict(model, state_dict=saved_state(model), save_embedding_layers=False)
        compare_tensors(directory / WEIGHTS, wanted)
        if self.opens_empty:
            with torch.device("meta"):
                attach_adapter(empty, directory, task)

    def make_room(self, network: PreTrainedModel, directory: Path) -> None:
        """Make the tables as large as those that are saved with the adapter."""
        from whet.methods.layers.adapter import grow_tables

        grow_tables(network, directory)

    def start_from(self, model: Any, directory: Path) -> int:
        """Load PEFT's file, and compare each of its tensors with the model's."""
        from whet.methods.layers.adapter import continue_adapter

        return continue_adapter(model, directory)

    @property
    def opens_empty(self) -> bool:
        """Whether an adapter can be put on a network without memory, none of whose weights PEFT reads for it."""
        return True

    def load(self, network: PreTrainedModel, directory: Path, task: Task = CAUSAL) -> nn.Module:
        """PEFT's model with the adapter in `directory`."""
        from whet.methods.layers.adapter import attach_adapter

        return attach_adapter(network, directory, task)

    @contextlib.contextmanager
    def base_only(self, model: Any) -> Iterator[None]:
        """Inside, the adapter is off."""
        with model.disable_adapter():
            yield

    def fold(self, network: PreTrainedModel, directory: Path, task: Task = CAUSAL) -> PreTrainedModel:
        """The plain model with the adapter merged by PEFT. UserError where layers that share a weight are adapted.

        PEFT writes into the config that head and embedding are no longer one where the head is tied to another table
        than the first (T5Gemma's decoder has its own); the head is then not saved, and would be random when read.
        """
        tied, shared = getattr(network.config, "tie_word_embeddings", None), shared_names(network)
        wrapped: Any = self.load(network, directory, task)
        adapted = {_own_parameters(module): name for name, module in network.named_modules()
                   if name in shared and hasattr(module, "base_layer")}  # fmt: skip
        if len(adapted) > 1:
            raise UserError(
                "layers that share a weight have an adapter each, and a plain model cannot hold both",
                field="method.target_modules", found=min(adapted.values()),
                expected="layers with weights of their own",
                fix="serve the adapter itself, or train with method.target_modules=all-linear, which leaves them out",
            )  # fmt: skip
        folded = wrapped.merge_and_unload()
        if tied and _head_is_shared(folded):
            folded.config.tie_word_embeddings = tied
        return folded


def _own_parameters(module: nn.Module) -> frozenset[int]:
    """What an adapted layer has beside its base. PEFT's rows of tokens are the same in all tables that are tied."""
    return frozenset(id(one) for name, one in module.named_parameters() if not name.startswith("base_layer."))


def _head_is_shared(network: PreTrainedModel) -> bool:
    """Whether the weight of the output head has another owner too."""
    weight = getattr(network.get_output_embeddings(), "weight", None)
    owners = [one for _, one in network.named_parameters(remove_duplicate=False) if one is weight]
    return weight is not None and len(owners) > 1


def _ordered(value: Any) -> Any:
    """A list of names in the order of the alphabet: PEFT writes sets, whose order is another one in every process."""
    names = isinstance(value, list) and all(isinstance(one, str) for one in value)
    return sorted(value) if names else value
