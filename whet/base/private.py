"""Everything private of other libraries that whet touches, in one file: names with an underscore, swapped classes.

Such a name may change in any release. Here each has a reason, the versions in which it was last seen at work, and one
function through which the rest of whet uses it; a test finds a name that is gone, a version that nobody has tried, and
a private name in any other file. Where a library has a public name for the same thing, that is used instead.

Libraries are imported when a function is called, so importing this file costs nothing.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

TORCH, TRANSFORMERS, PEFT = ("2.11", "2.13"), ("5.17",), ("0.21",)


@dataclass(frozen=True)
class Seam:
    """name: in `owner`, an object by its dotted path. why: what it is used for, and why nothing public is. seen: the
    versions of the library in which it was last seen at work."""

    owner: str
    name: str
    why: str
    seen: tuple[str, ...]


SEAMS = (
    Seam("torch", "_scaled_mm", "FP8 products; scaled_mm is younger and was not measured", TORCH),
    Seam("torch", "_foreach_zero_", "all sums of gradients to 0 in one kernel of a captured step", TORCH),
    Seam("torch.Tensor", "_version", "whether weights were written since a copy was made of them", TORCH),
    Seam("torch", "_foreach_copy_", "the copies of all A in the arithmetic's type, in a few kernels", TORCH),
    Seam("torch.ops.aten", "_flash_attention_forward", "attention of many documents in one call, also in a compiled "
         "layer; varlen_attn is a younger operator around it", TORCH),
    Seam("torch.nn.Module", "_compiled_call_impl", "what `compile` left on a module: to see it and to undo it", TORCH),
    Seam("torch._dynamo.exc", "TorchDynamoException", "a layer cannot be compiled; the class has no public name",
         TORCH),
    Seam("torch._functorch.config", "activation_memory_budget", "how much compiled layers keep for the backward pass",
         TORCH),
    Seam("torch._subclasses.fake_tensor", "FakeTensorMode", "tensors with shapes and no memory, on which a model runs "
         "to be counted", TORCH),
    Seam("torch._inductor.custom_graph_pass", "CustomGraphPass", "what the compiler asks of a pass of one's own",
         TORCH),
    Seam("torch._inductor.custom_graph_pass", "get_hash_for_files", "the identity of such a pass in its cache", TORCH),
    Seam("torch._inductor.pattern_matcher", "stable_topological_sort", "puts a changed graph in order", TORCH),
    Seam("torch.nn.Module", "__class__", "one instance gets another class, as FSDP2's fully_shard does; hooks cannot "
         "replace a forward, and a wrapper would rename weights", TORCH),
    Seam("torch.nn.Module", "forward", "one instance calls another forward for a while", TORCH),
    Seam("peft.utils.save_and_load", "_insert_adapter_name_into_state_dict", "the name of an adapter into the names of "
         "its tensors, without the renaming that is right for old checkpoints only", PEFT),
    Seam("peft.tuners.tuners_utils", "_check_lora_target_modules_mamba", "which layers of a family PEFT refuses, to "
         "leave them out of all-linear and not to fail", PEFT),
    Seam("transformers.PreTrainedModel", "_supports_sdpa", "whether torch's attention computes what the model means",
         TRANSFORMERS),
    Seam("transformers.PreTrainedModel", "_keys_to_ignore_on_load_unexpected", "tensors of a checkpoint that a model "
         "leaves out on purpose, such as heads that guess several tokens", TRANSFORMERS),
    Seam("transformers.PreTrainedModel", "_can_set_attn_implementation", "whether the model lets its attention be "
         "chosen; set_attn_implementation only warns", TRANSFORMERS),
    Seam("transformers.PreTrainedConfig", "_attn_implementation", "the attention in use, to be put back", TRANSFORMERS),
    Seam("transformers.configuration_utils", "_commit_hash", "the revision that a hub model was loaded from",
         TRANSFORMERS),
    Seam("transformers.PreTrainedModel", "_init_weights", "random weights of one layer; initialize_weights does all",
         TRANSFORMERS),
    Seam("transformers.modeling_utils", "_is_hf_initialized", "marks what must not be filled with random numbers",
         TRANSFORMERS),
    Seam("transformers.PreTrainedModel", "_keep_in_fp32_modules", "modules that must not be quantised", TRANSFORMERS),
    Seam("transformers.core_model_loading", "_weight_conversions", "what saving turns round; our packing cannot be",
         TRANSFORMERS),
    Seam("transformers.quantizers.base", "_is_quantized", "marks the config of a quantised module", TRANSFORMERS),
    Seam("transformers.modeling_layers", "_gradient_checkpointing_func", "what a layer runs in place of itself; "
         "gradient_checkpointing_enable sets one for all layers", TRANSFORMERS),
    Seam("peft.LoraConfig", "_register_custom_module", "LoRA by our layer on our linears; PEFT calls it experimental",
         PEFT),
)  # fmt: skip


def swap_class(module: nn.Module, mixin: type, prefix: str) -> None:
    """Let `module`, and no other instance, be of a class whose methods are first those of `mixin`.

    prefix: in front of the name of its class. Names in the state dict stay. Done twice it changes nothing.
    """
    if not isinstance(module, mixin):
        module.__class__ = _mixed(mixin, type(module), prefix)


def restore_class(module: nn.Module, mixin: type) -> None:
    """Undo `swap_class`, where it was done last with this mixin."""
    own = type(module).__bases__
    if own[0] is mixin:
        module.__class__ = own[1]


@functools.cache
def _mixed(mixin: type, kind: type[nn.Module], prefix: str) -> type[nn.Module]:
    return type(f"{prefix}{kind.__name__}", (mixin, kind), {})


@contextlib.contextmanager
def other_forward(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, calling `module` calls `forward`."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def scaled_mm(
    rows: torch.Tensor, columns: torch.Tensor, row_scale: torch.Tensor, column_scale: torch.Tensor,
    out_dtype: torch.dtype, bias: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """FP8 product [T, N] of e4m3 rows [T, K] and columns [K, N] with float32 scales: [T, 1] and [1, N], or scalars."""
    import torch

    return torch._scaled_mm(rows, columns, row_scale, column_scale, bias=bias, out_dtype=out_dtype, use_fast_accum=True)


def zero_all(tensors: list[torch.Tensor]) -> None:
    """Fill all of them with 0, in one kernel."""
    import torch

    torch._foreach_zero_(tensors)


def version_of(tensor: torch.Tensor) -> int:
    """How often the tensor was written in place; -1 for one of inference mode, which does not count."""
    return -1 if tensor.is_inference() else tensor._version


def copy_all(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy each source into its target, which may have another type, in a few kernels."""
    import torch

    if targets:
        torch._foreach_copy_(targets, sources)


