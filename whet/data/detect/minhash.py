"""Propose pairs of near duplicates: MinHash over character trigrams, banded (LSH), then two exact bounds.

Trigrams of characters need no words, so Korean and texts of twelve characters work as English pages do. They are
counted, not only noted: the second "ㅋㅋㅋ" of a text is another element than the first. So two texts of n characters
that differ by at most n/10 edits always share 7/13 of their elements (an edit breaks at most three trigrams), and 64
bands of 4 minima miss such a pair with a probability of 0.4 % at most (Broder 1997; Leskovec, Rajaraman and Ullman,
Mining of Massive Datasets, ch. 3). Most chance candidates fall to lengths and to the bits of their bigrams, which bound
the edit distance from below; the rest is for the caller to compare exactly.

In numpy, not from a library: on short Korean reviews and one core a sketch takes 11 µs (rensa 0.5.0: 19 µs, datasketch
2.0.0: 230 µs), and no release of a library can change which pairs are found. Memory is 300 bytes a row. Gives up: in a
bucket with more than `NEIGHBOURS` rows of like length, a row meets only those next to it, or one template filled in a
million times would cost 10¹² comparisons; the rows that met such a bucket are reported.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

BANDS, MINIMA = 64, 4
NEIGHBOURS = 256
CHUNK_ROWS = 4096
CHUNK_CHARACTERS = 1 << 20
MOST_TRIGRAMS = 512  # of a longer text those of the lowest hashes, which are a fair sample of it
BITS = 256
FLIPPED_BY_AN_EDIT = 4  # a substitution removes two bigrams and adds two
OPEN, CLOSE = "\ue000", "\ue001"  # private use: no text begins or ends with them
_LOW = np.uint64(0xFFFFFFFF)


@dataclass(frozen=True)
class Sketches:
    """Sketches of R texts: bands uint32 [BANDS, R], bits uint64 [R, BITS / 64] of bigrams, lengths int64 [R] in
    characters."""

    bands: np.ndarray
    bits: np.ndarray
    lengths: np.ndarray

    def reordered(self, order: np.ndarray) -> Sketches:
        """The sketches of the texts in another order."""
        bands = self.bands
        for band in bands:
            band[:] = band[order]
        return Sketches(bands, self.bits[order], self.lengths[order])


def sketches(texts: Iterable[str], rows: int) -> Sketches:
    """Read `rows` texts once, as a stream."""
    bands = np.empty((BANDS, rows), np.uint32)
    bits = np.empty((rows, BITS // 64), np.uint64)
    lengths = np.empty(rows, np.int64)
    start = 0
    for chunk in _chunks(texts):
        span = slice(start, start + len(chunk))
        bands[:, span], bits[span], lengths[span] = _sketch(chunk)
        start += len(chunk)
    assert start == rows, (start, rows)
    return Sketches(bands, bits, lengths)


def edits_allowed(longer: np.ndarray, similarity: float) -> np.ndarray:
    """Most edits between two texts that are as similar; longer: characters of the longer one, int64 [P]."""
    return np.floor((1 - similarity) * longer + 1e-9).astype(np.int64)


def meetings(sketched: Sketches, similarity: float) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    """(a, b, crowded): rows int64 [P] that share a bucket and whose lengths allow the similarity, nearest first.

    Lengths must ascend; b is never the shorter text. A pair comes once for each bucket that it shares. crowded: there
    are more partners for each a than are given.
    """
    for band in sketched.bands:
        order = np.argsort(band, kind="stable")
        keys, sizes = band[order], sketched.lengths[order]
        one = np.arange(len(order))
        for step in range(1, NEIGHBOURS + 2):
            one = one[: np.searchsorted(one, len(order) - step)]
            other = one + step
            allowed = edits_allowed(sizes[other], similarity)
            meets = (keys[one] == keys[other]) & (sizes[other] - sizes[one] <= allowed)
            one, other = one[meets], other[meets]
            if not len(one):
                break
            yield order[one], order[other], step > NEIGHBOURS


def may_be_near(sketched: Sketches, a: np.ndarray, b: np.ndarray, similarity: float) -> np.ndarray:
    """False for pairs of rows whose bigrams rule the similarity out, bool [P]. b: the longer texts."""
    flips = np.bitwise_count(sketched.bits[a] ^ sketched.bits[b]).sum(axis=1, dtype=np.int64)
    return flips <= FLIPPED_BY_AN_EDIT * edits_allowed(sketched.lengths[b], similarity)


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in lists whose memory is bounded."""
    stream = iter(texts)
    chunk: list[str] = []
    characters = 0
    while part := list(islice(stream, 256)):
        for text in part:
            chunk.append(text)
            characters += len(text)
            if len(chunk) == CHUNK_ROWS or characters >= CHUNK_CHARACTERS:
                yield chunk
                chunk, characters = [], 0
    if chunk:
        yield chunk


