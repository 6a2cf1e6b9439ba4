"""A step that runs out of memory is the same step in smaller pieces, and says so; what cannot be cut is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from whet.base.errors import UserError
from whet.base.out_of_memory import ran_out
from whet.data.batch.batches import Cut, Order
from whet.data.batch.padded_batches import PaddedBatches
from whet.data.batch.rows import Rows
from whet.data.batch.text_batches import TextBatches
from whet.recipe import Parsed
from whet.runs import Run
from whet.training import launch
from whet.training.launch import Launcher
from whet.training.loop import Loop
from whet.training.optim import _on_device
from whet.training.relief import Relief, leaner_modes
from whet.training.run import train
from whet.training.setup import get_ready
from whet.training.step import Steps

Make = Callable[..., Parsed]
SETTINGS: dict[str, Any] = {
    "train__max_steps": 4, "train__per_device_train_batch_size": 6, "train__save_steps": 2, "data__val_size": 0,
}  # fmt: skip
ROOM = 260  # tokens that fit at once; a row of the tests has up to 251, six of them more


@contextmanager
def only(tokens: int, patch: pytest.MonkeyPatch, *, after: Callable[[], bool] = lambda: True) -> Iterator[list[int]]:
    """Networks run out of memory above so many tokens in training; yields what they were given."""
    seen: list[int] = []
    begin = Loop.fit

    def small(module: Any, args: Any, kwargs: Any) -> None:
        ids = args[0] if args else kwargs["input"]
        if module.training and after():
            seen.append(ids.numel())
            if ids.numel() > tokens:
                raise torch.OutOfMemoryError("out of memory")

    def fit(self: Loop) -> None:
        self.launcher.arranged.network.get_input_embeddings().register_forward_pre_hook(small, with_kwargs=True)  # type: ignore[operator,union-attr]
        begin(self)

    with patch.context() as inner:
        inner.setattr(Loop, "fit", fit)
        yield seen


def metrics(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def apart(one: Run, other: Run) -> float:
    """Largest relative difference of losses, gradient norms and counts of two runs."""
    pairs = list(zip(metrics(one), metrics(other), strict=True))
    assert pairs
    names = ("loss", "grad_norm", "tokens", "supervised_tokens")
    return max(abs(a[name] - b[name]) / abs(b[name]) for a, b in pairs for name in names)


@pytest.mark.parametrize(
    "more",
    [{}, {"train__offload_optimizer": True}, {"train__gradient_accumulation_steps": 2}, {"data__padding_free": False},
     {"method.name": "full"}],
    ids=str,
)  # fmt: skip
def test_the_steps_are_the_same_in_smaller_pieces(
    more: dict[str, Any], recipe: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = SETTINGS | {"train__learning_rate": 1e-3} | more
    expected = train(recipe("plain", **settings))
    capsys.readouterr()
    with only(ROOM, monkeypatch) as seen:
        found = train(recipe("cut", **settings))
    assert max(seen) > ROOM
    assert apart(found, expected) < 1e-4
    said = " ".join(capsys.readouterr().err.split())
    assert "out of memory in step 1" in said
    assert "forward passes a step" in said
    facts = found.read("layout.json") or {}
    assert facts["out_of_memory"][0] == {"step": 1, "micro_batches": facts["out_of_memory"][0]["micro_batches"]}
    assert facts["cut"]["accumulate"] == facts["out_of_memory"][-1]["micro_batches"] > 1
    assert "out_of_memory" not in (expected.read("layout.json") or {})


def test_a_run_that_was_cut_continues(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint knows nothing of how steps are cut: with more memory the rest is done whole."""
    from test_resume import killed_before

    expected = train(recipe("plain", **SETTINGS))
    with only(ROOM, monkeypatch):
        killed_before(recipe("cut", **SETTINGS), 3)
    assert apart(train(recipe("cut", **SETTINGS)), expected) < 1e-3


