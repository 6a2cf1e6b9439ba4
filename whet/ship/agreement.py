"""Does a merged model write as the live adapter does? For models that write text, decoders and encoder-decoders.

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
from typing import TYPE_CHECKING, Any

import torch

from whet.base.errors import UserError
from whet.data.prepare import Prepared
from whet.engine.answer.generate import answer
from whet.engine.answer.sequence import answer_log_probabilities, answer_sources

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_PROMPTS = 200
KEPT_BYTES = 1 << 30  # of the live distributions, [T, V] fp32 each; what is over is computed again for each candidate
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
class Reference:
    """What the live adapter says: greedy answers, and log-probabilities along each, on the CPU and while they fit.

    answers_of: a network to its greedy answers, token ids each. distributions: a network, a prompt and a reply to
    log-probabilities [T + 1, V]. read_off: whether the distributions alone say if an answer would be repeated.
    """

    network: Any
    prompts: list[list[int]]
    answers: list[list[int]]
    stop_ids: list[int]
    max_new_tokens: int
    answers_of: Callable[[Any], list[list[int]]]
    distributions: Callable[[Any, Sequence[int], Sequence[int]], torch.Tensor]
    read_off: bool = True
    kept: dict[int, torch.Tensor] = field(default_factory=dict)

    def log_probabilities(self, index: int) -> torch.Tensor:
        """[T + 1, V] of answer `index`. Raises UserError for what is not a number."""
        if index in self.kept:
            return self.kept[index]
        found = self.distributions(self.network, self.prompts[index], self.answers[index]).cpu()
        if bool(found.isnan().any()):
            raise UserError(
                "the trained model answers with NaN, so there is nothing to compare a merged one with",
                fix="train again with a lower train.learning_rate",
            )
        if sum(one.nbytes for one in self.kept.values()) + found.nbytes <= KEPT_BYTES:
            self.kept[index] = found
        return found

    def compare(self, name: str, dtype: str, network: Any, best: Any | None) -> Agreement:
        """How near `network` is. best: what it would have to beat, so that a worse one need not answer."""
        divergences, agreed, same = [], [], []
        for index, (prompt, reply) in enumerate(zip(self.prompts, self.answers, strict=True)):
            second = self.distributions(network, prompt, reply)
            first = self.log_probabilities(index).to(second.device)
            divergences.append((first.exp() * (first - second)).sum(-1).clamp_min(0))
            agreed.append((first.argmax(-1) == second.argmax(-1)).float())
            same.append(self._repeats(second.argmax(-1).tolist(), reply))
        kl, top1 = torch.cat(divergences), torch.cat(agreed)
        greedy, bar = sum(same) / max(1, len(same)), best.greedy_agreement if best is not None else 0.0
        if not self.read_off or (greedy >= bar and float(kl.mean()) <= MEAN_KL_LIMIT):
            answers = self.answers_of(network)
            greedy = sum(a == b for a, b in zip(answers, self.answers, strict=True)) / max(1, len(answers))
        return Agreement(name, dtype, float(kl.mean()), float(kl.max()), float(top1.mean()), greedy)

    def certificate(self, best: Any, tried: Sequence[Any]) -> dict[str, Any]:
        """What was compared, and how near the best is."""
        return {
            "agreement": best.greedy_agreement,
            "top1_agreement": best.top1_agreement,
            "kl": best.mean_kl,
            "max_kl": best.max_kl,
            "prompts": len(self.prompts),
            "positions": sum(len(reply) + 1 for reply in self.answers),
            "candidates": [asdict(candidate) for candidate in tried],
        }

    def _repeats(self, likeliest: list[int], reply: list[int]) -> bool:
        """Whether greedy decoding gives `reply`: each token the likeliest, and a stop after it unless it was cut."""
        ends = len(reply) >= self.max_new_tokens or likeliest[-1] in self.stop_ids
        return ends and likeliest[:-1] == reply


def decoder_reference(network: PreTrainedModel, prepared: Prepared) -> Reference:
    """The live decoder on held-out prompts, or on the starts of rows where there are no prompts."""
    examples = (prepared.held_out or prepared.train_examples)[:MAX_PROMPTS]
    if prepared.tokeniser.template is None:
        prompts = [prepared.train.row(index)[0][:64].tolist() for index in range(min(len(prepared.train), MAX_PROMPTS))]
        longest = 32
    else:
        tokeniser = prepared.tokeniser
        prompts = [tokeniser.prompt(example.unanswered) for example in examples]
        longest = min(128, tokeniser.longest_reply(examples) + 8)
    stop_ids = prepared.tokeniser.stop_ids()

    def answers_of(asked: Any) -> list[list[int]]:
        return answer(asked, prompts, stop_ids=stop_ids, max_new_tokens=longest, batch_size=32)

    return Reference(network, prompts, answers_of(network), stop_ids, longest, answers_of, _log_probabilities)


def encoder_decoder_reference(network: Any, prepared: Prepared) -> Reference:
    """The live encoder-decoder on held-out sources, or on those that it was trained on."""
    rows = prepared.evaluation if len(prepared.evaluation) else prepared.train
    prompts = [rows.row(index)[0].tolist() for index in range(min(len(rows), MAX_PROMPTS))]
    assert rows.answers is not None, "rows of an encoder-decoder have answers"
    longest = min(128, int(rows.answers.lengths[: len(prompts)].max()) + 8)

    def answers_of(asked: Any) -> list[list[int]]:
        return answer_sources(asked, prompts, max_new_tokens=longest, batch_size=32)

    # Tokens that a model forces into its answers are not the likeliest, so its answers have to be written.
    return Reference(
        network, prompts, answers_of(network), [], longest, answers_of, answer_log_probabilities, read_off=False
    )


@torch.inference_mode()
def _log_probabilities(network: PreTrainedModel, prompt: Sequence[int], reply: Sequence[int]) -> torch.Tensor:
    """[len(reply) + 1, V] float32: the distribution of each token of the reply and of the one after it."""
    device = next(network.parameters()).device
    ids, count = torch.tensor([[*prompt, *reply]], device=device), len(reply) + 1
    known = signature(network.forward).parameters
    kept = {"logits_to_keep": count} if "logits_to_keep" in known else {}
    return torch.log_softmax(network(input_ids=ids, use_cache=False, **kept).logits[0, -count:].float(), -1)