def _sketch(texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(bands, bits, lengths) of a chunk, as `Sketches` has them."""
    lengths = np.fromiter((len(text) for text in texts), np.int64, len(texts))
    joined = "".join(f"{OPEN}{text}{CLOSE}" for text in texts)
    points = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    owners = np.repeat(np.arange(len(texts)), lengths + 2)
    twos = points[:-1] << np.uint64(21) | points[1:]
    inside = owners[:-1] == owners[1:]
    shown = np.zeros((len(texts), BITS), bool)
    shown[owners[:-1][inside], (mixed(twos[inside]) % np.uint64(BITS)).astype(np.int64)] = True
    bits = np.packbits(shown, axis=1).view(np.uint64)
    threes = twos[:-1] << np.uint64(21) | points[2:]
    inside = owners[:-2] == owners[2:]
    elements, starts = _counted(mixed(threes[inside]) & _LOW, owners[:-2][inside], len(texts))
    return _bands(elements, starts), bits, lengths


def _counted(hashes: np.ndarray, owners: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(elements uint32 [N], start of each row's int64 [rows]): the k-th copy of a trigram in a row is its own element.

    A row of no trigram (the empty text) has one element, so that every row has a start.
    """
    missing = np.flatnonzero(np.bincount(owners, minlength=rows) == 0)
    hashes = np.concatenate([hashes, np.zeros(len(missing), np.uint64)])
    coded = np.sort(np.concatenate([owners, missing]).astype(np.uint64) << np.uint64(32) | hashes)
    index = np.arange(len(coded))
    first = np.concatenate([[True], coded[1:] != coded[:-1]])
    copies = index - np.maximum.accumulate(np.where(first, index, 0))
    rows_of = (coded >> np.uint64(32)).astype(np.int64)
    starts = np.searchsorted(rows_of, np.arange(rows))
    sampled = index - starts[rows_of] < MOST_TRIGRAMS
    elements = mixed((coded & _LOW) + (copies.astype(np.uint64) << np.uint64(32)))
    return (elements[sampled] >> np.uint64(32)).astype(np.uint32), np.searchsorted(rows_of[sampled], np.arange(rows))


def _bands(elements: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """One uint32 of `MINIMA` minima for each band and row, [BANDS, R]."""
    draws = np.random.Generator(np.random.PCG64(20)).integers(0, 1 << 32, (BANDS, MINIMA, 2), dtype=np.uint32)
    bands = np.empty((BANDS, len(starts)), np.uint32)
    scratch = np.empty_like(elements)
    for band in range(BANDS):
        key = np.full(len(starts), band, np.uint64)
        for flip, factor in draws[band]:
            np.bitwise_xor(elements, flip, out=scratch)
            np.multiply(scratch, factor | np.uint32(1), out=scratch)
            key = mixed(key ^ np.minimum.reduceat(scratch, starts))
        bands[band] = key >> np.uint64(32)
    return bands


def mixed(values: np.ndarray) -> np.ndarray:
    """64 bits that depend on all 64 bits of each value (the finaliser of SplitMix64)."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
