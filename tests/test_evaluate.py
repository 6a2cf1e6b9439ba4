"""`whet eval` scores what was asked for: what the template alone writes before an answer is no part of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from whet import runs
from whet.data.template.row_tokenizer import RowTokenizer
from whet.engine.answer import decode
from whet.engine.answer.generate import DecoderSession
from whet.evaluation import label_metrics, metrics
from whet.evaluation.likelihood import LOSS_METRICS
from whet.evaluation.run import evaluate
from whet.recipe import Parsed
from whet.settings import LabelMetricName, MetricName, names_a_field
from whet.training.run import train

LEAD = "<think>\n\n</think>\n\n"
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{{ '<think>\\n\\n</think>\\n\\n' if loop.last and m.role == 'assistant' }}{{ m.content }}{{ '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def test_the_block_that_was_learned_before_an_answer_is_not_scored(
    recipe: Callable[..., Parsed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    (tmp_path / "own.jinja").write_text(TEMPLATE, encoding="utf-8")
    changes = {"model__chat_template": str(tmp_path / "own.jinja"), "data__val_size": 4, "train__max_steps": 1}
    run = train(recipe(**changes, train__load_best_model_at_end=False))
    tokenizer: Any = AutoTokenizer.from_pretrained(run.recipe.model.path)
    room = []

    def perfect(session: Any, prompts: list[list[int]], *, max_new_tokens: int, **_: Any) -> list[list[int]]:
        """Every prompt answered by what it was trained to be followed by."""
        room.append(max_new_tokens)
        return [answers[tuple(prompt)] for prompt in prompts]

    prepared = runs.prepared(run.recipe)
    answers = {
        tuple(prepared.row_tokenizer.prompt(example.question)): tokenizer.encode(LEAD + example.answer)
        for example in prepared.held_out
    }
    monkeypatch.setattr(DecoderSession, "answer", perfect)
    result = evaluate(run)
    assert result["tuned"]["metrics"]["exact_match"] == result["base"]["metrics"]["exact_match"] == 1.0
    assert min(room) > max(map(len, answers.values())), "there is room for the block and the answer"
    assert "<think>" not in (run.results / "predictions.jsonl").read_text(encoding="utf-8")
    monkeypatch.setattr(RowTokenizer, "answered", lambda self, question, reply: reply)
    assert evaluate(run)["tuned"]["metrics"]["exact_match"] == 0.0, "the planted fault"


def test_the_names_of_metrics_that_a_recipe_takes_are_those_there_are() -> None:
    assert set(get_args(MetricName)) == {*LOSS_METRICS, *metrics._BY_ROW, *metrics._BY_CORPUS}
    right, values = np.array([0, 1, 1]), np.array([0.5, 1.0, 2.0])
    labels = {*label_metrics.score_classes(right, right).metrics, *label_metrics.score_values(values, values).metrics}
    assert set(get_args(LabelMetricName)) == {name for name in labels if not names_a_field(name)}


def test_the_test_rows_are_scored_apart(recipe: Callable[..., Parsed]) -> None:
    from whet.base.errors import UserError

    run = train(recipe(train__max_steps=1, data__val_size=3, data__test_size=5))
    held, test = evaluate(run), evaluate(run, split="test")
    assert (held["rows"], held["split"], test["rows"], test["split"]) == (3, "eval", 5, "test")
    assert run.read("results/test.json") == test
    assert run.read("results/evaluation.json") == held
    without = train(recipe("without", train__max_steps=1, data__val_size=3))
    with pytest.raises(UserError, match="no test rows"):
        evaluate(without, split="test")


def test_what_a_session_notices_is_said(
    recipe: Callable[..., Parsed], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    run = train(recipe(train__max_steps=1, data__val_size=4))
    whole = evaluate(run)
    assert "out of memory" not in capsys.readouterr().err
    fill = decode.DecodingLoop.fill

    def small_memory(loop: decode.DecodingLoop, prompts: list[list[int]]) -> torch.Tensor:
        if len(prompts) > 2:
            raise torch.OutOfMemoryError
        return fill(loop, prompts)

    monkeypatch.setattr(decode.DecodingLoop, "fill", small_memory)
    assert evaluate(run)["tuned"]["metrics"] == whole["tuned"]["metrics"]
    assert capsys.readouterr().err.count("out of memory: answering 2 prompts together") == 1
