"""Optimisers, schedules, stopping, keeping the best, seeds, and what happens when a number is not finite."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from whet.base.errors import UserError
from whet.engine.config import Model
from whet.engine.device import Placement
from whet.engine.load.load import load_model
from whet.recipe import Parsed
from whet.runs import Run
from whet.settings import Train
from whet.training import checkpoint
from whet.training import loop as loop_module
from whet.training.loop import Loop
from whet.training.optim import build_optimiser
from whet.training.run import train
from whet.training.schedule import learning_rate

Make = Callable[..., Parsed]


def toy() -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    matrix = torch.nn.Parameter(torch.tensor([[1.0, -2.0], [0.5, 3.0]]))
    vector = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
    matrix.grad, vector.grad = torch.tensor([[0.1, -0.2], [0.3, 0.4]]), torch.tensor([0.5, -0.5])
    return matrix, vector


def by_hand(name: str, p: torch.Tensor, g: torch.Tensor, rate: float, decay: float) -> torch.Tensor:
    """The first update from zero state, in float64."""
    p, g = p.double(), g.double()
    if name == "adamw":  # both moments are corrected for their start, so the first step is the sign
        return p * (1 - rate * decay) - rate * g / (g.abs() + 1e-8)
    if name == "sgd":
        return p - rate * (g + decay * p)
    raise AssertionError(name)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_first_update_is_the_textbooks(name: str) -> None:
    matrix, vector = toy()
    expected = [
        by_hand(name, matrix.detach(), matrix.grad, 0.01, 0.1),
        by_hand(name, vector.detach(), vector.grad, 0.01, 0),
    ]
    build_optimiser(Train(optim=name, weight_decay=0.1, learning_rate=0.01), [matrix, vector]).step()
    for parameter, value in zip((matrix, vector), expected, strict=True):
        torch.testing.assert_close(parameter.detach().double(), value, rtol=1e-6, atol=1e-6)


def test_adafactor_keeps_a_row_and_a_column_of_a_matrix() -> None:
    matrix, vector = toy()
    optimiser = build_optimiser(Train(optim="adafactor", learning_rate=0.01), [matrix, vector])
    before = matrix.detach().clone()
    optimiser.step()
    assert {name: tuple(value.shape) for name, value in optimiser.state[matrix].items() if value.ndim} == {
        "row_var": (2, 1), "col_var": (1, 2)
    }  # fmt: skip
    assert bool(((matrix.detach() - before) * matrix.grad < 0).all())


def test_adam_settings_take_effect_and_vectors_do_not_decay() -> None:
    matrix, vector = toy()
    settings = Train(
        optim="adamw", adam_beta1=0.5, adam_beta2=0.6, adam_epsilon=1e-3, weight_decay=0.2, learning_rate=0.01
    )
    optimiser = build_optimiser(settings, [matrix, vector])
    groups = [
        (group["weight_decay"], group["betas"], group["eps"], len(group["params"])) for group in optimiser.param_groups
    ]
    assert groups == [(0.2, (0.5, 0.6), 1e-3, 1), (0.0, (0.5, 0.6), 1e-3, 1)]


@pytest.mark.parametrize("changes", [{}, {"train__optim": "adafactor"}, {"method__name": "full"}], ids=str)
def test_everything_trainable_is_trained_once_and_frozen_parameters_stay_out(
    changes: dict[str, Any], recipe: Make
) -> None:
    parsed = recipe(**changes)
    arranged = tiny.built(parsed)
    optimiser = build_optimiser(replace(parsed.recipe.train, learning_rate=0.1), arranged.trained)
    members = [p for group in optimiser.param_groups for p in group["params"]]
    trainable = [p for p in arranged.model.parameters() if p.requires_grad]
    assert sorted(map(id, members)) == sorted(map(id, trainable))
    frozen = [p for p in arranged.model.parameters() if not p.requires_grad]
    assert not {id(p) for p in members} & {id(p) for p in frozen}
    assert any(p.ndim < 2 for p in members) == (changes == {"method__name": "full"})


@pytest.mark.parametrize("optim", ["adamw", "adafactor", "sgd"])
def test_every_optimiser_learns(optim: str, recipe: Make) -> None:
    rate = {"adamw": 0.01, "adafactor": 1.0, "sgd": 0.3}[optim]
    run = train(recipe(train__optim=optim, train__learning_rate=rate, train__max_steps=20,
                       data__max_rows=8))  # fmt: skip
    losses = [line["loss"] for line in run.lines("metrics.jsonl") if line["kind"] == "train"]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize(
    "changes",
    [{"train__optim": "sgd", "train__adam_beta1": 0.8},
     {"train__lr_scheduler_type": "linear", "train__decay_ratio": 0.3}],
    ids=lambda changes: ",".join(map(str, changes.values())),
)  # fmt: skip
def test_a_setting_that_could_not_take_effect_is_refused(changes: dict[str, Any], recipe: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        train(recipe(**changes))
    assert caught.value.fix
    assert not (tmp_path / "run").exists()


SHAPES = ("linear", "cosine", "constant", "warmup_stable_decay")


def rates(shape: str, total: int, warmup: float, decay: float = 0.2) -> list[float]:
    options: dict[str, Any] = {
        "peak": 3e-4, "shape": shape, "warmup_steps": math.ceil(warmup * total), "decay_ratio": decay
    }  # fmt: skip
    return [learning_rate(step, total, **options) for step in range(total)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("total", [1, 2, 7, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.1, 0.5])
def test_a_schedule_rises_to_its_peak_and_never_leaves_its_bounds(shape: str, total: int, warmup: float) -> None:
    found = rates(shape, total, warmup)
    steps = math.ceil(warmup * total)
    assert all(0 < rate <= 3e-4 * (1 + 1e-12) for rate in found)
    assert found[:steps] == pytest.approx([3e-4 * (index + 1) / steps for index in range(steps)])
    assert max(found) == pytest.approx(3e-4)
    assert found[max(0, steps - 1)] == pytest.approx(3e-4)
    assert all(later <= earlier + 1e-15 for earlier, later in zip(found[steps:], found[steps + 1 :], strict=False))


def test_the_ends_of_the_schedules() -> None:
    """Of 100 steps, 10 to warm up: 90 to fall over, the last of them one ninetieth above nothing."""
    last = {shape: rates(shape, 100, 0.1)[-1] / 3e-4 for shape in SHAPES}
    assert last["linear"] == pytest.approx(1 / 90)
    assert last["cosine"] == pytest.approx(0.5 * (1 + math.cos(math.pi * 89 / 90)))
    assert last["constant"] == 1.0
    assert last["warmup_stable_decay"] == pytest.approx(1 / 20)
    assert rates("warmup_stable_decay", 100, 0.1)[80] == pytest.approx(3e-4)
    assert rates("warmup_stable_decay", 100, 0.1)[81] < 3e-4
    assert rates("cosine", 100, 0.1)[55] == pytest.approx(1.5e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_rates_of_a_run_are_those_of_the_schedule(shape: str, recipe: Make) -> None:
    made = recipe(
        train__lr_scheduler_type=shape, train__max_steps=10, train__warmup_ratio=0.2, train__learning_rate=3e-4
    )
    found = [line["learning_rate"] for line in train(made).lines("metrics.jsonl")]
    assert found == rates(shape, 10, 0.2)


def test_the_gradient_norm_is_measured_before_clipping_and_clipping_acts(recipe: Make) -> None:
    runs = {}
    for limit in (0.0, 1e-3):
        settings: dict[str, Any] = {
            "train__max_steps": 2, "train__max_grad_norm": limit, "train__optim": "sgd", "train__learning_rate": 1.0,
            "train__lr_scheduler_type": "constant", "train__warmup_ratio": 0.0,
        }  # fmt: skip
        runs[limit] = train(recipe(f"clip{limit}", **settings)).lines("metrics.jsonl")
    assert runs[0.0][0]["grad_norm"] == runs[1e-3][0]["grad_norm"] > 0.01
    assert abs(runs[1e-3][1]["loss"] - runs[0.0][1]["loss"]) > 1e-6


def poisoned(model_dir: Path, out: Path, token: int) -> Path:
    """The tiny model with one embedding row of NaN; the head is a copy of its own, so only reading the token hurts."""
    network = load_model(Model(path=str(model_dir)), Placement(torch.device("cpu"), "fp32", torch.float32, False, {}))
    network.config.tie_word_embeddings = False
    network.lm_head.weight = torch.nn.Parameter(network.lm_head.weight.detach().clone())
    with torch.no_grad():
        network.get_input_embeddings().weight[token] = float("nan")  # type: ignore[index]
    network.save_pretrained(str(out))
    return tiny.copy_tokenizer(out)


def own_token(model_dir: Path, word: str) -> int:
    """A token of `word` that no other row has."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model_dir))
    others = " ".join(f"{row['instruction']} {row['output']}\n" for row in tiny.rows()) + " system user assistant"
    return min({*tokenizer(word).input_ids} - {*tokenizer(others).input_ids})


