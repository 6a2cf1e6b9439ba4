"""Full fine-tuning: every weight is trained, and what is saved is a whole model.

Nothing is frozen, so nothing may be quantised. Weights are kept in fp32 while the arithmetic may still be bf16: an
update of a thousandth of a weight is lost in bf16, which keeps 8 bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from whet.base.config import config, setting
from whet.engine.task import CAUSAL, Task
from whet.methods.capability import Capability
from whet.methods.method import Method

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel


@config
class Full(Method):
    """Train every weight."""

    name: Literal["full"] = setting("full", "Train every weight of the model.")

    save_dtype: Literal["fp32", "bf16"] = setting("bf16", "Type in which the trained model is written.")

    capability: ClassVar[Capability] = Capability(
        storages=("fp32",), mergeable=False, peft_format=False, vllm=True, learning_rate=2e-5,
        whole_model=True, new_tokens=True, narrow_rate=True,
    )  # fmt: skip

    def attach(self, network: PreTrainedModel, task: Task = CAUSAL) -> PreTrainedModel:
        """Make every parameter trainable; returns the same model."""
        network.requires_grad_(True)
        return network

    def save(self, model: PreTrainedModel, directory: Path) -> None:
        """Write the whole model; it is left as it was."""
        import copy

        import torch

        saved = copy.deepcopy(model) if self.save_dtype == "bf16" else model
        if self.save_dtype == "bf16":
            saved.to(dtype=torch.bfloat16)  # type: ignore[call-arg]
        saved.set_attn_implementation("sdpa")
        saved.save_pretrained(str(directory), safe_serialization=True)
