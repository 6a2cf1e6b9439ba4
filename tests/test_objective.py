"""What a batch counts, what reaches the device, and an objective of a stranger that trains without a change of whet."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nets
import numpy as np
import pytest
import task_nets
import torch
from torch.nn.functional import logsigmoid

from whet.data.batch.batches import Batch, Batches, Cut
from whet.data.batch.forms import Form
from whet.data.batch.make import make_batches
from whet.data.batch.rows import Rows
from whet.data.config import Data
from whet.data.prepare import prepare
from whet.engine.compute.attention import Documents
from whet.engine.compute.head import Head, find_head
from whet.engine.device import Placement
from whet.engine.task import Task
from whet.training.objective.choose import objective_for
from whet.training.objective.labels import LabelObjective
from whet.training.objective.objective import Arithmetic, Objective
from whet.training.objective.seq2seq import Seq2SeqObjective
from whet.training.objective.text import TextObjective, TextOnDevice
from whet.training.objective.virtual_text import VirtualTextObjective
from whet.training.start import start_from_rows
from whet.training.step import Steps, held_out_loss

CPU = Arithmetic(torch.device("cpu"))
PLACED = Placement(torch.device("cpu"), "fp32", torch.float32, False, {})


# Worth: what the summed loss of a step is divided by.


def weighted(rows: Rows) -> Rows:
    draw = np.random.default_rng(3)
    return replace(rows, weights=draw.choice([0.25, 0.5, 2.0], len(rows.ids)).astype(np.float32))


def of_task(kind: str, task: str, place: Path) -> Rows:
    path = task_nets.write(place / "rows.jsonl", task_nets.rows(task, 23))
    unlabelled = "seq2seq" if kind == "T5" else "causal"
    return prepare(Data(dataset=str(path), val_size=0), task_nets.tokenizer(kind), 64, None, unlabelled).train


def learned_tokens(rows: Rows) -> float:
    """Each learned token by its weight, one by one."""
    places = [place for place in range(len(rows.ids)) if rows.learned[place]]
    return sum(1.0 if rows.weights is None else float(rows.weights[place]) for place in places)


def answer_tokens(rows: Rows) -> float:
    assert rows.answers is not None
    return float(len(rows.answers.ids))


@dataclass(frozen=True)
class Case:
    """An objective, rows for it, and what all of them are worth, counted without a batch."""

    objective: Objective[Any, Any]
    rows: Callable[[Path], Rows]
    expected: Callable[[Rows], float]
    flat: bool = False


LENGTHS = [9, 30, 17, 23, 12, 28, 40, 7, 15, 33, 21]
CASES: dict[str, Case] = {
    "flat text": Case(TextObjective(CPU), lambda _: nets.rows_of(LENGTHS), learned_tokens, flat=True),
    "padded text": Case(TextObjective(CPU), lambda _: nets.rows_of(LENGTHS), learned_tokens),
    "weighted text": Case(TextObjective(CPU), lambda _: weighted(nets.rows_of(LENGTHS)), learned_tokens, flat=True),
    "virtual text": Case(VirtualTextObjective(CPU), lambda _: nets.rows_of(LENGTHS), learned_tokens),
    "weighted virtual text": Case(
        VirtualTextObjective(CPU), lambda _: weighted(nets.rows_of(LENGTHS)), learned_tokens
    ),
    "class": Case(LabelObjective(CPU), lambda place: of_task("Bert", "classification", place), len),
    "several labels": Case(LabelObjective(CPU), lambda place: of_task("Bert", "multi_label", place), len),
    "number": Case(LabelObjective(CPU), lambda place: of_task("Bert", "regression", place), len),
    "answers": Case(Seq2SeqObjective(CPU), lambda place: of_task("T5", "seq2seq", place), answer_tokens),
}  # fmt: skip


def assert_worth(batches: Batches[Any], objective: Objective[Any, Any], expected: float) -> None:
    """Every step of an epoch together is worth all rows."""
    parts = [batch for step in range(batches.steps_per_epoch) for batch in batches.step(step)]
    assert sum(map(objective.worth, parts)) == pytest.approx(expected, rel=1e-6)


def cut_of(case: Case, place: Path, size: int, accumulate: int = 1) -> tuple[Batches[Any], float]:
    rows = case.rows(place)
    data = Data(dataset="rows.jsonl", padding_free=case.flat)
    return make_batches(rows, data, seed=1, cut=Cut(size, accumulate)), case.expected(rows)


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_divided_by_what_is_learned_however_it_is_cut(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    for size, accumulate in ((1, 1), (4, 1), (2, 3)):
        batches, expected = cut_of(case, tmp_path, size, accumulate)
        assert_worth(batches, case.objective, expected)
    filled: Any = cut_of(case, tmp_path, 4)[0]
    if case.flat:
        assert_worth(filled.filled(batches.steps_per_epoch, most_forms=2), case.objective, expected)


FAULTS: dict[str, Callable[[Any], float]] = {
    "unweighted": lambda batch: len(batch.targets),
    "tokens, learned or not": lambda batch: batch.tokens,
    "rows": lambda batch: len(batch.sources),
    "padding too": lambda batch: batch.ids.size,
    "batches": lambda batch: 1.0,
    "labels": lambda batch: batch.targets.size,
}


@pytest.mark.parametrize(
    ("name", "fault"),
    [(name, fault) for name in CASES for fault in FAULTS
     if not (fault == "unweighted" and not name.startswith("weighted"))
     and not (fault == "rows" and name in ("class", "several labels", "number"))
     and not (fault == "labels" and name != "several labels")],
)  # fmt: skip
def test_a_wrong_worth_would_be_seen(name: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    batches, expected = cut_of(case, tmp_path, 3)
    monkeypatch.setattr(type(case.objective), "worth", lambda self, batch: FAULTS[fault](batch))
    with pytest.raises(AssertionError):
        assert_worth(batches, case.objective, expected)


# What reaches the device.


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Every tensor in a batch on the device, however deep."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for one in value.values() for tensor in tensors_in(one)]
    if isinstance(value, tuple | list):
        return [tensor for one in value for tensor in tensors_in(one)]
    if dataclasses.is_dataclass(value):
        return [tensor for field in dataclasses.fields(value) for tensor in tensors_in(getattr(value, field.name))]
    return []


def assert_nothing_left_out(on_device: Any) -> None:
    listed = {id(tensor) for tensor in on_device.tensors()}
    assert listed == {id(tensor) for tensor in tensors_in(on_device)}


class Fronted(torch.nn.Module):
    """Logits of a table, one row for each token id, behind `front` places of a method that say something else."""

    def __init__(self, front: int) -> None:
        super().__init__()
        self.front = front
        self.table = torch.randn(nets.VOCABULARY, nets.VOCABULARY, generator=torch.Generator().manual_seed(3))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool) -> Any:
        logits = self.table[input_ids]
        return SimpleNamespace(logits=torch.cat([torch.zeros_like(logits[:, :1])] * self.front + [logits], dim=1))


def test_tokens_in_front_of_a_row_move_no_prediction(tmp_path: Path) -> None:
    batches, _ = cut_of(CASES["virtual text"], tmp_path, 4)
    objective = CASES["virtual text"].objective
    batch = batches.step(0)[0]
    there, without = (objective.losses(Fronted(front), objective.to_device(batch)) for front in (3, 0))
    assert torch.equal(there, without)
    by_hand = torch.log_softmax(Fronted(0).table, -1)
    before = [batch.ids[row, column] for row, column in zip(batch.rows, batch.columns, strict=True)]
    assert torch.allclose(without, -by_hand[torch.tensor(before), torch.tensor(batch.targets)])


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_of_a_batch_is_listed_for_a_captured_step(name: str, tmp_path: Path) -> None:
    """One that is not listed would keep the numbers of the batch that was captured."""
    case = CASES[name]
    batches, _ = cut_of(case, tmp_path, 3)
    on_device = case.objective.to_device(batches.step(0)[0])
    assert len(tensors_in(on_device)) >= 3
    assert_nothing_left_out(on_device)


def test_a_tensor_that_is_left_out_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    case, right = CASES["weighted text"], TextOnDevice.tensors
    batches, _ = cut_of(case, Path(), 3)
    monkeypatch.setattr(TextOnDevice, "tensors", lambda self: right(replace(self, weights=None)))
    with pytest.raises(AssertionError):
        assert_nothing_left_out(case.objective.to_device(batches.step(0)[0]))


@pytest.mark.parametrize("name", ["flat text", "weighted text"])
def test_batches_of_one_form_have_tensors_of_one_shape(name: str) -> None:
    case = CASES[name]
    plain: Any = cut_of(case, Path(), 2)[0]
    shapes: dict[Form | None, set[Any]] = {}
    for batches in (plain.filled(12, most_forms=2), plain.filled(12)):
        shapes.clear()
        for batch in (batch for step in range(12) for batch in batches.step(step)):
            found = tuple(tuple(tensor.shape) for tensor in case.objective.to_device(batch).tensors())
            shapes.setdefault(batch.form, set()).add(found)
        if batches.forms:
            assert set(shapes) == set(batches.forms)
            assert all(len(found) == 1 for found in shapes.values())
    assert len(shapes[None]) > 1, "without forms they would differ"


def test_a_method_that_starts_from_rows_is_told_what_is_padding() -> None:
    """Flat rows have none; of padded ones the mask says which tokens are real."""
    seen: list[Any] = []
    method = SimpleNamespace(wants_data=True, prepare=lambda model, passes: seen.extend(passes))
    for name in ("flat text", "padded text"):
        seen.clear()
        batches, _ = cut_of(CASES[name], Path(), 3)
        start_from_rows(method, torch.nn.Identity(), CASES[name].objective, batches)
        expected = [batch for step in range(4) for batch in batches.step(step)]
        assert len(seen) == len(expected)
        for (run, mask), batch in zip(seen, expected, strict=True):
            assert run.args[1].sha256() == batch.sha256()
            assert (mask is None) == (name == "flat text")
            if mask is not None:
                assert mask.shape == batch.ids.shape
                assert mask.sum(1).tolist() == [len(nets.rows_of(LENGTHS).row(row)[0]) for row in batch.sources]


# The choice.


@pytest.mark.parametrize(
    ("kind", "task", "padded", "virtual", "expected"),
    [("Llama", "causal", False, False, TextObjective), ("Llama", "causal", True, False, TextObjective),
     ("Llama", "causal", True, True, VirtualTextObjective), ("Bert", "classification", True, False, LabelObjective),
     ("Llama", "multi_label", True, True, LabelObjective), ("Qwen3", "regression", True, False, LabelObjective),
     ("T5", "seq2seq", True, False, Seq2SeqObjective), ("T5", "seq2seq", True, True, Seq2SeqObjective),
     ("T5", "classification", True, False, LabelObjective)],
)  # fmt: skip
def test_the_task_and_the_method_choose(kind: str, task: Any, padded: bool, virtual: bool, expected: type) -> None:
    chosen = Task(task, ("a", "b") if task in ("classification", "multi_label") else ())
    config = task_nets.config(kind, **chosen.config_values())
    network = chosen.auto_class().from_config(config).eval()
    network.config.pad_token_id = 0
    objective = objective_for(network, PLACED, chosen, padded=padded, virtual=virtual)
    assert type(objective) is expected
    seen: list[Any] = []
    network.register_forward_pre_hook(lambda module, args, given: seen.append(given["input_ids"]), with_kwargs=True)
    objective.run_once(network)
    assert [ids.shape for ids in seen] == [(1, 8)]
    if isinstance(objective, LabelObjective):
        assert objective.task == task
        assert objective.apart == (virtual and kind == "Llama")
        assert (int(seen[0][0, -1]) == config.eos_token_id) == (kind == "T5"), "T5's head reads its end token"


@pytest.mark.parametrize(
    ("storage", "padded", "autocast"), [("fp32", False, True), ("bf16", False, False), ("bf16", True, True)]
)
def test_padded_runs_train_in_float32_and_compute_in_less(storage: str, padded: bool, autocast: bool) -> None:
    placed = Placement(torch.device("cpu"), storage, torch.bfloat16, False, {})
    net = nets.network("Llama", dtype=torch.float32 if storage == "fp32" else torch.bfloat16)
    objective = objective_for(net, placed, Task(), padded=padded, virtual=False)
    assert objective.arithmetic == Arithmetic(torch.device("cpu"), torch.bfloat16, autocast)


# An objective of a stranger: preference between two answers, without a reference.


@dataclass(frozen=True)
class PairBatch:
    """Pairs of flat rows, the better one first. ids [1, T]; sides [N]: of each target, 2 * pair or one more."""

    ids: np.ndarray
    bounds: tuple[int, ...]
    indices: np.ndarray
    targets: np.ndarray
    sides: np.ndarray
    sources: tuple[int, ...]

    mask = None
    form = None

    @property
    def tokens(self) -> int:
        return self.ids.size

    def sha256(self) -> str:
        return str(self.sources)


@dataclass(frozen=True)
class PairsOnDevice:
    inputs: dict[str, Any]
    indices: torch.Tensor
    targets: torch.Tensor
    sides: torch.Tensor

    def tensors(self) -> list[torch.Tensor]:
        return [self.inputs["input_ids"], self.inputs["position_ids"], self.indices, self.targets, self.sides]


@dataclass(frozen=True)
class PairObjective(Objective[PairBatch, PairsOnDevice]):
    """-log sigmoid(beta (log p of the better answer - log p of the worse one)), one loss for each pair."""

    head: Head | None = None
    beta: float = 0.1

    def worth(self, batch: PairBatch) -> float:
        return len(batch.sources)

    def to_device(self, batch: PairBatch) -> PairsOnDevice:
        move, lengths = self.arithmetic.move, np.diff(batch.bounds)
        positions = np.concatenate([np.arange(length) for length in lengths])[None]
        cu = move(np.asarray(batch.bounds, np.int32))
        documents = Documents(cu, int(lengths.max()), bounds=batch.bounds)
        inputs = {"input_ids": move(batch.ids), "position_ids": move(positions), "documents": documents}
        return PairsOnDevice(inputs, move(batch.indices), move(batch.targets), move(batch.sides))

    def losses(self, model: torch.nn.Module, on_device: PairsOnDevice) -> torch.Tensor:
        assert self.head is not None
        with self.arithmetic.context():
            each = self.head.losses(on_device.inputs | {"use_cache": False}, on_device.indices, on_device.targets)
        pairs = int(on_device.sides[-1]) // 2 + 1
        sides = each.new_zeros(2 * pairs).index_add(0, on_device.sides, each).view(pairs, 2)
        return -logsigmoid(self.beta * (sides[:, 1] - sides[:, 0]))


ROWS = nets.rows_of([9, 14, 17, 12, 21, 8, 26, 19])


def pair_batch(pairs: Sequence[int]) -> PairBatch:
    """The batch of pairs (row 2 p, row 2 p + 1)."""
    rows = [ROWS.row(2 * pair + side) for pair in pairs for side in (0, 1)]
    ids, learned = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    bounds = np.cumsum([0, *(len(row[0]) for row in rows)])
    targets = np.flatnonzero(learned)
    sides = np.searchsorted(bounds, targets, side="right") - 1
    ids = ids.astype(np.int64)
    return PairBatch(ids[None], tuple(bounds.tolist()), targets - 1, ids[targets], sides, tuple(pairs))


def plain_preference(model: Any) -> torch.Tensor:
    """The mean loss of all pairs, row by row, from the model's own logits."""
    losses = []
    for pair in range(4):
        scores = []
        for side in (0, 1):
            ids, learned = ROWS.row(2 * pair + side)
            tokens, places = torch.from_numpy(ids.astype(np.int64)), np.flatnonzero(learned)
            log_probs = model(input_ids=tokens[None], use_cache=False).logits[0].double().log_softmax(-1)
            scores.append(log_probs[torch.from_numpy(places - 1), tokens[torch.from_numpy(places)]].sum())
        losses.append(-logsigmoid(0.1 * (scores[0] - scores[1])))
    return torch.stack(losses).mean()


