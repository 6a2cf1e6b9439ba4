"""PEFT's model around a loaded one, whatever its base is stored as: to be trained, or with a saved adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from whet.base.errors import UserError
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

    LoRA is computed by whet's own layer, also on frozen storages.
    """
    import peft
    from torch import nn

    from whet.engine.linear import FrozenLinear
    from whet.engine.lora_layer import LoraLinear

    config.task_type = peft.TaskType[task.peft_type]
    if isinstance(config, peft.LoraConfig):
        config._register_custom_module({nn.Linear: LoraLinear, FrozenLinear: LoraLinear})
    if task.labelled and hasattr(config, "modules_to_save"):
        config.modules_to_save = sorted({*(config.modules_to_save or ()), *head_names(network)})
    return getattr(peft, _MODELS[task.peft_type])(network, config, adapter_name=name)


def attach_adapter(
    network: PreTrainedModel, directory: Path, task: Task = CAUSAL, *, name: str = "default",
    beside: PeftModel | None = None,
) -> PeftModel:  # fmt: skip
    """PEFT's model around `network` with the adapter in `directory` as `name`, in evaluation mode.

    beside: PEFT's model with other adapters of the same kind, which gets this one too and is returned. Raises UserError when tensors of the adapter find no place in the model, or the model misses some.
    """
    import peft

    if not (directory / "adapter_config.json").is_file():
        raise UserError(
            "this is no adapter", file=str(directory), expected="adapter_config.json and adapter_model.safetensors",
            fix="give the adapter/ directory of a run",
        )  # fmt: skip
    wrapped = beside
    if wrapped is None:
        wrapped = wrap(network, peft.PeftConfig.from_pretrained(str(directory)), task, name)
    found = wrapped.load_adapter(str(directory), name, torch_device=str(next(network.parameters()).device))
    prefix = getattr(wrapped.base_model, "prefix", "prompt_encoder")
    missing = [key for key in found.missing_keys if prefix in key or "modules_to_save" in key]
    if missing or found.unexpected_keys:
        raise UserError(
            "the adapter does not fit this model", file=str(directory),
            found=f"{len(missing)} tensors missing, {len(found.unexpected_keys)} without a place",
            expected="an adapter that was trained on this base model", fix="check model.path",
        )  # fmt: skip
    return wrapped.eval()
