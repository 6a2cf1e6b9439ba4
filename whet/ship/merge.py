"""Fold the adapter into plain weights, and prove that the result answers as the trained model does.

What the adapter was trained on (the dequantised base) and the 16-bit base are both tried, in the type of the
checkpoint first and in fp32 when that loses answers; each is written, read back by plain transformers, and compared
with the live adapter on held-out prompts: KL divergence of the next-token distributions, top-1 agreement, and whole
greedy answers. The first candidate that agrees everywhere is kept, else the closest; too far away is refused. The
certificate lies beside the weights.

Whether an answer is the same is read off the distributions along the live one: greedy decoding repeats it if and only
if each of its tokens is the likeliest. So one pass judges a candidate, and only one that would be kept has to write its
answers, which takes a pass for each token and counts. What the live adapter says is computed once while it fits.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from whet.base.console import say
from whet.base.errors import UserError
from whet.base.files import whole_directory, write_json
from whet.data.goldens import FILE as CONTRACT
from whet.data.goldens import check_contract, write_contract
from whet.data.prepare import Prepared, prepare
from whet.data.template import use_template
from whet.engine.config import Model
from whet.engine.device import DTYPES, PACKED, Placement
from whet.engine.generate import answer
from whet.engine.linear import FrozenLinear
from whet.engine.load import load_config, load_model, load_tokenizer, longest_input
from whet.engine.open import Opened, open_trained
from whet.runs import Run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_PROMPTS = 200
KEPT_BYTES = 1 << 30  # of the live distributions, [T, V] fp32 each; what is over is computed again for each candidate
MEAN_KL_LIMIT = 0.05
CERTIFICATE = "whet_merge.json"


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
    def perfect(self) -> bool:
        return self.greedy_agreement == 1.0 and self.mean_kl <= MEAN_KL_LIMIT


@dataclass(frozen=True)
class Reference:
    """What the live adapter says: greedy answers, and log-probabilities along each, on the CPU and while they fit."""

    network: PreTrainedModel
    prompts: list[list[int]]
    answers: list[list[int]]
    stop_ids: list[int]
    max_new_tokens: int
    kept: dict[int, torch.Tensor] = field(default_factory=dict)

    def log_probabilities(self, index: int) -> torch.Tensor:
        """[T + 1, V] of answer `index`. Raises UserError for what is not a number."""
        if index in self.kept:
            return self.kept[index]
        found = _log_probabilities(self.network, self.prompts[index], self.answers[index]).cpu()
        if bool(found.isnan().any()):
            raise UserError(
                "the trained model answers with NaN, so there is nothing to compare a merged one with",
                fix="train again with a lower train.learning_rate",
            )
        if sum(one.nbytes for one in self.kept.values()) + found.nbytes <= KEPT_BYTES:
            self.kept[index] = found
        return found


def merge(run: Run, out: Path) -> dict[str, Any]:
    """Write a plain transformers model to `out` and the certificate to results/merge.json; returns the certificate.

    Raises UserError when the method cannot be merged, `out` is in the way, or no candidate is near enough.
    """
    recipe = run.recipe
    if not recipe.method.can.mergeable:
        raise UserError(
            f"a {recipe.method.name} run has no adapter to merge", file=str(run.path), field="method.name",
            expected="lora", fix=f"{run.model} is a plain model already",
        )  # fmt: skip
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not (out / CERTIFICATE).is_file():
        raise UserError(
            "the output is in the way: it is a file or a directory that is not empty",
            file=str(out),
            fix="give a new directory",
        )
    tokenizer = load_tokenizer(recipe.model)
    use_template(tokenizer, recipe.model.chat_template)
    prepared = prepare(recipe.data, tokenizer, longest_input(load_config(recipe.model)))
    check_contract(prepared.tokeniser, run.adapter / CONTRACT)
    live = open_trained(recipe.model, recipe.base, run.adapter, recipe.method)
    reference = _reference(live.answering, prepared)
    tried: list[Agreement] = []
    best: tuple[Agreement, Path] | None = None
    with tempfile.TemporaryDirectory() as scratch:
        for base_kind, dtype in _candidates(recipe.base.storage or "", live.network):
            place = Path(scratch) / f"{base_kind}-{dtype}"
            _write_candidate(run, live, base_kind, dtype, place, reference.stop_ids)
            bar = best[0].greedy_agreement if best else 0.0
            found = _compare(base_kind, dtype, place, live, reference, bar)
            tried.append(found)
            say(f"merged on {base_kind} base in {dtype}: mean KL {found.mean_kl:.2g}, "
                f"top-1 {found.top1_agreement:.2%}, greedy answers {found.greedy_agreement:.2%}")  # fmt: skip
            if best is None or (-found.greedy_agreement, found.mean_kl) < (-best[0].greedy_agreement, best[0].mean_kl):
                best = (found, place)
            if found.perfect:
                break
        assert best is not None
        certificate = _certificate(best[0], tried, reference, out)
        if not best[0].mean_kl <= MEAN_KL_LIMIT:
            run.write("results/merge.json", certificate | {"path": None})
            raise UserError(
                "no merged model is near enough to the adapter, so none was written", file=str(run.path),
                found=f"mean KL {best[0].mean_kl:.3g}", expected=f"at most {MEAN_KL_LIMIT}",
                fix="serve the adapter itself; results/merge.json holds the figures",
            )  # fmt: skip
        with whole_directory(out) as directory:
            for file in best[1].iterdir():
                file.rename(directory / file.name) if _same_disk(file, directory) else _copy(file, directory)
            tokenizer.save_pretrained(str(directory))
            if prepared.tokeniser.template is not None:
                write_contract(prepared.tokeniser, directory / CONTRACT)
            write_json(directory / CERTIFICATE, certificate)
    run.write("results/merge.json", certificate)
    return certificate


def _candidates(storage: str, network: PreTrainedModel) -> list[tuple[str, str]]:
    """(base, dtype) in the order in which they are tried: what was trained on first, small types first."""
    bases = ["dequantised", "16-bit"] if storage in PACKED else ["trained"]
    return [(base, dtype) for dtype in ("bf16", "fp32") for base in bases]


def _write_candidate(run: Run, live: Opened, base_kind: str, dtype: str, place: Path, stop_ids: list[int]) -> None:
    """base and what was trained, folded together in fp32, as a plain model in `dtype`."""
    target = Placement(torch.device("cpu"), "fp32", torch.float32, False, {})
    plain = load_model(run.recipe.model, target)
    with torch.no_grad():
        if base_kind == "dequantised":
            _copy_dequantised(live.network, plain)
        plain = run.recipe.method.fold(plain, run.trained)
    plain.to(DTYPES[dtype])  # type: ignore[arg-type]
    plain.set_attn_implementation("sdpa")
    plain.generation_config.eos_token_id = stop_ids  # type: ignore[union-attr]
    plain.save_pretrained(str(place), safe_serialization=True)


def _copy_dequantised(source: PreTrainedModel, plain: PreTrainedModel) -> None:
    """Give `plain` the weights of every quantised layer as they are computed with."""
    for found, module in source.named_modules():
        if isinstance(module, FrozenLinear):
            name = found.removesuffix(".base_layer")
            plain.get_submodule(name).weight.copy_(module.dense(torch.float32).to("cpu"))  # type: ignore[union-attr,operator]


def _reference(network: PreTrainedModel, prepared: Prepared) -> Reference:
    examples = (prepared.held_out or prepared.train_examples)[:MAX_PROMPTS]
    if prepared.tokeniser.template is None:
        prompts = [prepared.train.row(index)[0][:64].tolist() for index in range(min(len(prepared.train), MAX_PROMPTS))]
        longest = 32
    else:
        tokeniser = prepared.tokeniser
        prompts = [tokeniser.prompt(example.question) for example in examples]
        longest = min(128, tokeniser.longest_reply(examples) + 8)
    stop_ids = prepared.tokeniser.stop_ids()
    answers_ids = answer(network, prompts, stop_ids=stop_ids, max_new_tokens=longest, batch_size=32)
    return Reference(network, prompts, answers_ids, stop_ids, longest)


def _compare(base_kind: str, dtype: str, place: Path, live: Opened, reference: Reference, bar: float) -> Agreement:
    """Read the candidate back from the disk as a stranger would, in the arithmetic of the live model.

    bar: greedy agreement under which the candidate cannot be kept, so that it need not answer.
    """
    compute = live.placement.compute
    storage = "fp32" if compute == torch.float32 else "bf16"
    network = load_model(Model(path=str(place)), Placement(live.placement.device, storage, compute, False, {}))
    divergences, agreed, same = [], [], []
    for index, (prompt, reply) in enumerate(zip(reference.prompts, reference.answers, strict=True)):
        second = _log_probabilities(network, prompt, reply)
        first = reference.log_probabilities(index).to(second.device)
        divergences.append((first.exp() * (first - second)).sum(-1).clamp_min(0))
        agreed.append((first.argmax(-1) == second.argmax(-1)).float())
        same.append(_repeats(second.argmax(-1).tolist(), reply, reference))
    kl, top1 = torch.cat(divergences), torch.cat(agreed)
    greedy = sum(same) / max(1, len(same))
    if greedy >= bar and float(kl.mean()) <= MEAN_KL_LIMIT:
        options = {"stop_ids": reference.stop_ids, "max_new_tokens": reference.max_new_tokens, "batch_size": 32}
        answers = answer(network, reference.prompts, **options)
        greedy = sum(a == b for a, b in zip(answers, reference.answers, strict=True)) / max(1, len(answers))
    return Agreement(base_kind, dtype, float(kl.mean()), float(kl.max()), float(top1.mean()), greedy)


def _repeats(likeliest: list[int], reply: list[int], reference: Reference) -> bool:
    """Whether greedy decoding gives `reply`: each token the likeliest, and a stop after it unless it was cut off."""
    ends = len(reply) >= reference.max_new_tokens or likeliest[-1] in reference.stop_ids
    return ends and likeliest[:-1] == reply


@torch.inference_mode()
def _log_probabilities(network: PreTrainedModel, prompt: Sequence[int], reply: Sequence[int]) -> torch.Tensor:
    """[len(reply) + 1, V] float32: the distribution of each token of the reply and of the one after it."""
    device = next(network.parameters()).device
    ids, count = torch.tensor([[*prompt, *reply]], device=device), len(reply) + 1
    known = signature(network.forward).parameters
    kept = {"logits_to_keep": count} if "logits_to_keep" in known else {}
    return torch.log_softmax(network(input_ids=ids, use_cache=False, **kept).logits[0, -count:].float(), -1)


def _certificate(best: Agreement, tried: list[Agreement], reference: Reference, out: Path) -> dict[str, Any]:
    return {
        "chosen": f"{best.name} base, {best.dtype}",
        "agreement": best.greedy_agreement,
        "top1_agreement": best.top1_agreement,
        "kl": best.mean_kl,
        "max_kl": best.max_kl,
        "prompts": len(reference.prompts),
        "positions": sum(len(reply) + 1 for reply in reference.answers),
        "candidates": [asdict(candidate) for candidate in tried],
        "path": str(out),
    }


def _same_disk(file: Path, directory: Path) -> bool:
    return file.stat().st_dev == directory.stat().st_dev


def _copy(file: Path, directory: Path) -> None:
    import shutil

    shutil.copy2(file, directory / file.name)
