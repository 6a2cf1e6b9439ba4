"""Exact and near duplicates: planted ones are found, others are not, and nothing but content decides."""

from __future__ import annotations

import json
import lzma
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from near_texts import ENGLISH, damaged, planted, sentences
from rapidfuzz.distance import Levenshtein

from whet.base.errors import UserError
from whet.data.detect import minhash
from whet.data.detect.duplicates import (
    Duplicates,
    clusters_of,
    exact_duplicates,
    near_across,
    near_duplicates,
    normalised,
    text_keys,
)

ROOT = Path(__file__).parents[1]
BANKING = ROOT.parent / "shared" / "data" / "classification" / "banking77_test.jsonl.xz"


def all_pairs(texts: list[str], similarity: float = 0.9) -> set[tuple[int, int]]:
    """Every near pair, by comparing all with all: the definition, written down once more and slowly."""
    written = [normalised(text) for text in texts]
    found = set()
    for a in range(len(written)):
        for b in range(a):
            longer = max(len(written[a]), len(written[b]))
            limit = int((1 - similarity) * longer + 1e-9)
            if written[a] != written[b] and Levenshtein.distance(written[a], written[b], score_cutoff=limit) <= limit:
                found.add((b, a))
    return found


def recall(found: Duplicates, originals: list[int], start: int) -> float:
    hits = [found.first[start + index] == found.first[original] for index, original in enumerate(originals)]
    return float(np.mean(hits))


def assert_no_false_alarm(found: Duplicates, texts: list[str], similarity: float = 0.9) -> None:
    for (a, b), alike in zip(found.pairs.tolist(), found.similarity.tolist(), strict=True):
        one, other = normalised(texts[a]), normalised(texts[b])
        longer = max(len(one), len(other))
        assert alike == 1 - Levenshtein.distance(one, other) / longer >= similarity - 1e-9
        assert one != other


def test_planted_near_duplicates_are_found_and_nothing_else() -> None:
    texts = sentences(2500, seed=1)
    copies, originals = planted(texts, seed=2)
    found = near_duplicates(texts + copies)
    assert recall(found, originals, len(texts)) >= 0.99
    assert_no_false_alarm(found, texts + copies)
    assert not len(near_duplicates(sentences(400, seed=3)).pairs), "random sentences are not near one another"


def test_fewer_bands_would_miss_planted_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = sentences(600, seed=1)
    copies, originals = planted(texts, seed=2)
    monkeypatch.setattr(minhash, "BANDS", 8)
    assert recall(near_duplicates(texts + copies), originals, len(texts)) < 0.99


def test_repeated_syllables_are_counted() -> None:
    texts = ["ㅋ" * 60, "ㅋ" * 14 + "가" + "ㅋ" * 14 + "나" + "ㅋ" * 14 + "다" + "ㅋ" * 15, "ㅋ" * 40, "하" * 60]
    assert near_duplicates(texts).pairs.tolist() == [[0, 1]]


@pytest.mark.skipif(not BANKING.exists(), reason="shared/data is not beside this checkout")
def test_banking77_against_all_pairs() -> None:
    texts = [json.loads(line)["text"] for line in lzma.decompress(BANKING.read_bytes()).splitlines()]
    copies, originals = planted(texts, seed=4)
    found = near_duplicates(texts + copies)
    assert recall(found, originals, len(texts)) >= 0.99
    assert_no_false_alarm(found, texts + copies)
    alone = near_duplicates(texts[:1500])
    true = all_pairs(texts[:1500])
    wanted = clusters_of(alone.same, np.asarray(sorted(true), np.int64).reshape(-1, 2))
    assert np.array_equal(alone.first, wanted), "the same clusters as by comparing all with all"


def test_order_of_rows_and_hash_seed_change_nothing() -> None:
    texts = sentences(500, seed=5)
    texts += planted(texts, seed=6)[0] + texts[:50]
    found = near_duplicates(texts)
    order = np.random.default_rng(0).permutation(len(texts))
    again = near_duplicates([texts[index] for index in order])
    assert partition(found.first) == {frozenset(order[list(part)].tolist()) for part in partition(again.first)}
    assert sorted(found.similarity.tolist()) == sorted(again.similarity.tolist())
    code = (
        "from near_texts import planted, sentences\nfrom whet.data.detect.duplicates import near_duplicates\n"
        "found = near_duplicates(planted(sentences(60, 1), 2)[0] * 2)\n"
        "print(found.first.tolist(), found.pairs.tolist(), found.similarity.tolist())"
    )
    words = [sys.executable, "-c", code]
    printed = {
        subprocess.run(
            words,
            check=True,
            capture_output=True,
            cwd=ROOT / "tests",
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
        ).stdout
        for seed in ("0", "1", "random")
    }
    assert len(printed) == 1


