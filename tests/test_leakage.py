"""What is on two sides is found, exactly and nearly, and counted for each side; contradictions are named."""

from __future__ import annotations

import json
import lzma
import random
from pathlib import Path

import numpy as np
import pytest
from near_texts import damaged, sentences

from whet.base.errors import UserError
from whet.data.detect.duplicates import near_duplicates, text_keys
from whet.data.detect.leakage import Leak, contradictions, leaks

NSMC = Path(__file__).parents[2] / "shared" / "data" / "classification"


def long_ones(count: int, seed: int) -> list[str]:
    return [text for text in sentences(4 * count, seed) if len(text) >= 40][:count]


def by_name(found: list[Leak]) -> dict[tuple[str, str], Leak]:
    return {(leak.into, leak.of): leak for leak in found}


def test_planted_leaks_are_found_row_by_row() -> None:
    texts = long_ones(400, seed=1)
    draw = random.Random(2)
    train, evaluation, test = texts[:200], texts[200:260], texts[260:400]
    test[3], test[5], test[7] = train[10], f" {train[11].upper()} ", damaged(train[12], 3, draw)
    test[9] = damaged(evaluation[4], 3, draw)
    evaluation[8] = train[0]
    train[40] = train[10]
    found = by_name(leaks({"train": train, "evaluation": evaluation, "test": test}))
    assert list(found) == [("train", "evaluation"), ("train", "test"), ("evaluation", "test")]
    leak = found["train", "test"]
    assert leak.identical.tolist() == [3]
    assert leak.same.tolist() == [3, 5]
    assert leak.near.tolist() == [3, 5, 7]
    assert leak.into_near.tolist() == [10, 11, 12, 40], "every row of training that would have to go"
    assert leak.pairs.tolist() == [[10, 3], [11, 5], [12, 7]]
    assert leak.similarity[:2].tolist() == [1, 1]
    assert 0.9 <= leak.similarity[2] < 1
    assert found["train", "evaluation"].near.tolist() == [8] == found["train", "evaluation"].identical.tolist()
    assert found["evaluation", "test"].near.tolist() == [9]
    assert found["evaluation", "test"].same.tolist() == []
    told = leak.as_dict()
    assert (told["identical"], told["same"], told["near"], told["rows_to_remove"]) == (1, 2, 3, 4)
    assert told["pairs"][0] == {"train": 11, "test": 4, "similarity": 1}
    json.dumps(told)


def test_without_near_ones_only_equal_texts_count() -> None:
    train = long_ones(50, seed=3)
    other = [damaged(train[0], 2, random.Random(0)), train[1]]
    (leak,) = leaks({"train": train, "test": other}, similarity=None)
    assert (leak.near.tolist(), leak.as_dict()["near"]) == ([1], None)
    (leak,) = leaks({"train": train, "test": other})
    assert leak.near.tolist() == [0, 1]


def test_a_text_that_is_near_rows_of_all_sides_is_told_for_each() -> None:
    base = long_ones(1, seed=4)[0]
    draw = random.Random(5)
    one, two, three = (damaged(base, 1, draw) for _ in range(3))
    found = by_name(leaks({"train": [base, one], "evaluation": ["x", two], "bench": [three, "y"]}))
    assert found["train", "evaluation"].near.tolist() == [1]
    assert found["train", "bench"].near.tolist() == [0]
    assert found["evaluation", "bench"].near.tolist() == [0]
    for of in ("evaluation", "bench"):
        assert found["train", of].into_near.tolist() == [0, 1], "for each side, all rows that would have to go"


@pytest.mark.parametrize("sides", [{}, {"train": ["a"]}])
def test_one_side_is_not_enough(sides: dict[str, list[str]]) -> None:
    with pytest.raises(UserError, match="two sides"):
        leaks(sides)


def test_empty_sides() -> None:
    found = leaks({"train": [], "test": ["a"], "bench": []})
    assert [len(leak.near) for leak in found] == [0, 0, 0]


@pytest.mark.skipif(not NSMC.is_dir(), reason="shared/data is not beside this checkout")
def test_the_real_leakage_of_nsmc_is_found_exactly() -> None:
    sides = {}
    for name in ("train", "test"):
        lines = lzma.decompress((NSMC / f"nsmc_{name}.jsonl.xz").read_bytes()).splitlines()
        sides[name] = [json.loads(line)["text"] for line in lines]
    known = set(sides["train"])
    wanted = [row for row, text in enumerate(sides["test"]) if text in known]
    (leak,) = leaks(sides, similarity=None)
    assert leak.identical.tolist() == wanted
    assert len(leak.identical) == 1571
    assert len(leak.same) == 1576, "five more differ in case or white space alone"
    (near,) = leaks({"train": sides["train"], "test": sides["test"][:5000]})
    assert set(near.same.tolist()) == {row for row in leak.same.tolist() if row < 5000} < set(near.near.tolist())


def test_contradictions_are_rows_of_one_text_with_several_answers() -> None:
    texts = ["good film", "bad", "Good  film", "bad", "fine", "good film", "a", "A", "fine"]
    labels = ["1", "0", "0", "0", "1", "1", "x", "y", "1"]
    found = contradictions(text_keys(texts), text_keys(labels))
    assert found.texts == 2
    assert found.rows.tolist() == [0, 2, 5, 6, 7]
    assert found.groups == ((0, 2, 5), (6, 7))
    assert found.outvoted.tolist() == [2, 6, 7], "a tie has no majority"
    none = contradictions(text_keys([]), text_keys([]))
    assert (none.texts, none.groups, none.rows.tolist()) == (0, (), [])


def test_contradictions_of_near_duplicates() -> None:
    texts = ["i cannot top up my card in cash", "i can not top up my card in cash", "something else entirely"]
    found = near_duplicates(texts)
    assert contradictions(found.first, np.asarray([0, 1, 0])).rows.tolist() == [0, 1]
    assert contradictions(text_keys(texts), np.asarray([0, 1, 0])).rows.tolist() == []