def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, longest: int,
    scale: float | None, window: int | None,
) -> torch.Tensor:  # fmt: skip
    """Causal attention of documents that lie one after the other: query [T, Hq, D], key, value [T, Hkv, D]; [T, Hq, D].

    bounds: int32 [N + 1], where each of N documents begins and the last one ends; longest: tokens of one; window: how
    many tokens a token looks back on, itself among them.
    """
    import torch

    left = -1 if window is None else window - 1
    return torch.ops.aten._flash_attention_forward(
        query, key, value, bounds, bounds, longest, longest, 0.0, True, False,
        scale=scale, window_size_left=left, window_size_right=0,
    )[0]  # fmt: skip


def is_compiled(module: nn.Module) -> bool:
    """Tell whether the module was compiled in place, and that was not undone."""
    return getattr(module, "_compiled_call_impl", None) is not None


def undo_compile(module: nn.Module) -> None:
    """Let a compiled module run as it was written again."""
    module._compiled_call_impl = None


def compile_errors() -> type[Exception]:
    """The error that torch raises where it cannot compile."""
    from torch._dynamo.exc import TorchDynamoException

    return TorchDynamoException


def activation_budget(share: float) -> contextlib.AbstractContextManager[None]:
    """Inside, compiled layers keep this share of what they would keep for the backward pass."""
    import torch._functorch.config as settings

    return settings.patch(activation_memory_budget=share)


