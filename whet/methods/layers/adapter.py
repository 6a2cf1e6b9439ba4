"""PEFT's model around a loaded one, whatever its base is stored as: to be trained, or with a saved adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from whet.base.errors import UserError
from whet.base.private import adapt_by, has_sdpa
from whet.engine.compute.cached_attention import CACHED_ATTENTION
from whet.engine.load.headers import check_adapter_weights
from whet.engine.task import CAUSAL, Task, head_names

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

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
        network.set_attn_implementation(CACHED_ATTENTION if has_sdpa(network) else "eager")
    return getattr(peft, _MODELS[task.peft_type])(network, config, adapter_name=name)


def attach_adapter(
    network: PreTrainedModel, directory: Path, task: Task = CAUSAL, *, name: str = "default",
    beside: PeftModel | None = None,
) -> PeftModel:  # fmt: skip
    """PEFT's model around `network` with the adapter in `directory` as `name`, in evaluation mode.

    beside: PEFT's model with other adapters of the same kind, which gets this one too and is returned. Raises
    UserError when tensors of the adapter find no place in the model, or the model misses some.
    """
    import peft

    if not (directory / "adapter_config.json").is_file():
        raise UserError(
            "this is no adapter", file=str(directory), expected="adapter_config.json and adapter_model.safetensors",
            fix="give the adapter/ directory of a run",
        )  # fmt: skip
    check_adapter_weights(directory)
    wrapped = beside
    if wrapped is None:
        wrapped = wrap(network, peft.PeftConfig.from_pretrained(str(directory)), task, name)
    device = str(next(network.parameters()).device)
    try:
        found = wrapped.load_adapter(str(directory), name, torch_device=device)
    except KeyError as error:  # PEFT asks for the rows of trained tokens without looking whether they are there
        raise UserError(
            "the adapter lacks what its config says it has", file=str(directory), found=f"nothing for {error.args[0]}",
            expected="adapter_model.safetensors as it was written", fix="copy the adapter again, whole",
        ) from error  # fmt: skip
    missing, unexpected = _unplaced(wrapped, found)
    if missing or unexpected:
        raise UserError(
            "the adapter does not fit this model", file=str(directory),
            found=f"{len(missing)} tensors missing, {len(unexpected)} without a place",
            expected="an adapter that was trained on this base model", fix="check model.path",
        )  # fmt: skip
    return wrapped.eval()


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
    return missing, [key for key in found.unexpected_keys if key not in virtual]
