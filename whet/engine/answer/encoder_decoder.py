"""Sessions with an encoder-decoder: greedy answers by transformers' own `generate`.

The static decoding of `engine.answer.decode` is for decoders alone. Sources of similar length are encoded together
under an attention mask; an answer is cut at the model's end token. Settings of a model's generation_config that are no
part of greedy decoding (beams, penalties, shortest length) are left out; tokens that it forces at the start, as
multilingual models do, are part of what it was trained on and stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from whet.base.out_of_memory import ran_out
from whet.engine.answer.batches import in_batches
from whet.engine.answer.rows import StopRule
from whet.engine.answer.state import Session, ended
from whet.engine.memory.scarce import forget_frames, let_go

Row = Sequence[int] | NDArray[np.integer[Any]]
ROWS_ON_THE_HOST = 32  # that are brought there together


class EncoderDecoderSession(Session):
    """Answers sources (token ids for the encoder)."""

    def answer(
        self,
        prompts: Sequence[Row],
        *,
        stop_ids: Sequence[int] | None = None,
        max_new_tokens: int,
        batch_size: int,
        done: Callable[[int], None] | None = None,
    ) -> list[list[int]]:
        """The ids written for each source, without start and end token, in the order given.

        stop_ids: None for the model's own end tokens. `done` is called with the number of finished ones; fewer are
        answered together when memory runs out.
        """
        self._prepare()
        rule = self._rule(stop_ids, max_new_tokens)
        return in_batches(
            [len(source) for source in prompts], batch_size,
            lambda batch, _: written(self.model, [prompts[index] for index in batch], rule), done=done,
            scarce=self._scarce(
                lambda size: f"out of memory: answering {size} sources together", "answering one source"
            ),
        )  # fmt: skip

    def stream(
        self, prompt: Row, *, stop_ids: Sequence[int] | None = None, max_new_tokens: int, streamer: Any = None
    ) -> list[int]:
        """The ids written for one source, handed to a transformers `streamer` (or None) token by token."""
        self._prepare()
        rule = self._rule(stop_ids, max_new_tokens)
        with ended(streamer):
            return self._alone(
                lambda: written(self.model, [prompt], rule, streamer)[0], "answering one source",
                len(prompt) + max_new_tokens, again=streamer is None,
            )  # fmt: skip

    def _rule(self, stop_ids: Sequence[int] | None, max_new_tokens: int) -> StopRule:
        return StopRule.of(end_ids(self.model) if stop_ids is None else stop_ids, max_new_tokens)


@torch.inference_mode()
def written(model: Any, sources: Sequence[Row], rule: StopRule, streamer: Any = None) -> list[list[int]]:
    """The ids of the answers to a group of sources, encoded together, up to a stop token."""
    device, pad = next(model.parameters()).device, model.config.pad_token_id
    pad = rule.pad if pad is None else pad
    ids = torch.full((len(sources), max(map(len, sources))), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(sources):
        ids[index, : len(row)] = torch.as_tensor(np.asarray(row, dtype=np.int64))
        mask[index, : len(row)] = 1
    output = model.generate(
        input_ids=ids.to(device), attention_mask=mask.to(device), max_new_tokens=rule.max_new_tokens,
        do_sample=False, num_beams=1, repetition_penalty=1.0, encoder_repetition_penalty=1.0,
        no_repeat_ngram_size=0, encoder_no_repeat_ngram_size=0, min_length=0,
        eos_token_id=list(rule.stop_ids) or None, pad_token_id=pad, decoder_start_token_id=start_id(model),
        use_cache=True, **({} if streamer is None else {"streamer": streamer}),
    )  # fmt: skip
    return [rule.cut(row[1:]) for row in output.tolist()]


@torch.inference_mode()
def answer_log_probabilities(model: Any, source: Row, reply: Sequence[int]) -> torch.Tensor:
    """[len(reply) + 1, V] float32: the distribution of each token of the reply and of the one after it."""
    device = next(model.parameters()).device
    ids = torch.as_tensor(np.asarray(source, dtype=np.int64), device=device)[None]
    decoded = torch.tensor([[start_id(model), *reply]], device=device)
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=decoded, use_cache=False)
    return log_softmax(output.logits[0, -len(reply) - 1 :])


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [T, V] float32 of logits [T, V]; on the host, a few rows at a time, where the device has no
    room for them, which changes no number."""
    try:
        return torch.log_softmax(logits.float(), -1)
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        forget_frames(error)
    let_go()
    return torch.cat([torch.log_softmax(part.float(), -1).cpu() for part in logits.split(ROWS_ON_THE_HOST)])


def start_id(model: Any) -> int:
    """The token that the decoder starts from."""
    for settings in (model.generation_config, model.config):
        for name in ("decoder_start_token_id", "bos_token_id"):
            if isinstance(token := getattr(settings, name, None), int):
                return token
    return 0


def end_ids(model: Any) -> list[int]:
    """The tokens that end an answer; [] when the model has none."""
    for settings in (model.generation_config, model.config):
        tokens = getattr(settings, "eos_token_id", None)
        if tokens is not None:
            return [tokens] if isinstance(tokens, int) else list(tokens)
    return []
