"""BitFit: train the bias terms alone (Ben Zaken et al., 2021, arXiv:2106.10199).

Every bias counts, those of LayerNorm too, as in the paper; `biases` narrows it down, e.g. to the query and the second
feed-forward layer, its other variant. A packed base does not differentiate its own bias, so there it is added by a
layer around. Gives up: families without biases (Llama, Mistral, Gemma, T5), which are refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from whet.base.config import config, setting
from whet.base.errors import UserError
from whet.engine.task import CAUSAL, Task
from whet.methods.capability import ANY, Capability
from whet.methods.in_place import InPlaceMethod
from whet.methods.structure import chosen_names, new_head

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@config
class BitFit(InPlaceMethod):
    """Train the bias terms alone."""

    name: Literal["bitfit"] = setting("bitfit", "Train the bias terms alone.")
    biases: str | list[str] = setting(
        "all", "all, a list of name patterns (query, layers.1, *.output.dense.bias), or a regular expression."
    )

    capability: ClassVar[Capability] = Capability(
        storages=ANY, mergeable=True, peft_format=False, vllm=False, learning_rate=1e-3
    )

    def chosen(self, network: PreTrainedModel, task: Task) -> list[str]:
        """The biases of the body, and a new head. Raises UserError where there are no biases."""
        head = new_head(network)
        body = [name for name, _ in network.named_parameters() if name not in head]
        found = [name for name in body if name.rpartition(".")[2] == "bias"]
        if not found:
            raise UserError(
                "this model has no bias that could be trained", field="method.name", found=type(network).__name__,
                expected="a model with biases, e.g. BERT, GPT-2, BLOOM or Qwen2",
                fix="method.name=ln_tuning trains the scales of its norms, the nearest to it; or method.name=lora",
            )  # fmt: skip
        return (found if self.biases == "all" else chosen_names(found, self.biases, "method.biases")) + head

    def attach(self, network: PreTrainedModel, task: Task = CAUSAL) -> nn.Module:
        """The same network with its biases trainable, in fp32."""
        from whet.engine.weights.linear import FrozenLinear
        from whet.methods.layers.bias import TrainedBias

        wanted = self.chosen(network, task)
        packed = {name: module for name, module in network.named_modules() if isinstance(module, FrozenLinear)}
        for name, module in packed.items():
            if f"{name}.bias" in wanted:
                parent, _, leaf = name.rpartition(".")
                setattr(network.get_submodule(parent), leaf, TrainedBias(module))
        return super().attach(network, task)