def without_memory() -> Any:
    """A context inside of which tensors have shapes and types and no memory, and operations compute only these."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def graph_pass() -> Any:
    """The class of a pass over inductor's graph."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    return CustomGraphPass


def hash_of_files(*files: str) -> bytes:
    """The identity of a graph pass that is written in these files."""
    from torch._inductor.custom_graph_pass import get_hash_for_files

    return get_hash_for_files(files)


def sort_graph(graph: torch.fx.Graph) -> None:
    """Put the nodes of `graph` in an order in which each comes after what it reads."""
    from torch._inductor.pattern_matcher import stable_topological_sort

    stable_topological_sort(graph)


def has_sdpa(model: Any) -> bool:
    """Tell whether torch's attention computes what the model, or its class, means: without sinks, for one."""
    return model._supports_sdpa


def takes_attention(kind: type[PreTrainedModel]) -> bool:
    """Tell whether models of this class let their attention be chosen."""
    return kind._can_set_attn_implementation()


def attention_name(model: PreTrainedModel) -> str:
    """The attention in use, as `set_attn_implementation` takes it."""
    return model.config._attn_implementation or "sdpa"


def revision_of(config: PreTrainedConfig) -> str | None:
    """The commit of the hub model that `config` was loaded from, or None."""
    return getattr(config, "_commit_hash", None)


def draw_weights(network: PreTrainedModel, layer: nn.Module) -> None:
    """Fill one layer with random weights as the architecture of `network` wants them."""
    network._init_weights(layer)


def mark_initialised(done: Any) -> None:
    """Let transformers not fill this tensor or module with random numbers."""
    done._is_hf_initialized = True


def kept_in_fp32(model: nn.Module) -> frozenset[str]:
    """Names of modules that the architecture wants in full precision (T5's wo)."""
    return frozenset(getattr(model, "_keep_in_fp32_modules", None) or ())


def weight_conversions(network: PreTrainedModel) -> list[Any]:
    """The changes that were made to weights while they were loaded, which saving turns round: the list itself."""
    return vars(network).get("_weight_conversions", [])


def ignored_extras(network: PreTrainedModel) -> list[str]:
    """Patterns of tensors that checkpoints of this architecture may hold and the model has no use for."""
    return list(network._keys_to_ignore_on_load_unexpected or ())


def unmark_quantised(config: Any) -> None:
    """Take the mark of a quantised model off the config of one of its modules."""
    if hasattr(config, "_is_quantized"):
        del config._is_quantized


def checkpoint_with(layer: Any, function: Callable[..., Any]) -> None:
    """Let a GradientCheckpointingLayer call `function(partial(layer, **kwargs), *args)` in place of itself."""
    layer._gradient_checkpointing_func = function


def peft_forbids(config: PreTrainedConfig, name: str) -> bool:
    """Tell whether PEFT refuses to adapt a module of this name in the family of `config`."""
    from types import SimpleNamespace

    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

    model: Any = SimpleNamespace(config=config)
    asked: Any = SimpleNamespace(peft_type="LORA")
    try:
        _check_lora_target_modules_mamba(asked, model, name.rpartition(".")[2])
    except ValueError:
        return True
    return False


def with_adapter_name(state: dict[str, torch.Tensor], name: str, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors of an adapter's file under the names that they have in the model."""
    from peft.utils.save_and_load import _insert_adapter_name_into_state_dict

    return _insert_adapter_name_into_state_dict(state, adapter_name=name, parameter_prefix=prefix)


def adapt_by(config: Any, layers: dict[type[nn.Module], type[nn.Module]]) -> None:
    """Let PEFT put these layers around modules of these classes."""
    config._register_custom_module(layers)
