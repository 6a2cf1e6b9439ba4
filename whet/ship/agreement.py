"""How nearly a merged model writes as the live adapter, for models that write text: decoders and encoder-decoders.

KL divergence of the next-token distributions along the live answers, top-1 agreement, whole greedy answers, and the
held-out loss. A candidate is a plain model of transformers with its own attention, and its answers are those of
transformers' `generate`: what the live adapter is computed with has no part in it. With a decoder, whether an answer is
the same is read off the distributions along the live one: greedy decoding repeats it if and only if each of its tokens
is the likeliest. So one pass judges a candidate, and only one that would be kept has to write its answers, which takes
a pass for each token and counts. What the live adapter says is computed once while it fits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from inspect import signature
from typing import Any

import numpy as np
import torch

from whet.base.errors import UserError
from whet.base.out_of_memory import CLOSE_OTHERS, ran_out
from whet.data.batch.rows import Rows
from whet.data.prepare import Prepared
from whet.engine.answer.batches import Scarce, in_batches
from whet.engine.answer.encoder_decoder import answer_log_probabilities, end_ids, log_softmax, start_id
from whet.engine.answer.rows import StopRule
from whet.engine.answer.session import text_session
from whet.engine.compute.probe import FAILURES
from whet.engine.load.open import Opened
from whet.engine.memory.scarce import NoRoom, free_text
from whet.opening import tell

MAX_PROMPTS = 200
REMEMBERED_BYTES = (
    1 << 30
)  # of the live distributions, [T, V] fp32 each; what is over is computed again for each candidate
MEAN_KL_LIMIT = 0.05
MAX_ROWS = 200  # of the held-out loss: the longest, which reach beyond a window or chunk of attention if any does
MAX_TARGETS = 1024  # of a row, its last: [T, V] log-probabilities are in memory at once
LOSS_LIMIT = 0.02  # nats a token between live and merged held-out loss,
LOSS_SHARE = 0.005  # or this share of it, where a model is so bad that rounding moves it further
_TOGETHER = 32


@dataclass(frozen=True)
class Agreement:
    """How near a merged model is to the live adapter. KL in nats per position; agreements are shares; losses are means
    over the learned tokens of held-out rows."""

    name: str
    dtype: str
    mean_kl: float
    max_kl: float
    top1_agreement: float
    greedy_agreement: float
    held_out_loss: float
    live_held_out_loss: float

    @property
    def moved_loss(self) -> float:
        """How far the held-out loss is from the live one, in nats a token."""
        return abs(self.held_out_loss - self.live_held_out_loss)

    @property
    def loss_limit(self) -> float:
        """How far it may be."""
        return max(LOSS_LIMIT, LOSS_SHARE * self.live_held_out_loss)

    @property
    def near(self) -> bool:
        return self.mean_kl <= MEAN_KL_LIMIT and self.moved_loss <= self.loss_limit

    @property
    def perfect(self) -> bool:
        return self.greedy_agreement == 1.0 and self.near

    @property
    def order(self) -> tuple[float, float]:
        """The smaller, the nearer."""
        return -self.greedy_agreement, self.mean_kl + (self.moved_loss if self.moved_loss > self.loss_limit else 0.0)

    @property
    def agreement(self) -> float:
        return self.greedy_agreement

    @property
    def summary(self) -> str:
        loss = f"held-out loss {self.live_held_out_loss:.4f} to {self.held_out_loss:.4f}"
        kl = f"mean KL {self.mean_kl:.2g}"
        return f"greedy answers {self.greedy_agreement:.2%}, {kl}, top-1 {self.top1_agreement:.2%}, {loss}"

    @property
    def complaint(self) -> tuple[str, str]:
        found = f"mean KL {self.mean_kl:.3g}, held-out loss {self.live_held_out_loss:.4f} -> {self.held_out_loss:.4f}"
        return found, f"a mean KL of at most {MEAN_KL_LIMIT}, and a loss within {self.loss_limit:.3g}"


@dataclass(frozen=True)
class Questions:
    """Prompts, or sources of an encoder-decoder, and when an answer ends; stop_ids: None for the model's own."""

    prompts: list[list[int]]
    stop_ids: list[int] | None
    max_new_tokens: int

    def answers_of(self, opened: Opened) -> list[list[int]]:
        """The greedy answers of a model."""
        rule: dict[str, Any] = {} if self.stop_ids is None else {"stop_ids": self.stop_ids}
        with text_session(opened) as session:
            answers = session.answer(self.prompts, max_new_tokens=self.max_new_tokens, batch_size=_TOGETHER, **rule)
            tell(session)
        return answers

    def plain_answers(self, network: Any, seq2seq: bool) -> list[list[int]]:
        """The greedy answers of a plain model, by transformers alone; prompts of one length together, for padding is
        one more thing that could be computed otherwise."""
        stop_ids = end_ids(network) if self.stop_ids is None else self.stop_ids
        rule = StopRule.of(stop_ids, self.max_new_tokens)

        def answers_of(batch: list[int], _: int) -> list[list[int]]:
            return [rule.cut(ids) for ids in self._generated(network, batch, rule, seq2seq)]

        device = next(network.parameters()).device
        scarce = Scarce(fewer=lambda _: None, leaner=lambda: False, refusal=lambda tokens: no_room(device, tokens))
        return in_batches(
            [len(prompt) for prompt in self.prompts], _TOGETHER, answers_of, equal_lengths=True, scarce=scarce
        )

    @torch.inference_mode()
    def _generated(self, network: Any, group: list[int], rule: StopRule, seq2seq: bool) -> list[list[int]]:
        ids = torch.tensor([self.prompts[index] for index in group], device=next(network.parameters()).device)
        more: dict[str, Any] = {"decoder_start_token_id": start_id(network)} if seq2seq else {}
        if not rule.stop_ids:
            more["min_new_tokens"] = rule.max_new_tokens
        given: dict[str, Any] = {
            "input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": rule.max_new_tokens,
            "do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0,
            "eos_token_id": list(rule.stop_ids) or None, "pad_token_id": rule.pad, **more,
        }  # fmt: skip
        try:
            output = network.generate(**given)
        except FAILURES as error:  # in some families (BLT) it cannot make a cache
            if ran_out(error):
                raise
            output = network.generate(**given, use_cache=False)
        return output[:, 1 if seq2seq else ids.shape[1] :].tolist()


