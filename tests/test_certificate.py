"""The certificate of a merge says what plain transformers and PEFT say: how far the merged model is from the live one.

A merge that is a little wrong on purpose gives figures that are not zero; the same figures are computed again from the
files alone. A certificate that compares a model with itself, or with the base, is planted and has to be seen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tasks
import torch

import whet
from whet import runs
from whet.base.errors import UserError
from whet.methods.layers.lora_layer import LoraLinear
from whet.methods.lora import Lora
from whet.runs import Run
from whet.ship import agreement, label_agreement

# Of the update that is merged. The first is near enough to be accepted; the second leaves it out, so that no wrong
# figure is right by chance, and is accepted because the limits are lifted.
NEAR = {"causal": 1.02, "classification": 1.02, "regression": 1.005}
KINDS = {"causal": "llama", "classification": "bert", "regression": "bert"}
Fault = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    found = {}
    for task, kind in KINDS.items():
        model = tasks.save_model(kind, tmp_path_factory.mktemp(kind))
        place = tmp_path_factory.mktemp(f"run-{task}")
        found[task] = tasks.make_run(kind, "seq2seq" if task == "causal" else task, model, place, data__val_size=6)
    return found


def plain(run: Run, out: Path) -> tuple[Any, Any]:
    """(base with PEFT's adapter, the merged model as it lies on the disk), both in fp32."""
    import peft
    import transformers

    owner, options = transformers.AutoModelForCausalLM, {}
    if run.task.labelled:
        owner, options = transformers.AutoModelForSequenceClassification, {"num_labels": len(run.task.labels) or 1}
    base = owner.from_pretrained(run.recipe.model.path, dtype=torch.float32, **options)
    live = peft.PeftModel.from_pretrained(base, str(run.adapter)).eval()
    return live, owner.from_pretrained(str(out), dtype=torch.float32).eval()


@torch.inference_mode()
def figures_of_texts(run: Run, out: Path, longest: int) -> dict[str, float]:
    """Mean and largest KL along the live greedy answers, top-1 and whole-answer agreement."""
    live, merged = plain(run, out)
    tokenizer = tasks.tokenizer(Path(run.recipe.model.path))
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}
    divergences, agreed, same = [], [], []

    def answer(model: Any, prompt: list[int]) -> list[int]:
        written: list[int] = []
        while len(written) < longest:
            logits = model(input_ids=torch.tensor([prompt + written]), use_cache=False).logits[0, -1]
            if int(logits.argmax()) in ends:
                break
            written.append(int(logits.argmax()))
        return written

    for example in runs.prepared(run.recipe).held_out:
        chat = [{"role": message.role, "content": message.content} for message in example.question]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(text, add_special_tokens=False).input_ids
        reply = answer(live, prompt)
        ids = torch.tensor([prompt + reply])
        one, two = (
            torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :].double(), -1)
            for model in (live, merged)
        )
        divergences += (one.exp() * (one - two)).sum(-1).tolist()
        agreed += (one.argmax(-1) == two.argmax(-1)).double().tolist()
        same.append(float(answer(merged, prompt) == reply))
    return {
        "kl": float(np.mean(divergences)), "max_kl": max(divergences), "top1_agreement": float(np.mean(agreed)),
        "agreement": float(np.mean(same)), "positions": len(divergences), "prompts": len(same),
        "live_held_out_loss": held_out_loss(run, live), "held_out_loss": held_out_loss(run, merged),
    }  # fmt: skip


@torch.inference_mode()
def held_out_loss(run: Run, model: Any) -> float:
    """Mean loss of the learned tokens of all held-out rows, by transformers' own loss."""
    rows, total, count = runs.prepared(run.recipe).evaluation, 0.0, 0
    for index in range(len(rows)):
        ids, learned = (torch.tensor(array.tolist()) for array in rows.row(index))
        labels = ids.masked_fill(~learned, -100)[None]
        total += float(model(input_ids=ids[None], labels=labels, use_cache=False).loss) * int(learned.sum())
        count += int(learned.sum())
    return total / count


