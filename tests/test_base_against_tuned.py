"""Base against tuned, the sentence that whet stands for: the base answers without what was trained, the tuned model
with it, and the difference is tuned minus base.

The judge shares nothing with whet: answers are computed by plain transformers and PEFT from the files of the run, and
differences from predictions.jsonl by arithmetic of the test's own. Each fault that the evaluation could have is planted
and has to be seen.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tasks
import tiny
import torch

import whet
from whet.engine.answer import state
from whet.evaluation import compare, labels
from whet.methods.bridge import Bridge
from whet.methods.in_place import InPlaceMethod
from whet.methods.lora import Lora
from whet.methods.method import PeftMethod
from whet.runs import Run

NEW_TOKENS = 6
ROWS = 8
LABELLED = ("classification", "multi_label", "regression")
WORDS = [
    "where is my parcel", "cancel it", "송장 번호를 알려 주세요", "the refund did not come", "hello",
    "I moved last week", "주소를 바꾸고 싶어요", "two items are missing from the box",
]  # fmt: skip


# what plain transformers and PEFT say


def plain_base(run: Run, kind: str) -> Any:
    import transformers

    owner = transformers.AutoModelForSeq2SeqLM if kind == "t5" else transformers.AutoModelForCausalLM
    return owner.from_pretrained(run.recipe.model.path, dtype=torch.float32, attn_implementation="eager").eval()


def plain_tuned(run: Run, kind: str) -> Any:
    import peft
    import transformers

    if (run.path / "model").is_dir():
        return transformers.AutoModelForCausalLM.from_pretrained(str(run.path / "model"), dtype=torch.float32).eval()
    if (run.path / "adapter" / "trained.safetensors").is_file():
        from safetensors.torch import load_file

        base, values = plain_base(run, kind), load_file(run.path / "adapter" / "trained.safetensors")
        assert not base.load_state_dict(values, strict=False).unexpected_keys
        return base
    return peft.PeftModel.from_pretrained(plain_base(run, kind), str(run.path / "adapter")).eval()


def plain_answers(model: Any, kind: str, questions: list[str], tokenizer: Any) -> list[str]:
    """Greedy answers, one question at a time."""
    found = []
    for question in questions:
        if kind == "t5":
            ids = tokenizer(question, return_tensors="pt").input_ids
        else:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
            )
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False,
                num_beams=1, pad_token_id=0, eos_token_id=ends if kind != "t5" else 2,
            )[0].tolist()  # fmt: skip
        written = output[1:] if kind == "t5" else output[ids.shape[1] :]
        stop = next((place for place, token in enumerate(written) if token in (ends if kind != "t5" else [2])), None)
        found.append(tokenizer.decode(written[:stop], skip_special_tokens=kind == "t5"))
    return found


# the runs


def make_written_run(kind: str, model: Path, place: Path, **changes: Any) -> tuple[Run, list[str], list[str]]:
    """A run without training, and what plain base and tuned answer to its held-out rows.

    The references are written afterwards: half are the tuned model's own answers, a quarter the base's, the others
    neither's, so that the difference is +1/4 and every exchange shows.
    """
    held = place / "held.jsonl"

    def write(answers: list[str]) -> None:
        pairs = zip(WORDS, answers, strict=True)
        tiny.write_rows(held, [{"prompt": question, "completion": answer} for question, answer in pairs])

    write([f"answer {index}" for index in range(ROWS)])
    run = tasks.make_run(
        kind, "seq2seq", model, place, data__eval_dataset=str(held), data__val_size=0,
        eval__max_new_tokens=NEW_TOKENS, **changes,
    )  # fmt: skip
    tokenizer = tasks.tokenizer(model)
    base = plain_answers(plain_base(run, kind), kind, WORDS, tokenizer)
    tuned = plain_answers(plain_tuned(run, kind), kind, WORDS, tokenizer)
    apart = [row for row in range(ROWS) if base[row] != tuned[row] and base[row].strip() and tuned[row].strip()]
    assert len(apart) >= 6
    write([tuned[row] if row in apart[:4] else base[row] if row in apart[4:6] else "neither" for row in range(ROWS)])
    return run, base, tuned


def lines(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.results / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


# what has to hold


def holds_for_texts(run: Run, base: list[str], tuned: list[str]) -> None:
    """The answers are the plain ones, and the report's numbers follow from them."""
    result = whet.evaluate(run.path)
    shown = {row["prompt"]: row for row in lines(run)}
    assert list(shown) == WORDS
    assert [row["base"] for row in shown.values()] == base
    assert [row["tuned"] for row in shown.values()] == tuned
    exact = {
        side: [float(row[side].strip() == row["reference"].strip()) for row in shown.values()]
        for side in ("base", "tuned")
    }
    for side, rows in exact.items():
        assert result[side]["metrics"]["exact_match"] == pytest.approx(sum(rows) / ROWS), side
    difference_holds(result["difference"]["exact_match"], exact["base"], exact["tuned"])
    assert result["difference"]["exact_match"]["mean_difference"] == pytest.approx(2 / ROWS), "4 rows won, 2 lost"


