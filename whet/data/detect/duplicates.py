"""Find rows that are the same text, and rows that are nearly the same: which, how similar, and in what clusters.

Two texts are the same when they are equal after `normalised`: canonical Unicode (NFC), case folded, every run of white
space one space. Punctuation stays, since "Really?" and "Really!" may carry different labels. They are near duplicates
when the edit distance of the normalised texts (insertions, deletions, substitutions of characters) is at most
1 - similarity of the longer one: a definition that anybody can check by hand, unlike a score of sketches. Sketches
(`detect.minhash`) only propose pairs; rapidfuzz decides each one exactly, so there is no false alarm by construction.
Texts of fewer than 1 / (1 - similarity) characters have no near duplicates, only equal ones.

Everything is decided by content: the order of rows, the machine and PYTHONHASHSEED change nothing. Gives up: texts that
say the same in other words (that takes a model), and 0.4 % of the pairs at the very limit of the similarity.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from whet.base.errors import UserError
from whet.data.detect.minhash import Sketches, edits_allowed, may_be_near, meetings, sketches

SIMILARITY = 0.9
LEAST_SIMILARITY = 0.9  # for which the bands of detect.minhash are chosen
BATCH = 1 << 14
KEPT_CHARACTERS = 1 << 24
MOST_COMPARISONS = 100  # of one text with longer ones; a text of banking77 needs 3 on average


@dataclass(frozen=True)
class Duplicates:
    """Duplicates among R rows. first: the first row of each row's cluster, int64 [R] (of a row that is alone, itself).

    same: the first row with the same normalised text, int64 [R]. pairs: the near duplicates that tie the clusters
    together, int64 [P, 2], each text by its first row, a < b, ascending: one fewer than the texts of a cluster, so
    P < R whatever the data. similarity: 1 - distance / longer length, float64 [P]. crowded: texts that were not
    compared with every candidate, because too many were alike.
    """

    first: np.ndarray
    same: np.ndarray
    pairs: np.ndarray
    similarity: np.ndarray
    crowded: int = 0

    @property
    def repeated(self) -> np.ndarray:
        """Rows whose text stands in an earlier row, int64 [D]: those that removing exact duplicates would remove."""
        return np.flatnonzero(self.same != np.arange(len(self.same)))

    @property
    def removable(self) -> np.ndarray:
        """Rows that are not the first of their cluster, int64 [D]: those that keeping one row of each would remove."""
        return np.flatnonzero(self.first != np.arange(len(self.first)))

    def clusters(self) -> list[np.ndarray]:
        """The rows of each cluster of two or more, by their first rows."""
        order = np.argsort(self.first, kind="stable")
        parts = np.split(order, np.flatnonzero(np.diff(self.first[order])) + 1)
        return [part for part in parts if len(part) > 1]


def normalised(text: str) -> str:
    """The text in canonical Unicode, case folded, with single spaces between what white space parted."""
    text = " ".join(text.split())
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())


def text_keys(texts: Iterable[str], *, as_written: bool = False) -> np.ndarray:
    """uint64 [R]: equal keys for equal normalised texts (as_written: for equal texts, bit for bit).

    64 bits of BLAKE2: among a million rows, two different texts share a key with a probability of 3e-8.
    """

    def key(text: str) -> int:
        written = (text if as_written else normalised(text)).encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.blake2b(written, digest_size=8).digest(), "little")

    return np.fromiter((key(text) for text in texts), np.uint64)


def first_of(keys: np.ndarray) -> np.ndarray:
    """The first row with the same key, int64 [R]. keys: any integers [R]."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return first[inverse].astype(np.int64)


def exact_duplicates(keys: np.ndarray) -> Duplicates:
    """Rows with equal keys, as `text_keys` makes them."""
    same = first_of(keys)
    return Duplicates(same, same, np.zeros((0, 2), np.int64), np.zeros(0))


def near_duplicates(
    texts: Sequence[str], similarity: float = SIMILARITY, *, keys: np.ndarray | None = None
) -> Duplicates:
    """Exact and near duplicates among `texts`, which are read in order and then by index where two may be alike.

    keys: `text_keys(texts)`, where they are known. Near-linear in rows; about 400 bytes a row besides the texts. Raises
    UserError where the similarity is out of reach.
    """
    return _near(texts, text_keys(texts) if keys is None else keys, similarity, None, 2)[0]


def near_across(
    texts: Sequence[str], sides: np.ndarray, count: int, similarity: float = SIMILARITY, *,
    keys: np.ndarray | None = None,
) -> list[Duplicates]:  # fmt: skip
    """Near duplicates between side 0 and each other side, in the order of sides, as `near_duplicates` finds them.

    sides: 0 to count - 1 for each row, int [R]; a side may be empty. Every row that has a near duplicate on the other
    side is in a pair, short of those that `crowded` counts.
    """
    return _near(texts, text_keys(texts) if keys is None else keys, similarity, sides, count)


def _near(
    texts: Sequence[str], keys: np.ndarray, similarity: float, sides: np.ndarray | None, count: int
) -> list[Duplicates]:
    _check(similarity)
    unique, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    written = _Written(texts)
    sketched = sketches((written[row] for row in first.tolist()), len(first))
    order = np.argsort(sketched.lengths, kind="stable")
    sketched, rows = sketched.reordered(order), first[order]
    where: list[np.ndarray | None] = [None]
    if sides is not None:
        there = np.zeros((count, len(unique)), bool)
        there[sides, inverse] = True
        where = [(there[0] + 2 * side)[order] for side in there[1:].astype(np.uint8)]
    links = [_Links(written, sketched, rows, similarity, bits) for bits in where]
    for a, b, crowded in meetings(sketched, similarity):
        for each in links:
            each.meet(a, b, crowded)
    same = first[inverse].astype(np.int64)
    return [each.duplicates(same) for each in links]


