"""PEFT's model around a loaded one, whatever its base is stored as: to be trained, or with a saved adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from whet.base.errors import UserError
from whet.base.out_of_memory import ran_out
from whet.base.private import adapt_by, with_adapter_name
from whet.engine.compute.proven_attention import use_attention_with_masks
from whet.engine.load.headers import adapter_weights, check_trained_tensors
from whet.engine.task import CAUSAL, Task, head_names
from whet.methods.layers.key_names import PREFIX, rename_config, renamed_beginnings, turn

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_COPIES = re.compile(r"\.(modules_to_save|original_module)(?=\.(weight|bias)$)")
Beginnings = tuple[tuple[str, str], ...]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_CHANGE_THE_BASE = ("pissa", "olora", "corda")
_MODELS = {
    "CAUSAL_LM": "PeftModelForCausalLM", "SEQ_CLS": "PeftModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "PeftModelForSeq2SeqLM",
}  # fmt: skip


def wrap(network: PreTrainedModel, config: Any, task: Task = CAUSAL, name: str = "default") -> PeftModel:
    """PEFT's model around `network` with a new adapter of `config`; a new head is trained and saved with it.

    LoRA is computed by whet's own layer, also on frozen storages. Virtual tokens lie in a cache or change the length of
    a row, so the model gets the attention that reads caches and masks.
    """
    import peft
    from torch import nn

    from whet.engine.weights.linear import FrozenLinear
    from whet.methods.layers.lora_layer import LoraLinear

    config.task_type = peft.TaskType[task.peft_type]
    if isinstance(config, peft.LoraConfig):
        adapt_by(config, {nn.Linear: LoraLinear, FrozenLinear: LoraLinear})
    if task.labelled and hasattr(config, "modules_to_save"):
        config.modules_to_save = sorted({*(config.modules_to_save or ()), *head_names(network)})
    if config.is_prompt_learning:
        use_attention_with_masks(network)
    return getattr(peft, _MODELS[task.peft_type])(network, config, adapter_name=name)


def attach_adapter(
    network: PreTrainedModel, directory: Path, task: Task = CAUSAL, *, name: str = "default",
    beside: PeftModel | None = None,
) -> PeftModel:  # fmt: skip
    """PEFT's model around `network` with the adapter in `directory` as `name`, in evaluation mode.

    It may have been trained by whet or by anybody with PEFT: tables that grew are made as large, and names that another
    class of the same model has are turned into those of this one. beside: PEFT's model with other adapters of the same
    kind, which gets this one too and is returned. Raises UserError when tensors of the adapter find no place in the
    model, or the model misses some.
    """
    import peft

    shapes = saved_shapes(directory)
    config = peft.PeftConfig.from_pretrained(str(directory))
    inner: Any = network if beside is None else beside.get_base_model()
    beginnings = _fit(config, inner, shapes)
    if beside is None:
        wrapped = wrap(network, config, task, name)
    else:
        wrapped = beside
        config.inference_mode = True
        wrapped.add_adapter(name, config)
    load_weights(wrapped, directory, name, beginnings)
    return wrapped.eval()


def grow_tables(network: PreTrainedModel, directory: Path) -> None:
    """Make the embedding and head of a plain `network` as large as those in the adapter's file, where it has some."""
    rows = _grown_rows(network, saved_shapes(directory), ())
    if rows is not None:
        network.resize_token_embeddings(rows, mean_resizing=False)


