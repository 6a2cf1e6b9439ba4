"""From rows to batches: the split, packing, order, what happens to long rows, the ledger, the golden contract."""

from __future__ import annotations

import gc
import json
import random
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from whet.base.errors import UserError
from whet.data.batch.batches import Cut, Order
from whet.data.batch.ledger import Ledger
from whet.data.batch.pack import best_fit
from whet.data.batch.rows import Rows
from whet.data.batch.text_batches import TextBatch, TextBatches
from whet.data.config import Data
from whet.data.prepare import Prepared, prepare
from whet.data.sides.split import held_out
from whet.data.template.goldens import FILE, check_contract, write_contract
from whet.data.template.row_tokenizer import RowTokenizer

TINY = Path(__file__).parents[1] / "whet" / "builtin" / "tiny"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(TINY))


def test_a_row_never_changes_side() -> None:
    names = [f"row{n}" for n in range(2000)]
    sides = dict(zip(names, held_out(names, 0.1), strict=True))
    assert 150 < sum(sides.values()) < 250, "about the share"
    more = [f"new{n}" for n in range(500)] + names[::-1] + names[:300]
    random.Random(0).shuffle(more)
    for name, side in zip(more, held_out(more, 0.1), strict=True):
        assert side == sides.get(name, side), "neither order, nor other rows, nor duplicates move a row"
    assert all(not old or new for old, new in zip(held_out(names, 0.1), held_out(names, 0.2), strict=True)), "it grows"


def test_the_split_is_the_same_on_every_machine_and_in_every_version() -> None:
    names = [f"{n:016x}" for n in range(40)]
    assert [n for n, side in enumerate(held_out(names, 0.1)) if side] == [8, 21, 25, 27, 36]
    assert [n for n, side in enumerate(held_out(names, 3)) if side] == [8, 21, 27]


def test_a_number_of_rows_is_that_many_rows() -> None:
    names = [f"row{n}" for n in range(50)]
    for count in (1, 7, 49, 50, 80):
        assert sum(held_out(names, count)) == min(count, 50)
    assert sum(held_out(names, 0)) == 0
    doubled = held_out(names + names, 5)
    assert doubled[:50] == doubled[50:]
    assert sum(doubled) == 10, "all copies of a row are on one side"


def packs(lengths: list[int], capacity: int) -> tuple[list[list[int]], float]:
    """The packed rows, checked, and the share of places left empty."""
    rows = best_fit(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths))), "every document once"
    assert max(sum(lengths[index] for index in row) for row in rows) <= capacity
    return rows, 1 - sum(lengths) / (len(rows) * capacity)


def test_packing_holds_every_document_once_and_never_overflows() -> None:
    chance = random.Random(0)
    for _ in range(200):
        capacity = chance.randint(1, 40)
        lengths = [chance.randint(1, capacity) for _ in range(chance.randint(0, 60))]
        if not lengths:
            assert best_fit(lengths, capacity) == []
            continue
        rows, _ = packs(lengths, capacity)
        filled = [sum(lengths[index] for index in row) for row in rows]
        for place, row in enumerate(rows):
            assert all(full + lengths[row[0]] > capacity for full in filled[:place]), (
                "a row is opened only when it must be"
            )
        assert rows == best_fit(lengths, capacity)
    with pytest.raises(AssertionError):
        best_fit([5], 4)


def test_packing_wastes_little_on_lengths_as_they_occur_and_takes_no_time() -> None:
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(5.2, 0.9, 200_000), 8, 2048).astype(int).tolist()
    seconds = {}
    for count in (50_000, 200_000):
        gc.collect()
        gc.disable()  # or what other tests left behind would be searched through within the time
        try:
            start = time.process_time()
            _, waste = packs(lengths[:count], 2048)
            seconds[count] = time.process_time() - start
        finally:
            gc.enable()
        assert waste < 0.02, waste
    assert seconds[200_000] < 3
    assert seconds[200_000] < 10 * max(seconds[50_000], 0.02), "near-linear"
    in_order, room = 1, 2048
    for length in lengths[:50_000]:
        in_order, room = (in_order, room - length) if length <= room else (in_order + 1, 2048 - length)
    assert 1 - sum(lengths[:50_000]) / (in_order * 2048) > 0.02, "which is not so without fitting"


