"""Bottleneck adapters: small two-layer networks inside of the frozen one.

Houlsby et al. (2019, arXiv:1902.00751) put one after attention and one after the feed-forward of every layer, behind
the projection and before the residual is added; Pfeiffer et al. (2020, arXiv:2005.00247) found the second nearly
enough. y + U f(D y): U starts at zero, so the model starts as the base to the bit (the paper starts near it). The
modules they follow are found in the model's structure and swapped on the instance, which works on any storage, compiled
and in cached decoding. Gives up: folding, since f is not linear; and layers without a projection (`structure`).
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt

from whet.base.config import config, setting
from whet.base.errors import UserError
from whet.engine.task import CAUSAL, Task
from whet.methods.capability import ANY, Capability
from whet.methods.method import Method
from whet.methods.structure import new_head, residual_ends

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import nn
    from transformers import PreTrainedModel


@config
class Bottleneck(Method):
    """Train small adapter networks behind attention and feed-forward."""

    name: Literal["bottleneck"] = setting("bottleneck", "Train small adapter networks inside of the layers.")
    which: Literal["houlsby", "pfeiffer"] = setting(
        "houlsby", "houlsby: behind attention and behind feed-forward; pfeiffer: behind feed-forward only."
    )
    reduction_factor: Annotated[float, Gt(0)] = setting(16.0, "The hidden size is this many times the adapter's.")
    bottleneck_size: Annotated[int, Ge(1)] | None = setting(None, "The adapter's size itself; auto = the factor's.")
    non_linearity: Literal["relu", "gelu", "silu", "tanh"] = setting("relu", "Between down and up projection.")

    capability: ClassVar[Capability] = Capability(
        storages=ANY, mergeable=False, peft_format=False, vllm=False, learning_rate=1e-3
    )

    def attach(self, network: PreTrainedModel, task: Task = CAUSAL) -> nn.Module:
        """The same network, frozen, with adapters in it and a new head trainable. Raises UserError."""
        from whet.methods.delta import train_only
        from whet.methods.layers.bottleneck import Adapted

        hidden_size = int(network.config.get_text_config().hidden_size)  # type: ignore[arg-type]
        attention, forward = residual_ends(network, hidden_size)
        train_only(network, new_head(network))
        size = self.bottleneck_size or max(1, int(hidden_size / self.reduction_factor))
        like = next(network.parameters())
        for name in forward if self.which == "pfeiffer" else [*attention, *forward]:
            parent, _, leaf = name.rpartition(".")
            wrapped = Adapted(network.get_submodule(name), hidden_size, size, self.non_linearity, like)
            setattr(network.get_submodule(parent), leaf, wrapped.train(network.training))
        return network

    def save(self, model: Any, directory: Path) -> None:
        """Write trained.safetensors and method.json."""
        from whet.methods import delta

        delta.write(self, model, delta.trained_values(model), directory)

    def start_from(self, model: Any, directory: Path) -> int:
        """Give the adapters and the head the saved values."""
        from whet.methods import delta

        return delta.start_from(self.name, model, directory)

    def check_saved(self, model: Any, directory: Path, empty: PreTrainedModel, task: Task = CAUSAL) -> None:
        """Compare the file with the trained values."""
        from whet.methods import delta
        from whet.methods.saved import compare_tensors

        compare_tensors(directory / delta.TENSORS, delta.trained_values(model))

    def load(self, network: PreTrainedModel, directory: Path, task: Task = CAUSAL) -> nn.Module:
        """The same network with the saved adapters in it, as its own settings say. Raises UserError."""
        from whet.methods import delta

        tensors, about = delta.read(self.name, network, directory)
        settings = about["settings"] | {"name": self.name}
        dataclasses.replace(self, **settings).attach(network, task)
        missing = {name for name in delta.trained_values(network) if name not in tensors}
        if missing:
            raise UserError(
                "what was trained does not fit this model", file=str(directory), found=f"nothing for {min(missing)}",
                expected="the model that it was trained on", fix="check model.path",
            )  # fmt: skip
        delta.put(network, tensors, directory)
        return network.eval()

    @contextlib.contextmanager
    def base_only(self, model: Any) -> Iterator[None]:
        """Inside, the adapters are off and a head is as it was loaded."""
        from whet.methods.delta import base_values
        from whet.methods.layers.bottleneck import Adapted

        found = [module for module in model.modules() if isinstance(module, Adapted)]
        for module in found:
            module.on = False
        try:
            with base_values(model):
                yield
        finally:
            for module in found:
                module.on = True
