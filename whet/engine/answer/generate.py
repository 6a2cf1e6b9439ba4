"""Sessions with a decoder: batched and streamed answers to prompts, by whet's own loop or transformers' `generate`.

`engine.answer.decode` runs the model as it stands with a static cache (captured in a CUDA graph where there is one), on
dense copies of quantised layers when they fit (`engine.weights.unpacked`). A model with which it cannot be proven right
goes to transformers' own `generate`, and so does PEFT's model around one, in groups of one length. Training attention
reads the documents of a flat row and has no cache, so a session switches to `engine.compute.cached_attention`.
Penalties in a model's generation_config are no part of greedy decoding and are left out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from whet.base.errors import UserError
from whet.base.private import attention_name
from whet.engine.answer.batches import in_batches
from whet.engine.answer.decode import Decoder, padded
from whet.engine.answer.proof import find_fault, find_generation_fault, mixes_rows
from whet.engine.answer.rows import StopRule
from whet.engine.answer.state import Session, ended
from whet.engine.answer.static_cache import attention_layout, generation_bytes
from whet.engine.answer.uncached import answer_uncached
from whet.engine.compute.proven_attention import set_attention, use_attention_with_masks
from whet.engine.weights.linear import FrozenLinear
from whet.engine.weights.unpacked import free_bytes, unpacked

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class DecodingOptions:
    """How answers are computed; None = whet decides. None of it changes what is computed.

    static: our loop (True: without proving it on the model first) rather than transformers' `generate`; graphed: fixed
    shapes, captured in a CUDA graph where there is one; compiled: the step goes through torch.compile first, about a
    minute for a large model; dense: one dense copy of quantised layers.
    """

    static: bool | None = None
    graphed: bool | None = None
    compiled: bool = False
    dense: bool | None = None


DEFAULT = DecodingOptions()


class DecoderSession(Session):
    """Answers prompts; attention with a cache, dense copies, decoder, cache and graphs stay from call to call."""

    def __init__(
        self, model: Any, base_only: Callable[[], AbstractContextManager[None]] | None = None,
        options: DecodingOptions = DEFAULT,
    ) -> None:  # fmt: skip
        super().__init__(model, base_only)
        self.options = options
        self._decoder: Decoder | None = None
        self._packed: list[nn.Module] = []  # the quantised layers that dense copies stand for
        self._room_bytes = 0  # that the copies leave free
        self._apart = False  # prompts of unlike length share no batch
        self._cached = True  # transformers' `generate` computes what the model does
        self._frugal = False  # memory ran out: no dense copies, no graphs

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        stop_ids: Sequence[int],
        max_new_tokens: int,
        batch_size: int,
        done: Callable[[int], None] | None = None,
    ) -> list[list[int]]:
        """Greedy continuation of each prompt (token ids), without the stop token, in the order given.

        Prompts of similar length are answered together, the longest first, and fewer together when memory runs out;
        `done` is called with the number of finished ones. Without `stop_ids` every answer has `max_new_tokens`.
        UserError: a prompt without tokens.
        """
        if not prompts or max_new_tokens < 1:
            return [[] for _ in prompts]
        lengths, rule = [len(prompt) for prompt in prompts], StopRule.of(stop_ids, max_new_tokens)
        _check_not_empty(lengths)
        self._prepare_for(min(batch_size, len(prompts)), max(lengths) + max_new_tokens)

        def answers_of(batch: list[int], size: int) -> list[list[int]]:
            self._set_up_once()
            return [rule.cut(ids) for ids in self._continuations([prompts[index] for index in batch], size, rule)]

        scarce = self._scarce(lambda size: f"out of memory: answering {size} prompts together", "answering one prompt")
        return in_batches(lengths, batch_size, answers_of, done=done, equal_lengths=self._apart, scarce=scarce)

    def stream(
        self, prompt: Sequence[int], *, stop_ids: Sequence[int], max_new_tokens: int, streamer: Any = None
    ) -> list[int]:
        """Greedy continuation of one prompt, handed to a transformers `streamer` (or None) token by token."""
        if max_new_tokens < 1:
            return []
        rule = StopRule.of(stop_ids, max_new_tokens)
        self._prepare_for(1, len(prompt) + max_new_tokens)

        def answer() -> list[int]:
            self._set_up_once()
            return rule.cut(self._continuations([prompt], 1, rule, streamer)[0])

        with ended(streamer):
            return self._alone(answer, "answering one prompt", len(prompt) + max_new_tokens, again=streamer is None)

    def release(self) -> None:
        super().release()
        self._decoder, self._packed, self._room_bytes = None, [], 0

    def _leaner(self) -> bool:
        """Without dense copies of quantised layers and without graphs, unless it is so already or was asked for."""
        self.release()
        if self._frugal or None not in (self.options.dense, self.options.graphed):
            return False
        self._frugal = True
        self.notices.add("out of memory: answering without dense copies and graphs, which is slower")
        return True

    def _what_fits(self, tokens: int | None, device: torch.device) -> str:
        """The longest prompt with its answer that the free memory holds, by what is reckoned beforehand."""
        free, each = free_bytes(device), generation_bytes(self.model, 1, 1)
        if tokens is None or device.type != "cuda":
            return super()._what_fits(tokens, device)
        return f"about {max(1, min(tokens // 2, free // each)):,} tokens, with those of the answer"

    def _prepare_for(self, rows: int, tokens: int) -> None:
        """Set the model up for `rows` rows of `tokens` tokens; copies that leave no room for them make way."""
        self._check()
        needed = generation_bytes(self.model, rows, tokens)
        if self._packed and self.options.dense is None:
            held = 0 if self._decoder is None else self._decoder.cache_bytes
            if free_bytes(next(self.model.parameters()).device) + held < needed:
                self.release()
        self._room_bytes = max(self._room_bytes, needed)
        self._set_up_once()

    def _set_up(self, undo: contextlib.ExitStack) -> None:
        super()._set_up(undo)
        undo.enter_context(use_cached_attention(self.model))
        packed = [module for module in self.model.modules() if isinstance(module, FrozenLinear)]
        dense = False if self._frugal and self.options.dense is None else self.options.dense
        if undo.enter_context(unpacked(self.model, dense, self._room_bytes)):
            self._packed = [*packed]
        self._decoder = self._trusted_decoder()
        if is_wrapped(self.model):  # padding would stand between virtual tokens and the prompt
            self._apart = True
        elif self._decoder is None:
            fault = find_generation_fault(self.model)
            self._cached = not fault
            self._apart = bool(fault) or mixes_rows(self.model)
            if fault:
                self.notices.add(f"answers are computed without a cache, which is slow: {fault}")

    def _modules(self) -> Iterable[nn.Module]:
        return chain(super()._modules(), self._packed)

    def _trusted_decoder(self) -> Decoder | None:
        """Our loop around the model as it is now, or None when transformers has to answer."""
        options = self.options
        if options.static is False or is_wrapped(self.model):
            return None
        layout = attention_layout(self.model)
        fault = find_fault(self.model, layout) if options.static is None else ""
        if fault:
            self.notices.add(f"answers come from transformers' generate: {fault}")
        if layout is None or fault:
            return None
        graphed = False if self._frugal and options.graphed is None else options.graphed
        return Decoder(self.model, layout, graphed=graphed, compiled=options.compiled, notices=self.notices)

    @torch.inference_mode()
    def _continuations(
        self, prompts: Sequence[Sequence[int]], rows: int, rule: StopRule, streamer: Any = None
    ) -> list[list[int]]:
        """Ids for each prompt, with what follows a stop token. rows: of a full group."""
        if self._decoder is None:
            answer = generate if self._cached else answer_uncached
            return answer(self.model, prompts, rule, streamer)
        if streamer is None:
            return self._decoder.answer(prompts, rows, rule)
        streamer.put(torch.tensor([*prompts]))
        answers = self._decoder.answer(prompts, rows, rule, streamer.put)
        streamer.end()
        return answers


@contextlib.contextmanager
def use_cached_attention(model: PreTrainedModel) -> Iterator[None]:
    """Attention that reads caches and masks inside, what was before outside."""
    before = attention_name(model)
    use_attention_with_masks(model)
    try:
        yield
    finally:
        set_attention(model, before)


def is_wrapped(model: Any) -> bool:
    """Whether a method answers through PEFT's model around the network, with virtual tokens in front."""
    return hasattr(model, "get_base_model")