@dataclass(frozen=True)
class HeldOutRow:
    """A row of which some tokens are predicted. given: what stands before; targets: the rest, and which count."""

    given: list[int]
    targets: list[int]
    learned: list[bool]


@dataclass(frozen=True)
class Reference:
    """The live adapter's greedy answers, and log-probabilities along each, on the CPU and while they fit.

    distributions: a network, a prompt and a reply to log-probabilities [T + 1, V], by the attention that the network
    has; rows: of the held-out loss; live_loss: that of the live adapter; read_off: whether distributions alone say if
    an answer would be repeated.
    """

    live: Opened
    questions: Questions
    answers: list[list[int]]
    distributions: Callable[[Any, Sequence[int], Sequence[int]], torch.Tensor]
    rows: Sequence[HeldOutRow]
    live_loss: float
    read_off: bool = True
    remembered: dict[int, torch.Tensor] = field(default_factory=dict)

    def log_probabilities(self, index: int) -> torch.Tensor:
        """[T + 1, V] of answer `index`. Raises UserError for what is not a number."""
        if index in self.remembered:
            return self.remembered[index]
        values = self.distributions(self.live.answering, self.questions.prompts[index], self.answers[index]).cpu()
        if bool(values.isnan().any()):
            raise UserError(
                "the trained model answers with NaN, so there is nothing to compare a merged one with",
                fix="train again with a lower train.learning_rate",
            )
        if sum(tensor.nbytes for tensor in self.remembered.values()) + values.nbytes <= REMEMBERED_BYTES:
            self.remembered[index] = values
        return values

    def compare(self, name: str, dtype: str, candidate: Opened, best: Any | None) -> Agreement:
        """How near `candidate` is. best: what it would have to beat, so that a worse one need not answer."""
        divergences, agreed, same = [], [], []
        for index, (prompt, reply) in enumerate(zip(self.questions.prompts, self.answers, strict=True)):
            second = self.distributions(candidate.answering, prompt, reply)
            first = self.log_probabilities(index).to(second.device)
            divergences.append((first.exp() * (first - second)).sum(-1).clamp_min(0))
            agreed.append((first.argmax(-1) == second.argmax(-1)).float())
            same.append(self._repeats(second.argmax(-1).tolist(), reply))
        kl, top1 = torch.cat(divergences), torch.cat(agreed)
        greedy, bar = sum(same) / max(1, len(same)), best.greedy_agreement if best is not None else 0.0
        if not self.read_off or (greedy >= bar and float(kl.mean()) <= MEAN_KL_LIMIT):
            answers = self.questions.plain_answers(candidate.network, candidate.task.name == "seq2seq")
            greedy = sum(a == b for a, b in zip(answers, self.answers, strict=True)) / max(1, len(answers))
        loss = loss_of(candidate.network, self.rows, self.distributions)
        return Agreement(name, dtype, float(kl.mean()), float(kl.max()), float(top1.mean()), greedy, loss,
                         self.live_loss)  # fmt: skip

    def certificate(self, best: Any, tried: Sequence[Any]) -> dict[str, Any]:
        """The counts of what was compared, and how near the best is."""
        return {
            "agreement": best.greedy_agreement,
            "top1_agreement": best.top1_agreement,
            "kl": best.mean_kl,
            "max_kl": best.max_kl,
            "prompts": len(self.questions.prompts),
            "positions": sum(len(reply) + 1 for reply in self.answers),
            "held_out_loss": best.held_out_loss,
            "live_held_out_loss": best.live_held_out_loss,
            "held_out_rows": len(self.rows),
            "candidates": [asdict(candidate) for candidate in tried],
        }

    def _repeats(self, likeliest: list[int], reply: list[int]) -> bool:
        """Whether greedy decoding gives `reply`: each token the likeliest, and a stop after it unless it was cut."""
        ends = len(reply) >= self.questions.max_new_tokens or likeliest[-1] in (self.questions.stop_ids or ())
        return ends and likeliest[:-1] == reply


