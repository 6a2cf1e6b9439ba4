"""The frozen input embedding and output head in host memory.

Of the embedding only the rows that are read travel. The head is needed once a micro-batch, whole, for the loss; it sets
out before the decoder begins and is let go before the backward pass, whose peak it is not part of.

Gives up: the embedding reads the token ids on the host, so the host waits for the device once a micro-batch and the
step cannot be a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from whet.base.private import swap_class


class OffloadedEmbedding:
    """Mixed into the class of one embedding: the rows are picked on the host and only they travel.

    ids [...] on any device; returns [..., H] on the device of the ids, bit-equal to the embedding on the device.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = super().forward(input.to("cpu"))  # type: ignore[misc]
        return rows.pin_memory().to(input.device, non_blocking=True) if input.is_cuda else rows


def embedding_obstacle(network: nn.Module) -> str | None:
    """Why the input embedding must stay on the device, or None: it is trained, or is the output head too. Weights are
    not needed."""
    module: Any = cast("Any", network).get_input_embeddings()
    output = cast("Any", network).get_output_embeddings()
    if not isinstance(module, nn.Embedding) or module.weight.requires_grad or module.max_norm is not None:
        return "it is trained or not a plain embedding"
    if output is not None and getattr(output, "weight", None) is module.weight:
        return "it is the output head too"
    return None


def offload_embedding(network: nn.Module) -> int:
    """Keep the frozen input embedding on the host; returns the device bytes that this frees, V * H * itemsize.

    Names in the state dict stay. The weight becomes a buffer, because `parameters()` is where everybody looks for the
    device of a model. Call it when the model is on its device with its method attached. Raises ValueError when the
    embedding is trained, or is the output head too and so is needed on the device.
    """
    module: Any = cast("Any", network).get_input_embeddings()
    if isinstance(module, OffloadedEmbedding):
        return 0
    obstacle = embedding_obstacle(network)
    if obstacle is not None:
        raise ValueError(f"the input embedding must stay on the device: {obstacle}")
    weight = module.weight.detach()
    del module.weight
    module.register_buffer("weight", weight)
    module.to("cpu")  # whole: Gemma's embedding has a scale beside the weight
    swap_class(module, OffloadedEmbedding, "Offloaded")
    return weight.nbytes


class HostTensors:
    """Frozen tensors that wait on the host and come to a device for a while. tensors: as they are on the host.

    On CUDA they are pinned, and copied on a stream of their own.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], device: torch.device) -> None:
        self.device, on_gpu = device, device.type == "cuda"
        self.tensors = tuple(_waiting(tensor, pinned=on_gpu) for tensor in tensors)
        self._stream = torch.cuda.Stream(device) if on_gpu else None
        self._coming: tuple[torch.Tensor, ...] | None = None

    def call(self) -> None:
        """Let them set out for the device."""
        if self._coming is not None:
            return
        self._coming = tuple(torch.empty(t.shape, dtype=t.dtype, device=self.device) for t in self.tensors)
        if self._stream is not None:  # the memory may have been in use until now
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for room, tensor in zip(self._coming, self.tensors, strict=True):
                room.copy_(tensor, non_blocking=True)

    def arrive(self) -> tuple[torch.Tensor, ...]:
        """They, on the device; what is computed from here on waits for them. They go when the caller lets them go."""
        self.call()
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
        assert self._coming is not None
        arrived, self._coming = self._coming, None
        return arrived


def _waiting(tensor: torch.Tensor, *, pinned: bool) -> torch.Tensor:
    host = tensor.detach().to("cpu")
    return host.pin_memory() if pinned and not host.is_pinned() else host


class OffloadedHead:
    """Mixed into the class of one output head: whoever calls it gets its weights brought for that call."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        module = cast("nn.Module", self)
        waiting = dict(module.named_buffers(recurse=False))
        for name, tensor in waiting.items():
            setattr(module, name, tensor.to(input.device))
        try:
            return super().forward(input)  # type: ignore[misc]
        finally:
            for name, tensor in waiting.items():
                setattr(module, name, tensor)


def is_tied(network: nn.Module) -> bool:
    """Whether the output head is the input embedding too."""
    output = cast("Any", network).get_output_embeddings()
    table = getattr(cast("Any", network).get_input_embeddings(), "weight", None)
    return output is not None and table is not None and getattr(output, "weight", None) is table


def head_obstacle(network: nn.Module) -> str | None:
    """Why the output head must stay on the device, or None: it is trained or no plain linear layer. Weights are not
    needed."""
    output = cast("Any", network).get_output_embeddings()
    if not isinstance(output, nn.Linear):
        return "it is trained or not a plain linear layer"
    return "it is trained" if any(parameter.requires_grad for parameter in output.parameters()) else None


def offload_head(network: nn.Module, output: nn.Module, fp8: tuple[torch.Tensor, ...] | None = None) -> HostTensors:
    """Keep the frozen output head `output` of `network` on the host; returns what the loss needs of it.

    fp8: the tensors of its FP8 products, which then travel in place of the weight. An embedding that is the head too
    goes with it, and its rows are picked on the host. Names in the state dict stay; weights become buffers, as those
    of `offload_embedding` do. A bias stays where it is. Raises ValueError where the head is trained.
    """
    if any(parameter.requires_grad for parameter in output.parameters()):
        raise ValueError("the output head must stay on the device: it is trained")
    table, tied = cast("Any", network).get_input_embeddings(), is_tied(network)
    device = next(output.parameters()).device
    travelling = HostTensors((cast("Any", output).weight.detach(),) if fp8 is None else fp8, device)
    known = {} if fp8 is not None else {"weight": travelling.tensors[0]}
    for name, parameter in list(output.named_parameters(recurse=False)):
        if name != "bias":
            waiting = known.get(name, None if fp8 is None else _of(parameter, fp8, travelling))
            delattr(output, name)
            output.register_buffer(name, parameter.detach().to("cpu") if waiting is None else waiting)
    swap_class(output, OffloadedHead, "Offloaded")
    if tied:
        del table.weight
        table.register_buffer("weight", cast("Any", output).weight)
        table.to("cpu")  # whole: Gemma's embedding has a scale beside the weight
        swap_class(table, OffloadedEmbedding, "Offloaded")
    return travelling


def _of(parameter: torch.Tensor, fp8: tuple[torch.Tensor, ...], travelling: HostTensors) -> torch.Tensor | None:
    """The host's copy of `parameter`, where it is among what travels."""
    places = [place for place, tensor in enumerate(fp8) if tensor.data_ptr() == parameter.data_ptr()]
    return travelling.tensors[places[0]] if places else None
