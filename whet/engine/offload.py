"""Host memory beside the device: layer inputs that wait for backward, the frozen input embedding and output head.

Layer inputs (ALST, arXiv:2506.13996; 2 H bytes per token and layer) leave for the host while the next layer computes
and come back one layer before they are needed, on streams of their own, so a copy costs time only where the link is
slower than a layer. transformers' `gradient_checkpointing_enable(offload=True)` copies on the computing stream and
takes fresh pinned memory in every step; here it is cut into equal chunks that are used again: torch's pinned allocator
rounds every request up to a power of two, which for one long row would waste up to half of the host's memory. Order
is kept by events alone, not by `record_stream`, so that when memory comes free does not depend on timing. On the CPU
the same code copies to a second buffer, for the tests.

The head is needed once a micro-batch, whole, for the loss; it sets out before the decoder begins and is let go before
the backward pass, whose peak it is not part of.

Gives up: one device per stash; a graph can be differentiated once. The embedding reads the token ids on the host, so
the host waits for the device once a micro-batch and the step cannot be a CUDA graph.
"""

from __future__ import annotations

import functools
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from whet.base.errors import UserError

CHUNK_BYTES = 4 << 20
LEAVING = 2  # inputs whose copy to the host may be unfinished: one is being made while one is on its way


class Chunks:
    """Equal pieces of host memory; never more of them than were in use at once. made: how many exist."""

    def __init__(self, chunk_bytes: int, pinned: bool) -> None:
        self.chunk_bytes, self.pinned, self.made = chunk_bytes, pinned, 0
        self._free: list[torch.Tensor] = []

    def take(self, nbytes: int) -> list[torch.Tensor]:
        """Chunks [chunk_bytes] uint8 that hold `nbytes` together."""
        count = -(-nbytes // self.chunk_bytes)
        while len(self._free) < count:
            self._free.append(torch.empty(self.chunk_bytes, dtype=torch.uint8, pin_memory=self.pinned))
            self.made += 1
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def give(self, chunks: list[torch.Tensor]) -> None:
        """Hand chunks back; the caller has seen to it that later copies come after his own."""
        self._free.extend(chunks)


class Stowed:
    """A tensor that is on the host. When its owner lets it go, its chunks are free for the next one."""

    def __init__(self, tensor: torch.Tensor, pool: Chunks) -> None:
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.chunks = pool.take(tensor.nbytes)
        self.left: torch.Event | None = None
        self.back: list[torch.Event] = []
        self.returned: torch.Tensor | None = None
        self.free = weakref.finalize(self, _let_go, pool, self.chunks, self.back, self.device)
        self.free.atexit = False


def _let_go(pool: Chunks, chunks: list[torch.Tensor], back: list[torch.Event], device: torch.device) -> None:
    # A graph may be dropped in the middle of backward, while a copy still writes to memory that comes free now.
    for event in back:
        torch.cuda.current_stream(device).wait_event(event)
    pool.give(chunks)


class Stash:
    """Takes tensors in forward, gives them back in backward, the last one first and each a layer ahead."""

    def __init__(self, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.chunk_bytes = chunk_bytes
        self.pool: Chunks | None = None
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None
        self._order: list[weakref.ref[Stowed]] = []
        self._leaving: deque[tuple[torch.Tensor, torch.Event | None]] = deque()

    def put(self, tensor: torch.Tensor) -> Stowed:
        """Start the copy of `tensor`, of any shape, to the host; the caller may drop it at once."""
        self._open(tensor.device)
        assert self.pool is not None
        while self._order and self._order[-1]() is None:
            self._order.pop()
        while len(self._leaving) >= LEAVING:
            self._settle()
        tensor = tensor.detach().contiguous()
        stowed = Stowed(tensor, self.pool)
        if self._streams is None:
            _copy_out(tensor, stowed.chunks)
        else:
            away = self._streams[0]
            away.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(away):
                _copy_out(tensor, stowed.chunks)
                stowed.left = away.record_event()
        self._leaving.append((tensor, stowed.left))
        self._order.append(weakref.ref(stowed))
        return stowed

    def get(self, stowed: Stowed) -> torch.Tensor:
        """The tensor, on its device again; starts the return of the one that was put before it.

        Raises RuntimeError the second time.
        """
        if not stowed.free.alive:
            raise RuntimeError("an offloaded input is given back once: backward ran twice over the same graph")
        while self._leaving:
            self._settle()
        self._fetch(stowed)
        tensor, stowed.returned = stowed.returned, None
        assert tensor is not None
        stowed.free()
        before = self._before(stowed)
        if before is not None:
            self._fetch(before)
        return tensor

    def expect(self) -> None:
        """Start the return of the tensor that was put last: its layer is the next one."""
        while self._leaving:
            self._settle()
        last = next((stowed for ref in reversed(self._order) if (stowed := ref()) is not None), None)
        if last is not None:
            self._fetch(last)

    def _open(self, device: torch.device) -> None:
        if self.pool is None:
            self.pool = Chunks(self.chunk_bytes, pinned=device.type == "cuda")
            if device.type == "cuda":
                self._streams = (torch.cuda.Stream(device), torch.cuda.Stream(device))

    def _settle(self) -> None:
        """Let go of the oldest tensor whose copy may be running: what computes next waits for that copy."""
        tensor, event = self._leaving.popleft()
        if event is not None:
            torch.cuda.current_stream(tensor.device).wait_event(event)

    def _fetch(self, stowed: Stowed) -> None:
        if stowed.returned is not None:
            return
        tensor = torch.empty(stowed.shape, dtype=stowed.dtype, device=stowed.device)
        if self._streams is None:
            _copy_back(stowed.chunks, tensor)
        else:
            home = self._streams[1]
            assert stowed.left is not None
            # The memory may have been in use until now, and the host's copy may not be complete.
            home.wait_stream(torch.cuda.current_stream(stowed.device))
            home.wait_event(stowed.left)
            with torch.cuda.stream(home):
                _copy_back(stowed.chunks, tensor)
                stowed.back.append(home.record_event())
        stowed.returned = tensor

    def _before(self, stowed: Stowed) -> Stowed | None:
        """Strike `stowed` off the list; the living one that was put before it, if any."""
        self._order = [ref for ref in self._order if ref() is not None]
        place = next(index for index, ref in enumerate(self._order) if ref() is stowed)
        del self._order[place]
        return self._order[place - 1]() if place else None


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


def _copy_out(tensor: torch.Tensor, chunks: list[torch.Tensor]) -> None:
    for chunk, piece in zip(chunks, _bytes_of(tensor).split(chunks[0].numel()) if chunks else (), strict=True):
        chunk[: piece.numel()].copy_(piece, non_blocking=True)


def _copy_back(chunks: list[torch.Tensor], tensor: torch.Tensor) -> None:
    for chunk, piece in zip(chunks, _bytes_of(tensor).split(chunks[0].numel()) if chunks else (), strict=True):
        piece.copy_(chunk[: piece.numel()], non_blocking=True)


class OffloadedEmbedding:
    """Mixed into the class of one embedding: the rows are picked on the host and only they travel.

    ids [...] on any device; returns [..., H] on the device of the ids, bit-equal to the embedding on the device.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = super().forward(input.to("cpu"))  # type: ignore[misc]
        return rows.pin_memory().to(input.device, non_blocking=True) if input.is_cuda else rows


@functools.cache
def _offloaded(kind: type[nn.Embedding]) -> type[nn.Embedding]:
    return cast("type[nn.Embedding]", type(f"Offloaded{kind.__name__}", (OffloadedEmbedding, kind), {}))


def check_embedding(network: nn.Module) -> None:
    """Raise UserError where the input embedding is trained, or is the output head too; weights are not needed."""
    module: Any = cast("Any", network).get_input_embeddings()
    output = cast("Any", network).get_output_embeddings()
    obstacle = None
    if not isinstance(module, nn.Embedding) or module.weight.requires_grad or module.max_norm is not None:
        obstacle = "it is trained or not a plain embedding"
    elif output is not None and getattr(output, "weight", None) is module.weight:
        obstacle = "it is the output head too"
    if obstacle is not None:
        raise UserError(
            "the input embedding cannot be kept on the host", field="base.offload_embedding", found=obstacle,
            expected="a frozen embedding of its own", fix="base.offload_embedding=false",
        )  # fmt: skip


def offload_embedding(network: nn.Module) -> int:
    """Keep the frozen input embedding on the host; returns the device bytes that this frees, V * H * itemsize.

    Names in the state dict stay. The weight becomes a buffer, because `parameters()` is where everybody looks for the
    device of a model. Call it when the model is on its device with its method attached. Raises UserError when the
    embedding is trained, or is the output head too and so is needed on the device.
    """
    module: Any = cast("Any", network).get_input_embeddings()
    if isinstance(module, OffloadedEmbedding):
        return 0
    check_embedding(network)
    weight = module.weight.detach()
    del module.weight
    module.register_buffer("weight", weight)
    module.to("cpu")  # whole: Gemma's embedding has a scale beside the weight
    module.__class__ = _offloaded(type(module))
    return weight.nbytes


class Travelling:
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
        waiting = dict(module._buffers)
        module._buffers.update({name: None if t is None else t.to(input.device) for name, t in waiting.items()})
        try:
            return super().forward(input)  # type: ignore[misc]
        finally:
            module._buffers.update(waiting)


@functools.cache
def _headed(kind: type[nn.Module]) -> type[nn.Module]:
    return cast("type[nn.Module]", type(f"Offloaded{kind.__name__}", (OffloadedHead, kind), {}))


def is_tied(network: nn.Module) -> bool:
    """Whether the output head is the input embedding too."""
    output = cast("Any", network).get_output_embeddings()
    table = getattr(cast("Any", network).get_input_embeddings(), "weight", None)
    return output is not None and table is not None and getattr(output, "weight", None) is table


def check_head(network: nn.Module, *, flat: bool = True) -> None:
    """Raise UserError where the output head is trained or not used by the loss alone; weights are not needed.

    flat: whether rows are text without padding, the loss of which whet computes from the head.
    """
    output = cast("Any", network).get_output_embeddings()
    obstacle = None
    if not flat:
        obstacle = "rows with padding, whose loss is made of the model's own logits"
    elif not isinstance(output, nn.Linear):
        obstacle = "it is trained or not a plain linear layer"
    elif any(parameter.requires_grad for parameter in output.parameters()):
        obstacle = "it is trained"
    if obstacle is not None:
        raise UserError(
            "the output head cannot be kept on the host", field="base.offload_head", found=obstacle,
            expected="a frozen head that is a plain linear layer", fix="base.offload_head=false",
        )  # fmt: skip


def offload_head(network: nn.Module, output: nn.Module, fp8: tuple[torch.Tensor, ...] | None = None) -> Travelling:
    """Keep the frozen output head `output` of `network` on the host; returns what the loss needs of it.

    fp8: the tensors of its FP8 products, which then travel in place of the weight. An embedding that is the head too
    goes with it, and its rows are picked on the host. Names in the state dict stay; weights become buffers, as those
    of `offload_embedding` do. A bias stays where it is. Raises UserError where the head is trained.
    """
    if any(parameter.requires_grad for parameter in output.parameters()):
        check_head(network)
    table, tied = cast("Any", network).get_input_embeddings(), is_tied(network)
    device = next(output.parameters()).device
    travelling = Travelling((cast("Any", output).weight.detach(),) if fp8 is None else fp8, device)
    known = {} if fp8 is not None else {"weight": travelling.tensors[0]}
    for name, parameter in list(output.named_parameters(recurse=False)):
        if name != "bias":
            waiting = known.get(name, None if fp8 is None else _of(parameter, fp8, travelling))
            delattr(output, name)
            output.register_buffer(name, parameter.detach().to("cpu") if waiting is None else waiting)
    output.__class__ = _headed(type(output))
    if tied:
        del table.weight
        table.register_buffer("weight", cast("Any", output).weight)
        table.to("cpu")  # whole: Gemma's embedding has a scale beside the weight
        table.__class__ = _offloaded(type(table))
    return travelling


def _of(parameter: torch.Tensor, fp8: tuple[torch.Tensor, ...], travelling: Travelling) -> torch.Tensor | None:
    """The host's copy of `parameter`, where it is among what travels."""
    places = [place for place, tensor in enumerate(fp8) if tensor.data_ptr() == parameter.data_ptr()]
    return travelling.tensors[places[0]] if places else None
