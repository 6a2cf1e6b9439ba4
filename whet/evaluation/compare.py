"""Is the tuned model better, or was it luck? Paired statistics over the per-row values of one metric.

Both models answer the same rows, so rows are compared in pairs: how hard a row is cancels out, and a difference shows
in far fewer rows than between two averages. numpy is all that it takes. What it gives up: rows are taken as
independent (several rows from one document are not), and nothing is corrected for looking at many metrics.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_CELLS_PER_BLOCK = 1 << 20  # 8 MB of float64: memory stays the same for any number of rows


@dataclass(frozen=True)
class Paired:
    """Tuned minus base, in the metric's own unit.

    low, high: bounds of the confidence interval of the mean difference. p_value: two-sided, of a difference at least
    this large if the two models were alike. test: what gave it, "mcnemar" or "sign_flip".
    """

    mean_difference: float
    low: float
    high: float
    p_value: float
    test: str


def paired(
    base_rows: Sequence[float],
    tuned_rows: Sequence[float],
    *,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Paired:
    """Compares two models on the same rows in the same order; the answer does not depend on what that order is.

    The interval is `bootstrap_interval`, the p-value `mcnemar_p` where every value is 0 or 1, else `sign_flip_p`.
    ValueError: no rows, different lengths or a value that is not finite.
    """
    base, tuned = np.asarray(base_rows, dtype=np.float64), np.asarray(tuned_rows, dtype=np.float64)
    if base.shape != tuned.shape or base.ndim != 1 or base.size == 0:
        raise ValueError(f"rows cannot be paired: shapes {base.shape} and {tuned.shape}")
    if not (np.isfinite(base).all() and np.isfinite(tuned).all()):
        raise ValueError("a row value is not finite")

    differences = tuned - base
    low, high = bootstrap_interval(differences, resamples=resamples, confidence=confidence, seed=seed)
    if np.isin(np.concatenate([base, tuned]), (0.0, 1.0)).all():
        test, p_value = "mcnemar", mcnemar_p(int((differences < 0).sum()), int((differences > 0).sum()))
    else:
        test, p_value = "sign_flip", sign_flip_p(differences, flips=resamples, seed=seed)
    return Paired(math.fsum(differences) / differences.size, low, high, p_value, test)


def bootstrap_interval(
    differences: NDArray[np.float64], *, resamples: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `differences` [rows] (Efron 1979, doi:10.1214/aos/1176344552).

    Resampling differences keeps the pairs together: the paired bootstrap of Koehn 2004 (aclanthology.org/W04-3250).
    Under about 20 rows the interval is too narrow, and where all differences are equal it has no width: then the
    p-value is the one to read.
    """
    rng = np.random.default_rng(seed)
    # In sorted order the same rows give the same interval, however they were arranged.
    ordered = np.sort(differences)
    means = [
        ordered[rng.integers(0, ordered.size, size=(rounds, ordered.size))].mean(axis=1)
        for rounds in _blocks(resamples, ordered.size)
    ]
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)


def mcnemar_p(only_base: int, only_tuned: int) -> float:
    """Exact two-sided p-value from the counts of rows that only one of the two models got right.

    McNemar 1947, doi:10.1007/BF02295996. Were the models alike, each such row would go either way like a fair coin, so
    the smaller count is binomial with p = 1/2. Exact, because the usual chi-square form is wrong for the few such rows
    that an evaluation often has.
    """
    discordant, fewer = only_base + only_tuned, min(only_base, only_tuned)
    # Each binomial coefficient from the one before: math.comb takes 23 s at 20,000 such rows, this 0.03 s.
    coefficient = tail = 1
    for k in range(1, fewer + 1):
        coefficient = coefficient * (discordant - k + 1) // k
        tail += coefficient
    return min(1.0, 2 * tail / 2**discordant)


def sign_flip_p(differences: NDArray[np.float64], *, flips: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value of the mean of `differences` [rows] by random swaps of base and tuned within rows.

    Fisher's randomisation test, for language as in Dror et al. 2018 (aclanthology.org/P18-1128). Were the models
    alike, swapping the two answers of a row would change only the sign of its difference. It assumes no distribution;
    for 0/1 rows McNemar's test is its closed form. The observed signs count as one of the flips, so that p is never 0
    (Phipson and Smyth 2010, arXiv:1603.05766).
    """
    rng = np.random.default_rng(seed)
    ordered = np.sort(differences)
    # Sums of the same numbers in another order differ in the last bits and must still count as equal.
    observed = abs(ordered.sum()) - 1e-9 * np.abs(ordered).sum()
    as_large = 0
    for rounds in _blocks(flips, ordered.size):
        swapped = rng.integers(0, 2, size=(rounds, ordered.size), dtype=np.int8)
        as_large += int((np.abs(ordered.sum() - 2 * (swapped @ ordered)) >= observed).sum())
    return (as_large + 1) / (flips + 1)


def _blocks(rounds: int, rows: int) -> Iterator[int]:
    """`rounds` in portions, so that portion × `rows` numbers fit the memory bound."""
    size = max(1, _CELLS_PER_BLOCK // rows)
    for start in range(0, rounds, size):
        yield min(size, rounds - start)
