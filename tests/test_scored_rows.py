"""`whet eval` on other rows: each choice has results of its own, losses are those of plain transformers, every turn."""

from __future__ import annotations

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
from whet.base.errors import UserError
from whet.cli import run as command
from whet.engine.answer import losses as engine_losses
from whet.evaluation.texts import head_metric
from whet.evaluation.turns import turns_of
from whet.recipe import Parsed
from whet.runs import Run
from whet.training.run import train


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def message(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


DIALOGUES: list[dict[str, Any]] = [
    {
        "messages": [
            message("system", "Be brief."),
            message("user", f"first question {index}"),
            message("assistant", "the quick brown fox"),
            message("user", "and then?"),
            message("assistant", "jumps over the lazy dog"),
        ]
    }
    for index in range(6)
]


@pytest.fixture(scope="module")
def chat_run(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    place = tmp_path_factory.mktemp("dialogues")
    data = tiny.write_rows(place / "train.jsonl", DIALOGUES[:4])  # type: ignore[arg-type]
    held = tiny.write_rows(place / "held.jsonl", DIALOGUES[4:])  # type: ignore[arg-type]
    changes = {"data__eval_dataset": str(held), "train__max_steps": 6, "eval__max_new_tokens": 6}
    settings = tiny.settings(model_dir, data, place / "run", **changes)
    del settings["data.val_size"]
    from whet.recipe import parse

    return train(parse(None, tiny.words(settings)))


def plain_loss(run: Run, *, tuned: bool) -> float:
    """Mean loss of the assistants' tokens of the held-out rows in plain transformers and PEFT, one row at a time."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(run.recipe.model.path)
    model: Any = AutoModelForCausalLM.from_pretrained(run.recipe.model.path, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(run.adapter)) if tuned else model
    total, count = 0.0, 0
    for row in DIALOGUES[4:]:
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        spans = []
        for turn in (row["messages"][2], row["messages"][4]):
            start = text.index(turn["content"])
            spans.append((start, text.index("<|im_end|>", start) + len("<|im_end|>")))
        ids = torch.tensor([encoded.input_ids])
        with torch.inference_mode():
            log = model.eval()(input_ids=ids).logits[0].log_softmax(-1)
        for place, (first, last) in enumerate(encoded.offset_mapping):
            if any(start <= first and last <= end for start, end in spans):
                total -= float(log[place - 1, ids[0, place]])
                count += 1
    return total / count


def test_the_losses_are_those_of_plain_transformers(chat_run: Run) -> None:
    result = whet.evaluate(chat_run)
    for side in ("base", "tuned"):
        loss = plain_loss(chat_run, tuned=side == "tuned")
        assert result[side]["metrics"]["loss"] == pytest.approx(loss, abs=2e-4), side
        assert result[side]["metrics"]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-3)
    assert result["tuned"]["metrics"]["loss"] < result["base"]["metrics"]["loss"], "the two are apart"
    difference = result["difference"]["loss"]
    moved = result["tuned"]["metrics"]["loss"] - result["base"]["metrics"]["loss"]
    assert difference["mean_difference"] == pytest.approx(moved, abs=1e-6)
    assert difference["low"] <= moved + 1e-9
    assert moved - 1e-9 <= difference["high"] < 0
    assert list(result["tuned"]["metrics"])[:2] == ["loss", "perplexity"]


def test_the_tuned_loss_is_that_of_training(chat_run: Run) -> None:
    last = [row for row in chat_run.lines("metrics.jsonl") if row["kind"] == "eval"][-1]["eval_loss"]
    assert whet.evaluate(chat_run)["tuned"]["metrics"]["loss"] == pytest.approx(last, abs=2e-4)


def test_a_planted_shift_of_the_targets_is_seen(chat_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    right = engine_losses._summed
    monkeypatch.setattr(engine_losses, "_summed", lambda logits, targets, *more: right(logits, targets.roll(1), *more))
    with pytest.raises(AssertionError):
        test_the_losses_are_those_of_plain_transformers(chat_run)


def test_every_answer_of_a_dialogue_is_scored_with_its_roles(chat_run: Run) -> None:
    result = whet.evaluate(chat_run)
    assert (result["rows"], result["conversations"]) == (4, 2)
    shown = lines(chat_run.results / "predictions.jsonl")
    assert [row["reference"] for row in shown] == ["the quick brown fox", "jumps over the lazy dog"] * 2
    assert [[turn["role"] for turn in row["prompt"]] for row in shown[:2]] == [
        ["system", "user"], ["system", "user", "assistant", "user"],
    ]  # fmt: skip
    again = whet.predict(chat_run, [row["prompt"] for row in shown], max_new_tokens=6)
    assert [one["text"] for one in again] == [row["tuned"] for row in shown]


def test_only_learned_turns_are_scored_and_conversations_are_the_rows_of_an_interval() -> None:
    from whet.data.example import Example, Message

    def chat(*weights: float | None) -> Example:
        turns = [(Message("user", "q"), Message("assistant", "a", weight=weight)) for weight in weights]
        return Example("x", tuple(one for pair in turns for one in pair), None, "f", 1)

    given = [chat(None, 0.0, None), chat(None)]
    turns = turns_of(given, 10, "assistant")
    assert [len(example.messages or ()) for example in turns.examples] == [2, 6, 2]
    assert [len(example.messages or ()) for example in turns_of(given, 10, "last_assistant").examples] == [6, 2]
    values = [1.0, 0.0, 1.0]
    grouped = turns.by_conversation(values)
    assert len(grouped) == 2
    assert np.mean(grouped) == pytest.approx(np.mean(values))
    single = turns_of([chat(None), chat(None)], 10, "assistant")
    assert single.by_conversation([0.0, 1.0]) == [0.0, 1.0], "what is right or wrong stays so"


def test_each_choice_of_rows_has_results_of_its_own(recipe: Callable[..., Parsed], tmp_path: Path) -> None:
    run = train(recipe(train__max_steps=1, data__val_size=3, data__test_size=5, eval__max_new_tokens=4))
    whet.evaluate(run)
    held = (run.results / "predictions.jsonl").read_bytes(), (run.results / "mismatches.jsonl").read_bytes()
    whet.evaluate(run, split="test")
    assert len(lines(run.results / "test.predictions.jsonl")) == 5
    (tmp_path / "a").mkdir()
    for folder, rows in ((tmp_path, tiny.rows(7)), (tmp_path / "a", tiny.rows(4))):
        tiny.write_rows(folder / "new.jsonl", rows)
        result = whet.evaluate(run, data=str(folder / "new.jsonl"))
        assert (result["rows"], result["split"], result["of"]) == (len(rows), "data", "rows of new.jsonl")
    assert sorted(len(lines(path)) for path in run.results.glob("data-new-*.predictions.jsonl")) == [4, 7]
    assert held == ((run.results / "predictions.jsonl").read_bytes(), (run.results / "mismatches.jsonl").read_bytes())


def test_another_file_gives_the_scores_of_the_same_rows_held_out(tmp_path: Path) -> None:
    """Also with one class alone, with the columns of the run or whet's own, and without the training rows."""
    records = [{"review": row["text"], "stars": row["label"]} for row in tasks.rows("classification")]
    columns = {"data__columns": {"text": "review", "label": "stars"}}
    model = tasks.save_model("bert", tmp_path / "bert")
    run = tasks.make_run("bert", "classification", model, tmp_path, records=records, **columns)
    held = whet.evaluate(run)
    shown = lines(run.results / "predictions.jsonl")
    (tmp_path / "rows.jsonl").unlink()
    for names in (("review", "stars"), ("text", "label")):
        new = [dict(zip(names, (row["text"], row["label"]), strict=True)) for row in shown]
        file = tiny.write_rows(tmp_path / f"{names[0]}.jsonl", new)
        result = whet.evaluate(run, data=str(file))
        assert result["tuned"]["metrics"] == pytest.approx(held["tuned"]["metrics"])
        (again,) = run.results.glob(f"data-{names[0]}-*.predictions.jsonl")
        assert [row["predicted"] for row in lines(again)] == [row["predicted"] for row in shown]
    one = [row for row in shown if row["label"] == shown[0]["label"]]
    file = tiny.write_rows(tmp_path / "one.jsonl", [{"text": row["text"], "label": row["label"]} for row in one])
    assert whet.evaluate(run, data=str(file))["rows"] == len(one)
    bad = tiny.write_rows(tmp_path / "bad.jsonl", [{"text": "a", "label": "billing"}, {"text": "b", "label": "bill"}])
    with pytest.raises(UserError, match="not trained on this label") as caught:
        whet.evaluate(run, data=str(bad))
    assert (caught.value.row, caught.value.fix) == (2, "did you mean billing?")
    assert command(["eval", str(run.path), "--data", str(tmp_path / "no.csv")]) == 2
    assert command(["eval", str(run.path), "--data", str(file), "--split", "test"]) == 2


def test_values_are_scored_on_another_file(tmp_path: Path) -> None:
    model = tasks.save_model("bert", tmp_path / "bert")
    run = tasks.make_run("bert", "regression", model, tmp_path)
    file = tiny.write_rows(tmp_path / "new.jsonl", [{"text": "a", "label": 1.5}, {"text": "b", "label": 2}])  # type: ignore[list-item]
    assert whet.evaluate(run, data=str(file))["rows"] == 2


def test_rows_of_the_training_file_are_said_to_flatter(chat_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    whet.evaluate(chat_run, data=chat_run.recipe.data.dataset)
    assert "will flatter" in capsys.readouterr().err


def test_raw_text_has_a_loss(recipe: Callable[..., Parsed], tmp_path: Path) -> None:
    data = tiny.write_rows(tmp_path / "raw.jsonl", [{"text": " ".join(tiny.ENGLISH[i:])} for i in range(8)])
    run = train(recipe(data__dataset=str(data), data__val_size=3, train__max_steps=2))
    result = whet.evaluate(run)
    last = [row for row in run.lines("metrics.jsonl") if row["kind"] == "eval"][-1]["eval_loss"]
    assert result["tuned"]["metrics"]["loss"] == pytest.approx(last, abs=2e-4)
    assert set(result["tuned"]["metrics"]) == {"loss", "perplexity"}


def test_own_metrics_stand_beside_the_others(chat_run: Run) -> None:
    def short(predictions: list[str], references: list[str]) -> dict[str, float]:
        assert len(predictions) == len(references) == 4
        return {"mean_words": sum(len(text.split()) for text in predictions) / 4}

    result = whet.evaluate(chat_run, compute_metrics=short)
    assert {"mean_words", "exact_match"} <= set(result["tuned"]["metrics"])
    for wrong in ({"exact_match": 1.0}, {"x": float("nan")}, {"x": "y"}):
        with pytest.raises(UserError):
            whet.evaluate(chat_run, compute_metrics=lambda *_, found=wrong: found)


def test_the_first_number_fits_the_answers() -> None:
    metrics = {"loss": 1.0, "perplexity": 2.0, "exact_match": 0.5}
    assert head_metric(metrics, ["yes", "no", "maybe so"]) == "exact_match"
    assert head_metric(metrics, ["a long answer of very many words", "another long answer of many words"]) == "loss"
    assert (
        head_metric(metrics | {"category_accuracy": 1.0}, ["a long answer of very many words"]) == "category_accuracy"
    )
    assert head_metric({"token_f1": 0.1}, ["a long answer of very many words"]) == "token_f1"