def random_rows(count: int, seed: int = 0, longest: int = 12) -> Rows:
    """Rows whose token ids are all different, so that a token says where it came from."""
    generator, parts, at = np.random.default_rng(seed), [], 1
    for source in range(count):
        length = int(generator.integers(2, longest))
        marks = generator.random(length) < 0.5
        marks[-1] = True
        parts.append((source, np.arange(at, at + length), marks))
        at += length
    return Rows.gather(parts)


def questions(batch: TextBatch) -> Counter[tuple[int, int, int]]:
    """(token, its position, the token to predict from there) of every target."""
    ids, positions = batch.ids[batch.rows, batch.columns], batch.positions[batch.rows, batch.columns]
    return Counter(zip(ids.tolist(), positions.tolist(), batch.targets.tolist(), strict=True))


LAYOUTS = [(1, 1), (8, 1), (1, 8), (2, 4), (4, 2), (3, 5)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("size", "accumulate"), LAYOUTS)
def test_every_row_is_seen_once_an_epoch_and_again_in_another_order(size: int, accumulate: int, packed: bool) -> None:
    rows = random_rows(37)
    bins = best_fit(rows.lengths.tolist(), 30) if packed else None
    batches = TextBatches(rows, bins, flat=True, order=Order(3), cut=Cut(size, accumulate))
    orders = []
    for epoch in range(3):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        seen = [row for step in steps for batch in batches.step(step) for row in batch.sources]
        assert sorted(seen) == list(range(37))
        orders.append(seen)
    assert len({tuple(order) for order in orders}) == 3
    other = TextBatches(rows, bins, flat=True, order=Order(4), cut=Cut(size, accumulate))
    assert [row for batch in other.step(0) for row in batch.sources] != orders[0][: len(other.step(0)[0].sources)]


@pytest.mark.parametrize("flat", [False, True])
def test_resuming_at_any_step_is_looking_it_up(flat: bool) -> None:
    def fresh() -> TextBatches:
        return TextBatches(random_rows(23), flat=flat, order=Order(7), cut=Cut(2, 3))

    whole = fresh()
    hashes = [[batch.sha256() for batch in whole.step(step)] for step in range(3 * whole.steps_per_epoch)]
    assert len({tuple(step) for step in hashes}) == len(hashes), "or the comparison would say nothing"
    for start in range(len(hashes)):
        resumed = fresh()
        assert [[batch.sha256() for batch in resumed.step(step)] for step in range(start, len(hashes))] == hashes[
            start:
        ]
    backwards = fresh()
    assert [[b.sha256() for b in backwards.step(step)] for step in reversed(range(len(hashes)))] == hashes[::-1]


@pytest.mark.parametrize("packed", [False, True])
def test_a_step_asks_the_same_however_it_is_cut_and_laid_out(packed: bool) -> None:
    rows = random_rows(50)
    bins = best_fit(rows.lengths.tolist(), 24) if packed else None
    reference = None
    for size, accumulate in LAYOUTS[1:5]:
        for flat in (True, False):
            for multiple in (1, 16):
                made = TextBatches(rows, bins, flat=flat, order=Order(1), cut=Cut(size, accumulate, multiple))
                steps = [made.step(step) for step in range(2 * made.steps_per_epoch)]
                asked = [sum((questions(batch) for batch in step), Counter()) for step in steps]
                reference = reference or asked
                assert asked == reference
                assert all(len(step) <= accumulate for step in steps)
                assert sum(batch.tokens for step in steps for batch in step) == 2 * len(rows.ids)
    assert reference is not None
    expected = Counter()
    for row in range(len(rows)):
        ids, learned = rows.row(row)
        expected += Counter((int(ids[at - 1]), at - 1, int(ids[at])) for at in np.flatnonzero(learned))
    half = len(reference) // 2
    assert sum(reference[:half], Counter()) == sum(reference[half:], Counter()) == expected, "each target once an epoch"


