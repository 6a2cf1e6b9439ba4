"""Settings that do nothing with the rows that there are: each is said, and none that does something."""

from __future__ import annotations

from typing import Any

import pytest

from whet.planning.idle import idle
from whet.recipe import parse

STEPS = "train.max_steps=10"


def said(words: list[str], *, rows: int = 5, task: Any = "causal") -> list[str]:
    """What is said of a run of ten steps; a look every second step where nothing else is asked for."""
    asked = parse(None, words).recipe
    looks = [] if any(word.startswith("train.eval_steps") for word in words) else ["train.eval_steps=2"]
    return list(idle(asked, parse(None, [STEPS, *looks, *words]).recipe, rows, task))


@pytest.mark.parametrize(("word", "rows", "task"), [
    ("train.eval_steps=4", 0, "causal"), ("train.eval_steps=40", 5, "causal"), ("train.save_steps=40", 5, "causal"),
    ("train.logging_steps=40", 5, "causal"), ("train.early_stopping_patience=5", 5, "causal"),
    ("train.warmup_steps=10", 5, "causal"), ("eval.max_new_tokens=9", 5, "classification"),
])  # fmt: skip
def test_what_does_nothing_is_said(word: str, rows: int, task: str) -> None:
    assert [line.partition(":")[0] for line in said([word], rows=rows, task=task)] == [word]


@pytest.mark.parametrize("word", [
    "train.eval_steps=4", "train.save_steps=4", "train.logging_steps=4", "train.early_stopping_patience=2",
    "train.warmup_steps=3", "eval.max_new_tokens=9",
])  # fmt: skip
def test_nothing_is_said_of_what_does_something(word: str) -> None:
    assert said([word]) == []
