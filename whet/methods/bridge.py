"""Every method that PEFT has and that fits, through one bridge: a row of `methods.bridged` each, no file of its own.

PEFT owns the arithmetic, the adapter format, switching and merging. The recipe writes PEFT's own options under the
method's name, and they are checked against the fields of PEFT's config as soon as a recipe names one. What would break
whet's contract (the task, the base model, training callbacks) is not an option. Layers are found in the model's
structure, so that a family unknown to PEFT's tables works too. Gives up: whet's fused kernels and quantised storages,
but for methods that leave linear layers alone.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, ClassVar

from whet.base.config import config, setting
from whet.base.errors import UserError
from whet.base.private import other_forward
from whet.engine.task import CAUSAL, Task, head_names
from whet.methods.bridged import BRIDGED, BridgedName
from whet.methods.capability import Capability
from whet.methods.method import REFUSALS, PeftMethod, refused_by_peft
from whet.methods.options import check_options, config_class

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import nn
    from transformers import PreTrainedModel


@config
class Bridge(PeftMethod):
    """One of PEFT's methods, with PEFT's own options."""

    name: BridgedName = setting("ia3", "Which of PEFT's methods; `whet methods` describes each.")
    options: dict[str, Any] = setting({}, "Options of PEFT's config for the method; may stand beside the name.")

    capability: ClassVar[Capability] = BRIDGED["ia3"].can

    def __post_init__(self) -> None:
        """Raises UserError for an option that PEFT's config does not have, or whose value does not fit."""
        if self.options:
            check_options(self.name, self.options)

    @property
    def can(self) -> Capability:
        return BRIDGED[self.name].can

    def attach(self, network: PreTrainedModel, task: Task = CAUSAL) -> nn.Module:
        """PEFT's model around `network`. Raises UserError where PEFT refuses the model."""
        self._check(network, task)
        if BRIDGED[self.name].count is not None and next(network.parameters()).is_meta:
            return self._counted(network, task)
        return super().attach(network, task)

    def peft_config(self, network: PreTrainedModel, task: Task) -> Any:
        row = BRIDGED[self.name]
        options = row.defaults | self.options | self._targets(network)
        if row.fits:
            shapes = _shapes(network, options["target_modules"])
            if not shapes:
                raise UserError(
                    f"{self.name} needs layers with plain weights", field="base.storage",
                    found="none of those it adapts", expected=", ".join(self.can.storages),
                    fix=f"base.storage={self.can.storages[0]}",
                )  # fmt: skip
            options = {name: most(shapes) for name, most in row.fits.items()} | options
        if self.name in ("prompt", "p_tuning"):  # PEFT finds these by the names of a few families
            text = network.config.get_text_config()
            width = network.get_input_embeddings().weight.shape[1]  # type: ignore[union-attr,index]
            found = {"token_dim": width, "num_layers": text.num_hidden_layers}
            options = found | {"num_attention_heads": text.num_attention_heads} | options
        if self.name == "prompt" and "prompt_tuning_init_text" in options:
            options |= {"prompt_tuning_init": "TEXT", "tokenizer_name_or_path": _tokenizer_path(network)}
        if self.name == "adaption_prompt" and "adapter_layers" not in options:
            options["adapter_layers"] = max(1, _layer_count(network) - 2)  # all but the first two, as in the paper
        try:
            return config_class(self.name)(**options)
        except REFUSALS as error:
            raise refused_by_peft(self.name, error) from error

    @property
    def opens_empty(self) -> bool:
        return self.can.inside and BRIDGED[self.name].count is None

    @contextlib.contextmanager
    def base_only(self, model: Any) -> Iterator[None]:
        if self.can.inside or "generate" in vars(type(model)):
            with super().base_only(model):
                yield
            return
        # PEFT's own switch for virtual tokens reads a method that only models that write text have, and forgets heads.
        from peft.utils import ModulesToSaveWrapper

        heads = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
        try:
            for head in heads:
                head.enable_adapters(False)
            with other_forward(model, model.get_base_model().forward):
                yield
        finally:
            for head in heads:
                head.enable_adapters(True)

    def _counted(self, network: PreTrainedModel, task: Task) -> nn.Module:
        """A network without weights, with as many trainable numbers as the method would add: for planning."""
        import torch

        row, made = BRIDGED[self.name], self.peft_config(network, task)
        assert row.count is not None
        network.requires_grad_(False)
        for name in head_names(network) if task.labelled else []:
            network.get_submodule(name).requires_grad_(True)
        size = row.count(made, _shapes(network, made.target_modules))
        network.register_parameter("bridged", torch.nn.Parameter(torch.empty(size, device="meta")))
        return network

    def fold(self, network: PreTrainedModel, directory: Path, task: Task = CAUSAL) -> PreTrainedModel:
        """The plain model with the adapter merged, and a trained head in its place, which some of PEFT's merges leave
        in its wrapper."""
        from peft.utils import ModulesToSaveWrapper

        folded = super().fold(network, directory, task)
        for name, module in list(folded.named_modules()):
            if isinstance(module, ModulesToSaveWrapper):
                folded.set_submodule(name, module.modules_to_save[module.active_adapter])  # type: ignore[index]
        return folded

    def _targets(self, network: PreTrainedModel) -> dict[str, Any]:
        """Which modules are adapted, as PEFT's config says it, where the method adapts any."""
        from whet.methods.targets import find_targets, shortest_endings

        wanted, kind = self.options.get("target_modules"), BRIDGED[self.name].targets
        if kind == "none":
            return {}
        if kind in ("norm", "embedding"):
            names = wanted or (_norms(network) if kind == "norm" else [_embedding(network)])
            return {"target_modules": names if wanted else shortest_endings(network, names)}
        if kind == "ia3" and wanted is None:
            return _ia3_targets(network)
        if self.name == "beft" and wanted is None and _known_to_peft("BEFT", network):
            return {}
        names = find_targets(network, wanted or "all-linear")
        found: dict[str, Any] = {"target_modules": shortest_endings(network, names)}
        if kind == "ia3" and "feedforward_modules" not in self.options:
            inner = [name for name in names if name in _inner(network)]
            found["feedforward_modules"] = shortest_endings(network, inner)
        return found

    def _check(self, network: PreTrainedModel, task: Task) -> None:
        """Raises UserError for what PEFT would do wrong without a word."""
        if task.name not in self.can.tasks:
            raise UserError(
                f"{self.name} cannot be trained for this task", field="method.name", found=task.name,
                expected=", ".join(self.can.tasks), fix="method.name=lora",
            )  # fmt: skip
        if self.name == "trainable_tokens" and not self.options.get("token_indices"):
            raise UserError(
                "which tokens should be trained?", field="method.token_indices", found="none",
                expected="a list of token ids", fix="method.token_indices=[1, 2]",
            )  # fmt: skip
        if self.name == "prefix" and task.labelled and not _prefix_reaches_head(network):
            raise UserError(
                "PEFT's prefix tuning leaves out parts of this model's head", field="method.name", found="prefix",
                expected="a decoder, or a head of one layer on a pooled output", fix="method.name=prompt",
            )  # fmt: skip


