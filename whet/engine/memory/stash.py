"""Layer inputs that wait in host memory for the backward pass.

They (ALST, arXiv:2506.13996; 2 H bytes per token and layer) leave for the host while the next layer computes and come
back one layer before they are needed, on streams of their own, so a copy costs time only where the link is slower than
a layer. transformers' `gradient_checkpointing_enable(offload=True)` copies on the computing stream and takes fresh
pinned memory in every step; here it is cut into equal chunks that are used again: torch's pinned allocator rounds every
request up to a power of two, which for one long row would waste up to half of the host's memory. Order is kept by
events alone, not by `record_stream`, so that when memory comes free does not depend on timing. On the CPU the same code
copies to a second buffer, for the tests.

Gives up: one device per stash; a graph can be differentiated once.
"""

from __future__ import annotations

import weakref
from collections import deque

import torch

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


class StashedTensor:
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
        self._order: list[weakref.ref[StashedTensor]] = []
        self._leaving: deque[tuple[torch.Tensor, torch.Event | None]] = deque()

    def put(self, tensor: torch.Tensor) -> StashedTensor:
        """Start the copy of `tensor`, of any shape, to the host; the caller may drop it at once."""
        self._open(tensor.device)
        assert self.pool is not None
        while self._order and self._order[-1]() is None:
            self._order.pop()
        while len(self._leaving) >= LEAVING:
            self._release_oldest()
        tensor = tensor.detach().contiguous()
        stowed = StashedTensor(tensor, self.pool)
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

    def get(self, stowed: StashedTensor) -> torch.Tensor:
        """The tensor, on its device again; starts the return of the one that was put before it.

        Raises RuntimeError the second time.
        """
        if not stowed.free.alive:
            raise RuntimeError("an offloaded input is given back once: backward ran twice over the same graph")
        while self._leaving:
            self._release_oldest()
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
            self._release_oldest()
        last = next((stowed for ref in reversed(self._order) if (stowed := ref()) is not None), None)
        if last is not None:
            self._fetch(last)

    def _open(self, device: torch.device) -> None:
        if self.pool is None:
            self.pool = Chunks(self.chunk_bytes, pinned=device.type == "cuda")
            if device.type == "cuda":
                self._streams = (torch.cuda.Stream(device), torch.cuda.Stream(device))

    def _release_oldest(self) -> None:
        """Let go of the oldest tensor whose copy may be running: what computes next waits for that copy."""
        tensor, event = self._leaving.popleft()
        if event is not None:
            torch.cuda.current_stream(tensor.device).wait_event(event)

    def _fetch(self, stowed: StashedTensor) -> None:
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

    def _before(self, stowed: StashedTensor) -> StashedTensor | None:
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
