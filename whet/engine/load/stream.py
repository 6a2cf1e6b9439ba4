"""Weights from a checkpoint to their stored form one tensor at a time, through transformers' own loader.

`HfQuantizer` is the extension point that transformers publishes for this: it builds the model without memory, renames
and fuses what a checkpoint calls otherwise, ties weights and rebuilds buffers, for every architecture and for sharded
files. Ours fills the frozen form of a linear layer when its dense weight arrives and lets that go, so host and device
hold the final bytes and one layer. After loading the model is an ordinary one: nothing in it remembers a quantiser.
Gives up: reading ahead, because transformers reads one tensor after another when weights are converted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from whet.base.errors import UserError
from whet.base.extras import require
from whet.base.private import draw_weights, mark_initialised, unmark_quantised, weight_conversions
from whet.engine.task import CAUSAL, Task, head_names
from whet.engine.weights.linear import FrozenLinear, freeze_linears, frozen_names, hollow
from whet.engine.weights.nf4 import BLOCK

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "whet"
MARKS = {"is_quantized", "is_loaded_in_4bit", "is_4bit_serializable", "is_loaded_in_8bit", "is_8bit_serializable"}
# Bytes of one weight: nf4 with fp32 block maxima, at most.
ELEMENT_BYTES = {"nf4": 0.5 + 4 / BLOCK, "fp8": 1.0, "int8": 1.0}


class FrozenConfig(QuantizationConfigMixin):
    """What `from_pretrained(quantization_config=...)` is given; failure: what went wrong in one of our layers."""

    def __init__(self, storage: str, double_quant: bool) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.storage, self.double_quant = storage, double_quant
        self.failure: Exception | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenConfig:
        # transformers copies its arguments, and `failure` must reach the caller.
        return self


class FrozenQuantizer(HfQuantizer):
    """Swaps the linear layers that `freeze_linears` would swap, each when its weight is read."""

    quantization_config: FrozenConfig  # type: ignore[assignment]

    def __init__(self, quantization_config: FrozenConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.waiting: set[str] = set()
        self.filled: dict[str, FrozenLinear] = {}
        self.shapes: dict[str, torch.Size] = {}

    def is_serializable(self) -> bool:  # type: ignore[override]
        return False

    @property
    def is_trainable(self) -> bool:  # type: ignore[override]
        return True

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: torch.Tensor) -> float:
        if param_name in self.waiting:
            return ELEMENT_BYTES[self.quantization_config.storage]
        return super().param_element_size(model, param_name, param)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.waiting

    def get_quantize_ops(self) -> ConversionOps:
        return Freeze(self)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        # A weight that is tied has two owners, and one of them would be left without it: those wait for the end.
        tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
        names = (f"{name}.weight" for name in frozen_names(model) if isinstance(model.get_submodule(name), nn.Linear))
        self.waiting = {name for name in names if name not in tied}
        self.shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        # transformers compares shapes only where no quantiser is at work.
        found = {name: tensor.shape for name, tensor in model.state_dict().items()}
        refuse_misfits(str(model.name_or_path), {n: (found[n], shape) for n, shape in self.shapes.items()}, set())
        # Not earlier: after reading, transformers makes room anew for every buffer that no file holds, our tables too.
        for name in list(self.filled):
            frozen, linear = self.filled.pop(name), model.get_submodule(name)
            frozen.bias = _frozen_bias(linear)
            model.set_submodule(name, frozen)
        settings = self.quantization_config
        freeze_linears(model, settings.storage, settings.double_quant)
        forget_quantiser(model, self)
        return model


class Freeze(ConversionOps):
    """The step of transformers' loader that gets a dense weight with its name and makes a frozen layer of it."""

    def __init__(self, quantiser: FrozenQuantizer) -> None:
        self.quantiser = quantiser

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Returns what is left for transformers to place: the weights of `input_dict` that stay dense."""
        try:
            return self._kept(input_dict, kwargs["model"], kwargs["missing_keys"])
        except Exception as failure:
            # transformers would keep only the text of it.
            self.quantiser.quantization_config.failure = failure
            raise

    @torch.no_grad()
    def _kept(self, weights: dict[str, Any], model: PreTrainedModel, missing: set[str]) -> dict[str, Any]:
        settings, kept = self.quantiser.quantization_config, {}
        for name in list(weights):
            weight = weights.pop(name)
            weight = weight[0] if isinstance(weight, list) else weight
            place, _, _ = name.rpartition(".")
            linear: Any = model.get_submodule(place)
            fits = name in self.quantiser.waiting and linear.weight.shape == weight.shape
            frozen = hollow(linear, settings.storage, settings.double_quant) if fits else None
            if frozen is None:
                kept[name] = weight
                continue
            frozen.fill(weight)
            self.quantiser.filled[place] = frozen
            mark_initialised(linear.weight)
            missing.discard(name)
        return kept


register_quantization_config(METHOD)(FrozenConfig)
register_quantizer(METHOD)(FrozenQuantizer)


def load_frozen(
    source: str, storage: str, double_quant: bool, options: dict[str, Any], task: Task = CAUSAL
) -> PreTrainedModel:
    """The checkpoint `source` with its linear layers in `storage`; `options`: more arguments of `from_pretrained`.

    Raises UserError where bitsandbytes is missing or the weights do not fit, and what transformers raises.
    """
    if storage == "nf4":
        require("bitsandbytes.functional", "base.storage: nf4")
    settings = FrozenConfig(storage, double_quant)
    try:
        return load_plain(source, options | {"quantization_config": settings}, task)
    except RuntimeError as error:
        if settings.failure is not None:
            raise settings.failure from error
        raise


def load_plain(source: str, options: dict[str, Any], task: Task = CAUSAL) -> PreTrainedModel:
    """`from_pretrained`, refusing a checkpoint whose weights do not fit; transformers would fill in random ones.

    The head of a labelled task may be absent or made for other labels: it is new then.
    """
    loaded: Any = task.auto_class().from_pretrained(
        source, output_loading_info=True, ignore_mismatched_sizes=True, use_safetensors=True, **options,
        **task.config_values(),
    )  # fmt: skip
    network, report = loaded
    new = tuple(f"{name}." for name in head_names(network))
    wrong = {name: shapes for name, *shapes in report["mismatched_keys"] if not name.startswith(new)}
    refuse_misfits(source, wrong, {name for name in report["missing_keys"] if not name.startswith(new)})
    return network


def refuse_misfits(source: str, shapes: Mapping[str, Sequence[torch.Size]], missing: set[str]) -> None:
    """Raise UserError for weights of another shape, or that are missing. shapes: name to (found, wanted)."""
    wrong = [f"{name} {list(found)}, not {list(wanted)}" for name, (found, wanted) in shapes.items() if found != wanted]
    absent = sorted(missing)
    if wrong or absent:
        what = "weights have another shape than the config says" if wrong else "weights are missing"
        raise UserError(
            f"{len(wrong or absent)} of the model's {what}",
            file=source,
            field="model.path",
            found=", ".join(wrong or absent),
            expected="a checkpoint of the kind of model that the task needs, with all its weights",
            fix="fetch the model again, or give the whole model where this is an adapter or another kind of model",
        )


def random_frozen(network: PreTrainedModel, device: torch.device, storage: str, double_quant: bool) -> None:
    """Give `network`, which is on the meta device, random weights on `device`, its linear layers in `storage`.

    One layer at a time; the random numbers are other ones than a dense model of the same seed would get, and frozen
    layers have the plain spread where an architecture scales some by its depth.
    """
    for name in frozen_names(network):
        parent_name, _, child = name.rpartition(".")
        parent = network.get_submodule(parent_name)
        linear = getattr(parent, child)
        frozen = hollow(linear, storage, double_quant) if isinstance(linear, nn.Linear) else None
        if frozen is None:
            continue
        linear.to_empty(device=device)
        with torch.no_grad():
            draw_weights(network, linear)
        frozen.bias = _frozen_bias(linear)
        frozen.fill(linear.weight)
        mark_initialised(frozen)
        setattr(parent, child, frozen)
    made: dict[int, torch.Tensor] = {}
    for owner, name, tensor in list(_on_meta(network)):
        if id(tensor) not in made:
            room = torch.empty_like(tensor, device=device)
            made[id(tensor)] = nn.Parameter(room, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else room
        setattr(owner, name, made[id(tensor)])
    network.initialize_weights()
    network.tie_weights()


def forget_quantiser(network: PreTrainedModel, quantiser: HfQuantizer) -> None:
    """Make `network` an ordinary model again, which may be moved, cast and saved."""
    quantiser.remove_quantization_config(network)
    packing = {type(step) for conversion in quantiser.get_weight_conversions() for step in conversion.operations}
    used = weight_conversions(network)  # saving turns them round: not all can be
    used[:] = [one for one in used if packing.isdisjoint(map(type, getattr(one, "operations", ())))]
    for mark in vars(network).keys() & MARKS:
        delattr(network, mark)
    for module in network.modules():
        unmark_quantised(getattr(module, "config", None))


def _frozen_bias(linear: Any) -> nn.Parameter | None:
    return None if linear.bias is None else linear.bias.requires_grad_(False)


def _on_meta(network: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    for module in network.modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if tensor.is_meta:
                yield module, name, tensor