def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_the_rows(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = own_token(model_dir, "Poison")
    records = tiny.rows(12)
    records[7]["output"] = "Poison"
    data = tiny.write_rows(tmp_path / "rows.jsonl", records)
    model = poisoned(model_dir, tmp_path / "model", token)
    held: list[Loop] = []
    begin = Loop.fit
    monkeypatch.setattr(Loop, "fit", lambda self: (held.append(self), begin(self))[1])
    made = tiny.recipe(model, data, tmp_path / "run", train__per_device_train_batch_size=3, train__save_steps=1,
                       train__num_train_epochs=1)  # fmt: skip
    with pytest.raises(UserError) as caught:
        train(made)
    assert "is not finite; nothing was updated" in caught.value.problem
    assert "rows.jsonl row 8" in str(caught.value.found)
    loop = held[0]
    path, _ = checkpoint.latest(loop.checkpoints.run.checkpoints, loop.checkpoints.identity)
    weights = checkpoint.trainable(loop.launcher.arranged.model)
    if path is None:
        assert loop.state.step == 0
        assert all(not bool(value.any()) for name, value in weights.items() if "lora_B" in name)
    else:
        from safetensors.torch import load_file

        saved = load_file(path / "model.safetensors")
        assert all(torch.equal(value, saved[name]) for name, value in weights.items())
    assert len(loop.checkpoints.run.lines("metrics.jsonl")) == loop.state.step
    assert all(bool(torch.isfinite(value).all()) for value in weights.values())


def test_a_held_out_loss_that_is_not_finite_is_said_and_not_a_crash(model_dir: Path, tmp_path: Path) -> None:
    token = own_token(model_dir, "Poison")
    held_out = tiny.write_rows(tmp_path / "held.jsonl", [tiny.rows(1)[0] | {"output": "Poison"}])
    data = tiny.write_rows(tmp_path / "rows.jsonl", tiny.rows(6))
    made = tiny.recipe(poisoned(model_dir, tmp_path / "model", token), data, tmp_path / "run",
                       data__eval_dataset=str(held_out), train__max_steps=2, train__eval_steps=1)  # fmt: skip
    with pytest.raises(UserError, match="not finite"):
        train(made)


EAGER: dict[str, Any] = {
    "train__max_steps": 30, "train__eval_steps": 1, "train__learning_rate": 0.3, "data__val_size": 4,
    "train__lr_scheduler_type": "constant", "train__per_device_train_batch_size": 4,
}  # fmt: skip


def evaluations(run: Run) -> list[float]:
    return [line["eval_loss"] for line in run.lines("metrics.jsonl") if line["kind"] == "eval"]


def test_early_stopping_waits_as_long_as_it_was_told(recipe: Make) -> None:
    run = train(recipe(train__early_stopping_patience=3, **EAGER))
    losses = evaluations(run)
    best = losses.index(min(losses))
    assert run.finished is not None
    assert run.finished["stopped"] == "early_stopping"
    assert run.finished["steps"] == len(losses) == best + 1 + 3
    assert run.finished["best_step"] == best + 1


@pytest.mark.parametrize("keep", [True, False])
def test_the_best_weights_are_kept_if_wanted(keep: bool, recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file

    # a few steps down, then up: where a large rate overshoots depends on the processor
    monkeypatch.setattr(loop_module, "learning_rate", lambda step, total, **_: 0.02 if step < 4 else -0.05)
    settings = EAGER | {"train__max_steps": 8, "train__load_best_model_at_end": keep, "train__save_total_limit": 1}
    run = train(recipe(**settings))
    losses = evaluations(run)
    best = losses.index(min(losses)) + 1
    assert 1 < best < 8, losses
    assert run.finished is not None
    assert run.finished["kept_step"] == (best if keep else 8)
    assert run.finished["best_eval_loss"] == min(losses)
    saved = load_file(run.checkpoints / f"step-{best if keep else 8}" / "model.safetensors")
    adapter = load_file(run.adapter / "adapter_model.safetensors")
    assert {key.replace(".default", "") for key in saved} == adapter.keys()
    assert all(torch.equal(value, adapter[key.replace(".default", "")]) for key, value in saved.items())


def test_the_same_recipe_twice_is_equal_to_the_bit_and_another_seed_is_not(recipe: Make) -> None:
    settings = {"train__max_steps": 4, "method__lora_dropout": 0.1, "data__val_size": 4}
    first, again, other = (
        tiny.final_bytes(train(recipe(name, train__seed=seed, **settings)).path)
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert first == again
    assert [name for name in first if first[name] == other[name]] == []


def test_the_held_out_loss_does_not_depend_on_the_batch_size(recipe: Make) -> None:
    found = []
    for size in (1, 2, 3, 7):
        settings = {"train__max_steps": 1, "data__val_size": 10, "train__per_device_train_batch_size": size,
                    "train__learning_rate": 1e-9}  # fmt: skip
        found.append(evaluations(train(recipe(f"size{size}", **settings)))[0])
    assert found == pytest.approx([found[0]] * 4, rel=1e-6)


def test_optimiser_steps_count_what_they_learned(recipe: Make) -> None:
    run = train(recipe(train__num_train_epochs=2, train__per_device_train_batch_size=5))
    ledger = json.loads((run.path / "data.json").read_text(encoding="utf-8"))
    last = run.lines("metrics.jsonl")[-1]
    assert last["step"] == 10
    assert last["epoch"] == 2.0
    assert last["supervised_tokens"] == 2 * ledger["supervised_tokens"]
    assert last["tokens"] == 2 * ledger["tokens"]


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Train().seed = 1  # type: ignore[misc]


def test_each_step_is_given_its_own_time(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the one before it, with nothing left for the last step before a look at the held-out rows.

    By a clock of the test's own, which an update moves by as many seconds as there have been updates.
    """
    updates = []
    monkeypatch.setattr(time, "perf_counter", lambda: float(sum(updates)))
    hook = register_optimizer_step_post_hook(lambda *_: updates.append(len(updates) + 1))
    try:
        done = train(recipe(train__max_steps=9, train__eval_steps=3, data__val_size=4))
    finally:
        hook.remove()
    lines = [json.loads(line) for line in done.timing.read_text(encoding="utf-8").splitlines()]
    seconds = np.diff([0.0, *(line["seconds"] for line in lines)])
    assert seconds.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    tokens = np.diff([0, *(line["tokens"] for line in done.lines("metrics.jsonl") if line["kind"] == "train")])
    speeds = [round(count / second, 1) for count, second in zip(tokens, seconds, strict=True)]
    assert [line["tokens_per_second"] for line in lines] == speeds


def test_the_last_step_is_saved_whatever_save_steps_divides(recipe: Make) -> None:
    run = train(recipe(train__max_steps=3, train__save_steps=2))
    assert sorted(folder.name for folder in (run.path / "checkpoints").iterdir())[-1] == "step-3"