def test_a_flat_row_says_where_its_documents_begin() -> None:
    rows = random_rows(9)
    for multiple in (1, 16):
        batch = TextBatches(rows, flat=True, order=Order(0), cut=Cut(9, multiple=multiple)).step(0)[0]
        assert batch.bounds is not None
        assert batch.ids.shape[1] % multiple == 0
        assert batch.bounds[-1] == batch.ids.shape[1]
        for source, start, stop in zip(batch.sources, batch.bounds, batch.bounds[1:], strict=False):
            assert batch.ids[0, start:stop].tolist() == rows.row(source)[0].tolist()
            assert batch.positions[0, start:stop].tolist() == list(range(stop - start))
            assert start not in batch.columns + 1, "no document predicts the first token of the next"
    moved = replace(batch, positions=np.arange(batch.ids.shape[1])[None])
    assert moved.sha256() != batch.sha256()


def test_evaluation_sees_every_row_once() -> None:
    batches = TextBatches(random_rows(37), flat=True, order=Order(0), cut=Cut(5))
    groups = batches.all()
    assert sorted(unit for group in groups for unit in group) == list(range(37))
    assert max(map(len, groups)) == 5


def chats_of(lengths: list[tuple[int, int]]) -> list[dict[str, str]]:
    return [
        {"prompt": f"q{n} " + "word " * a, "completion": f"a{n} " + "reply " * b} for n, (a, b) in enumerate(lengths)
    ]


def made(tokenizer: Any, place: Path, rows: list[Any], **changes: Any) -> Prepared:
    path = place / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return prepare(Data(dataset=str(path), **({"val_size": 0} | changes)), tokenizer, 1024)


LENGTHS = [(2, 2), (40, 2), (2, 40), (40, 40), (90, 3), (3, 90), (0, 0), (60, 1), (1, 60), (10, 10)]
POLICIES = ["drop", "truncate", "truncate_prompt"]


@pytest.mark.parametrize("val_size", [0, 0.3])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_row_is_used_or_listed_and_every_token_used_or_lost(
    policy: str, val_size: float, tokenizer: Any, tmp_path: Path
) -> None:
    rows = chats_of(LENGTHS * 3)
    whole = made(tokenizer, tmp_path, rows, val_size=val_size)
    total = len(whole.train.ids) + len(whole.evaluation.ids)
    cut = made(tokenizer, tmp_path, rows, val_size=val_size, max_length=48, over_length=policy)
    ledger = cut.ledger
    used = len(set(cut.train.sources.tolist())) + len(set(cut.evaluation.sources.tolist()))
    assert ledger.rows_read == len(rows) == used + len(ledger.dropped)
    assert len(cut.train.ids) + len(cut.evaluation.ids) + ledger.tokens_lost == total
    assert max(cut.train.lengths) <= 48
    over = sum(length > 48 for part in (whole.train, whole.evaluation) for length in part.lengths)
    assert ledger.rows_over_length == over > 0
    assert all(drop["reason"].endswith("over 48") and drop["row"] for drop in ledger.dropped)
    assert (ledger.rows_train, ledger.tokens) == (len(cut.train), len(cut.train.ids))
    assert ledger.supervised_tokens == cut.train.targets == int(cut.train.learned.sum())
    assert (ledger.longest_row, ledger.sha256) == (max(cut.train.lengths), cut.train.sha256())
    assert ledger.supervised_by_role == {"assistant": ledger.supervised_tokens}


