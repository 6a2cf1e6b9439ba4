"""Choose a few fixed forms for batches of every length, so that layers are compiled and steps captured once for each.

A GPU repeats a step that it has been prepared for many times faster than it runs a new one; real batches all differ. So
the token counts of all batches of a run are computed beforehand (the order is a function of the seed), a few are chosen
that waste least, and every batch is filled up to the next one: its tokens with documents that teach nothing, its
document ends and targets with entries that count for nothing. The filling is never counted as work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

TOKEN_MULTIPLE = 128
CANDIDATES = 64
FORM_SAVES = 0.02  # another form costs a compilation and a graph's memory, so it has to save this share of the tokens


@dataclass(frozen=True)
class Form:
    """The fixed sizes that a batch is filled up to. tokens: T; documents: D; targets: M; longest: bound of a document's
    tokens.

    row: the length of every document if all are the same, those that fill up too, else 0.
    """

    tokens: int
    documents: int
    targets: int
    longest: int
    row: int = 0


@dataclass(frozen=True)
class BatchSizes:
    """Sizes of each batch of a run, int64 [B]: real tokens, documents, targets, longest and shortest document."""

    tokens: np.ndarray
    documents: np.ndarray
    targets: np.ndarray
    longest: np.ndarray
    shortest: np.ndarray

    @classmethod
    def of(cls, windows: Iterator[tuple[np.ndarray, np.ndarray]], per_unit: BatchSizes) -> BatchSizes:
        """The sizes of all batches, from (order of units, starts of the batches in it) of each epoch and the sizes of
        each unit."""
        parts: list[list[np.ndarray]] = []
        for order, starts in windows:
            sums = [
                np.add.reduceat(getattr(per_unit, name)[order], starts) for name in ("tokens", "documents", "targets")
            ]
            sums.append(np.maximum.reduceat(per_unit.longest[order], starts))
            sums.append(np.minimum.reduceat(per_unit.shortest[order], starts))
            parts.append(sums)
        return cls(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def choose_forms(facts: BatchSizes, limit: int) -> list[Form]:
    """At most `limit` forms that hold every batch, smallest first: the fewest that come near to the least filling."""
    rounded = -(-facts.tokens // TOKEN_MULTIPLE) * TOKEN_MULTIPLE
    values, counts = np.unique(rounded, return_counts=True)
    if len(values) > CANDIDATES:
        step = -(-int(values[-1]) // (CANDIDATES * TOKEN_MULTIPLE)) * TOKEN_MULTIPLE
        values, where = np.unique(-(-values // step) * step, return_inverse=True)
        counts = np.bincount(where, weights=counts).astype(np.int64)
    sizes = _best_sizes(values, counts, limit)
    forms = []
    for index, size in enumerate(sizes):
        below = sizes[index - 1] if index else 0
        chosen = (facts.tokens > below) & (facts.tokens <= size)
        forms.append(_form(size, facts, chosen))
    return forms


def _form(size: int, facts: BatchSizes, chosen: np.ndarray) -> Form:
    longest = int(facts.longest[chosen].max())
    same = longest == int(facts.shortest[chosen].min()) and bool(((size - facts.tokens[chosen]) % longest == 0).all())
    if not same:
        longest = -(-longest // TOKEN_MULTIPLE) * TOKEN_MULTIPLE
    filled = -(-(size - facts.tokens[chosen]) // longest)
    documents = int((facts.documents[chosen] + filled).max())
    return Form(size, documents, int(facts.targets[chosen].max()), longest, longest if same else 0)


def _best_sizes(values: np.ndarray, counts: np.ndarray, limit: int) -> list[int]:
    """The values to round up to, by dynamic programming over the sorted distinct ones: exact for the candidates."""
    total = len(values)
    number = np.concatenate([[0], np.cumsum(counts)])
    best = np.full((limit + 1, total + 1), np.inf)
    cut = np.zeros((limit + 1, total + 1), dtype=np.int64)
    best[0, 0] = 0
    for used in range(1, limit + 1):
        for end in range(1, total + 1):
            costs = best[used - 1, :end] + values[end - 1] * (number[end] - number[:end])
            cut[used, end] = int(np.argmin(costs))
            best[used, end] = costs[cut[used, end]]
    used = int(np.argmax(best[:, total] <= (1 + FORM_SAVES) * best[:, total].min()))
    sizes, end = [], total
    while end:
        sizes.append(int(values[end - 1]))
        used, end = used - 1, int(cut[used, end])
    return sizes[::-1]


def fitting(forms: Sequence[Form], tokens: int) -> Form | None:
    """The smallest form that holds `tokens`, or None."""
    return next((form for form in forms if form.tokens >= tokens), None)