def continue_adapter(wrapped: PeftModel, directory: Path, name: str = "default") -> int:
    """Give the adapter of a model that is about to be trained the numbers of the one in `directory`.

    Returns how many tensors. They are read again and compared, so that step 0 is that adapter and no other. Raises
    UserError where a tensor has no place, or something trained would start from random numbers.
    """
    from peft import get_peft_model_state_dict
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
    from safetensors import safe_open

    shapes, config = saved_shapes(directory), wrapped.peft_config[name]
    kind: Any = config.peft_type
    prefix = "" if config.is_prompt_learning else PEFT_TYPE_TO_PREFIX_MAPPING.get(kind, "")
    beginnings = renamed_beginnings(wrapped.get_base_model(), shapes, prefix) if prefix else ()
    load_weights(wrapped, directory, name, beginnings)
    state = get_peft_model_state_dict(wrapped, adapter_name=name, save_embedding_layers=False)
    names = {
        PREFIX + turn(key.removeprefix(PREFIX), beginnings) if key.startswith(PREFIX) else key: key for key in shapes
    }
    problem = next((f"nothing for {key}" for key in state if key not in names), None)
    with safe_open(str(directory / WEIGHTS), "pt", device=str(next(wrapped.parameters()).device)) as file:
        for key in state.keys() & names.keys():
            if not torch.equal(file.get_tensor(names[key]).to(state[key].dtype), state[key]):
                problem = problem or f"other numbers in {key}"
    if problem is not None:
        raise UserError(
            "the adapter is not what this recipe would begin with", file=str(directory), field="model.adapter",
            found=problem, expected="every trained tensor in the file, to the bit", fix="merge it, and train on that",
        )  # fmt: skip
    return len(state)


def saved_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Name to shape of every tensor of the adapter in `directory`, from the header of its file. Raises UserError."""
    from safetensors import SafetensorError, safe_open

    if not (directory / CONFIG).is_file():
        raise UserError(
            "this is no adapter", file=str(directory), expected=f"{CONFIG} and {WEIGHTS}",
            fix="give the adapter/ directory of a run",
        )  # fmt: skip
    check_trained_tensors(adapter_weights(directory))
    try:
        with safe_open(str(directory / WEIGHTS), "pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"the adapter cannot be read: {error}", file=str(directory / WEIGHTS), fix="copy it again, whole"
        ) from error


def load_weights(wrapped: PeftModel, directory: Path, name: str, beginnings: Beginnings) -> None:
    """Put the tensors of `directory` into the adapter `name` of `wrapped`. Raises UserError unless each finds its
    place, and each place its tensor."""
    device = next(wrapped.parameters()).device
    empty = device.type == "meta"
    try:
        found = wrapped.load_adapter(
            str(directory), name, torch_device="cpu" if empty else str(device), low_cpu_mem_usage=empty,
            key_mapping={f"^{re.escape(old)}": new for old, new in beginnings} or None,
        )  # fmt: skip
    except KeyError as error:  # PEFT asks for the rows of trained tokens without looking whether they are there
        raise UserError(
            "the adapter lacks what its config says it has", file=str(directory), found=f"nothing for {error.args[0]}",
            expected="adapter_model.safetensors as it was written", fix="copy the adapter again, whole",
        ) from error  # fmt: skip
    except RuntimeError as error:  # a tensor of another shape
        if ran_out(error):
            raise
        raise UserError(
            "a tensor of the adapter has another shape than its layer", file=str(directory),
            found=str(error).strip().splitlines()[-1].strip(),
            expected="an adapter that was trained on this base model",
            fix="check model.path",
        ) from error  # fmt: skip
    missing, unexpected = _unplaced(wrapped, found)
    if missing and unexpected:
        missing, unexpected = _unplaced(wrapped, _placed_as_named(wrapped, directory, name))
    missing += _without_values(wrapped, directory, name, beginnings)
    if missing or unexpected:
        names = (*missing, *unexpected)
        raise UserError(
            "the adapter does not fit this model", file=str(directory),
            found=f"{len(missing)} tensors missing, {len(unexpected)} without a place, such as {names[0]}",
            expected="an adapter that was trained on this base model", fix="check model.path",
        )  # fmt: skip


def _fit(config: Any, network: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> Beginnings:
    """Make room in `network` for tables that grew, and let `config` mean its layers; returns how names turn."""
    import peft
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    start = getattr(config, "init_lora_weights", True)
    if str(start).startswith(_CHANGE_THE_BASE):
        raise UserError(
            "the adapter belongs to a base whose weights its start has changed, and would not fit the base as it is",
            field="init_lora_weights", found=str(start), expected="an adapter that was saved as plain LoRA",
            fix="save it with PEFT's path_initial_model_for_weight_conversion, which converts it",
        )  # fmt: skip
    if isinstance(config, peft.LoraConfig):
        config.init_lora_weights = True  # the tensors come from the file
    beginnings: Beginnings = ()
    kind: Any = config.peft_type
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(kind, "")
    if not config.is_prompt_learning and prefix:
        beginnings = renamed_beginnings(network, shapes, prefix)
    if beginnings:
        rename_config(config, network, shapes, beginnings, prefix)
    rows = _grown_rows(network, shapes, beginnings)
    if rows is not None:
        network.resize_token_embeddings(rows, mean_resizing=False)
    return beginnings


def _grown_rows(network: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]], beginnings: Beginnings) -> int | None:
    """The rows of the embedding or head that the adapter brings along, where they are not as many as the model's."""
    names = {id(module): name for name, module in network.named_modules()}
    for table in (network.get_input_embeddings(), network.get_output_embeddings()):
        if table is None:
            continue
        wanted = names[id(table)]
        for key, shape in shapes.items():
            name = turn(key.removeprefix(PREFIX), beginnings)
            whole = name.removesuffix(".weight").removesuffix(".modules_to_save").removesuffix(".base_layer")
            if name.endswith(".weight") and whole == wanted and shape[0] != table.weight.shape[0]:  # type: ignore[union-attr,index]
                return shape[0]
    return None


