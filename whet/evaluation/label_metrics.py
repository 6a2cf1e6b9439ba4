"""Metrics of the tasks whose answer is a label or a number: arrays of predictions and references in, `Scores` out.

They are in numpy, not from scikit-learn, which stays a package of the tests (there every number is held against it):
a dozen formulas, it would be the largest package of the evaluation, and where a formula divides by zero it warns and
gives 0 or NaN. Here every such case has a value, chosen so that metric(x, x) is the best there is:

- F1 of nothing predicted and nothing expected is 1, of either alone 0, as for texts (`metrics.token_f1`).
- Macro F1 and balanced accuracy average over the classes that have a reference row (labels: a positive reference), so
  that base and tuned model are averaged over the same classes. A prediction of any other class is an error in the
  recall of the right one. scikit-learn's macro F1 takes such a class in with F1 = 0; where each class has a row, the
  two are equal. Without any positive reference, macro F1 is 1 if nothing was predicted and else 0.
- MCC, Pearson and Spearman are 0 where predictions or references are constant: no relation was shown. Alone among the
  metrics here they are then 0 for (x, x) as well.
- r2 of constant references is 1 if every prediction is exact and else 0.
- In tables per class, a precision, recall or F1 that has nothing to divide by is None.

The metrics that are a mean of rows come with their rows, for `compare.paired`; squared and absolute errors there are
better when lower. F1, MCC, correlations and r2 are defined on the whole set and have no rows. Given up: sample
weights, and probabilities (log loss, AUC): these metrics see decisions alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from whet.base.errors import UserError
from whet.evaluation.metrics import Scores

LARGEST_MATRIX = 100  # classes; beyond it a matrix is neither read nor small
MOST_CONFUSED = 20
# Far beyond what a 32-bit model can say or tell apart, and their squares and quotients still fit a double.
_LARGEST_VALUE, _SMALLEST_SPREAD = 1e50, 1e-100


def score_classes(predictions: ArrayLike, references: ArrayLike) -> Scores:
    """One class per row: both are class indices [R], integers from 0.

    accuracy (rows: 0 or 1), macro_f1, micro_f1 (over all classes, hence equal to accuracy), mcc (-1..1) and
    balanced_accuracy (mean recall). ValueError: no rows, unlike shapes, or values that are no class indices.
    """
    predicted, expected = _class_pair(predictions, references)
    right = (predicted == expected).astype(np.float64)
    correct, answered, present = _class_counts(predicted, expected)
    recalls = [hit / rows for hit, rows in zip(correct, present, strict=True) if rows]
    return _scores(
        {"accuracy": right},
        {
            "macro_f1": _macro_f1(correct, answered, present),
            "micro_f1": _f1(sum(correct), sum(answered), sum(present)),
            "mcc": _matthews(correct, answered, present),
            "balanced_accuracy": math.fsum(recalls) / len(recalls),
        },
    )


def score_labels(predictions: ArrayLike, references: ArrayLike) -> Scores:
    """Any number of labels per row: both are 0/1 [R, C].

    subset_accuracy (rows: 1 where all labels of the row are right), hamming_accuracy (rows: share of the row's labels
    that are right), micro_f1 (over all R × C decisions) and macro_f1 (mean over labels). ValueError: no rows or labels,
    unlike shapes, or values other than 0 and 1.
    """
    predicted, expected = _label_pair(predictions, references)
    right = predicted == expected
    correct, answered, present = _label_counts(predicted, expected)
    return _scores(
        {"subset_accuracy": right.all(axis=1), "hamming_accuracy": right.mean(axis=1)},
        {
            "micro_f1": _f1(sum(correct), sum(answered), sum(present)),
            "macro_f1": _macro_f1(correct, answered, present),
        },
    )


def score_values(predictions: ArrayLike, references: ArrayLike) -> Scores:
    """Regression: both are floats [R].

    mse (rows: squared error) and mae (rows: absolute error), in the references' unit squared and plain; pearson,
    spearman (ties share their average rank) and r2, at most 1 and for bad predictions below 0. Integers are refused, so
    that no class index is taken for a measurement. ValueError: no rows, unlike shapes, no floats, or a reference that
    is not finite. UserError: a prediction that is not.
    """
    predicted, expected = _value_pair(predictions, references)
    errors = predicted - expected
    deviations, squares = _deviations(expected), np.square(errors)
    spread = math.fsum(deviations**2)
    r2 = float(not errors.any()) if spread < _SMALLEST_SPREAD else 1 - math.fsum(squares) / spread
    return _scores(
        {"mse": squares, "mae": np.abs(errors)},
        {
            "pearson": _correlation(predicted, expected),
            "spearman": _correlation(_ranks(predicted), _ranks(expected)),
            "r2": r2,
        },
    )


def majority(references: ArrayLike, rows: int | None = None) -> NDArray[Any]:
    """What one would say without looking at the input: the baseline of a base model whose head is random.

    Class indices [R]: the commonest class, the lowest of several. 0/1 [R, C]: for each label whether over half of the
    rows have it. Floats [R]: their mean. The shape is that of `references`, or `rows` of it, so that training
    references can answer for held-out rows; from the held-out references themselves it is the best constant answer to
    them, hence a baseline on the strict side. ValueError as the `score_` function of that kind of array.
    """
    given = np.asarray(references)
    if given.ndim == 2:
        said = (2 * _labels(given, "references").sum(axis=0) > len(given)).astype(given.dtype)
    elif given.dtype.kind == "f":
        values = _values(given, "references")
        said = np.asarray(_mean(values))
    else:
        values, counts = np.unique(_classes(given, "references"), return_counts=True)
        said = values[counts.argmax()]
    return np.repeat(said[None], len(given) if rows is None else rows, axis=0)


def details(predictions: ArrayLike, references: ArrayLike, names: Sequence[str]) -> dict[str, Any]:
    """What a report shows beside the metrics, ready for JSON. names: one per class, in order of the indices.

    Of class indices [R]: `names`; `per_class` (see `per_class`); `confusion` [C][C], rows by reference and columns by
    prediction, None over 100 classes; `most_confused`, at most 20 of {"reference", "predicted", "rows"}, most rows
    first, then by index. Of 0/1 [R, C] the first two alone: with several labels per row, none stands for another.
    ValueError as the `score_` functions, or an index without a name.
    """
    table: dict[str, Any] = {"names": list(names), "per_class": per_class(predictions, references, names)}
    if np.ndim(references) == 2:
        return table
    predicted, expected = _class_pair(predictions, references)
    pairs = expected * len(names) + predicted
    if len(names) <= LARGEST_MATRIX:
        counts = np.bincount(pairs, minlength=len(names) ** 2).reshape(len(names), len(names))
        table["confusion"] = counts.tolist()
    else:
        table["confusion"] = None
    wrong = Counter(pairs[predicted != expected].tolist())
    table["most_confused"] = [
        {"reference": names[pair // len(names)], "predicted": names[pair % len(names)], "rows": rows}
        for pair, rows in sorted(wrong.items(), key=lambda item: (-item[1], item[0]))[:MOST_CONFUSED]
    ]
    return table


def per_class(predictions: ArrayLike, references: ArrayLike, names: Sequence[str]) -> list[dict[str, Any]]:
    """Per class, or per label, in the order of `names`: {"class", "precision", "recall", "f1", "support"}.

    support: rows whose reference has it. precision is None where it was never predicted, recall where support is 0, f1
    where both hold. ValueError as the `score_` functions, or an index without a name.
    """
    if np.ndim(references) == 2:
        counts = _label_counts(*_label_pair(predictions, references))
    else:
        predicted, expected = _class_pair(predictions, references)
        if max(predicted.max(), expected.max()) >= len(names):
            raise ValueError(f"class {max(predicted.max(), expected.max())} for {len(names)} names")
        counts = _class_counts(predicted, expected, len(names))
    return [
        {
            "class": name,
            "precision": correct / answered if answered else None,
            "recall": correct / present if present else None,
            "f1": _f1(correct, answered, present) if answered or present else None,
            "support": present,
        }
        for name, correct, answered, present in zip(names, *counts, strict=True)
    ]


def _scores(rows: Mapping[str, NDArray[Any]], whole: dict[str, float]) -> Scores:
    listed = {name: values.astype(np.float64).tolist() for name, values in rows.items()}
    # fsum is exact, so the order of the rows does not move the last digit.
    means = {name: math.fsum(values) / len(values) for name, values in listed.items()}
    return Scores({**means, **whole}, listed, skipped=[])


# Counts per class are Python integers: products of them, as in MCC, outgrow 64 bits from 60,000 rows on.
_Counts = tuple[list[int], list[int], list[int]]


def _class_counts(predicted: NDArray[np.int64], expected: NDArray[np.int64], classes: int = 0) -> _Counts:
    """Per class the rows that are right, those predicted as it and those that are it.

    Without `classes`, only classes that occur, so that one very large index takes no memory.
    """
    if not classes:
        found, index = np.unique(np.concatenate([predicted, expected]), return_inverse=True)
        predicted, expected, classes = index[: predicted.size], index[predicted.size :], found.size
    kinds = expected[predicted == expected], predicted, expected
    correct, answered, present = (np.bincount(kind, minlength=classes).tolist() for kind in kinds)
    return correct, answered, present


def _label_counts(predicted: NDArray[np.bool_], expected: NDArray[np.bool_]) -> _Counts:
    kinds = predicted & expected, predicted, expected
    correct, answered, present = (kind.sum(axis=0).tolist() for kind in kinds)
    return correct, answered, present


def _f1(correct: int, answered: int, present: int) -> float:
    return 2 * correct / (answered + present) if answered + present else 1.0


def _macro_f1(correct: list[int], answered: list[int], present: list[int]) -> float:
    found = [_f1(*counts) for counts in zip(correct, answered, present, strict=True) if counts[2]]
    return math.fsum(found) / len(found) if found else float(not any(answered))


def _matthews(correct: list[int], answered: list[int], present: list[int]) -> float:
    """R_K of Gorodkin 2004, doi:10.1016/j.compbiolchem.2004.09.006; for two classes Matthews' own (1975)."""
    rows = sum(present)
    shared = rows * sum(correct) - sum(a * p for a, p in zip(answered, present, strict=True))
    spread = (rows**2 - sum(a * a for a in answered)) * (rows**2 - sum(p * p for p in present))
    return max(-1.0, min(1.0, shared / math.sqrt(spread))) if spread else 0.0