def partition(first: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(first == name).tolist()) for name in np.unique(first)}


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("한국어", "\u1112\u1161\u11ab\u1100\u116e\u11a8\u110b\u1165", True),  # composed and decomposed syllables
        ("  Top   up\tmy\ncard ", "top up my card", True),
        ("STRASSE", "straße", True),
        ("a b", "a\u00a0b", True),  # a space that does not break
        ("really?", "really!", False),
        ("a b", "ab", False),
        ("", " \n", True),
        ("é", "e", False),
        ("\ud800", "?", False),  # a lone surrogate is text too
    ],
)
def test_what_is_the_same_text(one: str, other: str, same: bool) -> None:
    keys = text_keys([one, other])
    assert (keys[0] == keys[1]) == same
    written = text_keys([one, other], as_written=True)
    assert written[0] != written[1]


def test_keys_are_the_same_on_every_machine_and_in_every_version() -> None:
    assert text_keys(iter(["Hello  World", "안녕"])).tolist() == [5814608031911216775, 1666638135771752750]


def test_exact_duplicates_and_clusters() -> None:
    found = exact_duplicates(text_keys(["b", "a", "B ", "c", "a"]))
    assert found.same.tolist() == [0, 1, 0, 3, 1]
    assert found.repeated.tolist() == [2, 4] == found.removable.tolist()
    assert [part.tolist() for part in found.clusters()] == [[0, 2], [1, 4]]
    chain = clusters_of(np.arange(6), np.asarray([[3, 4], [4, 5], [0, 5]]))
    assert chain.tolist() == [0, 1, 2, 0, 0, 0]
    assert exact_duplicates(text_keys([])).repeated.tolist() == []


def test_a_template_filled_in_many_times_stays_cheap() -> None:
    draw = random.Random(0)
    texts = [f"Order {draw.randrange(10**6):06d} has not arrived yet, please send my money back" for _ in range(5000)]
    found = near_duplicates(texts)
    assert len(found.clusters()) == 1
    assert len(found.pairs) == len(np.unique(found.same)) - 1, "pairs that tie a cluster together, not all of them"


def test_sides_are_compared_with_each_other_only() -> None:
    texts = ["why was my card declined today", "why was my card declined today?", "why was my card declined today!"]
    assert near_across(texts, np.asarray([0, 0, 0]), 1) == []
    (found,) = near_across(texts, np.asarray([0, 0, 1]), 2)
    assert found.pairs.tolist() == [[0, 2], [1, 2]]
    one, two = near_across(texts, np.asarray([0, 1, 2]), 3)
    assert (one.pairs.tolist(), two.pairs.tolist()) == ([[0, 1]], [[0, 2]])
    assert len(near_duplicates(texts).pairs) == 2


@pytest.mark.parametrize("texts", [[], [""], ["", " "], ["a", "b"], ["\ud800" * 30, "\ud800" * 29]], ids=repr)
def test_odd_data(texts: list[str]) -> None:
    found = near_duplicates(texts)
    assert len(found.first) == len(texts)
    assert len(found.pairs) == (1 if len("".join(texts)) > 50 else 0)


def test_long_texts_are_sampled_and_compared_whole() -> None:
    draw = random.Random(3)
    book = " ".join(draw.choice(ENGLISH) for _ in range(4000))
    other = " ".join(draw.choice(ENGLISH) for _ in range(4000))
    found = near_duplicates([book, other, damaged(book, len(book) // 12, draw)])
    assert found.pairs.tolist() == [[0, 2]]


@pytest.mark.parametrize("similarity", [0.5, 1.1, float("nan")])
def test_a_similarity_out_of_reach_is_refused(similarity: float) -> None:
    with pytest.raises(UserError, match="similarity"):
        near_duplicates(["a"], similarity)
