"""Tokenised rows in three flat arrays: bounded memory (5 bytes a token) whatever their number."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Rows:
    """ids: token ids of all rows, int32 [N]; learned: True where a token is a target, bool [N]; starts: int64 [R+1].

    sources: index of each row's example in the order of reading, int64 [R].
    """

    ids: np.ndarray
    learned: np.ndarray
    starts: np.ndarray
    sources: np.ndarray

    @classmethod
    def gather(cls, parts: Iterable[tuple[int, np.ndarray, np.ndarray]]) -> Rows:
        """From (source, ids, learned) of each row. A row's first token is never a target: nothing predicts it."""
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
        span = slice(self.starts[index], self.starts[index + 1])
        return self.ids[span], self.learned[span]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 [R]."""
        return np.diff(self.starts)

    @property
    def targets(self) -> int:
        """Learned tokens of all rows."""
        return int(self.learned.sum())

    def sha256(self) -> str:
        """Of everything that training sees."""
        digest = hashlib.sha256()
        for array in (self.ids, self.learned, self.starts):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()