def test_what_each_policy_keeps(tokenizer: Any, tmp_path: Path) -> None:
    rows = chats_of(LENGTHS)
    whole = made(tokenizer, tmp_path, rows).train
    for policy in POLICIES:
        cut = made(tokenizer, tmp_path, rows, max_length=48, over_length=policy)
        for index, source in enumerate(cut.train.sources.tolist()):
            (ids, learned), (old, old_learned) = cut.train.row(index), whole.row(source)
            if len(old) <= 48 or policy == "drop":
                assert np.array_equal(ids, old)
            elif policy == "truncate":
                assert np.array_equal(ids, old[:48])
                assert np.array_equal(learned, old_learned[:48])
            else:
                assert len(ids) == 48
                assert np.array_equal(ids[learned], old[old_learned]), "no token of the answer is lost"
                assert np.array_equal(ids[:3], old[:3]), "nor one of the template"
                first = int(np.flatnonzero(learned)[0])
                assert np.array_equal(ids[first - 8 : first], old[np.flatnonzero(old_learned)[0] - 8 :][:8])
        ends = sum(row[-2] == 2 and bool(marks[-2]) for row, marks in map(cut.train.row, range(len(cut.train))))
        assert cut.ledger.rows_without_end_of_turn == len(cut.train) - ends
        assert (cut.ledger.rows_without_end_of_turn > 0) == (policy == "truncate")
    with pytest.raises(UserError, match=r"rows\.jsonl, row 2, field data\.over_length") as caught:
        made(tokenizer, tmp_path, rows, max_length=48, over_length="error")
    assert caught.value.found == f"{whole.lengths[1]} tokens"


def test_the_oldest_part_of_a_prompt_is_cut_first(tokenizer: Any, tmp_path: Path) -> None:
    turns = [("system", "rule " * 20), ("user", "new " * 20), ("assistant", "yes")]
    rows = [{"messages": [{"role": role, "content": content} for role, content in turns]}]
    cut = made(tokenizer, tmp_path, rows, max_length=40, over_length="truncate_prompt")
    text = tokenizer.decode(cut.train.ids)
    assert text.count("rule") < text.count("new") == 20


def test_splitting_text_loses_nothing_that_is_not_counted(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"text": "once upon a time " * n} for n in (1, 5, 20, 33, 64)]
    whole = made(tokenizer, tmp_path, rows, packing=False)
    for limit in (8, 9, 10, 11, 12, 13, 64):
        cut = made(tokenizer, tmp_path, rows, packing=False, max_length=limit)
        assert cut.ledger.policy["over_length"] == "split"
        assert len(cut.train.ids) + cut.ledger.tokens_lost == len(whole.train.ids)
        assert set(cut.train.sources.tolist()) == set(range(5))
        for source in range(5):
            pieces = [cut.train.row(i)[0] for i in np.flatnonzero(cut.train.sources == source)]
            joined = np.concatenate(pieces)
            assert np.array_equal(joined, whole.train.row(source)[0][: len(joined)])
    assert any(made(tokenizer, tmp_path, rows, max_length=n).ledger.tokens_lost for n in range(8, 20)), (
        "or it never was"
    )


def test_packing_is_counted(tokenizer: Any, tmp_path: Path) -> None:
    found = made(tokenizer, tmp_path, [{"text": f"story {n} " * (n % 7 + 1)} for n in range(50)], max_length=64)
    assert found.bins is not None
    assert found.ledger.packed_rows == len(found.bins)
    assert found.ledger.packing_fill == len(found.train.ids) / (64 * len(found.bins))
    assert found.decided["data.packing"] == (True, "usual for raw text")


def test_blank_answers_are_refused_or_dropped_and_counted(tokenizer: Any, tmp_path: Path) -> None:
    rows = [*chats_of([(1, 1)] * 4), {"prompt": "a", "completion": "  "}, {"prompt": "b", "completion": ""}]
    with pytest.raises(UserError, match=r"row 5, field completion[\s\S]*data\.empty=drop"):
        made(tokenizer, tmp_path, rows)
    ledger = made(tokenizer, tmp_path, rows, empty="drop").ledger
    assert (ledger.rows_read, ledger.rows_train, ledger.rows_without_target) == (6, 4, 2)
    assert [drop["row"] for drop in ledger.dropped] == [5, 6]
    with pytest.raises(UserError, match="every row is blank"):
        made(tokenizer, tmp_path, rows[4:], empty="drop")