@pytest.mark.parametrize("fault", ["gradients are kept", "a row is lost", "the step is left out"])
def test_a_wrong_second_try_would_be_seen(fault: str, recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SETTINGS | {"train__gradient_accumulation_steps": 2, "train__learning_rate": 1e-3}
    expected = train(recipe("plain", **settings))
    calls: list[int] = []
    if fault == "gradients are kept":
        monkeypatch.setattr(launch, "free_memory", lambda optimiser: None)
    elif fault == "a row is lost":
        right = TextBatches.recut

        def short(self: TextBatches, size: int) -> TextBatches:
            found = right(self, size)
            found.units = [*found.units[:-1], found.units[0]]
            return found

        monkeypatch.setattr(TextBatches, "recut", short)
    else:
        cut, start = Launcher.cut, Launcher.launch
        monkeypatch.setattr(Launcher, "cut", lambda self, index: cut(self, index + 1))
        monkeypatch.setattr(Launcher, "launch", lambda self, index: start(self, (index + 1) % 4))

    def second() -> bool:  # the first micro-batch has left its gradient when the second one fails
        calls.append(1)
        return len(calls) == 2

    with only(0, monkeypatch, after=second):
        found = train(recipe("cut", **settings))
    assert apart(found, expected) > 1e-3


def test_right_after_the_first_micro_batch_nothing_is_counted_twice(
    recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SETTINGS | {"train__gradient_accumulation_steps": 2, "train__learning_rate": 1e-3}
    for more in ({}, {"train__offload_optimizer": True}):
        expected = train(recipe(f"plain{len(more)}", **settings, **more))
        calls: list[int] = []

        def second(calls: list[int] = calls) -> bool:
            calls.append(1)
            return len(calls) == 2

        with only(0, monkeypatch, after=second):
            found = train(recipe(f"cut{len(more)}", **settings, **more))
        assert apart(found, expected) < 1e-4


def test_a_row_that_does_not_fit_alone_is_named(recipe: Make, data_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with only(20, monkeypatch), pytest.raises(UserError) as refused:
        train(recipe(**SETTINGS))
    assert str(data_file.name) in str(refused.value)
    assert "row" in str(refused.value)
    assert "data.max_length" in refused.value.fix
    assert "base.storage=nf4" in refused.value.fix


@pytest.mark.parametrize(
    ("more", "expected"),
    [({}, [(1, False, False), (1, True, False), (1, True, True)]),
     ({"train__gradient_checkpointing": False}, []),
     ({"train__gradient_checkpointing": True}, [(1, True, False), (1, True, True)]),
     ({"train__activation_offload": False}, [(1, False, False), (1, False, True)]),
     ({"data__padding_free": False}, [(1, False, False), (1, True, False), (1, True, True)]),
     ({"train__gradient_checkpointing": True, "train__tile_mlp": 8}, [(1, True, True)])],
    ids=str,
)  # fmt: skip
def test_what_is_left_to_give_up(more: dict[str, Any], expected: list[Any], recipe: Make) -> None:
    found = leaner_modes(get_ready(recipe(**SETTINGS | more)).plan)
    assert [(one.checkpointed_layers, one.offload, bool(one.tile_tokens)) for one in found] == expected


@pytest.mark.parametrize("fits_in", ["gradient checkpointing", "inputs in host memory", "MLPs in pieces"])
def test_a_row_that_is_alone_is_made_again_with_less_kept(
    fits_in: str, recipe: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The third micro-batch fails until the mode is lean enough; dropout's masks are those of the plain run."""
    settings = SETTINGS | {"train__per_device_train_batch_size": 1, "method__lora_dropout": 0.1}
    expected = train(recipe("plain", **settings))
    taken: list[str] = []
    right = Relief.next_mode

    def next_mode(self: Relief, arranged: Any) -> Any:
        found = right(self, arranged)
        taken.append("" if found is None else found[1])
        return found

    calls: list[int] = []

    def still() -> bool:
        calls.append(1)
        return len(calls) >= 3 and not any(fits_in in words for words in taken)

    with monkeypatch.context() as patch, only(0, patch, after=still):
        patch.setattr(Relief, "next_mode", next_mode)
        found = train(recipe("lean", **settings))
    assert fits_in in taken[-1]
    assert apart(found, expected) < 1e-5
    said = " ".join(capsys.readouterr().err.split())
    assert f"going on with {taken[-1]}" in said
    facts = found.read("layout.json") or {}
    assert facts["mode"]["checkpointed_layers"] == 1
    assert [one["step"] for one in facts["out_of_memory"]] == [3] * len(taken)


def test_of_the_rows_of_a_step_the_largest_is_named() -> None:
    batches = TextBatches(rows([9, 40, 12]), flat=True, order=Order(3), cut=Cut(1, 3))
    plan: Any = SimpleNamespace(
        facts=SimpleNamespace(placement=SimpleNamespace(device=torch.device("cpu"), storage="fp32"), on_gpu=False),
        recipe=SimpleNamespace(
            train=SimpleNamespace(gradient_checkpointing=False, activation_offload=None),
            method=SimpleNamespace(can=SimpleNamespace(storages=("fp32",))),
        ),
    )  # fmt: skip
    named: list[Any] = []
    relief: Any = SimpleNamespace(plan=plan, name_rows=lambda sources: named.append(sources) or "rows")
    relief._what_fits, relief._fix = partial(Relief._what_fits, relief), partial(Relief._fix, relief)
    refused = Relief.refusal(relief, batches.step(0))
    assert named == [(1,)]
    assert "40 tokens" in str(refused.found)
    assert "gradient_checkpointing=auto" in refused.fix


def test_moments_without_room_are_no_reason_to_try_again(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, closure: Any = None) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(_on_device(torch.optim.AdamW), "step", full)
    with pytest.raises(UserError, match="moments") as refused:
        train(recipe(**SETTINGS))
    assert "offload_optimizer" in refused.value.fix


def test_other_errors_pass(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, batches: Any, step: int) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(Steps, "step", broken)
    with pytest.raises(RuntimeError, match="something else"):
        train(recipe(**SETTINGS))


def test_it_is_found_behind_what_was_raised_in_its_place() -> None:
    error = RuntimeError("capture failed")
    error.__context__ = torch.OutOfMemoryError("out of memory")
    assert ran_out(error)
    assert not ran_out(RuntimeError("capture failed"))


def rows(lengths: list[int]) -> Rows:
    return Rows.gather((i, np.full(n, 5, np.int32), np.ones(n, bool)) for i, n in enumerate(lengths))


@pytest.mark.parametrize(
    ("size", "accumulate", "expected"), [(8, 1, [4, 2, 1]), (6, 2, [3, 1]), (5, 1, [1]), (1, 4, [])]
)
def test_pieces_are_halved_in_the_same_order(size: int, accumulate: int, expected: list[int]) -> None:
    batches = TextBatches(rows([4 + n for n in range(23)]), flat=True, order=Order(3), cut=Cut(size, accumulate))
    sizes, found = [], batches
    while (less := found.smaller(5)) is not None:
        found = less
        sizes.append(found.size)
        for step in range(batches.steps_per_epoch):
            before, after = ([row for b in made.step(step) for row in b.sources] for made in (batches, found))
            assert before == after
    assert sizes == expected


def test_smaller_pieces_are_filled_up_as_the_large_ones_were() -> None:
    batches = TextBatches(rows([30 + 9 * n for n in range(23)]), flat=True, order=Order(3), cut=Cut(4))
    for given in (batches.filled(12, most_forms=2), batches.filled(12), batches):
        less = given.smaller(12)
        assert less is not None
        assert (less.size, less.accumulate) == (2, 2)
        every = [batch for step in range(12) for batch in less.step(step)]
        if given.forms:
            assert {batch.form for batch in every} == set(less.forms)
            assert len(less.forms) == len(given.forms)
        assert less.cut.multiple == given.cut.multiple
        assert all(batch.ids.size % (128 if given.forms else given.cut.multiple) == 0 for batch in every)


def test_tasks_are_cut_in_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    labelled = rows([4 + n for n in range(23)])
    object.__setattr__(labelled, "labels", np.zeros(23, np.int64))
    batches = PaddedBatches(labelled, order=Order(3), cut=Cut(4))
    found = batches.smaller(5)
    assert found is not None
    assert (found.size, found.accumulate) == (2, 2)
    for step in range(batches.steps_per_epoch):
        before, after = ([row for b in made.step(step) for row in b.sources] for made in (batches, found))
        assert before == after


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_the_largest_batch_is_found(accumulate: int) -> None:
    lengths = [10 + 7 * (n * 13 % 29) for n in range(31)]
    batches = TextBatches(rows(lengths), flat=True, order=Order(3), cut=Cut(2, accumulate))
    steps = 2 * batches.steps_per_epoch + 1
    sizes = [max(batch.ids.size for batch in batches.step(step)) for step in range(steps)]
    found = batches.largest_step(steps)
    assert (0 if found is None else sizes[found]) == (0 if max(sizes) == sizes[0] else max(sizes))
    assert TextBatches(rows([9] * 12), flat=True, order=Order(3), cut=Cut(2)).largest_step(6) is None


@pytest.mark.parametrize("more", [{}, {"train__offload_optimizer": True}], ids=str)
def test_the_largest_batch_is_tried_early_and_forgotten(
    more: dict[str, Any], recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, so that a random number that is used up would show."""
    settings = SETTINGS | {"train__per_device_train_batch_size": 1, "train__max_steps": 8, "method__lora_dropout": 0.1}
    settings |= more
    expected = train(recipe("plain", **settings))
    monkeypatch.setattr(launch, "TRIED_ON", ("cpu",))
    with only(1 << 20, monkeypatch) as seen:
        found = train(recipe("tried", **settings))
    assert found.metrics.read_bytes() == expected.metrics.read_bytes()
    assert len(seen) == 9
    assert seen[1] == max(seen) > seen[0]
    with only(max(seen) - 1, monkeypatch), pytest.raises(UserError, match="does not fit"):
        train(recipe("small", **settings))
    lines = (recipe("small", **settings)).recipe.output_dir
    assert len(Path(str(lines)).joinpath("metrics.jsonl").read_text().splitlines()) == 1
