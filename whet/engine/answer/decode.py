"""Greedy decoding on a device that never waits for Python: a static cache, and one captured graph for every new token.

A group of prompts is padded on the left and read in one eager forward pass. After that each token is the same work on
the same tensors: open a cache slot, run the model on [B, 1] ids, take the best token, note who has finished. On CUDA
that work is captured once per shape in a CUDA graph and replayed, so a token costs one launch and the host looks in
only every `LOOK_EVERY` tokens, one look behind. Elsewhere the same step runs as it is, on the filled part of the cache,
and rows that have finished are dropped, which a graph of fixed shape cannot do. Before it is trusted, `proven` compares
a model's cached logits with uncached ones; what does not agree, or has other layers than full and sliding attention, is
left to transformers' `generate`. Gives up: in a graph, finished rows keep computing until the last one has.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache

from whet.base.console import say
from whet.engine.answer.static_cache import Cursor, Layers, Slots, layers_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROUND = 128  # cache lengths are multiples of it, so that few graphs arise
LOOK_EVERY = 8  # tokens between two questions whether all rows have finished
GRAPH_FROM_TOKENS = 8  # shorter answers do not repay the capture
DROP_BELOW = 0.75  # unfinished share of the rows at which a smaller batch repays copying the cache
CLOSE_ENOUGH = 0.05  # of the largest logit, between cached and uncached, in bf16
_verdicts: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


@dataclass
class Loop:
    """One group of rows being answered: all tensors live as long as the loop, so a captured step stays valid.

    rows B, length L of the cache, room for `new_tokens` in `answers` [B, N]. ids [B, 1] is the newest token of each
    row, position [B, 1] its place in the row's own text, opened [B, 1, 1, L] is 0 for readable slots and -inf else.
    """

    model: PreTrainedModel
    layers: Layers
    rows: int
    length: int
    new_tokens: int
    stop_ids: Sequence[int]
    graphed: bool
    forward: Callable[..., torch.Tensor] | None = None
    graph: Any = None
    cursor: Cursor = field(init=False)
    cache: Cache = field(init=False)

    def __post_init__(self) -> None:
        weight = self.model.get_input_embeddings().weight
        device: Any = weight.device
        self.pad = int(self.stop_ids[0]) if self.stop_ids else 0
        self.ids = torch.zeros(self.rows, 1, dtype=torch.long, device=device)
        self.position = torch.zeros_like(self.ids)
        self.done = torch.zeros(self.rows, dtype=torch.bool, device=device)
        self.count = torch.zeros(1, dtype=torch.long, device=device)
        self.answers = torch.zeros(self.rows, self.new_tokens, dtype=torch.long, device=device)
        self.opened = torch.zeros(self.rows, 1, 1, self.length, dtype=weight.dtype, device=device)  # type: ignore[arg-type]
        self.index = torch.arange(self.length, device=device)
        self.stops = torch.tensor(list(self.stop_ids), dtype=torch.long, device=device)
        self.cursor = Cursor(self.length, torch.zeros(1, dtype=torch.long, device=device), self.length)
        self.slots = [Slots(self.cursor) for _ in range(self.layers.count)]
        self.cache = Cache(layers=[*self.slots])
        self.finished, self.origin = self.answers, torch.arange(self.rows, device=device)

    def run(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, emit: Callable[[torch.Tensor], None] | None = None
    ) -> list[list[int]]:
        """At most `new_tokens` ids for each prompt, padded after a stop; `emit` gets each step's ids [B]."""
        self.accept(self.fill(prompts))
        start = max(len(prompt) for prompt in prompts)
        if self.graphed and self.ids.is_cuda and self.graph is None and new_tokens >= GRAPH_FROM_TOKENS:
            self.capture()
        made, look = 1, Look(every=1 if emit is not None or self.graph is None else LOOK_EVERY)
        if emit is not None:
            emit(self.ids[:, 0].cpu())
        while made < new_tokens and not look.all_done(self.done, made):
            if self.graph is not None:
                self.graph.replay()
            else:
                if not self.graphed:
                    self.drop_finished()
                    self.cursor.reach = start + made
                self.step()
            made += 1
            if emit is not None:
                emit(self.ids[:, 0].cpu())
        if self.finished is not self.answers:
            self.finished[self.origin] = self.answers
        return self.finished[: len(prompts), :made].tolist()

    def drop_finished(self) -> None:
        """Go on with the unfinished rows alone once they are few; the loop is of no use to another group then."""
        alive = (~self.done).nonzero()[:, 0]
        if len(alive) > DROP_BELOW * len(self.done):
            return
        if self.finished is self.answers:
            self.finished = self.answers.clone()
        self.finished[self.origin] = self.answers
        self.origin = self.origin[alive]
        self.ids, self.position, self.done = self.ids[alive], self.position[alive], self.done[alive]
        self.answers, self.opened = self.answers[alive], self.opened[alive]
        for layer in self.slots:
            layer.keep(alive)

    def fill(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Read the prompts; returns the logits [B, V] after each. Rows without a prompt copy one and count as done."""
        ids, seen = padded(prompts, self.rows, self.pad)
        ids, seen = ids.to(self.ids.device), seen.to(self.ids.device)
        width = ids.shape[1]
        self.count.zero_()
        self.answers.fill_(self.pad)
        self.done.copy_(torch.arange(self.rows, device=self.done.device) >= len(prompts))
        self.cursor.slot.fill_(width - 1)
        self.opened.fill_(float("-inf"))
        self.opened[:, 0, 0, :width].masked_fill_(seen, 0.0)
        places = (seen.cumsum(1) - 1).clamp_min_(0)
        self.position.copy_(places[:, -1:])
        self.cursor.filling = True
        try:
            return last_logits(
                self.model, input_ids=ids, attention_mask=seen.long(), position_ids=places, past_key_values=self.cache
            )
        finally:
            self.cursor.filling = False

    def step(self) -> None:
        """One token for every row, without a word from the host."""
        self.accept(self.next_logits())

    def next_logits(self) -> torch.Tensor:
        """Logits [B, V] after the newest tokens, which take the next slot."""
        self.opened.index_fill_(3, self.cursor.slot, 0.0)
        return (self.forward or last_logits)(
            self.model,
            input_ids=self.ids,
            attention_mask=self.masks(),
            position_ids=self.position,
            past_key_values=self.cache,
        )

    def masks(self) -> Any:
        """What each kind of layer may read, [B, 1, 1, reach], added to its scores."""
        full = self.opened[..., : self.cursor.reach]
        found = {"full_attention": full, "sliding_attention": full}
        if self.layers.window is not None and self.layers.window < self.length:
            behind = self.index[: self.cursor.reach] <= self.cursor.slot - self.layers.window
            found["sliding_attention"] = full.masked_fill(behind, float("-inf"))
        if self.layers.by_name:
            return {kind: found[kind] for kind in self.layers.kinds}
        return found[next(iter(self.layers.kinds))]

    def accept(self, logits: torch.Tensor) -> None:
        """Write the best token of each row, a pad for finished ones, and move on."""
        token = logits.argmax(-1).masked_fill_(self.done, self.pad)
        self.answers.index_copy_(1, self.count, token[:, None])
        self.done.logical_or_((token[:, None] == self.stops).any(1))
        self.ids.copy_(token[:, None])
        # A finished row stands still, so that it never walks past the last position the model knows.
        self.position.add_(1).masked_fill_(self.done[:, None], 0)
        self.cursor.slot.add_(1)
        self.count.add_(1)

    def capture(self) -> None:
        """Record one step; on failure say so and go on without. The state is put back: nothing has happened."""
        state = [self.ids, self.position, self.done, self.count, self.answers, self.opened, self.cursor.slot]
        before = [tensor.clone() for tensor in state]
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        graph = torch.cuda.CUDAGraph()
        side.wait_stream(current)
        try:
            with torch.cuda.stream(side):
                self.step()  # libraries make their plans and workspaces here, which a capture does not allow
                put_back(state, before)
                side.synchronize()
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self.step()
                finally:
                    graph.capture_end()
            self.graph = graph
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            missing = "a CUDA graph" if self.forward is None else "torch.compile"
            say(f"decoding without {missing}: {first_line(error)}")
        current.wait_stream(side)
        put_back(state, before)
        if self.graph is None:
            self.graphed = self.forward is not None  # once more, without the compiler, before the graph is given up
            self.forward = None
            if self.graphed:
                self.capture()


@dataclass
class Look:
    """Asks the device every few tokens whether all rows are done, and reads the answer at the next asking."""

    every: int

    def __post_init__(self) -> None:
        self.asked = None
        if self.every > 1:
            self.answer = torch.zeros(1, dtype=torch.bool, pin_memory=True)

    def all_done(self, done: torch.Tensor, made: int) -> bool:
        """made: tokens so far. On CUDA with `every` > 1 it says so up to 2 `every` tokens late."""
        if self.every == 1:
            return bool(done.all())
        if made % self.every:
            return False
        if self.asked is not None:
            self.asked.synchronize()  # keeps the host, too, from running far ahead of the device
            if bool(self.answer):
                return True
        self.answer.copy_(done.all()[None], non_blocking=True)
        self.asked = torch.cuda.Event()
        self.asked.record()
        return False


@dataclass
class Decoder:
    """Answers groups of prompts; a loop of fixed shape is kept as long as it serves. graphed: None = where CUDA is."""

    model: PreTrainedModel
    layers: Layers
    stop_ids: Sequence[int]
    max_new_tokens: int
    graphed: bool | None = None
    compiled: bool = False
    loop: Loop | None = None

    def __post_init__(self) -> None:
        on_cuda = self.model.get_input_embeddings().weight.is_cuda  # type: ignore[union-attr]
        self.graphed = bool(on_cuda) if self.graphed is None else self.graphed
        self.forward = torch.compile(last_logits, fullgraph=True) if self.compiled else None

    def answer(
        self, prompts: Sequence[Sequence[int]], rows: int, emit: Callable[[torch.Tensor], None] | None = None
    ) -> list[list[int]]:
        """Ids of each answer [<= max_new_tokens], with what follows a stop token; longest groups first is cheapest.

        `emit` gets the ids [B] of each step on the CPU, which waits for the device at every token.
        rows: of a full group; a graph has that many, however few the prompts are.
        """
        needed = max(len(prompt) for prompt in prompts) + self.max_new_tokens - 1
        rows = rows if self.graphed else len(prompts)
        kept = self.loop
        if kept is None or not kept.graphed or kept.rows != rows or not kept.length // 2 < needed <= kept.length:
            self.loop = kept = None  # its memory is free before the next one's is taken
            self.loop = kept = Loop(
                self.model, self.layers, rows, -(-needed // ROUND) * ROUND, self.max_new_tokens, self.stop_ids,
                bool(self.graphed), self.forward,
            )  # fmt: skip
        found = kept.run(prompts, self.max_new_tokens, emit)
        self.graphed, self.forward = kept.graphed, kept.forward
        return found


def last_logits(model: PreTrainedModel, **inputs: Any) -> torch.Tensor:
    """Logits [B, V] of the last position."""
    return model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1]


def padded(prompts: Sequence[Sequence[int]], rows: int, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids [rows, T], padded on the left, and which of them are real; missing rows are copies of the first."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((rows, longest), pad, dtype=torch.long)
    real = torch.zeros(rows, longest, dtype=torch.bool)
    for row in range(rows):
        prompt = prompts[row if row < len(prompts) else 0]
        ids[row, longest - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
        real[row, longest - len(prompt) :] = True
    return ids, real


def put_back(state: list[torch.Tensor], before: list[torch.Tensor]) -> None:
    """Values of `before` into the same memory."""
    for tensor, value in zip(state, before, strict=True):
        tensor.copy_(value)


def proven(model: PreTrainedModel) -> Layers | None:
    """The model's layers when cached decoding computes what the model computes, else None, said once for a model.

    Two rows of unequal length, three tokens each, against one uncached forward pass for each row.
    """
    layers = layers_of(model)
    if model not in _verdicts:
        _verdicts[model] = _disagreement(model, layers) if layers else "its layers keep more than keys and values"
        if _verdicts[model]:
            say(f"answers come from transformers' generate: {_verdicts[model]}")
    return None if _verdicts[model] else layers


def _disagreement(model: PreTrainedModel, layers: Layers) -> str:
    """Why the cached logits cannot be trusted; empty when they agree."""
    vocabulary = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[union-attr,index,arg-type]
    prompts = [[(start + 7 * place) % vocabulary for place in range(length)] for start, length in ((1, 5), (2, 9))]
    loop = Loop(model, layers, rows=2, length=16, new_tokens=3, stop_ids=(), graphed=False)
    loop.cursor.reach = 16
    try:
        ours = [loop.fill(prompts)]
        for _ in range(2):
            loop.accept(ours[-1])
            ours.append(loop.next_logits())
        tokens = loop.answers.tolist()
        for row, prompt in enumerate(prompts):
            ids = torch.tensor([prompt + tokens[row][:2]], device=loop.ids.device)
            exact = model(input_ids=ids, use_cache=False).logits[0, -3:].float()
            cached = torch.stack([logits[row] for logits in ours]).float()
            apart = float((cached - exact).abs().max())
            if not apart <= CLOSE_ENOUGH * float(exact.abs().max()):
                return f"cached and uncached logits are {apart:.2g} apart"
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        return first_line(error)
    return ""


def first_line(error: BaseException) -> str:
    """An error in a few words."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