@torch.inference_mode()
def figures_of_labels(run: Run, out: Path) -> dict[str, float]:
    """Largest logit difference, mean over rows of the largest change of a probability, share of equal labels."""
    live, merged = plain(run, out)
    tokenizer = tasks.tokenizer(Path(run.recipe.model.path))
    prepared = runs.prepared(run.recipe)
    one, two = [], []
    for source in prepared.evaluation.sources:
        ids = tokenizer(prepared.held_out[int(source)].text, return_tensors="pt").input_ids
        one.append(live(input_ids=ids).logits[0].double())
        two.append(merged(input_ids=ids).logits[0].double())
    first, second = torch.stack(one), torch.stack(two)
    figures = {"max_logit_difference": float((first - second).abs().max()), "prompts": len(one)}
    if run.task.name == "regression":
        return figures | {"change": float((first - second).abs().mean() / first.std(correction=0))}
    change = (first.softmax(-1) - second.softmax(-1)).abs().amax(1)
    same = (first.argmax(1) == second.argmax(1)).double().mean()
    return figures | {"change": float(change.mean()), "agreement": float(same)}


def certificate_holds(run: Run, out: Path, patch: pytest.MonkeyPatch, *, lifted: bool = False) -> None:
    """The figures of a merge that is wrong on purpose are those of plain transformers and PEFT."""
    with patch.context() as planted:
        right, factor = LoraLinear.get_delta_weight, 0.0 if lifted else NEAR[run.task.name]
        planted.setattr(LoraLinear, "get_delta_weight", lambda self, name: factor * right(self, name))
        if lifted:
            planted.setattr(agreement, "MEAN_KL_LIMIT", 1e9)
            planted.setattr(agreement, "LOSS_LIMIT", 1e9)
            planted.setattr(label_agreement, "CHANGE_LIMIT", 1e9)
            planted.setattr(label_agreement, "UNEQUAL_LIMIT", 1.0)
        certificate = whet.merge(run.path, out)
    if run.task.labelled:
        figures = figures_of_labels(run, out)
        assert figures["change"] > 1e-4
    else:
        longest = min(
            128, runs.prepared(run.recipe).row_tokenizer.longest_reply(runs.prepared(run.recipe).held_out) + 8
        )
        figures = figures_of_texts(run, out, longest)
        assert figures["kl"] > 1e-4
    for name, figure in figures.items():
        assert certificate[name] == pytest.approx(figure, rel=1e-4 if lifted else 0.02), name


def compared_with_itself(patch: pytest.MonkeyPatch) -> None:
    """The reference is the merged model."""
    texts = agreement.Reference.compare
    patch.setattr(
        agreement.Reference, "compare",
        lambda self, name, dtype, candidate, best: texts(
            dataclasses.replace(self, live=candidate, remembered={}), name, dtype, candidate, best
        ),
    )  # fmt: skip
    labels = label_agreement.LabelReference.compare

    def compare(self: Any, name: str, dtype: str, candidate: Any, best: Any) -> Any:
        found = label_agreement._logits(candidate, self.rows, self.types)
        return labels(dataclasses.replace(self, logits=found), name, dtype, candidate, best)

    patch.setattr(label_agreement.LabelReference, "compare", compare)


def the_base_is_the_reference(patch: pytest.MonkeyPatch) -> None:
    """What the merged model is held against is the model without its adapter."""
    load, fold = Lora.load, Lora.fold

    def off(self: Any, *given: Any, **more: Any) -> Any:
        model = load(self, *given, **more)
        model.base_model.disable_adapter_layers()
        return model

    def whole(self: Any, *given: Any, **more: Any) -> Any:
        with pytest.MonkeyPatch.context() as inside:
            inside.setattr(Lora, "load", load)
            return fold(self, *given, **more)

    patch.setattr(Lora, "load", off)
    patch.setattr(Lora, "fold", whole)


@pytest.mark.parametrize("lifted", [False, True])
@pytest.mark.parametrize("task", KINDS)
def test_the_certificate_says_what_plain_transformers_and_peft_say(
    task: str, lifted: bool, made: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate_holds(made[task], tmp_path / "out", monkeypatch, lifted=lifted)


@pytest.mark.parametrize("fault", [compared_with_itself, the_base_is_the_reference], ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("task", KINDS)
def test_a_certificate_about_another_model_is_seen(
    task: str, fault: Fault, made: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    with pytest.raises((AssertionError, UserError)):
        certificate_holds(made[task], tmp_path / "out", monkeypatch)