def _shapes(network: nn.Module, targets: Any) -> list[tuple[int, int]]:
    """(in, out) of every layer that PEFT will adapt: names, endings or a regular expression."""
    import re

    def chosen(name: str) -> bool:
        if isinstance(targets, str):
            return re.fullmatch(targets, name) is not None
        return any(name == target or name.endswith("." + target) for target in targets)

    return [_sides(module) for name, module in network.named_modules() if chosen(name) and hasattr(module, "weight")]


def _sides(module: Any) -> tuple[int, int]:
    """(in, out) of a linear layer, also of GPT-2's transposed ones."""
    if hasattr(module, "in_features"):
        return module.in_features, module.out_features
    inside, outside = module.weight.shape
    return int(inside), int(outside)


def _norms(network: nn.Module) -> list[str]:
    """Names of the normalisation layers, by what their classes are called."""
    found = [
        name for name, module in network.named_modules()
        if "norm" in type(module).__name__.lower() and not list(module.children()) and list(module.parameters())
    ]  # fmt: skip
    if not found:
        raise UserError(
            "the model has no normalisation layer with weights", field="method.name", found="ln_tuning",
            fix="method.name=lora",
        )  # fmt: skip
    return found


def _embedding(network: PreTrainedModel) -> str:
    """Name of the embedding of the input's tokens."""
    wanted = network.get_input_embeddings()
    return next(name for name, module in network.named_modules() if module is wanted)


def _inner(network: PreTrainedModel) -> set[str]:
    """Names of the layers that lead from an MLP's wide side back: their inputs are what IA3 rescales there."""
    from whet.methods.targets import find_targets

    mlp = find_targets(network, "mlp")
    return {name for name in mlp if (s := _sides(network.get_submodule(name)))[0] > s[1]}


def _ia3_targets(network: PreTrainedModel) -> dict[str, Any]:
    """PEFT's own choice where it knows the family, else every attention layer's output and the MLPs' inner side."""
    from whet.methods.targets import find_targets, shortest_endings

    if _known_to_peft("IA3", network):
        return {}
    inner = sorted(_inner(network))
    names = [*find_targets(network, "attention"), *inner]
    return {
        "target_modules": shortest_endings(network, names), "feedforward_modules": shortest_endings(network, inner),
    }  # fmt: skip


def _known_to_peft(kind: str, network: PreTrainedModel) -> bool:
    from peft.utils import constants

    mapping = getattr(constants, f"TRANSFORMERS_MODELS_TO_{kind}_TARGET_MODULES_MAPPING", {})
    return network.config.model_type in mapping


def _prefix_reaches_head(network: PreTrainedModel) -> bool:
    """Whether PEFT's prefix tuning computes all of a classifier: it calls the model itself where that takes a cache,
    else the body and the last layer, which is all there is where one linear layer reads a pooled output."""
    from inspect import signature

    from torch import nn

    if "past_key_values" in signature(network.forward).parameters:
        return True
    body = getattr(network, network.base_model_prefix, network)
    takes = "past_key_values" in signature(body.forward).parameters
    heads = [network.get_submodule(name) for name in head_names(network)]
    return takes and getattr(body, "pooler", None) is not None and len(heads) == 1 and isinstance(heads[0], nn.Linear)


def _layer_count(network: PreTrainedModel) -> int:
    return int(network.config.get_text_config().num_hidden_layers)


def _tokenizer_path(network: PreTrainedModel) -> str:
    """Where the model came from: its tokenizer reads the text that the prompt starts as."""
    path = network.name_or_path
    if not path:
        raise UserError(
            "a model without weights has no tokenizer to read the text with", field="method.prompt_tuning_init_text",
            fix="leave it out, or give model.path",
        )  # fmt: skip
    return path
