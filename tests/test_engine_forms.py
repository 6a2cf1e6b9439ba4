"""Batches filled up to a few forms: never too small, never counted, and the step they make is the same step."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import nets
import numpy as np
import pytest
import torch
from nets import rows_of

from whet.data.batch.batches import Cut, Order
from whet.data.batch.forms import FORM_SAVES, TOKEN_MULTIPLE, BatchSizes, Form, choose_forms, fitting
from whet.data.batch.forms import _best_sizes as best_sizes
from whet.data.batch.pack import best_fit
from whet.data.batch.text_batches import TextBatch, TextBatches
from whet.engine.compute.head import find_head
from whet.training.objective.objective import Arithmetic
from whet.training.objective.text import TextObjective
from whet.training.step import train_step

CPU = Arithmetic(torch.device("cpu"))


def uneven(count: int, seed: int = 1, longest: int = 400) -> list[int]:
    draw = np.random.default_rng(seed)
    return np.clip(draw.lognormal(4.2, 0.8, count).astype(int), 2, longest).tolist()


def batches_of(
    lengths: Sequence[int], *, size: int = 4, accumulate: int = 1, capacity: int = 0, epochs: int = 3, limit: int = 3
) -> tuple[TextBatches, int]:
    """Batches with forms for some epochs, and the number of steps; capacity: of packed rows, if they are packed."""
    rows = rows_of(lengths)
    bins = best_fit(lengths, capacity) if capacity else None
    plain = TextBatches(rows, bins, flat=True, order=Order(5), cut=Cut(size, accumulate))
    steps = epochs * plain.steps_per_epoch
    return plain.filled(steps, most_forms=limit), steps


CASES: dict[str, dict[str, Any]] = {
    "rows": {"lengths": uneven(50)},
    "rows, last batch of one": {"lengths": uneven(49)},
    "accumulated": {"lengths": uneven(53), "accumulate": 3},
    "packed": {"lengths": uneven(200), "capacity": 512, "size": 2},
    "packed alone": {"lengths": uneven(90), "capacity": 512, "size": 1},
    "one row": {"lengths": [37], "size": 2},
    "all alike": {"lengths": [128] * 20},
    "all alike, not a multiple": {"lengths": [100] * 20},
    "all alike, last batch smaller": {"lengths": [128] * 21},
    "one form": {"lengths": uneven(60), "limit": 1},
    "many values": {"lengths": uneven(400, longest=20000), "size": 8},
}


def drawn(case: str) -> tuple[TextBatches, list[TextBatch]]:
    batches, steps = batches_of(**CASES[case])
    return batches, [batch for step in range(steps) for batch in batches.step(step)]


@pytest.mark.parametrize("case", CASES)
def test_every_batch_of_a_run_fits_its_form(case: str) -> None:
    batches, every = drawn(case)
    assert 1 <= len(batches.forms) <= 3
    for batch in every:
        form, bounds = batch.form, batch.bounds
        assert form is not None
        assert bounds is not None
        lengths = np.diff(bounds)
        assert batch.ids.shape == batch.positions.shape == (1, form.tokens)
        assert bounds[-1] == form.tokens
        assert len(lengths) <= form.documents
        assert len(batch.targets) <= form.targets
        assert lengths.max() <= form.longest
        assert all(length == form.row for length in lengths) or not form.row
    assert {batch.form for batch in every} == set(batches.forms)  # none is made in vain


@pytest.mark.parametrize("case", CASES)
def test_what_is_shown_has_the_size_of_the_form(case: str) -> None:
    for batch in drawn(case)[1]:
        form, shown = batch.form, TextObjective(CPU).to_device(batch)
        assert form is not None
        assert shown.documents is not None
        assert shown.documents.cu.shape == (form.documents + 1,)
        assert shown.indices.shape == shown.targets.shape == (form.targets,)
        assert int((shown.targets >= 0).sum()) == len(batch.targets)
        assert shown.documents.longest == form.longest
        assert shown.documents.row == form.row
        assert shown.documents.cu[-1] == form.tokens
        ends = shown.documents.cu
        assert bool((ends.diff() >= 0).all())
        assert torch.equal((shown.positions[0] == 0).nonzero().flatten(), ends[:-1][ends.diff() > 0].long())


@pytest.mark.parametrize("case", CASES)
def test_filler_is_never_counted(case: str) -> None:
    batches, every = drawn(case)
    plain = batches.recut(batches.size)
    count = 0
    for step in range(len(every)):
        if count == len(every):
            break
        for bare in plain.step(step):
            filled = every[count]
            count += 1
            real = bare.ids.shape[1]
            assert filled.tokens == bare.tokens == real
            assert filled.sources == bare.sources
            assert np.array_equal(filled.ids[:, :real], bare.ids)
            assert not filled.ids[:, real:].any()
            assert np.array_equal(filled.positions[:, :real], bare.positions)
            assert np.array_equal(filled.targets, bare.targets)
            assert np.array_equal(filled.columns, bare.columns)
    assert count == len(every)


@pytest.mark.parametrize("case", CASES)
def test_forms_waste_no_more_than_the_best_single_size(case: str) -> None:
    _, every = drawn(case)
    tokens = [batch.tokens for batch in every]
    largest = -(-max(tokens) // TOKEN_MULTIPLE) * TOKEN_MULTIPLE
    shown = sum(batch.ids.shape[1] for batch in every)
    coarse = largest // 64 if len({-(-t // TOKEN_MULTIPLE) for t in tokens}) > 64 else 0  # candidates are then rounded
    assert shown <= (largest + coarse + TOKEN_MULTIPLE * bool(coarse)) * len(every)
    if case == "rows":
        assert shown < 0.95 * largest * len(every)


def test_rows_are_dense_only_where_all_documents_are_alike() -> None:
    def rows(case: str) -> set[int]:
        return {form.row for form in drawn(case)[0].forms}

    assert rows("all alike") == {128}
    assert rows("all alike, last batch smaller") == {128}  # a form of its own for the batch of one
    assert rows("all alike, not a multiple") == {0}
    assert rows("rows") == {0}
    assert {form.row for form in batches_of([128] * 20 + [256] * 2, limit=1)[0].forms} == {0}
    assert {form.row for form in batches_of([128] * 19 + [127], limit=1)[0].forms} == {0}


def test_a_shorter_batch_is_filled_with_rows_of_the_same_length() -> None:
    facts = BatchSizes(*(np.array(c) for c in ([512, 512, 256], [4, 4, 2], [9, 8, 7], [128] * 3, [128, 128, 128])))
    small, large = choose_forms(facts, 2)
    assert (small.row, large.row) == (128, 128)
    (only,) = choose_forms(facts, 1)
    assert only == Form(512, 4, 9, 128, 128)
    odd = BatchSizes(*(np.array(c) for c in ([512, 512, 384], [4, 4, 3], [9, 8, 7], [128] * 3, [128, 128, 127])))
    assert choose_forms(odd, 1)[0].row == 0


@pytest.mark.parametrize(("batches", "forms"), [(10, 2), (100, 1)])
def test_another_form_has_to_save_its_share(batches: int, forms: int) -> None:
    """The last batch of an epoch is half full: worth a form of its own in a short epoch, not in a long one."""
    tokens = np.array([1024] * (batches - 1) + [512])
    facts = BatchSizes(tokens, tokens // 128, tokens - 1, np.full(batches, 128), np.full(batches, 100))
    assert len(choose_forms(facts, 2)) == forms


@pytest.mark.parametrize("seed", range(20))
def test_the_sizes_are_the_best_there_are(seed: int) -> None:
    """Against every choice of sizes: the best of as many, and no fewer would come near."""
    draw = np.random.default_rng(seed)
    values = np.unique(draw.integers(1, 40, 8)) * TOKEN_MULTIPLE
    counts = draw.integers(1, 9, len(values))
    limit = int(draw.integers(1, 5))

    def cost(sizes: Sequence[int]) -> int:
        return sum(int(n) * min(s for s in sizes if s >= v) for v, n in zip(values, counts, strict=True))

    found = best_sizes(values, counts, limit)
    assert found == sorted(set(found))
    assert len(found) <= limit
    least = [
        min(cost([*below, int(values[-1])]) for below in itertools.combinations(values[:-1].tolist(), used))
        for used in range(min(limit, len(values)))
    ]
    assert cost(found) == least[len(found) - 1] <= (1 + FORM_SAVES) * min(least)
    assert all(few > (1 + FORM_SAVES) * min(least) for few in least[: len(found) - 1])


def test_the_smallest_form_that_holds_is_taken() -> None:
    forms = [Form(128, 1, 1, 128), Form(512, 1, 1, 128)]
    assert fitting(forms, 128) is forms[0]
    assert fitting(forms, 129) is forms[1]
    assert fitting(forms, 513) is None


def measured(kind: str, batches: Sequence[TextBatch]) -> tuple[Any, dict[str, torch.Tensor]]:
    """One optimiser step of a small model on the CPU: what it says of itself, and the weights after it."""
    model = nets.made(kind)
    trained = [p for p in model.parameters() if p.requires_grad]
    head = find_head(model.get_base_model())
    assert head is not None
    objective = TextObjective(CPU, head=head)
    done = train_step(model, nets.Sgd(trained, lr=1.0), batches, objective, max_grad_norm=0.0, step=1)
    return done, {name: p.detach().clone() for name, p in nets.lora_parameters(model).items()}


def assert_same_step(kind: str, one: Sequence[TextBatch], other: Sequence[TextBatch]) -> None:
    (a, weights), (b, others) = measured(kind, one), measured(kind, other)
    assert a.tokens == b.tokens
    assert a.targets == b.targets
    assert abs(a.loss - b.loss) < 1e-5 * b.loss
    assert abs(a.grad_norm - b.grad_norm) < 1e-5 * b.grad_norm
    start = nets.lora_parameters(nets.made(kind))
    moved = {name: weights[name] - start[name] for name in weights}
    assert nets.apart(moved, {name: others[name] - start[name] for name in others}) < 1e-4


@pytest.mark.parametrize("kind", ["Llama", "Gemma2"])
@pytest.mark.parametrize("case", ["rows", "packed", "all alike", "all alike, not a multiple"])
def test_a_step_filled_up_to_its_form_is_the_same_step(kind: str, case: str) -> None:
    batches, _ = batches_of(**(CASES[case] | {"lengths": CASES[case]["lengths"][:12]}))
    plain = batches.recut(batches.size)
    filled = batches.step(0)
    assert filled[0].ids.shape[1] > plain.step(0)[0].ids.shape[1] or filled[0].form.row  # type: ignore[union-attr]
    assert_same_step(kind, filled, plain.step(0))


def test_filler_that_is_learned_would_be_seen() -> None:
    import dataclasses

    batches, _ = batches_of(CASES["rows"]["lengths"][:12])
    plain, filled = batches.recut(4).step(0), batches.step(0)[0]
    last = filled.ids.shape[1] - 2
    wrong = dataclasses.replace(
        filled, form=None, targets=np.append(filled.targets, 0), columns=np.append(filled.columns, last),
        rows=np.append(filled.rows, 0),
    )  # fmt: skip
    with pytest.raises(AssertionError):
        assert_same_step("Llama", [wrong], plain)


@pytest.mark.parametrize("formed", [False, True])
def test_joined_micro_batches_make_the_same_step(formed: bool) -> None:
    batches, steps = batches_of(uneven(22), size=2, accumulate=4)
    joined = batches.recut(8)
    if formed:
        joined = joined.filled(steps, most_forms=2)
    assert joined.steps_per_epoch == batches.steps_per_epoch
    for step in (0, batches.steps_per_epoch - 1, batches.steps_per_epoch):  # full, partial, of the next epoch
        parts, (whole,) = batches.step(step), joined.step(step)
        assert [row for part in parts for row in part.sources] == list(whole.sources)
        assert_same_step("Llama", [whole], parts)


def test_without_forms_flat_rows_are_filled_to_a_multiple() -> None:
    batches, steps = batches_of(uneven(22))
    bare = batches.recut(4)
    sizes = [[batch.ids.size for step in range(steps) for batch in made.step(step)] for made in (bare, bare.filled(1))]
    assert [-(-size // 32) * 32 for size in sizes[0]] == sizes[1] != sizes[0]
    padded = TextBatches(bare.rows, flat=False, order=Order(5), cut=Cut(4))
    for filled in (padded.filled(steps), padded.filled(steps, most_forms=2)):
        assert [b.sha256() for b in filled.step(0)] == [b.sha256() for b in padded.step(0)]


@pytest.mark.parametrize("capacity", [0, 512])
def test_the_most_tokens_that_a_forward_pass_can_have(capacity: int) -> None:
    lengths = uneven(12)
    batches, _ = batches_of(lengths, size=3, capacity=capacity)
    tokens = [sum(lengths[row] for row in unit) for unit in batches.units]
    assert batches.most_tokens() == max(map(sum, itertools.combinations(tokens, 3)))


@pytest.mark.parametrize(("size", "rows"), [(1, 1), (5, 5), (12, 12), (99, 12)])
def test_padding_counts_in_the_largest_forward_pass(size: int, rows: int) -> None:
    lengths = uneven(12)
    bare, _ = batches_of(lengths, size=3, capacity=0)
    padded = TextBatches(bare.rows, flat=False, order=Order(5), cut=Cut(size))
    assert padded.most_tokens() == padded.largest_tokens(4) == rows * max(lengths)
    assert max(batch.ids.size for step in range(4) for batch in padded.step(step)) <= padded.most_tokens()


def test_facts_are_those_of_the_batches() -> None:
    for case in CASES.values():
        batches, steps = batches_of(**case)
        plain = batches.recut(batches.size)
        facts = plain.facts(steps)
        every = [batch for step in range(steps) for batch in plain.step(step)]
        lengths = [np.diff(batch.bounds) for batch in every]  # type: ignore[arg-type]
        assert facts.tokens.tolist() == [batch.tokens for batch in every]
        assert facts.targets.tolist() == [len(batch.targets) for batch in every]
        assert facts.documents.tolist() == [len(found) for found in lengths]
        assert facts.longest.tolist() == [found.max() for found in lengths]
        assert facts.shortest.tolist() == [found.min() for found in lengths]
