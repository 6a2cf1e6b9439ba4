"""How nearly a merged model writes as the live adapter, for models that write text: decoders and encoder-decoders.

KL divergence of the next-token distributions along the live answers, top-1 agreement, and whole greedy answers. With a
decoder, whether an answer is the same is read off the distributions along the live one: greedy decoding repeats it if
and only if each of its tokens is the likeliest. So one pass judges a candidate, and only one that would be kept has to
write its answers, which takes a pass for each token and counts. What the live adapter says is computed once while it
fits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from inspect import signature
from typing import Any

import torch

from whet.base.errors import UserError
from whet.data.prepare import Prepared
from whet.engine.answer.encoder_decoder import answer_log_probabilities
from whet.engine.answer.session import text_session
from whet.engine.load.open import Opened
from whet.opening import tell

MAX_PROMPTS = 200
REMEMBERED_BYTES = (
    1 << 30
)  # of the live distributions, [T, V] fp32 each; what is over is computed again for each candidate
MEAN_KL_LIMIT = 0.05


@dataclass(frozen=True)
class Agreement:
    """How near a merged model is to the live adapter. KL in nats per position; agreements are shares."""

    name: str
    dtype: str
    mean_kl: float
    max_kl: float
    top1_agreement: float
    greedy_agreement: float

    @property
    def near(self) -> bool:
        return self.mean_kl <= MEAN_KL_LIMIT

    @property
    def perfect(self) -> bool:
        return self.greedy_agreement == 1.0 and self.near

    @property
    def order(self) -> tuple[float, float]:
        """The smaller, the nearer."""
        return -self.greedy_agreement, self.mean_kl

    @property
    def agreement(self) -> float:
        return self.greedy_agreement

    @property
    def summary(self) -> str:
        kl = f"mean KL {self.mean_kl:.2g}"
        return f"greedy answers {self.greedy_agreement:.2%}, {kl}, top-1 {self.top1_agreement:.2%}"

    @property
    def complaint(self) -> tuple[str, str]:
        return f"mean KL {self.mean_kl:.3g}", f"at most {MEAN_KL_LIMIT}"


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
            answers = session.answer(self.prompts, max_new_tokens=self.max_new_tokens, batch_size=32, **rule)
            tell(session)
        return answers


@dataclass(frozen=True)
class Reference:
    """The live adapter's greedy answers, and log-probabilities along each, on the CPU and while they fit.

    distributions: a network, a prompt and a reply to log-probabilities [T + 1, V], by the attention that the network
    was trained with; read_off: whether they alone say if an answer would be repeated.
    """

    live: Opened
    questions: Questions
    answers: list[list[int]]
    distributions: Callable[[Any, Sequence[int], Sequence[int]], torch.Tensor]
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
            answers = self.questions.answers_of(candidate)
            greedy = sum(a == b for a, b in zip(answers, self.answers, strict=True)) / max(1, len(answers))
        return Agreement(name, dtype, float(kl.mean()), float(kl.max()), float(top1.mean()), greedy)

    def certificate(self, best: Any, tried: Sequence[Any]) -> dict[str, Any]:
        """The counts of what was compared, and how near the best is."""
        return {
            "agreement": best.greedy_agreement,
            "top1_agreement": best.top1_agreement,
            "kl": best.mean_kl,
            "max_kl": best.max_kl,
            "prompts": len(self.questions.prompts),
            "positions": sum(len(reply) + 1 for reply in self.answers),
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
    return Reference(live, questions, questions.answers_of(live), _log_probabilities)


def encoder_decoder_reference(live: Opened, prepared: Prepared) -> Reference:
    """The live encoder-decoder on held-out sources, or on those that it was trained on."""
    rows = prepared.evaluation if len(prepared.evaluation) else prepared.train
    sources = [rows.row(index)[0].tolist() for index in range(min(len(rows), MAX_PROMPTS))]
    assert rows.answers is not None, "rows of an encoder-decoder have answers"
    longest = min(128, int(rows.answers.lengths[: len(sources)].max()) + 8)
    questions = Questions(sources, None, longest)
    # Tokens that a model forces into its answers are not the likeliest, so its answers have to be written.
    return Reference(live, questions, questions.answers_of(live), answer_log_probabilities, read_off=False)


@torch.inference_mode()
def _log_probabilities(network: Any, prompt: Sequence[int], reply: Sequence[int]) -> torch.Tensor:
    """[len(reply) + 1, V] float32: the distribution of each token of the reply and of the one after it."""
    device = next(network.parameters()).device
    ids, count = torch.tensor([[*prompt, *reply]], device=device), len(reply) + 1
    known = signature(network.forward).parameters
    last = {"logits_to_keep": count} if "logits_to_keep" in known else {}
    return torch.log_softmax(network(input_ids=ids, use_cache=False, **last).logits[0, -count:].float(), -1)
