"""Tokenised rows in three flat arrays: bounded memory (5 bytes a token) whatever their number."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Rows:
    """R rows of N tokens in all. ids: token ids, int32 [N]; learned: the loss mask, True where a token is a target,
    bool [N]; starts: first token of each row, and N, int64 [R+1].

    sources: index of each row's example in the order of reading, int64 [R]. labels: int64 [R], float32 [R] or float32
    [R, C]; types: token types of pairs of texts, int8 [N]; answers: the rows that a decoder writes for these, their
    tokens all learned; weights: factor on the loss of each token, float32 [N], None: 1 for all.
    """

    ids: np.ndarray
    learned: np.ndarray
    starts: np.ndarray
    sources: np.ndarray
    labels: np.ndarray | None = None
    types: np.ndarray | None = None
    answers: Rows | None = None
    weights: np.ndarray | None = None

    @classmethod
    def whole(cls, parts: Iterable[tuple[int, np.ndarray]], *, learned: bool) -> Rows:
        """Gather (source, ids) of rows whose tokens are all learned (by a decoder that has a start token), or none."""
        rows = cls.gather((source, ids, np.zeros(len(ids), bool)) for source, ids in parts)
        return replace(rows, learned=np.full(len(rows.ids), learned))

    @classmethod
    def gather(cls, parts: Iterable[tuple[int, np.ndarray, np.ndarray]]) -> Rows:
        """Gather (source, ids, learned) of rows. A row's first token is never a target: nothing predicts it."""
        ids, learned, starts, sources = [], [], [0], []
        for source, row_ids, row_learned in parts:
            ids.append(np.asarray(row_ids, dtype=np.int32))
            marks = np.array(row_learned, dtype=bool)
            marks[:1] = False
            learned.append(marks)
            starts.append(starts[-1] + len(row_ids))
            sources.append(source)
        return cls(
            np.concatenate(ids) if ids else np.zeros(0, np.int32),
            np.concatenate(learned) if learned else np.zeros(0, bool),
            np.asarray(starts, dtype=np.int64),
            np.asarray(sources, dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, learned) of one row, both [T]."""
        span = self.span(index)
        return self.ids[span], self.learned[span]

    def span(self, index: int) -> slice:
        """The span of one row's tokens in the arrays."""
        return slice(self.starts[index], self.starts[index + 1])

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 [R]."""
        return np.diff(self.starts)

    @property
    def targets(self) -> int:
        """Count of targets in all rows: labels, tokens of answers, or learned tokens."""
        if self.labels is not None:
            return len(self.labels)
        return int(self.learned.sum()) if self.answers is None else self.answers.targets

    def sha256(self) -> str:
        """The hash of everything that training reads of the rows."""
        digest = hashlib.sha256()
        for array in (self.ids, self.learned, self.starts):
            digest.update(np.ascontiguousarray(array).tobytes())
        for array in (self.labels, self.types, self.weights):
            if array is not None:
                digest.update(f"{array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        if self.answers is not None:
            digest.update(self.answers.sha256().encode())
        return digest.hexdigest()
