"""Metrics of labels and numbers: by hand, against scikit-learn and scipy, and with planted faults they must catch."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics as theirs

from whet.base.errors import UserError
from whet.evaluation import label_metrics as ours
from whet.evaluation.compare import paired
from whet.evaluation.metrics import Scores

Score = Callable[[Any, Any], Scores]

CLASSES = np.array([0, 0, 1, 1, 1, 0, 2, 2]), np.array([0, 0, 0, 1, 1, 1, 1, 2])  # predicted, expected
CLASSES_BY_HAND = {
    "accuracy": 5 / 8,
    "micro_f1": 5 / 8,
    "macro_f1": (2 / 3 + 4 / 7 + 2 / 3) / 3,
    "balanced_accuracy": (2 / 3 + 1 / 2 + 1) / 3,
    "mcc": (5 * 8 - (3 * 3 + 3 * 4 + 2 * 1)) / math.sqrt((64 - 22) * (64 - 26)),
}
LABELS = (
    np.array([[1, 0, 0], [0, 1, 0], [1, 0, 1], [0, 0, 0]]),
    np.array([[1, 0, 1], [0, 1, 0], [1, 1, 0], [0, 0, 0]]),
)
LABELS_BY_HAND = {"subset_accuracy": 2 / 4, "hamming_accuracy": 9 / 12, "micro_f1": 6 / 9, "macro_f1": (1 + 2 / 3) / 3}
VALUES = np.array([10.0, 20.0, 30.0, 30.0]), np.array([1.0, 2.0, 2.0, 5.0])
VALUES_BY_HAND = {
    "mse": (81 + 324 + 784 + 625) / 4,
    "mae": (9 + 18 + 28 + 25) / 4,
    "pearson": 35 / math.sqrt(275 * 9),
    "spearman": 3.75 / 4.5,  # ranks 1, 2, 3.5, 3.5 and 1, 2.5, 2.5, 4
    "r2": 1 - 1814 / 9,
}
BY_HAND = [
    (ours.score_classes, CLASSES, CLASSES_BY_HAND),
    (ours.score_labels, LABELS, LABELS_BY_HAND),
    (ours.score_values, VALUES, VALUES_BY_HAND),
]
NAMED = pytest.mark.parametrize(("score", "given", "expected"), BY_HAND, ids=["classes", "labels", "values"])


@pytest.fixture(autouse=True)
def _nothing_warns() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def draw(seed: int, kind: str, rows: int = 200, classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Predictions that are right about half of the time; all classes occur unless there are few rows."""
    rng = np.random.default_rng(seed)
    if kind == "values":
        expected = np.round(rng.normal(size=rows), 1)  # rounded, so that there are ties
        return np.round(expected + rng.normal(size=rows), 1), expected
    shape, top = ((rows, classes), 2) if kind == "labels" else ((rows,), classes)
    expected = rng.integers(0, top, shape)
    return np.where(rng.random(shape) < 0.5, expected, rng.integers(0, top, shape)), expected


def check_by_hand(score: Score, given: tuple[Any, Any], expected: dict[str, float]) -> None:
    found = score(*given)
    assert found.metrics == pytest.approx(expected, abs=1e-12)
    assert found.skipped == []
    for name, values in found.rows.items():
        assert math.fsum(values) / len(values) == found.metrics[name]
        assert all(type(value) is float for value in values)


@NAMED
def test_by_hand(score: Score, given: tuple[Any, Any], expected: dict[str, float]) -> None:
    check_by_hand(score, given, expected)


def renamed(score: Score, **names: str) -> Score:
    def wrong(predictions: Any, references: Any) -> Scores:
        found = score(predictions, references)
        moved = {name: found.metrics[names.get(name, name)] for name in found.metrics}
        return Scores(moved, found.rows, [])

    return wrong


def replaced(score: Score, name: str, formula: Callable[[Any, Any], float]) -> Score:
    def wrong(predictions: Any, references: Any) -> Scores:
        found = score(predictions, references)
        return Scores({**found.metrics, name: float(formula(predictions, references))}, found.rows, [])

    return wrong


def mirrored(score: Score) -> Score:
    return lambda predictions, references: score(references, predictions)


def two_class_mcc(predictions: Any, references: Any) -> float:
    return theirs.matthews_corrcoef(references == 0, predictions == 0)


def order_of(values: Any) -> Any:
    return np.argsort(np.argsort(values))


