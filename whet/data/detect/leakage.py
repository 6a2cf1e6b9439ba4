"""Find rows on two sides (a test, an evaluation or a benchmark that training has seen), and contradictory rows.

Three measures of sameness, each with its own count, since they call for different actions: identical (bit for bit),
same (equal after `duplicates.normalised`), near (an edit distance of at most 1 - similarity of the longer text). A
score on leaked rows measures memory, not skill. Contradictions are the other half: one text with two labels or answers
teaches neither. Gives up: the same question in other words, which takes a model to see.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from whet.base.errors import UserError
from whet.data.detect.duplicates import SIMILARITY, Duplicates, near_across, text_keys

MOST_SHOWN = 20


@dataclass(frozen=True)
class Leak:
    """Rows of side `of` whose text is on side `into` too; all rows are indices from 0 within their side.

    identical, same, near: int64 arrays of rows of `of`, ascending; each kind holds the one before it, so `near` is all.
    into_same, into_near: rows of `into` whose text is the same as one of `of`, and all that have one much like it.
    pairs: (row of `into`, row of `of`), int64 [P, 2]: for each text, its first row and a text that it was found with;
    similarity: float64 [P], 1 for the same text.
    measured: the similarity asked for, None where only equal texts were looked for. crowded: as in `Duplicates`.
    """

    into: str
    of: str
    identical: np.ndarray
    same: np.ndarray
    near: np.ndarray
    into_same: np.ndarray
    into_near: np.ndarray
    pairs: np.ndarray
    similarity: np.ndarray
    measured: float | None
    crowded: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Counts and the first pairs as plain values, rows counted from 1 as people do."""
        shown = zip(self.pairs[:MOST_SHOWN].tolist(), self.similarity[:MOST_SHOWN].tolist(), strict=True)
        return {
            "into": self.into,
            "of": self.of,
            "identical": len(self.identical),
            "same": len(self.same),
            "near": len(self.near) if self.measured is not None else None,
            "similarity": self.measured,
            "rows_to_remove": len(self.into_near),
            "not_fully_compared": self.crowded,
            "pairs": [{self.into: a + 1, self.of: b + 1, "similarity": round(s, 3)} for (a, b), s in shown],
        }


@dataclass(frozen=True)
class Contradictions:
    """Rows with one text and several answers. rows: all of them, int64, ascending; texts: how many texts they are;
    groups: up to `MOST_SHOWN` of them as lists of rows, by their first rows; outvoted: the rows whose answer is not the
    most frequent one of their text (all of them where there is a tie), int64."""

    rows: np.ndarray
    texts: int
    groups: tuple[tuple[int, ...], ...]
    outvoted: np.ndarray


def leaks(sides: Mapping[str, Sequence[str]], similarity: float | None = SIMILARITY) -> list[Leak]:
    """Every pair of sides in the order given (train first, then evaluation, test, benchmarks by name).

    similarity: of near duplicates; None: equal texts only, which needs no package. Near-linear in all rows together for
    each side but the last. Raises UserError as `near_duplicates` does.
    """
    names = list(sides)
    if len(names) < 2:
        raise UserError(
            "leakage is looked for between two sides or more", found=", ".join(names) or "none",
            fix="name the evaluation data, or a benchmark file",
        )  # fmt: skip
    keys = _keys(sides)
    return [leak for index in range(len(names) - 1) for leak in _against(names[index:], sides, keys, similarity)]


def leaks_of_first(sides: Mapping[str, Sequence[str]], similarity: float | None = SIMILARITY) -> list[Leak]:
    """The leaks between the first side and each other one alone, of which there may be none; as `leaks`."""
    return _against(list(sides), sides, _keys(sides), similarity) if len(sides) > 1 else []


_Keys = dict[bool, dict[str, np.ndarray]]


def _keys(sides: Mapping[str, Sequence[str]]) -> _Keys:
    """`text_keys` of each side, uint64 [R], as written (True) and normalised (False)."""
    return {as_written: {name: text_keys(texts, as_written=as_written) for name, texts in sides.items()}
            for as_written in (True, False)}  # fmt: skip


def _against(
    names: list[str], sides: Mapping[str, Sequence[str]], every: _Keys, similarity: float | None
) -> list[Leak]:
    """The leaks between the first of `names` and each other one."""
    keys = every[False]
    near: Sequence[Duplicates | None] = [None] * (len(names) - 1)
    if similarity is not None:
        side_of = np.repeat(np.arange(len(names)), [len(keys[name]) for name in names])
        joined = _Joined([sides[name] for name in names])
        near = near_across(joined, side_of, len(names), similarity, keys=np.concatenate([keys[n] for n in names]))
    result, start = [], len(keys[names[0]])
    for of, across in zip(names[1:], near, strict=True):
        span = slice(start, start + len(keys[of]))
        result.append(_leak(names[0], of, every[True], keys, span, across, similarity))
        start = span.stop
    return result


