"""What methods share whose result is other values for parameters of the network: attach, save, load, switch, fold.

The arithmetic is `methods.delta`. It is imported when a model is there, so that a recipe is read, and methods are
listed, without torch.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from whet.engine.task import CAUSAL, Task
from whet.methods.method import Method

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import torch
    from torch import nn
    from transformers import PreTrainedModel


class InPlaceMethod(Method):
    """A method whose result is other values for parameters of the network."""

    def chosen(self, network: PreTrainedModel, task: Task) -> list[str]:
        """Names of the parameters that are trained. Raises UserError."""
        raise NotImplementedError

    def attach(self, network: PreTrainedModel, task: Task = CAUSAL) -> nn.Module:
        """The same network with the chosen parameters trainable, in fp32."""
        from whet.methods import delta

        return delta.train_only(network, self.chosen(network, task))

    def tensors(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """What `save` writes: values by name, or places and differences."""
        from whet.methods import delta

        return delta.trained_values(model)

    def save(self, model: Any, directory: Path) -> None:
        """Write trained.safetensors and method.json."""
        from whet.methods import delta

        delta.write(self, model, self.tensors(model), directory)

    def start_from(self, model: Any, directory: Path) -> int:
        """Give the trained parameters the saved values."""
        from whet.methods import delta

        return delta.start_from(self.name, model, directory)

    def check_saved(self, model: Any, directory: Path, empty: PreTrainedModel, task: Task = CAUSAL) -> None:
        """Compare the file with the trained values."""
        from whet.methods.delta import TENSORS
        from whet.methods.saved import compare_tensors

        compare_tensors(directory / TENSORS, self.tensors(model))

    def load(self, network: PreTrainedModel, directory: Path, task: Task = CAUSAL) -> nn.Module:
        """The same network with the trained values in it. Raises UserError when they belong to another model."""
        from whet.methods import delta

        delta.put(network, delta.read(self.name, network, directory)[0], directory)
        return network.eval()

    @contextlib.contextmanager
    def base_only(self, model: Any) -> Iterator[None]:
        """Inside, the base values are back."""
        from whet.methods import delta

        with delta.base_values(model):
            yield

    def fold(self, network: PreTrainedModel, directory: Path, task: Task = CAUSAL) -> PreTrainedModel:
        """The plain network with the trained values in it."""
        from whet.methods import delta

        delta.put(network, delta.read(self.name, network, directory)[0], directory)
        delta.keep_changes(network)
        return network