def difference_holds(difference: dict[str, Any], base: list[float], tuned: list[float]) -> None:
    """Tuned minus base over the rows, an interval around it, and for 0/1 rows the binomial p-value."""
    rows = [after - before for before, after in zip(base, tuned, strict=True)]
    mean = sum(rows) / len(rows)
    assert difference["mean_difference"] == pytest.approx(mean, abs=1e-6)
    assert difference["low"] <= mean + 1e-9
    assert mean - 1e-9 <= difference["high"]
    draws = np.random.default_rng(5).choice(rows, (4000, len(rows))).mean(1)
    spread = max(float(np.std(draws)), 1e-6)
    assert abs(difference["low"] - float(np.quantile(draws, 0.025))) < 0.5 * spread
    assert abs(difference["high"] - float(np.quantile(draws, 0.975))) < 0.5 * spread
    if difference["test"] == "mcnemar":
        won, lost = sum(row > 0 for row in rows), sum(row < 0 for row in rows)
        tail = sum(math.comb(won + lost, k) for k in range(min(won, lost) + 1)) / 2 ** (won + lost)
        assert difference["p_value"] == pytest.approx(min(1.0, 2 * tail))


Fault = Callable[[pytest.MonkeyPatch], None]


def base_with_the_adapter(patch: pytest.MonkeyPatch) -> None:
    """The base answers with the adapter on."""
    for owner in (PeftMethod, Lora):
        patch.setattr(owner, "base_only", lambda self, model: contextlib.nullcontext(), raising=False)


def tuned_without_the_adapter(patch: pytest.MonkeyPatch) -> None:
    """The tuned model answers with the adapter off."""
    right = Lora.load

    def load(self: Any, *given: Any, **more: Any) -> Any:
        model = right(self, *given, **more)
        model.base_model.disable_adapter_layers()
        return model

    patch.setattr(Lora, "load", load)
    base_with_the_adapter(patch)  # leaving it would switch the adapter on


def exchanged(patch: pytest.MonkeyPatch) -> None:
    """The base answers as the tuned model and the other way round."""
    tuned_without_the_adapter(patch)

    @contextlib.contextmanager
    def base_only(self: Any, model: Any) -> Any:
        model.base_model.enable_adapter_layers()
        try:
            yield
        finally:
            model.base_model.disable_adapter_layers()

    patch.setattr(Lora, "base_only", base_only, raising=False)


def turned(patch: pytest.MonkeyPatch) -> None:
    """The difference is base minus tuned."""
    right = compare.Paired
    patch.setattr(compare, "Paired", lambda mean, low, high, p, test: right(-mean, -high, -low, p, test))


def half_the_interval(patch: pytest.MonkeyPatch) -> None:
    """The interval is not around the difference."""
    right = compare.Paired
    patch.setattr(compare, "Paired", lambda mean, low, high, p, test: right(mean, 0.0, high, p, test))


