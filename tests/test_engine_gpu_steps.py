"""Steps captured as CUDA graphs against the same steps one by one, with a batch that breaks, and resumed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import nets
import numpy as np
import pytest
import torch

from whet.data.batch.batches import Cut, Order
from whet.data.batch.rows import Rows
from whet.data.batch.text_batches import TextBatches
from whet.engine.compute.attention import fastest_attention
from whet.engine.compute.compile import compile_layers
from whet.engine.compute.head import find_head
from whet.engine.memory.checkpointing import checkpoint_layers
from whet.methods.layers.fuse import fuse
from whet.settings import Train
from whet.training import checkpoint
from whet.training.captured import WARM_STEPS, GraphSteps, Replayed, side_stream
from whet.training.checkpoint import Identity
from whet.training.objective.objective import Arithmetic
from whet.training.objective.text import TextObjective
from whet.training.optim import build_optimiser
from whet.training.step import NotFinite, Pending, Steps

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
CUDA = torch.device("cuda")
POISON = nets.VOCABULARY - 1  # a token that no row has, whose embedding is NaN
SIZES = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "tie_word_embeddings": False,
}  # fmt: skip


class Made:
    """A small model in bf16 with the optimiser that runs have; epsilon is large, so that noise stays as small as it is
    (with 1e-8 the sign of a gradient near 0 decides about a whole step)."""

    def __init__(
        self, *, captured: bool, compiled: bool = False, optim: Any = "adamw", dropout: float = 0.0,
        again: bool = False, rank: int = 8,
    ) -> None:  # fmt: skip
        net = nets.network("Llama", dtype=torch.bfloat16, device="cuda", **SIZES)
        with torch.no_grad():
            net.get_input_embeddings().weight[POISON] = float("nan")
        self.model = nets.adapted(net, r=rank, lora_dropout=dropout).train()
        self.fused = fuse(self.model, compute=torch.bfloat16)
        objective = TextObjective(
            Arithmetic(CUDA, torch.bfloat16), self.fused.refresh, find_head(net), draws=self.fused.draws
        )
        assert objective.head is not None
        checkpoint_layers(net, None if again else ())
        if compiled:
            compile_layers(net)
        train = Train(adam_epsilon=0.01, learning_rate=0.02, optim=optim)
        self.optimiser = build_optimiser(train, nets.trained(self.model), captured=captured)
        self.steps = (GraphSteps if captured else Steps)(self.model, self.optimiser, objective, 1.0)

    def weights(self) -> torch.Tensor:
        torch.cuda.synchronize()
        return torch.cat([p.detach().flatten() for p in nets.trained(self.model)])

    def moments(self) -> list[torch.Tensor]:
        torch.cuda.synchronize()
        return [value.clone() for state in self.optimiser.state.values() for value in state.values()]

    def run(self, batches: TextBatches, steps: range) -> tuple[list[tuple[float, float]], int]:
        """(loss, norm) of each step, read one step late as in a run, and how many were replayed."""
        found, replayed = [], 0
        last: Pending | None = None
        for step in steps:
            pending = self.steps.step(batches.step(step), step + 1)
            replayed += isinstance(pending, Replayed)
            if last is not None:
                found.append(last.read())
            last = pending
        assert last is not None
        found.append(last.read())
        return [(done.loss, done.grad_norm) for done in found], replayed


def rows_and_batches(
    count: int, *, accumulate: int = 1, alike: bool = False, forms: int = 2
) -> tuple[Rows, TextBatches]:
    """Rows of two lengths by turns (or of one), each a batch, in as many forms."""
    rows = nets.rows_of([128 if alike else (60, 260)[index % 2] + 7 * (index % 8) for index in range(count)])
    plain = TextBatches(rows, flat=True, order=Order(5), cut=Cut(1, accumulate))
    return rows, plain.filled(plain.steps_per_epoch, most_forms=forms)


def assert_alike(
    one: Any, other: Any, start: torch.Tensor, weights: tuple[torch.Tensor, torch.Tensor], bound: float = 0.05
) -> None:
    for (loss, norm), (expected, expected_norm) in zip(one, other, strict=True):
        assert abs(loss - expected) < bound / 20 * expected
        assert abs(norm - expected_norm) < 0.03 * expected_norm
    assert nets.relative(weights[0] - start, weights[1] - start) < bound
    assert float((weights[1] - start).norm()) > 0


@pytest.mark.parametrize(
    ("accumulate", "compiled", "alike"),
    [(1, False, False), (1, False, True), (2, False, False), pytest.param(1, True, False, marks=pytest.mark.slow)],
)
def test_captured_steps_are_the_same_steps(accumulate: int, compiled: bool, alike: bool) -> None:
    torch.compiler.reset()
    rows = 8 if alike else 8 * accumulate * (1 if accumulate == 1 else 2)
    _, batches = rows_and_batches(rows, accumulate=accumulate, alike=alike)
    steps = range(batches.steps_per_epoch)
    assert len(steps) >= 8
    with fastest_attention(CUDA), side_stream(CUDA):
        plain, captured = Made(captured=False), Made(captured=True, compiled=compiled)
        start = plain.weights()
        assert torch.equal(start, captured.weights())
        expected, none = plain.run(batches, steps)
        found, replayed = captured.run(batches, steps)
        assert none == 0
        kinds = {(len(step), *sorted({b.form.tokens for b in step})) for step in map(batches.step, steps)}  # type: ignore[union-attr]
        assert replayed >= len(steps) - WARM_STEPS * len(kinds)
        assert replayed > 0
        assert len(batches.forms) == (1 if alike else 2)
        weights = captured.weights(), plain.weights()
        assert_alike(found, expected, start, weights, bound=0.1 if compiled else 0.05)
        assert ("update" in captured.steps.graphs) == (accumulate > 1)


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize(("dropout", "again"), [(0.0, True), (0.3, False), (0.3, True)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_everyday_recipe_is_captured(optim: str, dropout: float, again: bool, accumulate: int) -> None:
    """8-bit moments, dropout and layers that run again give the losses of steps one by one that keep everything."""
    _, batches = rows_and_batches(8 * accumulate, accumulate=accumulate, alike=True)
    steps = range(batches.steps_per_epoch)
    with fastest_attention(CUDA), side_stream(CUDA):
        given: dict[str, Any] = {"optim": optim, "dropout": dropout, "rank": 32}
        plain, captured = Made(captured=False, **given), Made(captured=True, again=again, **given)
        start = plain.weights()
        expected, none = plain.run(batches, steps)
        found, replayed = captured.run(batches, steps)
        assert (none, replayed) == (0, len(steps) - WARM_STEPS)
        assert_alike(found, expected, start, (captured.weights(), plain.weights()))
        if dropout:
            other, _ = Made(captured=True, optim=optim, rank=32).run(batches, steps)
            apart = max(abs(one[0] - two[0]) for one, two in zip(found, other, strict=True))
            assert apart > 0.001, "nothing is dropped"


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_broken_batch_stops_the_run_and_changes_nothing(accumulate: int) -> None:
    rows, batches = rows_and_batches(10 * accumulate, accumulate=accumulate, forms=1)
    bad = 6
    broken = copy.deepcopy(batches.step(bad))
    row = broken[-1].sources[0]
    rows.ids[rows.starts[row]] = POISON
    with fastest_attention(CUDA), side_stream(CUDA):
        made = Made(captured=True)
        _, replayed = made.run(batches, range(bad))
        assert replayed == bad - WARM_STEPS
        weights, moments = made.weights(), made.moments()
        pending = made.steps.step(batches.step(bad), bad + 1)
        after = made.steps.step(batches.step(bad + 1), bad + 2)  # launched before anybody has looked
        assert isinstance(pending, Replayed)
        with pytest.raises(NotFinite) as caught:
            pending.read()
        assert caught.value.step == bad + 1
        assert caught.value.what == "loss"
        assert row in caught.value.rows
        assert list(caught.value.rows) == [source for batch in broken for source in batch.sources]
        with pytest.raises(NotFinite):
            after.read()
        assert torch.equal(made.weights(), weights)
        assert all(torch.equal(now, then) for now, then in zip(made.moments(), moments, strict=True))


def test_a_batch_that_breaks_before_its_form_is_captured() -> None:
    rows, batches = rows_and_batches(8, forms=1)
    rows.ids[rows.starts[batches.step(1)[0].sources[0]]] = POISON
    with fastest_attention(CUDA), side_stream(CUDA):
        made = Made(captured=True)
        made.run(batches, range(1))
        weights = made.weights()
        with pytest.raises(NotFinite):
            made.steps.step(batches.step(1), 2)
        assert torch.equal(made.weights(), weights)


def test_a_resumed_run_continues(tmp_path: Path) -> None:
    _, batches = rows_and_batches(14)
    middle, end = 8, batches.steps_per_epoch
    with fastest_attention(CUDA), side_stream(CUDA):
        whole = Made(captured=True)
        start = whole.weights()
        expected, _ = whole.run(batches, range(end))
        first = Made(captured=True)
        first.run(batches, range(middle))
        saved = checkpoint.save(tmp_path, middle, first.model, first.optimiser, {}, Identity("recipe", "rows"))
        second = Made(captured=True)
        checkpoint.load(saved, second.model, second.optimiser)
        assert torch.equal(second.weights(), first.weights())
        found, replayed = second.run(batches, range(middle, end))
        assert replayed > 0
        assert_alike(found, expected[middle:], start, (second.weights(), whole.weights()))


def test_rows_of_the_tests_never_break_by_themselves() -> None:
    rows, _ = rows_and_batches(20)
    assert not np.any(rows.ids == POISON)
