"""LoRA: W x + (alpha / r) B A x with W frozen (Hu et al., 2021, arXiv:2106.09685), and its family as settings of it.

PEFT owns injection, adapter files, switching and composition; whet hands it a layer of its own through
`LoraConfig._register_custom_module`, so an adapter trained here opens in plain PEFT on a plain model. QLoRA is not a
method: it is this one on `base.storage: nf4`. What is more than A and B (DoRA, trained biases) runs through PEFT's own
layer; where A and B start is `methods.initial`, which layers have them `methods.targets`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Lt, Predicate

from whet.base.config import config, setting
from whet.base.errors import UserError, nearest
from whet.base.files import read_json, write_json
from whet.base.private import revision_of
from whet.engine.task import CAUSAL, Task
from whet.methods.capability import ANY, DENSE, Capability
from whet.methods.method import PeftMethod
from whet.methods.targets import check_expression, find_targets, fits, no_match, shortest_endings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import peft
    from torch import nn
    from transformers import PreTrainedModel

    from whet.methods.method import Pass

PACKED = ("nf4", "fp8", "int8")
Rank = Annotated[int, Ge(1)]
Index = Annotated[int, Ge(0)]


def is_pissa(name: str) -> bool:
    """Whether this is PiSSA with a number of rounds of subspace iteration: `pissa_niter_16`."""
    return name.removeprefix("pissa_niter_").isdigit() and name.startswith("pissa_niter_")


Start = Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora", "loftq", "eva", "corda"]


@config
class Lora(PeftMethod):
    """Train a low-rank update of every linear layer."""

    name: Literal["lora"] = setting("lora", "Train a low-rank update of the linear layers.")
    r: Rank = setting(16, "Rank of the update; r * (inputs + outputs) parameters a layer.")
    lora_alpha: Annotated[float, Gt(0)] | None = setting(None, "The update is scaled by lora_alpha / r; auto = 2 * r.")
    lora_dropout: Annotated[float, Ge(0), Lt(1)] = setting(0.0, "Share of inputs dropped in front of the update.")
    target_modules: str | list[str] = setting(
        "all-linear",
        "all-linear (but the output head), attention, mlp (the rest of a layer), a list of layer names, or a regular "
        "expression.",
    )
    exclude_modules: str | list[str] = setting([], "Names or a regular expression of targets to leave out.")
    layers_to_transform: list[Index] | None = setting(None, "Only these layers, counted from 0; auto = all.")
    rank_pattern: dict[str, Rank] = setting({}, "Other ranks for some targets: name or regular expression to rank.")
    alpha_pattern: dict[str, Annotated[float, Gt(0)]] = setting(
        {}, "Other lora_alpha for some targets: name or regular expression to value."
    )
    use_rslora: bool = setting(False, "Scale by lora_alpha / sqrt(r) (Kalajdzievski, 2023), for high ranks.")
    use_dora: bool = setting(
        False, "Train the length of each output's weights apart from their direction (DoRA; Liu et al., 2024); slower."
    )
    init_lora_weights: Start | Annotated[str, Predicate(is_pissa)] = setting(
        "kaiming",
        "Where A and B start. kaiming, gaussian: A random, B 0. orthogonal: both random, product 0. pissa (Meng et "
        "al., 2024; fast: pissa_niter_16), olora (Büyükakyüz, 2024), corda (Yang et al., 2024, from training rows): "
        "main parts of the weight, on dense storage. loftq (Li et al., 2023): what quantising lost. eva (Paischer et "
        "al., 2024): main directions of the inputs, from training rows.",
    )
    loraplus_lr_ratio: Annotated[float, Gt(0)] = setting(
        1.0, "B, and what has one dimension, learns at so many times the rate (LoRA+; Hayou et al., 2024; try 16)."
    )
    bias: Literal["none", "all", "lora_only"] = setting(
        "none", "Also train the base's biases: all, or those of adapted layers; on dense storage."
    )
    modules_to_save: list[str] = setting([], "Modules to train whole and save with the adapter, such as lm_head.")
    trainable_token_indices: list[Index] = setting([], "Rows of the input embedding to train: ids of tokens.")

    capability: ClassVar[Capability] = Capability(
        storages=ANY,
        mergeable=True,
        peft_format=True,
        vllm=True,
        learning_rate=2e-4,
        narrow_rate=True,
        composable=True,
        new_tokens=True,
    )

    def __post_init__(self) -> None:
        if isinstance(self.exclude_modules, str):
            check_expression(self.exclude_modules, "method.exclude_modules")
        for field in ("rank_pattern", "alpha_pattern"):
            for key in getattr(self, field):
                check_expression(key, f"method.{field}")
        odd = [r for r in (self.r, *self.rank_pattern.values()) if r % 2]
        if self.init_lora_weights == "orthogonal" and odd:
            raise UserError(
                "the orthogonal start shares the rank between A and B", field="method.r", found=str(odd[0]),
                expected="an even rank", fix=f"method.r={odd[0] + 1}, or method.init_lora_weights=kaiming",
            )  # fmt: skip
        if self.layers_to_transform == []:
            raise UserError(
                "an empty list leaves nothing to train", field="method.layers_to_transform", found="[]",
                expected="auto, or layers counted from 0", fix="method.layers_to_transform=auto",
            )  # fmt: skip
        self._check_together()

    def _check_together(self) -> None:
        """Refuse two settings that are each possible alone."""
        if self.init_lora_weights == "loftq" and self.bias != "none":
            raise UserError(
                "LoftQ starts on a quantised base, whose biases cannot be trained", field="method.bias",
                found=self.bias, expected="none", fix="method.bias=none, or method.init_lora_weights=pissa",
            )  # fmt: skip
        if self.trainable_token_indices and any("embed" in name for name in self.modules_to_save):
            raise UserError(
                "an embedding that is trained whole has no rows to train apart", field="method.trainable_token_indices",
                found=str(self.trainable_token_indices), expected="[] beside modules_to_save with the embedding",
                fix="remove the embedding from method.modules_to_save",
            )  # fmt: skip

    def decided(self) -> dict[str, tuple[object, str]]:
        """The scale of the update, where the recipe leaves it open."""
        return {"lora_alpha": (2.0 * self.r, "2 * r")} if self.lora_alpha is None else {}

    @property
    def can(self) -> Capability:
        """DoRA, patterns and whatever lies outside of A and B cost some of what plain LoRA can."""
        changed = self._takes_out or self.bias != "none"
        storages = PACKED if self.init_lora_weights == "loftq" else DENSE if changed else ANY
        plain = not (self.use_dora or self.bias != "none" or self.modules_to_save or self.trainable_token_indices)
        whole = plain and not (self.rank_pattern or self.alpha_pattern)
        return dataclasses.replace(self.capability, storages=storages, vllm=whole, composable=plain, compiles=plain)

    @property
    def _takes_out(self) -> bool:
        """Whether the start takes part of the base's weights into A and B."""
        return self.init_lora_weights.startswith(("pissa", "olora", "corda"))

    @property
    def wants_data(self) -> bool:
        """Whether `prepare` must be called before training."""
        return self.init_lora_weights in ("eva", "corda")

    def attach(self, network: PreTrainedModel, task: Task = CAUSAL) -> nn.Module:
        """PEFT's model with A and B where they start."""
        from whet.methods import initial
        from whet.methods.layers.rates import set_rate_ratio

        model = super().attach(network, task)
        if self._takes_out or self.init_lora_weights in ("loftq", "eva"):
            _check_ranks(model)
        if next(network.parameters()).device.type != "meta":
            if self.init_lora_weights == "loftq":
                initial.from_loss_of_quantising(model, _dense_twin(network, task))
            elif self.init_lora_weights.startswith(("pissa", "olora", "orthogonal")):
                for _, layer in initial.layers_of(model):
                    initial.from_weight(layer, self.init_lora_weights)
        if self.loraplus_lr_ratio != 1.0:
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and ("lora_B" in name or parameter.ndim == 1):
                    set_rate_ratio(parameter, self.loraplus_lr_ratio)
        return model

    def prepare(self, model: nn.Module, passes: list[Pass]) -> None:
        """Start A and B from what the layers read in `passes` (eva, corda); to be called after `attach`."""
        from whet.methods.initial import from_inputs

        assert self.wants_data
        from_inputs(model, self.init_lora_weights, passes)
        model.prepared = True  # type: ignore[assignment]

    def save(self, model: Any, directory: Path) -> None:
        """Write the adapter in PEFT's format: plain LoRA on the untouched base, wherever A and B started."""
        from whet.methods.initial import rewrite

        assert not self.wants_data or getattr(model, "prepared", False), "A and B were never started from data"
        super().save(model, directory)
        if rewrite(model, directory):
            _double(directory / "adapter_config.json")

    def load(self, network: PreTrainedModel, directory: Path, task: Task = CAUSAL) -> nn.Module:
        """PEFT's model with the adapter; the base's own biases are kept beside it where they were trained."""
        own = {name: p.detach().clone() for name, p in network.named_parameters() if self._trains(name)}
        model = super().load(network, directory, task)
        if own:
            model.own_biases = own  # type: ignore[assignment]
        return model

    def _trains(self, name: str) -> bool:
        return self.bias != "none" and name.rpartition(".")[2] == "bias"

    @contextlib.contextmanager
    def base_only(self, model: Any) -> Iterator[None]:
        """Inside, the adapter is off, and the biases are the base's own: PEFT itself would leave the trained ones."""
        import torch

        named = model.base_model.model.named_parameters()
        now = {name.replace(".base_layer.", "."): p for name, p in named}
        own = {name: value for name, value in getattr(model, "own_biases", {}).items() if name in now}
        trained = {name: now[name].detach().clone() for name in own}
        with super().base_only(model):
            _fill(now, own)
            try:
                yield
            finally:
                with torch.no_grad():
                    _fill(now, trained)

    def peft_config(self, network: PreTrainedModel, task: Task) -> peft.LoraConfig:
        """PEFT's config. Raises UserError when something named is not in the model."""
        import peft
        from transformers.pytorch_utils import Conv1D

        names = find_targets(
            network, self.target_modules, exclude=self.exclude_modules, layers=self.layers_to_transform
        )
        for field in ("rank_pattern", "alpha_pattern"):
            for key in getattr(self, field):
                if not any(fits(key, name) for name in names):
                    raise no_match(key, names, field)
        for name in self.modules_to_save:
            _check_trained_whole(network, name)
        self._check_tokens(network)
        lora_alpha = self.lora_alpha if self.lora_alpha is not None else self.decided()["lora_alpha"][0]
        return peft.LoraConfig(
            r=self.r,
            lora_alpha=lora_alpha,  # type: ignore[arg-type]
            lora_dropout=self.lora_dropout,
            target_modules=shortest_endings(network, names),
            rank_pattern=dict(self.rank_pattern),
            alpha_pattern=dict(self.alpha_pattern),
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            init_lora_weights="gaussian" if self.init_lora_weights == "gaussian" else True,
            bias=self.bias,
            modules_to_save=list(self.modules_to_save) or None,
            trainable_token_indices=self._rows(network),
            fan_in_fan_out=all(isinstance(network.get_submodule(name), Conv1D) for name in names),
        )

    def _rows(self, network: PreTrainedModel) -> Any:
        """Which rows of the embedding are trained, as PEFT's config says it; of new tokens also those of a head that
        is not the embedding. What is trained whole is left out."""
        from whet.engine.load.new_tokens import new_token_ids, tables

        new, chosen = new_token_ids(network), list(self.trainable_token_indices)
        if not new:
            return chosen or None
        found: dict[str, list[int]] = {}
        for place, (name, table) in enumerate(tables(network).items()):
            if any(f".{name}".endswith(f".{whole}") for whole in self.modules_to_save):
                continue
            if place and getattr(table, "bias", None) is not None:
                raise UserError(
                    "PEFT would leave out the bias of this model's head", field="model.new_tokens", found=name,
                    expected="a head without bias, or one that is trained whole",
                    fix=f"method.modules_to_save=[{name}], or method.name=full",
                )  # fmt: skip
            found[shortest_endings(network, [name])[0]] = list(dict.fromkeys([*([] if place else chosen), *new]))
        return found or None

    def _check_tokens(self, network: PreTrainedModel) -> None:
        rows = network.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr]
        if self.trainable_token_indices and max(self.trainable_token_indices) >= rows:
            raise UserError(
                "the embedding has no such row", field="method.trainable_token_indices",
                found=str(max(self.trainable_token_indices)), expected=f"0 to {rows - 1}", fix="check the ids",
            )  # fmt: skip