def dropout_stays_on(patch: pytest.MonkeyPatch) -> None:
    """The model answers as it trains: its dropout draws at every question."""
    right = Lora.load
    patch.setattr(Lora, "load", lambda self, *given, **more: right(self, *given, **more).train())
    patch.setattr(state, "evaluating", lambda model: contextlib.nullcontext())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: tasks.save_model(kind, tmp_path_factory.mktemp(kind)) for kind in ("llama", "bert", "t5")}


@pytest.fixture(scope="module")
def written(
    models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Run, list[str], list[str]]]:
    return {kind: make_written_run(kind, models[kind], tmp_path_factory.mktemp(f"run-{kind}")) for kind in KINDS}


KINDS = {"llama": "a decoder", "t5": "an encoder-decoder"}


@pytest.mark.parametrize("kind", KINDS)
def test_base_and_tuned_answer_as_plain_transformers_and_peft_do(kind: str, written: dict[str, Any]) -> None:
    holds_for_texts(*written[kind])


@pytest.mark.parametrize(
    "fault", [base_with_the_adapter, tuned_without_the_adapter, exchanged, turned, half_the_interval],
    ids=lambda fault: fault.__name__,
)  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_fault_in_the_comparison_of_texts_is_seen(
    kind: str, fault: Fault, written: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        holds_for_texts(*written[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_off_in_evaluation_and_would_be_seen(
    kind: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = make_written_run(kind, models[kind], tmp_path, method__lora_dropout=0.6)
    holds_for_texts(*given)
    dropout_stays_on(monkeypatch)
    with pytest.raises(AssertionError):
        holds_for_texts(*given)


@pytest.mark.parametrize(
    "changes",
    [
        {"method__name": "full", "method__save_dtype": "fp32"}, {"method__name": "ia3"}, {"method__name": "prompt"},
        {"method__name": "freeze", "method__layers": 1},
    ],
    ids=lambda changes: changes["method__name"],
)  # fmt: skip
def test_other_ways_to_leave_out_what_was_trained(
    changes: dict[str, Any], models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole model of its own, PEFT's own layers, virtual tokens in front of a row, other values in the network."""
    given = make_written_run("llama", models["llama"], tmp_path, **changes)
    holds_for_texts(*given)
    if changes["method__name"] == "full":  # the planted fault: the base is read from what was trained
        base = Path(given[0].recipe.model.path) / "model.safetensors"
        right = base.read_bytes()
        base.write_bytes((given[0].path / "model" / "model.safetensors").read_bytes())
        try:
            with pytest.raises(AssertionError):
                holds_for_texts(*given)
        finally:
            base.write_bytes(right)
    else:
        for owner in (Bridge, InPlaceMethod):
            monkeypatch.setattr(owner, "base_only", lambda self, model: contextlib.nullcontext())
        with pytest.raises(AssertionError):
            holds_for_texts(*given)


# labelled tasks: the baseline is the best constant answer


@pytest.fixture(scope="module")
def labelled(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    pairs = {"classification": "llama", "multi_label": "llama", "regression": "bert"}
    return {
        task: tasks.make_run(kind, task, models[kind], tmp_path_factory.mktemp(task)) for task, kind in pairs.items()
    }


def plain_logits(run: Run, task: str, texts: list[str]) -> np.ndarray:
    """[R, C] of plain transformers with PEFT's adapter and head, one text at a time."""
    import peft
    import transformers

    transformers.set_seed(0)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        run.recipe.model.path, num_labels=1 if task == "regression" else len(tasks.NAMES), dtype=torch.float32
    )
    model = peft.PeftModel.from_pretrained(base, str(run.path / "adapter")).eval()
    tokenizer = tasks.tokenizer(Path(run.recipe.model.path))
    with torch.inference_mode():
        rows = [model(input_ids=tokenizer(text, return_tensors="pt").input_ids).logits[0] for text in texts]
    return torch.stack(rows).numpy()


def row_scores(task: str, answers: list[Any], references: list[Any]) -> tuple[str, list[float]]:
    """A metric that is a mean of rows, and its rows."""
    pairs = list(zip(answers, references, strict=True))
    if task == "regression":
        return "mse", [(answer - reference) ** 2 for answer, reference in pairs]
    if task == "classification":
        return "accuracy", [float(answer == reference) for answer, reference in pairs]
    count = len(tasks.NAMES)
    return "hamming_accuracy", [1 - len({*answer} ^ {*reference}) / count for answer, reference in pairs]


def constant_answer(task: str, references: list[Any]) -> Any:
    """The best that can be said of every row alike."""
    if task == "regression":
        return sum(references) / len(references)
    names = sorted(tasks.NAMES)
    if task == "classification":
        return max(names, key=references.count)
    return [name for name in names if 2 * sum(name in reference for reference in references) > len(references)]


def holds_for_labels(run: Run, task: str) -> None:
    """Predictions are plain PEFT's, the baseline is the best constant, and the difference is theirs."""
    result = whet.evaluate(run.path)
    shown = lines(run)
    assert len(shown) == 12
    logits = plain_logits(run, task, [row["text"] for row in shown])
    predicted, references = [row["predicted"] for row in shown], [row["label"] for row in shown]
    names = sorted(tasks.NAMES)
    if task == "regression":
        assert predicted == pytest.approx(logits[:, 0].tolist(), abs=1e-4)
    elif task == "classification":
        assert predicted == [names[index] for index in logits.argmax(1)]
    else:
        assert predicted == [[name for name, value in zip(names, row, strict=True) if value > 0] for row in logits]
    metric, tuned = row_scores(task, predicted, references)
    _, base = row_scores(task, [constant_answer(task, references)] * 12, references)
    assert result["tuned"]["metrics"][metric] == pytest.approx(sum(tuned) / 12, rel=1e-4)
    assert result["base"]["metrics"][metric] == pytest.approx(sum(base) / 12, rel=1e-4)
    assert sum(tuned) != sum(base), "else no sign shows"
    mean = (sum(tuned) - sum(base)) / 12
    difference = result["difference"][metric]
    assert difference["mean_difference"] == pytest.approx(mean, rel=1e-4)
    assert difference["low"] <= mean * (1 - 1e-4 * (mean < 0)) <= difference["high"] + 1e-9


def another_constant(patch: pytest.MonkeyPatch) -> None:
    """The baseline says of every row something else than the best."""
    right = labels.majority

    def wrong(references: Any) -> Any:
        best = right(references)
        return best + 1.0 if best.dtype.kind == "f" else 1 - best if best.ndim == 2 else (best + 1) % len(tasks.NAMES)

    patch.setattr(labels, "majority", wrong)


def no_baseline(patch: pytest.MonkeyPatch) -> None:
    """The tuned model is compared with the references themselves."""
    patch.setattr(labels, "majority", lambda references: references)


@pytest.mark.parametrize("task", LABELLED)
def test_a_labelled_task_is_compared_with_the_best_constant_answer(task: str, labelled: dict[str, Run]) -> None:
    holds_for_labels(labelled[task], task)


@pytest.mark.parametrize("fault", [tuned_without_the_adapter, turned, another_constant, no_baseline],
                         ids=lambda fault: fault.__name__)  # fmt: skip
@pytest.mark.parametrize("task", LABELLED)
def test_a_planted_fault_in_the_comparison_of_labels_is_seen(
    task: str, fault: Fault, labelled: dict[str, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        holds_for_labels(labelled[task], task)


def test_graded_values_of_either_side_are_not_counted_as_right_or_wrong() -> None:
    """McNemar's test is for rows that are right or wrong; a value in between would count as a whole one."""
    whole, graded = [0.0, 1.0, 0.0, 1.0, 0.0], [0.25, 1.0, 0.5, 1.0, 0.0]
    assert compare.paired(whole, graded).test == compare.paired(graded, whole).test == "sign_flip"
    assert compare.paired(whole, whole[::-1]).test == "mcnemar"