def _without_values(wrapped: PeftModel, directory: Path, name: str, beginnings: Beginnings) -> list[str]:
    """Modules that are saved whole and are not in the file: PEFT leaves them as they were drawn, without a word."""
    held = {turn(key.removeprefix(PREFIX), beginnings) for key in saved_shapes(directory)}
    whole = f".modules_to_save.{name}."
    return [
        key for key, _ in wrapped.named_parameters()
        if whole in key and key.removeprefix(PREFIX).replace(whole, ".") not in held
        and ".lora_" not in key.partition(whole)[2]
    ]  # fmt: skip


def _placed_as_named(wrapped: PeftModel, directory: Path, name: str) -> Any:
    """The report of loading an adapter's tensors under the names that stand in its file.

    PEFT renames them as transformers renames an old checkpoint of the base, and in some families (Laguna) the pattern
    also fits names that are new already.
    """
    from safetensors.torch import load_file

    path = directory / "adapter_model.safetensors"
    prefix = getattr(wrapped.base_model, "prefix", None)
    if prefix is None or not path.is_file():
        return wrapped.load_state_dict({}, strict=False)
    state = with_adapter_name(load_file(str(path)), name, prefix)
    return wrapped.load_state_dict(state, strict=False)


def _unplaced(wrapped: PeftModel, found: Any) -> tuple[list[str], list[str]]:
    """(tensors of the adapter's part of the model that were not in the file, tensors of the file without a place).

    Virtual tokens are loaded by PEFT apart from the rest, and a tensor that layers share is in the file once.
    """
    parameters = dict(wrapped.named_parameters(remove_duplicate=False))
    absent = set(found.missing_keys)
    loaded = {id(parameter) for name, parameter in parameters.items() if name not in absent}
    prefix = getattr(wrapped.base_model, "prefix", "modules_to_save")
    missing = [
        key for key in found.missing_keys
        if (prefix in key or "modules_to_save" in key) and id(parameters.get(key)) not in loaded
    ]  # fmt: skip
    virtual = ("prompt_embeddings",) if hasattr(wrapped, "prompt_encoder") else ()
    unplaced = [key for key in found.unexpected_keys if key not in virtual]
    # Of a table that grew and is trained whole PEFT writes its wrapper's two copies too, beside the one that it reads.
    wrapped_tables = {re.sub(r"\.modules_to_save\.[^.]+\.", ".", name) for name in parameters}
    return missing, [key for key in unplaced if _COPIES.sub("", key) not in wrapped_tables or key in parameters]