def decoder_reference(live: Opened, prepared: Prepared) -> Reference:
    """The live decoder on held-out prompts, or on the starts of rows where there are no prompts."""
    row_tokenizer = prepared.row_tokenizer
    examples = (prepared.held_out or prepared.train_examples)[:MAX_PROMPTS]
    if row_tokenizer.template is None:
        prompts = [prepared.train.row(index)[0][:64].tolist() for index in range(min(len(prepared.train), MAX_PROMPTS))]
        longest = 32
    else:
        prompts = [row_tokenizer.prompt(example.unanswered) for example in examples]
        longest = min(128, row_tokenizer.longest_reply(examples) + 8)
    questions = Questions(prompts, row_tokenizer.stop_ids(), longest)
    rows = _held_out_rows(prepared)
    loss = loss_of(live.answering, rows, _log_probabilities)
    return Reference(live, questions, questions.answers_of(live), _log_probabilities, rows, loss)


def encoder_decoder_reference(live: Opened, prepared: Prepared) -> Reference:
    """The live encoder-decoder on held-out sources, or on those that it was trained on."""
    rows = prepared.evaluation if len(prepared.evaluation) else prepared.train
    sources = [rows.row(index)[0].tolist() for index in range(min(len(rows), MAX_PROMPTS))]
    assert rows.answers is not None, "rows of an encoder-decoder have answers"
    longest = min(128, int(rows.answers.lengths[: len(sources)].max()) + 8)
    questions = Questions(sources, None, longest)
    held = _held_out_rows(prepared)
    loss = loss_of(live.answering, held, answer_log_probabilities)
    # Tokens that a model forces into its answers are not the likeliest, so its answers have to be written.
    return Reference(
        live, questions, questions.answers_of(live), answer_log_probabilities, held, loss, read_off=False
    )  # fmt: skip


def no_room(device: torch.device, tokens: int | None = None) -> NoRoom:
    """The error where live model and merged one cannot be compared. tokens: of the prompt that is alone."""
    found = free_text(device) if tokens is None else f"{tokens:,} tokens; {free_text(device)}"
    return NoRoom(
        "comparing the merged model with the live one does not fit in memory", found=found,
        expected="memory for one of the two models and one row",
        fix=f"{CLOSE_OTHERS}; CUDA_VISIBLE_DEVICES= in front of the command merges on the CPU",
    )  # fmt: skip


def loss_of(
    network: Any, rows: Sequence[HeldOutRow],
    distributions: Callable[[Any, Sequence[int], Sequence[int]], torch.Tensor],
) -> float:  # fmt: skip
    """Mean loss of the learned tokens of `rows`, one row at a time. Raises UserError for what is not a number."""
    total, count = 0.0, 0
    for row in rows:
        found = distributions(network, row.given, row.targets[:-1])
        targets = torch.tensor(row.targets, device=found.device)
        losses = -found.gather(-1, targets[:, None])[:, 0][torch.tensor(row.learned, device=found.device)]
        total, count = total + float(losses.double().sum()), count + len(losses)
    if total != total:
        raise UserError(
            "the held-out loss is not a number, so there is nothing to compare",
            fix="train again with a lower train.learning_rate",
        )
    return total / max(1, count)


def _held_out_rows(prepared: Prepared) -> list[HeldOutRow]:
    """The longest held-out rows, or those that were learned where nothing is held out."""
    source = prepared.evaluation if len(prepared.evaluation) else prepared.train
    lengths = source.lengths if source.answers is None else source.lengths + source.answers.lengths
    rows = [_held_out_row(source, int(index)) for index in np.argsort(-lengths, kind="stable")[:MAX_ROWS]]
    return [row for row in rows if any(row.learned)]


def _held_out_row(source: Rows, index: int) -> HeldOutRow:
    ids, learned = (array.tolist() for array in source.row(index))
    if source.answers is not None:
        answer = source.answers.row(index)[0].tolist()[:MAX_TARGETS]
        return HeldOutRow(ids, answer, [True] * len(answer))
    first = max(learned.index(True) if any(learned) else 1, len(ids) - MAX_TARGETS, 1)
    return HeldOutRow(ids[:first], ids[first:], learned[first:])


@torch.inference_mode()
def _log_probabilities(network: Any, prompt: Sequence[int], reply: Sequence[int]) -> torch.Tensor:
    """[len(reply) + 1, V] float32: the distribution of each token of the reply and of the one after it."""
    device = next(network.parameters()).device
    ids, count = torch.tensor([[*prompt, *reply]], device=device), len(reply) + 1
    known = signature(network.forward).parameters
    last = {"logits_to_keep": count} if "logits_to_keep" in known else {}
    return log_softmax(network(input_ids=ids, use_cache=False, **last).logits[0, -count:])
