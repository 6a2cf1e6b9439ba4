"""AdamW on the host: weights in float32, moments and gradients stay in host memory, the update runs there.

As in ZeRO-Offload (arXiv:2101.06840) the device keeps what the layers multiply with, and nothing of the optimiser:
12 bytes a trained weight less, 14 where `shorten_weights` applies. A gradient leaves for the host as soon as it is
complete and is added up there in float32, so micro-batches, clipping and weight decay are what they are on the device,
and the update is torch's own fused AdamW: the same bits on a CPU. The tensors lie in ordinary host memory; only a small
ring of chunks is pinned, and everything travels through it. Pinning all of it would take minutes for a large model, and
torch rounds such requests up to a power of two.

Under autocast the weights of linear layers are cast to bf16 in every product. `shorten_weights` keeps just that cast on
the device, so the arithmetic does not change by a bit. Embeddings, the output head, norms and biases are read in
float32, so they stay in it.

Gives up: time. 28 bytes a weight pass through the host's memory in an update, and the device waits for it. A step
cannot be a CUDA graph.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from whet.engine.memory.stash import Chunks
from whet.engine.weights.linear import frozen_names

CHUNK_BYTES = 8 << 20
RING = 16  # chunks on their way at once
BUCKET_BYTES = 256 << 20  # masters updated together; they travel while the next ones are updated


@dataclass
class Transfer:
    """A chunk on its way. done: when the copy is complete, None: it is; source: kept until then; arrived: what the
    host does with the chunk after that."""

    chunk: torch.Tensor
    done: torch.Event | None
    source: torch.Tensor
    arrived: Callable[[], None] | None


class HostLink:
    """Carries flat tensors between one device and the host through `ring` chunks that are used again.

    On CUDA the chunks are pinned and the copies run on a stream of their own. Elsewhere they are plain copies in the
    same order.
    """

    def __init__(self, device: torch.device, chunk_bytes: int = CHUNK_BYTES, ring: int = RING) -> None:
        self.device, self.ring = device, ring
        self.pool = Chunks(chunk_bytes, pinned=device.type == "cuda")
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._under_way: deque[Transfer] = deque()

    def to_host(self, tensor: torch.Tensor, into: torch.Tensor, *, add: bool) -> None:
        """Start to copy `tensor` to `into` on the host, of as many numbers; add: to what is there.

        `into` is complete after `wait_on_host`; `tensor` may be dropped at once.
        """
        flat = tensor.detach().reshape(-1)
        self._follow()
        for piece, target in self._pieces(flat, into.view(-1), flat.dtype):
            chunk = self._chunk()
            staged = _as(chunk, piece)
            self._cross(chunk, piece, staged, partial(_put, staged, target, add))

    def to_device(self, tensor: torch.Tensor, into: torch.Tensor) -> None:
        """Start to copy `tensor` from the host to `into` on the device, in its type. `tensor` may change at once.

        What the device computes after `wait_on_device` sees it.
        """
        self._follow()
        for piece, target in self._pieces(tensor.view(-1), into.view(-1), into.dtype):
            chunk = self._chunk()
            staged = _as(chunk, target)
            staged.copy_(piece)
            self._cross(chunk, staged, target, None)

    def wait_on_device(self) -> None:
        """Let what the device does next wait for all copies."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def wait_on_host(self) -> None:
        """Wait until everything has arrived."""
        while self._under_way:
            self._complete_oldest()

    def _pieces(
        self, source: torch.Tensor, target: torch.Tensor, dtype: torch.dtype
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        count = self.pool.chunk_bytes // dtype.itemsize
        return zip(source.split(count), target.split(count), strict=True)

    def _chunk(self) -> torch.Tensor:
        """A chunk; waits for the oldest one where all are on their way."""
        while len(self._under_way) >= self.ring:
            self._complete_oldest()
        (chunk,) = self.pool.take(self.pool.chunk_bytes)
        return chunk

    def _cross(
        self, chunk: torch.Tensor, source: torch.Tensor, target: torch.Tensor, arrived: Callable[[], None] | None
    ) -> None:
        done = None
        if self.stream is None:
            target.copy_(source)
        else:
            with torch.cuda.stream(self.stream):
                target.copy_(source, non_blocking=True)
                done = self.stream.record_event()
        self._under_way.append(Transfer(chunk, done, source, arrived))

    def _complete_oldest(self) -> None:
        crossing = self._under_way.popleft()
        if crossing.done is not None:
            crossing.done.synchronize()
        if crossing.arrived is not None:
            crossing.arrived()
        self.pool.give([crossing.chunk])

    def _follow(self) -> None:
        """Copies that start now come after what the device was told to do so far."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))


def _as(chunk: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return chunk[: like.numel() * like.itemsize].view(like.dtype)


def _put(staged: torch.Tensor, target: torch.Tensor, add: bool) -> None:
    if add:
        target.add_(staged)
    else:
        target.copy_(staged)


@dataclass
class Pair:
    """A parameter and its master: float32 on the host. room: where its gradient is added up, made when one comes."""

    parameter: nn.Parameter
    master: nn.Parameter
    room: torch.Tensor | None = None

    @property
    def shortened(self) -> bool:
        """Whether the device keeps fewer bits than the master."""
        return self.parameter.dtype != self.master.dtype


class HostAdamW(torch.optim.AdamW):
    """AdamW whose parameters are the masters of `groups`' parameters; their state and its names are AdamW's.

    groups: as AdamW takes them, with the parameters of the model. masters: float32 host tensors that some of these
    have already (see `shorten_weights`); the others get a copy of their own. Backward passes may follow each other;
    `collect_gradients` ends them, then the gradients stand in `.grad` of the masters. A parameter needs `requires_grad`
    when it comes in.
    """

    def __init__(
        self, groups: Sequence[Mapping[str, Any]], masters: Mapping[nn.Parameter, torch.Tensor] | None = None, *,
        chunk_bytes: int = CHUNK_BYTES, **adam: Any,
    ) -> None:  # fmt: skip
        known, self.pairs = masters or {}, cast("list[Pair]", [])
        hosted = []
        for group in groups:
            pairs = [Pair(parameter, _master(parameter, known.get(parameter))) for parameter in group["params"]]
            hosted.append({**group, "params": [pair.master for pair in pairs]})
            self.pairs += pairs
        super().__init__(hosted, fused=True, **adam)
        self.link = HostLink(self.pairs[0].parameter.device, chunk_bytes)
        self._hooks = [
            pair.parameter.register_post_accumulate_grad_hook(partial(self._leave, pair)) for pair in self.pairs
        ]

    @torch.no_grad()
    def _leave(self, pair: Pair, parameter: torch.Tensor) -> None:
        """Send the gradient that `parameter` has now to the host."""
        grad = parameter.grad
        if grad is None:
            return
        parameter.grad = None
        if pair.room is None:
            pair.room = torch.empty_like(pair.master)
        self.link.to_host(grad, pair.room, add=pair.master.grad is not None)
        pair.master.grad = pair.room

    def collect_gradients(self) -> None:
        """Wait for all gradients; from here on they stand in `.grad` of the masters."""
        for pair in self.pairs:
            self._leave(pair, pair.parameter)  # one that no hook saw
        self.link.wait_on_host()

    def forget_broken_step(self) -> None:
        """Forget what a step that was broken off has left on the host."""
        self.zero_grad()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, on the host and on the device."""
        self.link.wait_on_host()
        for pair in self.pairs:
            pair.parameter.grad = None
        super().zero_grad(set_to_none=True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the masters that have a gradient, and let the parameters follow; the gradients are used up."""
        assert closure is None
        self.collect_gradients()
        grads = {id(pair): pair.master.grad for pair in self.pairs}
        super().zero_grad(set_to_none=True)
        for bucket in _buckets([pair for pair in self.pairs if grads[id(pair)] is not None]):
            for pair in bucket:
                pair.master.grad = grads[id(pair)]
            super().step()
            super().zero_grad(set_to_none=True)
            for pair in bucket:
                self.link.to_device(pair.master, pair.parameter)
        self.link.wait_on_device()

    @property
    def exact_weights(self) -> dict[nn.Parameter, torch.Tensor]:
        """The masters of the parameters that the device keeps in fewer bits."""
        return {pair.parameter: pair.master for pair in self.pairs if pair.shortened}

    @torch.no_grad()
    def follow_weights(self) -> None:
        """Take over weights that were written: to masters in `exact_weights`, else to the parameters."""
        for pair in self.pairs:
            if pair.shortened:
                self.link.to_device(pair.master, pair.parameter)
            else:
                self.link.to_host(pair.parameter, pair.master, add=False)
        self.link.wait_on_device()
        self.link.wait_on_host()

    def hand_back(self) -> None:
        """Training is over: the model gets the masters in `exact_weights` themselves, which stay on the host."""
        self.link.wait_on_host()
        for hook in self._hooks:
            hook.remove()
        for parameter, master in self.exact_weights.items():
            parameter.data = master.data


def _master(parameter: nn.Parameter, known: torch.Tensor | None) -> nn.Parameter:
    if not parameter.is_contiguous():
        parameter.data = parameter.data.contiguous()
    if known is None:
        known = torch.empty(parameter.shape, dtype=torch.float32).copy_(parameter.detach())
    return nn.Parameter(known)


def _buckets(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """In order, each of BUCKET_BYTES or of one larger master."""
    buckets: list[list[Pair]] = []
    filled = BUCKET_BYTES
    for pair in pairs:
        if filled >= BUCKET_BYTES:
            buckets.append([])
            filled = 0
        buckets[-1].append(pair)
        filled += pair.master.nbytes
    return buckets


@torch.no_grad()
def shorten_weights(network: nn.Module, device: torch.device, dtype: torch.dtype) -> dict[nn.Parameter, torch.Tensor]:
    """Keep what autocast casts to `dtype` anyway, the trained weights of linear layers, as that on `device`.

    Returns their float32 values on the host, by parameter: the masters of a `HostAdamW`. The output head, a weight
    with two owners and what the architecture wants in full precision stay float32. All of `network` is on `device`
    afterwards; where it comes from the host, the device never holds more than the result. Call it under no graph,
    and run the network under autocast to `dtype` only.
    """
    owners = Counter(id(p) for module in network.modules() for p in module.parameters(recurse=False))
    masters: dict[nn.Parameter, torch.Tensor] = {}
    for name in frozen_names(network):
        weight = network.get_submodule(name).weight
        if not isinstance(weight, nn.Parameter) or not weight.requires_grad or owners[id(weight)] > 1:
            continue
        if weight.dtype == torch.float32:
            masters[weight] = weight.detach().to("cpu")
            weight.data = weight.detach().to(dtype).to(device)
    network.to(device)
    return masters