def test_the_gate_lets_nothing_through_that_learns_nothing(tokenizer: Any, tmp_path: Path) -> None:
    Ledger(rows_read=1, rows_train=1, supervised_tokens=1).gate()
    with pytest.raises(UserError, match="no row is left to train on"):
        Ledger(rows_read=3, rows_eval=3).gate()
    with pytest.raises(UserError, match="no token would be learned"):
        Ledger(rows_read=3, rows_train=3, tokens=30).gate()
    with pytest.raises(UserError, match=r"2 rows read, 0 held out, 2 dropped \(\d+ tokens, over 8\)"):
        made(tokenizer, tmp_path, chats_of([(9, 9), (9, 9)]), max_length=8).ledger.gate()


def test_rows_on_both_sides_are_counted(tokenizer: Any, tmp_path: Path) -> None:
    other = tmp_path / "held.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in chats_of([(1, 1), (2, 2), (3, 3)])))
    found = made(tokenizer, tmp_path, chats_of([(1, 1), (9, 9), (3, 3)]), eval_dataset=str(other))
    assert (found.ledger.rows_on_both_sides, found.ledger.rows_eval) == (2, 3)
    assert made(tokenizer, tmp_path, chats_of(LENGTHS) * 4, val_size=0.4).ledger.rows_on_both_sides == 0


def test_rows_do_not_depend_on_how_many_are_tokenised_together(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*chats_of(LENGTHS * 2), {"prompt": "<|im_end|>", "completion": "<|im_start|>"}]
    whole = made(tokenizer, tmp_path, rows)
    monkeypatch.setattr("whet.data.batch.row_builder.CHUNK", 3)
    assert made(tokenizer, tmp_path, rows).ledger.sha256 == whole.ledger.sha256
    assert made(tokenizer, tmp_path, rows[::-1]).ledger.sha256 != whole.ledger.sha256


def test_a_changed_template_or_tokenizer_breaks_the_contract(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    def fresh(old: str = "", new: str = "") -> RowTokenizer:
        found = AutoTokenizer.from_pretrained(str(TINY))
        assert old in found.chat_template
        found.chat_template = found.chat_template.replace(old, new)
        return RowTokenizer(found, chat=True)

    path = tmp_path / FILE
    assert check_contract(fresh(), path) == 0, "nothing was promised"
    write_contract(fresh(), path)
    assert check_contract(fresh(), path) == 5
    assert len(json.loads(path.read_text(encoding="utf-8"))["golden"]) == 5
    for changed in (
        fresh("<|im_end|>\\n", "<|im_end|>"),
        fresh("message['content']", "(message['content'] | trim)"),
        fresh("assistant\\n", "assistant\\n<think>"),  # the prompt alone
    ):
        with pytest.raises(UserError, match=r"that the adapter was trained with|asks for an answer"):
            check_contract(changed, path)
    other = fresh()
    vocabulary = json.loads(other.backend.to_str())
    one, two = other.backend.encode("a b", add_special_tokens=False).tokens[:2]
    words = vocabulary["model"]["vocab"]
    words[one], words[two] = words[two], words[one]
    other.backend = type(other.backend).from_str(json.dumps(vocabulary))
    with pytest.raises(UserError, match="another token at position"):
        check_contract(other, path)


def test_a_template_without_system_messages_promises_the_others(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(str(TINY))
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    found.chat_template = refusal + found.chat_template
    write_contract(RowTokenizer(found, chat=True), tmp_path / FILE)
    assert check_contract(RowTokenizer(found, chat=True), tmp_path / FILE) == 5
