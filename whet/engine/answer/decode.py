"""Decoding on a device that never waits for Python: a static cache, and one captured graph for every new token.

A group of prompts is padded on the left and read in one eager forward pass. After that each token is the same work on
the same tensors: open a cache slot, run the model on [B, 1] ids, choose a token, note which rows have finished. On CUDA
that work is captured once per shape in a CUDA graph and replayed, so a token costs one launch, and the host asks only
every `CHECK_EVERY` tokens whether all rows are done and reads the answer at the next asking. Elsewhere the same step
runs as it is, on the filled part of the cache, and rows that have finished are dropped, which a graph of fixed shape
cannot do. Rows (`answer.rows`), cache (`answer.static_cache`) and choice (`answer.choice`) are told apart, so that rows
that come and go, with prompts read in chunks between two steps, are a second loop over the same three. Gives up: in a
graph, finished rows keep computing until the last one has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from whet.engine.answer.choice import Choose, greedy
from whet.engine.answer.notices import Notices
from whet.engine.answer.rows import Rows, StopRule
from whet.engine.answer.static_cache import AttentionLayout, StaticCache
from whet.engine.compute.probe import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROUND = 128  # cache lengths are multiples of it, so that few graphs arise
CHECK_EVERY = 8  # tokens between two questions whether all rows have finished
GRAPH_FROM_TOKENS = 8  # shorter answers do not repay the capture
DROP_BELOW = 0.75  # unfinished share of the rows at which a smaller batch repays copying the cache

Emit = Callable[[torch.Tensor], None]  # gets the ids [B] of a step, on the CPU


@dataclass
class DecodingLoop:
    """One group of rows being answered; with a graph, one group after another.

    graphed: the shapes stay as they are, and the step is captured where there is CUDA; forward: the model's pass, if it
    is not `last_logits`; choose: logits to tokens. What goes wrong while capturing is told to `notices`.
    """

    model: PreTrainedModel
    rows: Rows
    cache: StaticCache
    graphed: bool
    forward: Callable[..., torch.Tensor] | None = None
    choose: Choose = greedy
    notices: Notices = field(default_factory=Notices)
    graph: Any = field(default=None, init=False)

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int, emit: Emit | None = None) -> list[list[int]]:
        """At most `new_tokens` ids for each prompt, padded after a stop; `emit` gets each step's ids."""
        self.accept(self.fill(prompts))
        start = max(len(prompt) for prompt in prompts)
        if self.graphed and self.graph is None and new_tokens >= GRAPH_FROM_TOKENS and self.can_capture():
            self.capture()
        check = FinishedCheck(every=1 if emit is not None or self.graph is None else CHECK_EVERY)
        tokens = 1
        if emit is not None:
            emit(self.rows.ids[:, 0].cpu())
        while tokens < new_tokens and not check.all_done(self.rows.finished, tokens):
            if self.graph is not None:
                self.graph.replay()
            else:
                if not self.graphed:
                    self.drop_finished()
                    self.cache.position.reach = start + tokens
                self.step()
            tokens += 1
            if emit is not None:
                emit(self.rows.ids[:, 0].cpu())
        return self.rows.result(len(prompts), tokens)

    def drop_finished(self) -> None:
        """Go on with the unfinished rows alone once they are few; the loop is of no use to another group then."""
        unfinished = self.rows.unfinished()
        if len(unfinished) <= DROP_BELOW * len(self.rows):
            self.rows.keep(unfinished)
            self.cache.keep(unfinished)

    def fill(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Read the prompts; returns the logits [B, V] after each. Rows without a prompt copy one and count as done."""
        ids, real = padded(prompts, len(self.rows), self.rows.rule.pad)
        ids, real = ids.to(self.rows.ids.device), real.to(self.rows.ids.device)
        positions = (real.cumsum(1) - 1).clamp_min_(0)
        self.rows.begin(len(prompts), positions[:, -1:])
        with self.cache.filling(real):
            return last_logits(
                self.model, input_ids=ids, attention_mask=real.long(), position_ids=positions,
                past_key_values=self.cache.states,
            )  # fmt: skip

    def step(self) -> None:
        """One token for every row; the host waits for nothing."""
        self.accept(self.next_logits())

    def next_logits(self) -> torch.Tensor:
        """Logits [B, V] after the newest tokens, which take the next slot."""
        self.cache.open_slot()
        return (self.forward or last_logits)(
            self.model,
            input_ids=self.rows.ids,
            attention_mask=self.cache.masks(),
            position_ids=self.rows.positions,
            past_key_values=self.cache.states,
        )

    def accept(self, logits: torch.Tensor) -> None:
        """Choose and write the next token of each row, and move on."""
        self.rows.accept(self.choose(logits))
        self.cache.advance()

    def can_capture(self) -> bool:
        """Whether the device has graphs."""
        return self.rows.ids.is_cuda

    def capture(self) -> None:
        """Record one step; on failure note it and go on without. The state is restored: nothing has happened."""
        state = [*self.rows.tensors(), *self.cache.tensors()]
        before = [tensor.clone() for tensor in state]
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        graph = torch.cuda.CUDAGraph()
        side.wait_stream(current)
        try:
            with torch.cuda.stream(side):
                self.step()  # libraries make their plans and workspaces here, which a capture does not allow
                restore(state, before)
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
            self.notices.add(f"decoding without {missing}: {first_line(error)}")
        current.wait_stream(side)
        restore(state, before)
        if self.graph is None:
            self.graphed = self.forward is not None  # once more, without the compiler, before the graph is given up
            self.forward = None
            if self.graphed:
                self.capture()


class FinishedCheck:
    """Asks the device every few tokens whether all rows are done, and reads the answer at the next asking."""

    def __init__(self, every: int) -> None:
        self.every = every
        self._asked: torch.cuda.Event | None = None
        if every > 1:
            self._answer = torch.zeros(1, dtype=torch.bool, pin_memory=True)

    def all_done(self, finished: torch.Tensor, tokens: int) -> bool:
        """tokens: written so far. On CUDA with `every` > 1 it is up to 2 `every` tokens late."""
        if self.every == 1:
            return bool(finished.all())
        if tokens % self.every:
            return False
        if self._asked is not None:
            self._asked.synchronize()  # keeps the host, too, from running far ahead of the device
            if bool(self._answer):
                return True
        self._answer.copy_(finished.all()[None], non_blocking=True)
        self._asked = torch.cuda.Event()
        self._asked.record()
        return False


class Decoder:
    """Answers groups of prompts with one model in one state; a loop of fixed shape is kept for the groups to come.

    graphed: None = where CUDA is. compiled: the step goes through torch.compile first.
    """

    def __init__(
        self, model: PreTrainedModel, layout: AttentionLayout, *, graphed: bool | None = None, compiled: bool = False,
        notices: Notices | None = None,
    ) -> None:  # fmt: skip
        self.model, self.layout = model, layout
        self.notices = Notices() if notices is None else notices
        self.loop: DecodingLoop | None = None
        on_cuda: Any = model.get_input_embeddings().weight.is_cuda  # type: ignore[union-attr]
        self.graphed = bool(on_cuda) if graphed is None else graphed
        self.forward = torch.compile(last_logits, fullgraph=True) if compiled else None

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache that is kept."""
        return 0 if self.loop is None else self.loop.cache.bytes

    def answer(
        self, prompts: Sequence[Sequence[int]], rows: int, rule: StopRule, emit: Emit | None = None
    ) -> list[list[int]]:
        """Ids of each answer, with what follows a stop token; longest groups first is cheapest.

        `emit` gets the ids [B] of each step on the CPU, which waits for the device at every token.
        rows: of a full group; a graph has that many, however few the prompts are.
        """
        loop = self._loop_for(max(len(prompt) for prompt in prompts), rows if self.graphed else len(prompts), rule)
        answers = loop.run(prompts, rule.max_new_tokens, emit)
        self.graphed, self.forward = loop.graphed, loop.forward
        return answers

    def _loop_for(self, longest: int, rows: int, rule: StopRule) -> DecodingLoop:
        """The loop that is kept, where it serves, or a new one; `longest`: tokens of the longest prompt."""
        needed, loop = -(-(longest + rule.max_new_tokens - 1) // ROUND) * ROUND, self.loop
        if loop is not None and loop.graphed and len(loop.rows) == rows and loop.rows.rule.stop_ids == rule.stop_ids:
            length, room = loop.cache.position.length, loop.rows.rule.max_new_tokens
            if length // 2 < needed <= length and rule.max_new_tokens <= room:
                return loop
        self.loop = loop = None  # its memory is free before the next one's is taken
        weight: Any = self.model.get_input_embeddings().weight
        loop = DecodingLoop(
            self.model,
            Rows(rows, rule, weight.device),
            StaticCache(self.layout, rows, needed, weight),
            self.graphed,
            self.forward,
            notices=self.notices,
        )
        self.loop = loop if self.graphed else None  # one of loose shape drops rows, and serves one group
        return loop


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


def restore(state: list[torch.Tensor], before: list[torch.Tensor]) -> None:
    """Put the values of `before` into the same memory."""
    for tensor, value in zip(state, before, strict=True):
        tensor.copy_(value)
