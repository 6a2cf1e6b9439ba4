"""A finished run can be given more steps: it goes on from its last checkpoint, or says why it cannot."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import tiny

from whet.base.errors import UserError
from whet.recipe import Parsed
from whet.training.loop import Loop
from whet.training.run import train

Recipe = Callable[..., Parsed]
CONSTANT = {"train__lr_scheduler_type": "constant", "train__warmup_ratio": 0, "data__val_size": 4}


def test_more_steps_at_a_constant_rate_are_those_of_one_long_run(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    short = train(recipe(train__max_steps=3, **CONSTANT))
    before = short.metrics.read_bytes()
    capsys.readouterr()
    longer = train(recipe(train__max_steps=6, **CONSTANT))
    assert "its learning rate goes on as the schedule of 6 steps" in " ".join(capsys.readouterr().err.split())
    assert longer.path == short.path
    assert longer.metrics.read_bytes().startswith(before)
    whole = train(recipe("whole", train__max_steps=6, **CONSTANT))
    assert tiny.final_bytes(longer.path)["adapter"] == tiny.final_bytes(whole.path)["adapter"]
    steps = [line["step"] for line in longer.lines("metrics.jsonl") if line["kind"] == "train"]
    assert steps == [1, 2, 3, 4, 5, 6], "nothing twice, nothing missing"
    assert (longer.finished or {})["steps"] == 6
    assert (longer.read("origins.json") or {})["train.max_steps"]["value"] == 6
    train(recipe(train__max_steps=6, **CONSTANT))
    assert "nothing to do" in capsys.readouterr().err


def test_epochs_are_extended_too_and_a_kill_on_the_way_loses_nothing(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"train__per_device_train_batch_size": 12, "train__learning_rate": 1e-3}
    run = train(recipe(train__num_train_epochs=1, **changes))
    assert (run.finished or {})["steps"] == 2
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "fit", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(recipe(train__num_train_epochs=2, **changes))
    longer = train(recipe(train__num_train_epochs=2, **changes))
    assert (longer.finished or {})["steps"] == 4
    assert [line["step"] for line in longer.lines("metrics.jsonl")] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"train__max_steps": 2}, "it has 3 steps already"),
        ({"train__max_steps": 6, "train__learning_rate": 0.001}, "output_dir="),
        ({"train__max_steps": 6, "data__max_length": 500}, "output_dir="),
    ],
)
def test_what_cannot_go_on_says_why_and_changes_nothing(changes: dict[str, Any], why: str, recipe: Recipe) -> None:
    run = train(recipe(train__max_steps=3))
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="another recipe") as caught:
        train(recipe(**changes))
    assert why in caught.value.fix
    assert "output_dir=" in caught.value.fix
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def test_a_run_without_its_last_checkpoint_is_not_begun_anew(recipe: Recipe) -> None:
    run = train(recipe(train__max_steps=3))
    shutil.rmtree(run.checkpoints / "step-3")
    with pytest.raises(UserError) as caught:
        train(recipe(train__max_steps=6))
    assert "step-3, is gone" in caught.value.fix
    assert (run.finished or {})["steps"] == 3


def test_a_run_that_stopped_early_is_not_extended(recipe: Recipe) -> None:
    changes = {"data__val_size": 4, "train__eval_steps": 1, "train__early_stopping_patience": 1}
    changes |= {"train__learning_rate": 5.0, "train__warmup_ratio": 0}
    run = train(recipe(train__max_steps=8, **changes))
    assert (run.finished or {})["stopped"] == "early_stopping"
    with pytest.raises(UserError) as caught:
        train(recipe(train__max_steps=20, **changes))
    assert "would stop again" in caught.value.fix


def test_methods_of_one_length_are_refused(recipe: Recipe) -> None:
    from whet.methods.all import METHODS

    assert METHODS["adalora"]().follows_share
    assert not METHODS["lora"]().follows_share
