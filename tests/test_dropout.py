"""Dropout keyed by step, token and place: how much it drops, that its masks have nothing to do with each other, and
that a step has the same ones however it is cut or run again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch

from whet.engine.compute.dropout import Draws, keyed_dropout
from whet.methods.layers.group import LoraGroup
from whet.recipe import Parsed
from whet.training.run import train
from whet.training.setup import get_ready

Make = Callable[..., Parsed]
CPU = torch.device("cpu")


def mask(
    step: int = 1, before: int = 0, layer: int = 0, *, seed: int = 0, share: float = 0.3, shape: Any = (400, 500)
) -> torch.Tensor:
    """1.0 where a number is kept."""
    draws = Draws(CPU, seed)
    draws.place(step, before)
    return (keyed_dropout(torch.ones(shape), share, draws, torch.tensor(layer, dtype=torch.int32)) > 0).float()


@pytest.mark.parametrize("share", [0.01, 0.05, 0.3, 0.5, 0.9])
def test_it_drops_the_share_and_keeps_the_mean(share: float) -> None:
    draws = Draws(CPU, 3)
    draws.place(7, 0)
    x = torch.full((1000, 700), 2.0)
    y = keyed_dropout(x, share, draws, torch.tensor(5, dtype=torch.int32))
    wrong = 5 * (share * (1 - share) / x.numel()) ** 0.5
    assert abs(float((y == 0).float().mean()) - share) < wrong
    assert torch.allclose(y[y != 0], torch.tensor(2.0 / (1 - share)))
    for axis in (0, 1):  # no row and no column is served differently
        shares = (y == 0).float().mean(dim=axis)
        count = x.shape[axis]
        assert float((shares - share).abs().max()) < 5.5 * (share * (1 - share) / count) ** 0.5


@pytest.mark.parametrize(
    "other",
    [{"step": 2}, {"layer": 1}, {"seed": 1}, {"seed": 2**32}, {"before": 400}, {"step": 2, "layer": 1}, {"layer": 200}],
    ids=str,
)
def test_masks_have_nothing_to_do_with_each_other(other: dict[str, int]) -> None:
    one, two = mask() - 0.7, mask(**other) - 0.7
    count = one.numel()
    assert abs(float((one * two).mean()) / 0.21) < 5 / count**0.5
    for shift in (1, 2, 3, 16, 64):  # nor have neighbours, in a row or a column
        assert abs(float((one[:, shift:] * one[:, :-shift]).mean()) / 0.21) < 5.5 / count**0.5
        assert abs(float((one[shift:] * one[:-shift]).mean()) / 0.21) < 5.5 / count**0.5


def test_a_step_that_is_cut_has_the_same_masks() -> None:
    whole = mask(step=4, shape=(90, 64))
    parts = [mask(step=4, before=start, shape=(size, 64)) for start, size in ((0, 30), (30, 45), (75, 15))]
    assert torch.equal(torch.cat(parts), whole)


def test_every_layer_of_a_model_has_its_own(recipe: Make) -> None:
    arranged = tiny.built(recipe(method__lora_dropout=0.2))
    groups = [module for module in arranged.model.modules() if isinstance(module, LoraGroup)]
    assert len(groups) > 2
    assert sorted(int(group.number) for group in groups) == list(range(len(groups)))
    assert all(group.draws is arranged.objective.draws for group in groups)


def test_losses_do_not_depend_on_the_cut_and_do_depend_on_the_step(recipe: Make) -> None:
    """The dropout of LoRA is strong here and the adapter does not begin at 0, so other masks would be seen at once."""
    changes = {"method__lora_dropout": 0.5, "data__max_rows": 8, "method__init_lora_weights": "gaussian",
               "train__learning_rate": 0.05, "train__max_steps": 4}  # fmt: skip
    cuts = [(4, 1), (2, 2), (1, 4)]
    runs = [
        train(
            recipe(
                f"run{size}",
                train__per_device_train_batch_size=size,
                train__gradient_accumulation_steps=parts,
                **changes,
            )
        )
        for size, parts in cuts
    ]
    losses = [[line["loss"] for line in run.lines("metrics.jsonl") if line["kind"] == "train"] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] == pytest.approx(losses[2], rel=1e-4)
    other = train(
        recipe("seed", train__per_device_train_batch_size=4, train__seed=0, **{**changes, "method__lora_dropout": 0.4})
    )
    found = [line["loss"] for line in other.lines("metrics.jsonl") if line["kind"] == "train"]
    assert found != pytest.approx(losses[0], rel=1e-4)


def test_layers_that_run_again_draw_the_same(recipe: Make) -> None:
    def gradients(*, again: bool) -> dict[str, torch.Tensor]:
        changes: dict[str, Any] = {"train__gradient_checkpointing": again, "data__max_rows": 4}
        parsed = recipe(f"again{again}", method__lora_dropout=0.4, **changes)
        arranged = tiny.built(parsed)
        tiny.randomise_adapter(arranged.model)
        batch = get_ready(parsed).batches.step(0)[0]
        arranged.objective.before_step()
        arranged.objective.place(3, 0)
        torch.manual_seed(again)  # torch's generator has no part in it
        arranged.objective.loss(arranged.model, batch).backward()
        return tiny.gradients(arranged.model)

    plain, rerun = gradients(again=False), gradients(again=True)
    assert plain
    for name, value in plain.items():
        assert torch.allclose(value, rerun[name], atol=1e-6), name