def clusters_of(same: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """The first row of each row's cluster, int64 [R], from equal rows (first row of each text, int64 [R]) and pairs."""
    forest = _Forest(same.copy())
    for a, b in pairs.tolist():
        forest.join(a, b)
    return forest.flat()


class _Forest:
    """Union-find over rows; a cluster's root is its lowest row."""

    def __init__(self, parent: np.ndarray) -> None:
        self.parent = parent

    def root(self, row: int) -> int:
        parent = self.parent
        while (up := int(parent[row])) != row:
            parent[row] = parent[up]
            row = int(parent[row])
        return row

    def join(self, a: int, b: int) -> None:
        low, high = sorted((self.root(a), self.root(b)))
        self.parent[high] = low

    def flat(self) -> np.ndarray:
        """The root of each row, int64 [R]."""
        while not np.array_equal(up := self.parent[self.parent], self.parent):
            self.parent = up
        return self.parent


class _Written:
    """Texts in their normal form by row, cached: each is sketched, and then compared with many."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts
        self.cache: dict[int, str] = {}
        self.characters = 0

    def __getitem__(self, row: int) -> str:
        text = self.cache.get(row)
        if text is None:
            if self.characters > KEPT_CHARACTERS:
                self.cache, self.characters = {}, 0
            text = self.cache[row] = normalised(self.texts[row])
            self.characters += len(text)
        return text


class _Links:
    """Compares pairs that are not in one cluster yet, so memory is bounded by rows and not by pairs.

    rows: the first row of each text. where: uint8, bit 0 or 1 set where the text is on that side; None: no sides.
    """

    def __init__(
        self, written: _Written, sketched: Sketches, rows: np.ndarray, similarity: float, where: np.ndarray | None
    ) -> None:
        self.written, self.sketched, self.rows, self.similarity, self.where = written, sketched, rows, similarity, where
        self.forest = _Forest(np.arange(len(rows)))
        self.crowded = np.zeros(len(rows), bool)
        self.compared = np.zeros(len(rows), np.int32)
        self.pairs: list[tuple[int, int]] = []
        self.alike: list[float] = []
        self.flattened = 0

    def meet(self, a: np.ndarray, b: np.ndarray, crowded: bool) -> None:
        """Link those of the pairs that are alike. a, b: indices of texts, int64 [P]."""
        apart = self.forest.parent[a] != self.forest.parent[b]
        if self.where is not None:
            apart &= (self.where[a] | self.where[b]) == 3
        a, b = a[apart], b[apart]
        if crowded:
            self.crowded[a] = True
            return
        near = may_be_near(self.sketched, a, b, self.similarity)
        a, b = a[near], b[near]
        left = self.compared[a] < MOST_COMPARISONS
        self.crowded[a[~left]] = True
        a, b = a[left], b[left]
        np.add.at(self.compared, a, 1)
        for start in range(0, len(a), BATCH):
            self._compare(a[start : start + BATCH], b[start : start + BATCH])
        if len(self.pairs) > self.flattened + len(self.rows) // 64:
            self.forest.flat()
            self.flattened = len(self.pairs)

    def duplicates(self, same: np.ndarray) -> Duplicates:
        """The duplicates of all pairs so far, the pairs in order of rows. same: as in `Duplicates`."""
        pairs = np.asarray(self.pairs, np.int64).reshape(-1, 2)
        order = np.lexsort((pairs[:, 1], pairs[:, 0]))
        pairs, alike = pairs[order], np.asarray(self.alike, np.float64)[order]
        return Duplicates(clusters_of(same, pairs), same, pairs, alike, int(self.crowded.sum()))

    def _compare(self, a: np.ndarray, b: np.ndarray) -> None:
        """Link those of the pairs that are alike and not in one cluster by then."""
        from rapidfuzz.distance import Levenshtein
        from rapidfuzz.process import cpdist

        ones, others = ([self.written[row] for row in self.rows[some].tolist()] for some in (a, b))
        allowed = edits_allowed(np.fromiter(map(len, others), np.int64, len(others)), self.similarity)
        distances = cpdist(  # beyond the loosest limit it is that and one more
            ones, others, scorer=Levenshtein.distance, score_cutoff=int(allowed.max()), dtype=np.int64
        )
        for near in np.flatnonzero(distances <= allowed).tolist():
            one, other = int(a[near]), int(b[near])
            if self.forest.root(one) == self.forest.root(other):
                continue
            self.forest.join(one, other)
            low, high = sorted((int(self.rows[one]), int(self.rows[other])))
            self.pairs.append((low, high))
            self.alike.append(1 - int(distances[near]) / max(1, len(others[near])))


def _check(similarity: float) -> None:
    if not LEAST_SIMILARITY <= similarity <= 1:
        raise UserError(
            "near duplicates are not found at this similarity", field="similarity", found=str(similarity),
            expected=f"{LEAST_SIMILARITY} to 1: the share of characters that stay", fix=f"write {SIMILARITY}",
        )  # fmt: skip