def _check_ranks(model: nn.Module) -> None:
    """Raise UserError where a rank is larger than its layer: a decomposition has no more directions than that."""
    from whet.methods import initial

    too_wide = initial.too_wide(model)
    if too_wide is not None:
        name, rank, most = too_wide
        raise UserError(
            "the rank is larger than a layer, and this start takes that many directions of its weight",
            field="method.r", found=f"{rank} for {name}", expected=f"at most {most}",
            fix=f"method.r={most}, or method.init_lora_weights=kaiming",
        )  # fmt: skip


def _double(path: Path) -> None:
    """Twice the rank in an adapter's config, at the same scale."""
    found = read_json(path)
    more = math.sqrt(2) if found["use_rslora"] else 2
    found |= {"r": 2 * found["r"], "lora_alpha": more * found["lora_alpha"]}
    found["rank_pattern"] = {key: 2 * r for key, r in found["rank_pattern"].items()}
    found["alpha_pattern"] = {key: more * alpha for key, alpha in found["alpha_pattern"].items()}
    write_json(path, found)


def _fill(parameters: dict[str, Any], values: dict[str, Any]) -> None:
    for name, value in values.items():
        parameters[name].data.copy_(value)


def _check_trained_whole(network: PreTrainedModel, wanted: str) -> None:
    """Raise UserError unless some module has this name, and its weights can be trained."""
    from whet.engine.weights.linear import FrozenLinear

    found = [(name, module) for name, module in network.named_modules() if f".{name}".endswith(f".{wanted}") and name]
    if not found:
        leaves = sorted({name.rsplit(".", 1)[-1] for name, _ in network.named_modules() if name})
        near = nearest(wanted, leaves)
        raise UserError(
            "the model has no module of this name", field="method.modules_to_save", found=wanted,
            expected="a module of the model", fix=f"write {near}" if near else "remove it",
        )  # fmt: skip
    packed = [name for name, module in found if any(isinstance(inner, FrozenLinear) for inner in module.modules())]
    if packed:
        raise UserError(
            "a quantised module cannot be trained whole", field="method.modules_to_save", found=packed[0],
            expected="a module of dense weights", fix="base.storage=bf16, or train it with target_modules",
        )  # fmt: skip


def _dense_twin(network: PreTrainedModel, task: Task) -> PreTrainedModel:
    """The same network as `network`, from the same checkpoint, not quantised, in host memory."""
    import torch

    from whet.engine.config import Model
    from whet.engine.device import Placement
    from whet.engine.load.load import load_config, load_model

    path = network.config.name_or_path
    if not path:
        raise UserError(
            "LoftQ needs the weights as they were before quantising, and this model was made from nothing",
            field="method.init_lora_weights", found="loftq", expected="a checkpoint in model.path",
            fix="method.init_lora_weights=kaiming",
        )  # fmt: skip
    source = Model(path=path, revision=revision_of(network.config))
    stored = torch.bfloat16 if load_config(source).dtype == torch.bfloat16 else torch.float32
    host = Placement(torch.device("cpu"), "bf16" if stored == torch.bfloat16 else "fp32", stored, False, {})
    return load_model(source, host, task)