def generate(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], rule: StopRule, streamer: Any = None
) -> list[list[int]]:
    """Ids for each prompt by transformers' own greedy `generate`, with what follows a stop token."""
    device = next(model.parameters()).device
    ids, real = padded(prompts, len(prompts), rule.pad)
    more: dict[str, Any] = {"streamer": streamer}
    if not rule.stop_ids:
        more["min_new_tokens"] = rule.max_new_tokens
    output = model.generate(  # type: ignore[operator]
        input_ids=ids.to(device),
        attention_mask=real.long().to(device),
        max_new_tokens=rule.max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        forced_bos_token_id=None,
        forced_eos_token_id=None,
        eos_token_id=list(rule.stop_ids) or None,
        pad_token_id=rule.pad,
        use_cache=True,
        **more,
    )
    return output[:, ids.shape[1] :].tolist()  # type: ignore[index,union-attr]


def _check_not_empty(lengths: Sequence[int]) -> None:
    """UserError for a prompt without tokens."""
    empty = [number for number, length in enumerate(lengths, 1) if not length]
    if empty:
        raise UserError(
            f"prompt {empty[-1]} of {len(lengths)} has no tokens, so the model has nothing to answer to",
            field="messages", found="an empty prompt, and a tokenizer without a begin token",
            expected="one token or more", fix="use model.chat_template=chatml or alpaca, or a prompt that is not empty",
        )  # fmt: skip
