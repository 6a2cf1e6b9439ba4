"""Weights of turns: each answer's loss times its weight, over the sum of the weights, however the batch is cut."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import nets
import numpy as np
import pytest
import tiny
import torch
from torch.nn.functional import cross_entropy

from whet.data.batch.batches import Cut, Order
from whet.data.batch.text_batches import TextBatches
from whet.data.config import Data
from whet.data.prepare import Prepared, prepare
from whet.engine.compute.head import find_head
from whet.engine.config import Model
from whet.engine.load.load import load_tokenizer
from whet.training.objective.objective import Arithmetic
from whet.training.objective.text import TextObjective
from whet.training.step import held_out_loss, train_step

CPU = Arithmetic(torch.device("cpu"))


def turns(*pairs: tuple[str, float | None]) -> dict[str, Any]:
    messages = []
    for text, weight in pairs:
        messages.append({"role": "user", "content": f"ask {text}"})
        messages.append({"role": "assistant", "content": text} | ({} if weight is None else {"weight": weight}))
    return {"messages": messages}


ROWS = [
    turns(("one two three", 0.25), ("four", 1)), turns(("five six", None)), turns(("seven", 0), ("eight nine", 0.5)),
    turns(("ten", 1.0)), turns(("eleven twelve", 0.75)),
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Any:
    return load_tokenizer(Model(path=str(model_dir)))


def made(tokenizer: Any, place: Path, rows: list[dict[str, Any]], **settings: Any) -> Prepared:
    path = place / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return prepare(Data(dataset=str(path), val_size=0, **settings), tokenizer, 256)


def test_tokens_get_the_weight_of_their_turn(tokenizer: Any, tmp_path: Path) -> None:
    found = made(tokenizer, tmp_path, ROWS)
    weights = found.train.weights
    assert weights is not None
    assert weights.dtype == np.float32
    assert len(weights) == len(found.train.ids)
    seen = []
    for index in range(len(ROWS)):
        span = found.train.span(index)
        ids, learned, each = found.train.ids[span], found.train.learned[span], weights[span]
        seen.append({float(w): tokenizer.decode(ids[learned & (each == w)]) for w in np.unique(each[learned])})
    stop = "<|im_end|>"
    assert seen == [
        {0.25: f"one two three{stop}", 1.0: f"four{stop}"}, {1.0: f"five six{stop}"}, {0.5: f"eight nine{stop}"},
        {1.0: f"ten{stop}"}, {0.75: f"eleven twelve{stop}"},
    ]  # fmt: skip


def test_weights_of_one_and_none_cost_nothing(tokenizer: Any, tmp_path: Path) -> None:
    assert made(tokenizer, tmp_path, [turns(("a", 1), ("b", None)), turns(("c", 0), ("d", 1))]).train.weights is None


def test_weights_may_begin_late(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that were written before the first weight count in full."""
    monkeypatch.setattr("whet.data.batch.row_builder.CHUNK", 1)
    rows = [turns(("a b", None)), turns(("c d", None)), turns(("e f", 0.5)), turns(("g", None))]
    weights = made(tokenizer, tmp_path, rows).train
    assert weights.weights is not None
    each = [float(weights.weights[weights.span(i)][weights.learned[weights.span(i)]].mean()) for i in range(4)]
    assert each == [1.0, 1.0, 0.5, 1.0]


def expected_loss(model: Any, found: Prepared, rows: list[int]) -> torch.Tensor:
    """Each document by itself in float64: sum of weight times loss, over the sum of weights."""
    total, worth = torch.zeros((), dtype=torch.float64), 0.0
    for row in rows:
        span = found.train.span(row)
        ids = torch.from_numpy(np.asarray(found.train.ids[span]).astype(np.int64))
        learned, weights = np.asarray(found.train.learned[span]), np.asarray(found.train.weights[span])  # type: ignore[index]
        logits = model(input_ids=ids[None]).logits[0].double()
        places = np.flatnonzero(learned)
        each = cross_entropy(logits[places - 1], ids[places], reduction="none")
        factors = torch.from_numpy(weights[places]).double()
        total, worth = total + (each * factors).sum(), worth + float(factors.sum())
    return total / worth


@pytest.mark.parametrize(("size", "accumulate"), [(5, 1), (1, 5), (2, 3)])
@pytest.mark.parametrize("own_head", [True, False])
def test_a_step_is_the_weighted_mean_however_it_is_cut(
    own_head: bool, size: int, accumulate: int, tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import LlamaForCausalLM

    found = made(tokenizer, tmp_path, ROWS)
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny.llama()).float().eval()
    expected = expected_loss(model, found, list(range(5)))
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    batches = TextBatches(found.train, flat=True, order=Order(0), cut=Cut(size, accumulate))
    objective = TextObjective(CPU, head=find_head(model) if own_head else None)
    grads: dict[str, torch.Tensor] = {}

    class Watch(nets.Sgd):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            grads.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    stepped = train_step(model, Watch(model.parameters(), lr=0.0), batches.step(0), objective, max_grad_norm=0, step=1)
    assert stepped.loss == pytest.approx(float(expected), rel=1e-5)
    for name, gradient in wanted.items():
        assert torch.allclose(grads[name], gradient, atol=1e-5 * float(gradient.abs().max()) + 1e-8), name
    assert held_out_loss(model, batches.step(0), objective)[0] == pytest.approx(float(expected), rel=1e-5)


def test_the_check_sees_weights_that_are_left_out(tokenizer: Any, tmp_path: Path) -> None:
    """The planted fault: targets that all count the same give another loss."""
    from transformers import LlamaForCausalLM

    found = made(tokenizer, tmp_path, ROWS)
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny.llama()).float().eval()
    (batch,) = TextBatches(found.train, flat=True, order=Order(0), cut=Cut(5)).step(0)
    objective = TextObjective(CPU, head=find_head(model))
    with torch.no_grad():
        weighted = float(objective.loss(model, batch)) / objective.worth(batch)
        bare = replace(batch, weights=None)
        plain = float(objective.loss(model, bare)) / objective.worth(bare)
        expected = float(expected_loss(model, found, list(range(5))))
    assert weighted == pytest.approx(expected, rel=1e-4)
    assert abs(plain - expected) > 1e-3 * expected


@pytest.mark.parametrize("flat", [True, False])
def test_batches_carry_the_weights_of_their_targets(flat: bool, tokenizer: Any, tmp_path: Path) -> None:
    found = made(tokenizer, tmp_path, ROWS)
    for batch in TextBatches(found.train, flat=flat, order=Order(1), cut=Cut(2, 3)).step(0):
        rows = found.train
        expected = np.concatenate([rows.weights[rows.span(r)][rows.learned[rows.span(r)]] for r in batch.sources])  # type: ignore[index]
        assert batch.weights is not None
        assert np.array_equal(batch.weights, expected)
        assert TextObjective(CPU).worth(batch) == pytest.approx(float(expected.sum()))
        assert len(batch.weights) == len(batch.targets)
