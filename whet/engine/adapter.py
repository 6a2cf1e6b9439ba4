"""Put a saved PEFT adapter on a loaded model, whatever its base is stored as."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from whet.base.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def attach_adapter(network: PreTrainedModel, directory: Path) -> PeftModel:
    """PEFT's model around `network` with the adapter in `directory`, in evaluation mode.

    Raises UserError when tensors of the adapter find no place in the model, or the model misses some.
    """
    import peft
    from peft import LoraConfig
    from torch import nn

    from whet.engine.linear import FrozenLinear
    from whet.engine.lora_layer import LoraLinear

    if not (directory / "adapter_config.json").is_file():
        raise UserError(
            "this is no adapter", file=str(directory), expected="adapter_config.json and adapter_model.safetensors",
            fix="give the adapter/ directory of a run",
        )  # fmt: skip
    config = peft.PeftConfig.from_pretrained(str(directory))
    if isinstance(config, LoraConfig):
        config._register_custom_module({nn.Linear: LoraLinear, FrozenLinear: LoraLinear})
    wrapped = peft.PeftModelForCausalLM(network, config)
    found = wrapped.load_adapter(str(directory), "default", torch_device=str(next(network.parameters()).device))
    missing = [key for key in found.missing_keys if "lora_" in key]
    if missing or found.unexpected_keys:
        raise UserError(
            "the adapter does not fit this model", file=str(directory),
            found=f"{len(missing)} tensors missing, {len(found.unexpected_keys)} without a place",
            expected="an adapter that was trained on this base model", fix="check model.path",
        )  # fmt: skip
    return wrapped.eval()