def two_steps(cut: Sequence[Sequence[int]]) -> tuple[list[float], list[torch.Tensor], Any]:
    """Losses of two steps of plain descent over all pairs in the given micro-batches, the gradients of the first, and
    the model."""
    model = nets.made("Llama")
    head = find_head(model.get_base_model())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    seen: list[torch.Tensor] = []

    class Watched(nets.Sgd):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            if not seen:
                seen.extend(parameter.grad.clone() for parameter in trained if parameter.grad is not None)
            super().step()

    steps = Steps(model, Watched(trained, lr=0.3), PairObjective(CPU, head=head), 0.0)
    batches: list[Batch] = [pair_batch(part) for part in cut]
    return [steps.step(batches, step).read().loss for step in (1, 2)], seen, model


@pytest.mark.parametrize("cut", [[[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0], [1], [2], [3]], [[3, 1, 0], [2]]], ids=str)
def test_an_objective_of_a_stranger_trains(cut: list[list[int]]) -> None:
    """A loss that is no sum over tokens, against plain logits; the same however its pairs are cut."""
    losses, seen, trained = two_steps(cut)
    model = nets.made("Llama")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = plain_preference(model)
    gradients = torch.autograd.grad(expected, parameters)
    assert losses[0] == pytest.approx(expected.item(), rel=1e-5)
    for mine, theirs in zip(seen, gradients, strict=True):
        assert nets.relative(mine, theirs) < 1e-4
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter -= 0.3 * gradient
        second, third = plain_preference(model).item(), plain_preference(trained).item()
    assert losses[1] == pytest.approx(second, rel=1e-4)
    assert third < losses[1] < losses[0]
    head = find_head(trained.get_base_model())
    loss, targets = held_out_loss(trained, [pair_batch(part) for part in cut], PairObjective(CPU, head=head))
    assert loss == pytest.approx(third, rel=1e-5)
    assert targets == sum(len(pair_batch(part).targets) for part in cut)


def test_a_wrong_worth_of_a_stranger_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = plain_preference(nets.made("Llama")).item()
    monkeypatch.setattr(PairObjective, "worth", lambda self, batch: len(batch.targets))
    assert two_steps([[0, 1], [2, 3]])[0][0] != pytest.approx(expected, rel=1e-2)


def test_with_a_trained_head_it_is_refused_and_nothing_is_updated() -> None:
    net = nets.network("Llama", tie_word_embeddings=False)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    steps = Steps(net, nets.Sgd(net.parameters(), lr=0.3), PairObjective(CPU, head=find_head(net)), 0.0)
    with pytest.raises(RuntimeError, match="the output head is trained"):
        steps.step([pair_batch([0, 1])], 1)
    assert all(torch.equal(now, then) for now, then in zip(net.parameters(), before, strict=True))