def _mean(values: NDArray[np.float64]) -> float:
    """The mean, and for equal values that very value, which a division does not always give back."""
    return float(values[0]) if (values == values[0]).all() else math.fsum(values) / values.size


def _deviations(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values - _mean(values)


def _correlation(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    one, other = _deviations(one), _deviations(other)
    spread, others = math.fsum(one**2), math.fsum(other**2)
    if min(spread, others) < _SMALLEST_SPREAD:
        return 0.0
    # One root of the product, not a product of two roots: exact for equal arrays.
    return max(-1.0, min(1.0, math.fsum(one * other) / math.sqrt(spread * others)))


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 for the lowest; equal values share the average of the ranks that they take up."""
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[index]


def _class_pair(predictions: ArrayLike, references: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    _same_shape(predictions, references)
    return _classes(predictions, "predictions"), _classes(references, "references")


def _label_pair(predictions: ArrayLike, references: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    _same_shape(predictions, references)
    return _labels(predictions, "predictions"), _labels(references, "references")


def _value_pair(predictions: ArrayLike, references: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    _same_shape(predictions, references)
    predicted = np.asarray(predictions)
    if predicted.dtype.kind == "f" and predicted.ndim == 1 and not np.isfinite(predicted).all():
        row = int(np.argmin(np.isfinite(predicted)))
        raise UserError(
            "the model's answer is not a finite number",
            fix="train again with a lower train.learning_rate, or go back to an earlier checkpoint",
            row=row + 1,
            found=str(predicted[row]),
            expected="a finite number for every row",
        )
    return _values(predicted, "predictions"), _values(references, "references")


def _same_shape(predictions: ArrayLike, references: ArrayLike) -> None:
    """[R, 1] against [R] would broadcast to R × R comparisons and give a plausible number."""
    if np.shape(predictions) != np.shape(references):
        raise ValueError(f"predictions of shape {np.shape(predictions)} for references of {np.shape(references)}")


def _classes(given: ArrayLike, what: str) -> NDArray[np.int64]:
    array = np.asarray(given)
    if array.ndim != 1 or not array.size or array.dtype.kind not in "iu":
        raise ValueError(f"{what} must be class indices [R]: {array.dtype} {array.shape}")
    if array.min() < 0:
        raise ValueError(f"{what} hold {array.min()}, which is no class; leave out what has no label")
    return array.astype(np.int64)


def _labels(given: ArrayLike, what: str) -> NDArray[np.bool_]:
    array = np.asarray(given)
    if array.ndim != 2 or not array.size or not ((array == 0) | (array == 1)).all():
        raise ValueError(f"{what} must be 0 or 1 [R, C]: {array.dtype} {array.shape}")
    return array.astype(np.bool_)


def _values(given: ArrayLike, what: str) -> NDArray[np.float64]:
    array = np.asarray(given)
    if array.ndim != 1 or not array.size or array.dtype.kind != "f":
        raise ValueError(f"{what} must be floats [R]: {array.dtype} {array.shape}")
    array = array.astype(np.float64)  # before the comparison: the bound is infinite in 16 and 32 bits
    if not (np.abs(array) <= _LARGEST_VALUE).all():
        raise ValueError(f"{what} hold a value that is not finite, or beyond {_LARGEST_VALUE:g}")
    return array