def contradictions(keys: np.ndarray, answers: np.ndarray) -> Contradictions:
    """Rows of one text whose answers differ.

    keys: of the texts, integers [R], as `text_keys` or as the clusters of `near_duplicates`. answers: integers [R], by
    `text_keys` of the labels or answers.
    """
    _, texts = np.unique(keys, return_inverse=True)
    _, said = np.unique(answers, return_inverse=True)
    kinds = int(said.max()) + 1 if len(said) else 1
    coded, votes = np.unique(texts * kinds + said, return_counts=True)
    each = np.bincount(coded // kinds)
    torn = np.flatnonzero(each > 1)
    rows = np.flatnonzero(np.isin(texts, torn))
    most = np.zeros(len(each), np.int64)
    np.maximum.at(most, coded // kinds, votes)
    tops = np.bincount(coded // kinds, votes == most[coded // kinds])
    mine = votes[np.searchsorted(coded, texts[rows] * kinds + said[rows])]
    outvoted = rows[(mine < most[texts[rows]]) | (tops[texts[rows]] > 1)]
    order = rows[np.argsort(texts[rows], kind="stable")]
    parts = np.split(order, np.flatnonzero(np.diff(texts[order])) + 1) if len(order) else []
    groups = sorted((tuple(part.tolist()) for part in parts), key=lambda group: group[0])[:MOST_SHOWN]
    return Contradictions(rows, len(torn), tuple(groups), outvoted)


def _leak(
    into: str, of: str, written: dict[str, np.ndarray], keys: dict[str, np.ndarray], span: slice,
    near: Duplicates | None, similarity: float | None,
) -> Leak:  # fmt: skip
    """The leak of one pair of sides. span: the rows of `of` among all rows of `near`; those of `into` come first."""
    identical = np.flatnonzero(np.isin(written[of], written[into]))
    same, here = np.isin(keys[of], keys[into]), np.isin(keys[into], keys[of])
    seen = here
    _, a, b = np.intersect1d(keys[into], keys[of], return_indices=True)
    pairs, alike = np.stack([a, b], axis=1), np.ones(len(a))
    near_of = same
    if near is not None:
        near_into, near_here, tied, similarities = _between(near, slice(0, len(keys[into])), span)
        seen, near_of = seen | near_into, same | near_here
        pairs, alike = np.concatenate([pairs, tied]), np.concatenate([alike, similarities])
    order = np.lexsort((pairs[:, 0], pairs[:, 1]))
    return Leak(
        into, of, identical, np.flatnonzero(same), np.flatnonzero(near_of), np.flatnonzero(here),
        np.flatnonzero(seen), pairs[order], alike[order], similarity, 0 if near is None else near.crowded,
    )  # fmt: skip


def _between(duplicates: Duplicates, one: slice, other: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(bool rows of one, bool rows of other, pairs int64 [P, 2], similarity float64 [P]) of two spans of rows."""
    nowhere = len(duplicates.same)
    firsts = []
    for span in (one, other):
        first = np.full(nowhere, nowhere, np.int64)
        np.minimum.at(first, duplicates.same[span], np.arange(span.stop - span.start))
        firsts.append(first)
    pairs = np.concatenate([duplicates.pairs, duplicates.pairs[:, ::-1]])
    alike = np.concatenate([duplicates.similarity, duplicates.similarity])
    there = (firsts[0][pairs[:, 0]] < nowhere) & (firsts[1][pairs[:, 1]] < nowhere)
    pairs, alike = pairs[there], alike[there]
    marked = [np.isin(duplicates.same[span], pairs[:, side]) for side, span in enumerate((one, other))]
    tied = np.stack([firsts[0][pairs[:, 0]], firsts[1][pairs[:, 1]]], axis=1)
    return marked[0], marked[1], tied, alike


class _Joined(Sequence[str]):
    """Several sequences of texts as one, none of them copied."""

    def __init__(self, parts: list[Sequence[str]]) -> None:
        self.parts = parts
        self.ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, row: Any) -> Any:
        part = bisect_right(self.ends, row)
        return self.parts[part][int(row) - (self.ends[part - 1] if part else 0)]