FAULTS = {
    "classes: macro and micro swapped": (0, lambda s: renamed(s, macro_f1="micro_f1", micro_f1="macro_f1")),
    "classes: macro weighted by support": (
        0, lambda s: replaced(s, "macro_f1", lambda p, r: theirs.f1_score(r, p, average="weighted")),
    ),
    "classes: F1 of the mean precision and recall": (
        0, lambda s: replaced(s, "macro_f1", lambda p, r: 2 / (1 / theirs.precision_score(r, p, average="macro")
                                                               + 1 / theirs.recall_score(r, p, average="macro"))),
    ),
    "classes: balanced accuracy is plain accuracy": (0, lambda s: renamed(s, balanced_accuracy="accuracy")),
    "classes: recall and precision swapped": (0, mirrored),
    "classes: MCC of the first class alone": (0, lambda s: replaced(s, "mcc", two_class_mcc)),
    "classes: kappa for MCC": (
        0, lambda s: replaced(s, "mcc", lambda p, r: theirs.cohen_kappa_score(r, p)),
    ),
    "labels: macro and micro swapped": (1, lambda s: renamed(s, macro_f1="micro_f1", micro_f1="macro_f1")),
    "labels: subset and hamming swapped": (
        1, lambda s: renamed(s, subset_accuracy="hamming_accuracy", hamming_accuracy="subset_accuracy"),
    ),
    "labels: hamming loss": (1, lambda s: replaced(s, "hamming_accuracy", lambda p, r: np.mean(p != r))),
    "values: pearson and spearman swapped": (2, lambda s: renamed(s, pearson="spearman", spearman="pearson")),
    "values: ranks without ties": (
        2, lambda s: replaced(s, "spearman", lambda p, r: np.corrcoef(order_of(p), order_of(r))[0, 1]),
    ),
    "values: root of mse": (2, lambda s: replaced(s, "mse", lambda p, r: np.sqrt(np.mean((p - r) ** 2)))),
    "values: r2 is pearson squared": (2, lambda s: replaced(s, "r2", lambda p, r: np.corrcoef(p, r)[0, 1] ** 2)),
    "values: references for predictions": (2, mirrored),
    "values: [R, 1] against [R]": (
        2, lambda s: replaced(s, "mse", lambda p, r: np.mean((p[:, None] - r) ** 2)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault: str) -> None:
    index, plant = FAULTS[fault]
    score, given, expected = BY_HAND[index]
    with pytest.raises(AssertionError):
        check_by_hand(plant(score), given, expected)


@pytest.mark.parametrize("rows", [1, 2, 7, 200])
@pytest.mark.parametrize("seed", range(8))
def test_classes_equal_scikit_learn(seed: int, rows: int) -> None:
    predicted, expected = draw(seed, "classes", rows)
    found, seen = ours.score_classes(predicted, expected).metrics, np.unique(expected)
    assert found["accuracy"] == found["micro_f1"] == pytest.approx(theirs.accuracy_score(expected, predicted))
    macro = theirs.f1_score(expected, predicted, average="macro", labels=seen, zero_division=0)
    assert found["macro_f1"] == pytest.approx(macro)
    assert found["balanced_accuracy"] == pytest.approx(
        theirs.recall_score(expected, predicted, average="macro", labels=seen)
    )
    if rows == 200:  # every class has rows: scikit-learn's defaults, and it has nothing to warn of
        assert found["macro_f1"] == pytest.approx(theirs.f1_score(expected, predicted, average="macro"))
        assert found["balanced_accuracy"] == pytest.approx(theirs.balanced_accuracy_score(expected, predicted))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert found["mcc"] == pytest.approx(theirs.matthews_corrcoef(expected, predicted))


@pytest.mark.parametrize("seed", range(8))
def test_labels_equal_scikit_learn(seed: int) -> None:
    predicted, expected = draw(seed, "labels")
    assert ours.score_labels(predicted, expected).metrics == pytest.approx({
        "subset_accuracy": theirs.accuracy_score(expected, predicted),
        "hamming_accuracy": 1 - theirs.hamming_loss(expected, predicted),
        "micro_f1": theirs.f1_score(expected, predicted, average="micro"),
        "macro_f1": theirs.f1_score(expected, predicted, average="macro"),
    })  # fmt: skip


@pytest.mark.parametrize("rows", [2, 3, 200])
@pytest.mark.parametrize("seed", range(8))
def test_values_equal_scipy_and_scikit_learn(seed: int, rows: int) -> None:
    predicted, expected = draw(seed + 20, "values", rows)
    assert ours.score_values(predicted, expected).metrics == pytest.approx({
        "mse": theirs.mean_squared_error(expected, predicted),
        "mae": theirs.mean_absolute_error(expected, predicted),
        "pearson": scipy.stats.pearsonr(expected, predicted).statistic,
        "spearman": scipy.stats.spearmanr(expected, predicted).statistic,
        "r2": theirs.r2_score(expected, predicted),
    })  # fmt: skip


def test_the_matrix_and_the_classes_equal_scikit_learn() -> None:
    predicted, expected = draw(3, "classes")
    found = ours.details(predicted, expected, list("abcde"))
    assert found["confusion"] == theirs.confusion_matrix(expected, predicted).tolist()
    table = zip(*theirs.precision_recall_fscore_support(expected, predicted), strict=True)
    for row, name, (precision, recall, f1, support) in zip(found["per_class"], "abcde", table, strict=True):
        assert (row["class"], row["support"]) == (name, support)
        assert (row["precision"], row["recall"], row["f1"]) == pytest.approx((precision, recall, f1))


@pytest.mark.parametrize("kind", ["classes", "labels", "values"])
def test_the_order_of_rows_and_the_numbers_of_classes_do_not_matter(kind: str) -> None:
    score = {"classes": ours.score_classes, "labels": ours.score_labels, "values": ours.score_values}[kind]
    predicted, expected = draw(5, kind)
    before, rng = score(predicted, expected), np.random.default_rng(0)
    order = rng.permutation(len(expected))
    after = score(predicted[order], expected[order])
    assert after.metrics == before.metrics  # to the last digit
    assert all(after.rows[name] == np.array(before.rows[name])[order].tolist() for name in before.rows)
    new = rng.permutation(5)
    if kind == "classes":
        assert score(new[predicted], new[expected]).metrics == before.metrics
        assert score(new[predicted] + 10**12, new[expected] + 10**12).metrics == before.metrics
    if kind == "labels":
        assert score(predicted[:, new], expected[:, new]).metrics == before.metrics
    if kind == "values":
        moved = score(3 * predicted + 1, 3 * expected + 1).metrics
        for name in ("pearson", "spearman", "r2"):
            assert moved[name] == pytest.approx(before.metrics[name])
        assert moved["mse"] == pytest.approx(9 * before.metrics["mse"])


def test_spearman_sees_order_alone() -> None:
    predicted, expected = draw(9, "values")
    metrics = ours.score_values(np.exp(predicted), expected).metrics
    assert metrics["spearman"] == ours.score_values(predicted, expected).metrics["spearman"]
    assert ours.score_values(-predicted, expected).metrics["spearman"] == pytest.approx(-metrics["spearman"])


@NAMED
def test_what_is_equal_is_best(score: Score, given: tuple[Any, Any], expected: dict[str, float]) -> None:
    found = score(given[1], given[1]).metrics
    assert found == {name: 0.0 if name in ("mse", "mae") else 1.0 for name in expected}


@pytest.mark.parametrize(
    ("predicted", "expected", "metrics"),
    [
        ([0, 0], [0, 0], {"accuracy": 1, "macro_f1": 1, "micro_f1": 1, "mcc": 0, "balanced_accuracy": 1}),
        ([0, 0], [0, 1], {"accuracy": 0.5, "macro_f1": 1 / 3, "micro_f1": 0.5, "mcc": 0, "balanced_accuracy": 0.5}),
        ([0, 1], [0, 0], {"accuracy": 0.5, "macro_f1": 2 / 3, "micro_f1": 0.5, "mcc": 0, "balanced_accuracy": 0.5}),
        ([7], [3], {"accuracy": 0, "macro_f1": 0, "micro_f1": 0, "mcc": 0, "balanced_accuracy": 0}),
        ([1, 0], [0, 1], {"accuracy": 0, "macro_f1": 0, "micro_f1": 0, "mcc": -1, "balanced_accuracy": 0}),
    ],
    ids=["one class", "constant answers", "a class without rows", "one wrong row", "all wrong"],
)
def test_undefined_cases_of_classes(predicted: list[int], expected: list[int], metrics: dict[str, float]) -> None:
    assert ours.score_classes(predicted, expected).metrics == pytest.approx(metrics)


@pytest.mark.parametrize(
    ("predicted", "expected", "micro", "macro"),
    [
        ([[0, 0]], [[0, 0]], 1, 1),
        ([[1, 0]], [[0, 0]], 0, 0),
        ([[0, 0]], [[1, 0]], 0, 0),
        ([[1, 0], [0, 0]], [[1, 0], [0, 0]], 1, 1),  # the second label never occurs
        ([[1, 1], [0, 0]], [[1, 0], [0, 0]], 2 / 3, 1),
    ],
)
def test_undefined_cases_of_labels(predicted: Any, expected: Any, micro: float, macro: float) -> None:
    found = ours.score_labels(predicted, expected).metrics
    assert (found["micro_f1"], found["macro_f1"]) == pytest.approx((micro, macro))


@pytest.mark.parametrize(
    ("predicted", "expected", "r2"),
    [
        ([0.1, 0.1, 0.1], [0.1, 0.1, 0.1], 1),
        ([0.2, 0.1, 0.1], [0.1, 0.1, 0.1], 0),
        ([2.0, 2.0, 2.0], [1.0, 2.0, 3.0], 0),
        ([0.1 + 0.2], [0.3], 0),
        ([1e-300, 2e-300], [3e-300, 1e-300], 0),  # squares that are zero in a double
    ],
    ids=["equal constants", "constant references", "constant answers", "one row", "too small"],
)
def test_undefined_cases_of_values(predicted: list[float], expected: list[float], r2: float) -> None:
    found = ours.score_values(predicted, expected).metrics
    assert (found["pearson"], found["r2"]) == (0, r2)
    if r2 or len(expected) != 2:
        assert found["spearman"] == 0


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_largest_values_of_each_type_stay_finite(dtype: type) -> None:
    top = min(float(np.finfo(dtype).max), 1e50)
    found = ours.score_values(np.array([top, -top, 0], dtype), np.array([-top, top, 1], dtype))
    assert all(math.isfinite(value) for value in found.metrics.values())
    assert found.metrics["mse"] >= 2.6 * top**2


def test_many_rows_do_not_overflow() -> None:
    expected = np.arange(300_000) % 3
    assert ours.score_classes(expected, expected).metrics["mcc"] == 1.0
    assert ours.score_classes(expected.astype(np.uint8), expected.astype(np.int8)).metrics["mcc"] == 1.0


@pytest.mark.parametrize("score", [ours.score_classes, ours.score_labels, ours.score_values])
@pytest.mark.parametrize(
    ("predictions", "references"),
    [
        ([], []),
        (np.empty((0, 3)), np.empty((0, 3))),
        (np.empty((3, 0)), np.empty((3, 0))),
        (np.zeros((3, 1)), np.zeros(3)),
        (np.zeros((3, 1), int), np.zeros(3, int)),
        ([1, 2], [1]),
        ([0, -100], [0, -100]),
        ([[0, 2]], [[0, 1]]),
        ([[0.0, 1.0]], [[0.0, math.nan]]),
        ([1.0], [math.nan]),
        ([1e300], [1.0]),
        (["a"], ["a"]),
        (3, 3),
    ],
)
def test_what_cannot_be_scored_is_refused(score: Score, predictions: Any, references: Any) -> None:
    with pytest.raises(ValueError, match=r"shape|must be|hold"):
        score(predictions, references)


def test_kinds_are_not_mistaken_for_each_other() -> None:
    with pytest.raises(ValueError, match="floats"):
        ours.score_values([1, 2], [1, 2])
    with pytest.raises(ValueError, match="class indices"):
        ours.score_classes([1.0, 2.0], [1.0, 2.0])


def test_an_answer_that_is_not_finite_is_the_users_to_mend() -> None:
    with pytest.raises(UserError, match="row 2: the model's answer is not a finite number"):
        ours.score_values([1.0, math.nan], [1.0, 2.0])


@pytest.mark.parametrize("kind", ["classes", "labels", "values"])
def test_rows_can_be_paired(kind: str) -> None:
    score = {"classes": ours.score_classes, "labels": ours.score_labels, "values": ours.score_values}[kind]
    predicted, expected = draw(11, kind)
    base, tuned = score(ours.majority(expected), expected), score(predicted, expected)
    for name in tuned.rows:
        found = paired(base.rows[name], tuned.rows[name], resamples=200)
        assert found.mean_difference == pytest.approx(tuned.metrics[name] - base.metrics[name])
    best = {"classes": "accuracy", "labels": "hamming_accuracy", "values": "mse"}[kind]
    test = {"classes": "mcnemar"}.get(kind, "sign_flip")
    assert paired(base.rows[best], tuned.rows[best], resamples=200).test == test


def test_the_majority_of_each_kind() -> None:
    assert ours.majority([2, 1, 1, 2, 0]).tolist() == [1] * 5  # of two equally common ones, the lower
    assert ours.majority(np.array([[1, 0, 1], [1, 0, 0], [0, 0, 1], [1, 1, 0]])).tolist() == [[1, 0, 0]] * 4
    assert ours.majority([1.0, 2.0, 6.0]).tolist() == [3.0] * 3
    assert ours.majority([1, 1, 0], rows=2).tolist() == [1, 1]
    assert ours.majority([[1.0, 0.0]], rows=2).tolist() == [[1.0, 0.0]] * 2
    for bad in ([], [-1, 0], [math.inf, 1.0], [[2, 0]]):
        with pytest.raises(ValueError, match=r"must be|hold"):
            ours.majority(bad)


@pytest.mark.parametrize("seed", range(3))
def test_no_other_constant_answer_beats_the_majority(seed: int) -> None:
    _, classes = draw(seed, "classes", 60)
    best = ours.score_classes(ours.majority(classes), classes).metrics
    assert best["accuracy"] == max(np.mean(classes == c) for c in range(5))
    assert best["mcc"] == 0
    _, labels = draw(seed, "labels", 61)
    share = labels.mean(axis=0)
    hamming = ours.score_labels(ours.majority(labels), labels).metrics["hamming_accuracy"]
    assert hamming == pytest.approx(np.maximum(share, 1 - share).mean())
    _, values = draw(seed, "values", 60)
    mean = ours.score_values(ours.majority(values), values).metrics
    assert (mean["r2"], mean["pearson"]) == (0, 0)
    assert all(ours.score_values(np.full(60, c), values).metrics["mse"] >= mean["mse"] for c in (-0.1, 0.0, 0.1))


def test_details_name_what_is_undefined() -> None:
    found = ours.details([0, 1, 1, 2], [0, 0, 1, 1], ["a", "b", "c", "가"])
    assert found["per_class"] == [
        {"class": "a", "precision": 1.0, "recall": 0.5, "f1": 2 / 3, "support": 2},
        {"class": "b", "precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2},
        {"class": "c", "precision": 0.0, "recall": None, "f1": 0.0, "support": 0},
        {"class": "가", "precision": None, "recall": None, "f1": None, "support": 0},
    ]
    assert found["confusion"] == [[1, 1, 0, 0], [0, 1, 1, 0], [0] * 4, [0] * 4]
    assert found["most_confused"] == [
        {"reference": "a", "predicted": "b", "rows": 1},
        {"reference": "b", "predicted": "c", "rows": 1},
    ]
    assert json.loads(json.dumps(found)) == found


def test_details_of_labels_and_of_many_classes() -> None:
    labels = ours.details(*LABELS, ["a", "b", "c"])
    assert set(labels) == {"names", "per_class"}
    assert [row["f1"] for row in labels["per_class"]] == pytest.approx([1, 2 / 3, 0])
    many = [f"class {n}" for n in range(101)]
    expected = np.arange(101).repeat(3)
    predicted = np.where(expected % 2, expected, (expected + 1) % 101)
    predicted[expected == 4] = 9
    found = ours.details(predicted, expected, many)
    assert found["confusion"] is None
    assert len(found["most_confused"]) == 20
    assert {"reference": "class 4", "predicted": "class 9", "rows": 3} in found["most_confused"]
    assert [row["rows"] for row in found["most_confused"]] == [3] * 20
    assert (
        ours.details(expected[:300], expected[:300], many[:100])["confusion"] == (3 * np.eye(100, dtype=int)).tolist()
    )


def test_the_most_frequent_confusions_come_first() -> None:
    expected, predicted = np.array([0] * 6 + [2] * 4 + [1] * 3), np.array([1, 1, 1, 2, 2, 0, 0, 0, 0, 2, 0, 0, 0])
    found = ours.details(predicted, expected, ["a", "b", "c"])["most_confused"]
    assert [(row["reference"], row["predicted"], row["rows"]) for row in found] == [
        ("a", "b", 3), ("b", "a", 3), ("c", "a", 3), ("a", "c", 2),
    ]  # fmt: skip


def test_a_class_without_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match="class 2 for 2 names"):
        ours.details([2, 0], [0, 1], ["a", "b"])
    with pytest.raises(ValueError, match="argument"):
        ours.details(*LABELS, ["a", "b"])
