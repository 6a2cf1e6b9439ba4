"""Store examples on disk, any number of them, with only those in memory that are in use.

Everything that happens between reading and tokenising (splitting, mixing, finding duplicates) needs a few numbers of
each row, and its text once. So texts go to a file as they are read, one JSON line each, and memory holds 8 bytes for
its offset, 4 for its size and 8 for its id. Rows are read and not mapped, so that they leave no pages in the process.
Gives up: a random look at a row costs two system calls and some parsing, about 20 microseconds.
"""

from __future__ import annotations

import tempfile
import threading
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, overload

import numpy as np

from whet.data.example import Example, from_json, to_json

TOGETHER_BYTES = 1 << 20  # read at once where rows are taken in order


class Lines:
    """A file of examples that several selections read from."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self._lock = file, threading.Lock()

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on."""
        with self._lock:
            self.file.seek(offset)
            return self.file.read(size)


class Examples(Sequence[Example]):
    """A selection of the examples in a file. ids: uint64 [N], the ids of the examples as numbers."""

    def __init__(self, lines: Lines, offsets: np.ndarray, sizes: np.ndarray, ids: np.ndarray) -> None:
        self._lines, self._offsets, self._sizes, self.ids = lines, offsets, sizes, ids

    def __len__(self) -> int:
        return len(self._offsets)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> Example | Examples:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        return from_json(self._lines.read(int(self._offsets[index]), int(self._sizes[index])).decode())

    def __iter__(self) -> Iterator[Example]:
        return map(from_json, self.lines())

    def held(self, most_bytes: int) -> Sequence[Example]:
        """The examples in memory where they are no more than `most_bytes` on disk, else these: each look at one of them
        reads it again."""
        return list(self) if int(self._sizes.sum()) <= most_bytes else self

    def lines(self) -> Iterator[str]:
        """The examples as JSON in order; neighbours in the file are read together."""
        start = 0
        while start < len(self):
            end = self._run(start)
            begin = int(self._offsets[start])
            size = int(self._offsets[end - 1]) + int(self._sizes[end - 1]) - begin
            block = self._lines.read(begin, size)
            for index in range(start, end):
                begins = int(self._offsets[index]) - begin
                yield block[begins : begins + int(self._sizes[index])].decode()
            start = end

    def _run(self, start: int) -> int:
        """End of the rows from `start` that lie in ascending order within TOGETHER_BYTES."""
        window = self._offsets[start : start + 4096].astype(np.int64)
        apart = (np.diff(window) < 0) | (window[1:] - window[0] > TOGETHER_BYTES)
        return start + (int(np.argmax(apart)) + 1 if apart.any() else len(window))

    def take(self, chosen: np.ndarray) -> Examples:
        """The examples at the indices (or where the mask is True), in that order."""
        return Examples(self._lines, self._offsets[chosen], self._sizes[chosen], self.ids[chosen])

    def joined(self, other: Examples) -> Examples:
        """These examples and then the others, which are in the same file."""
        assert self._lines is other._lines
        pairs = ((self._offsets, other._offsets), (self._sizes, other._sizes), (self.ids, other.ids))
        return Examples(self._lines, *(np.concatenate(pair) for pair in pairs))

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays that `opened` needs beside the file."""
        return {"places": self._offsets, "sizes": self._sizes, "ids": self.ids}


class Store:
    """Writes examples to `path`, or to a file without a name that goes with the process."""

    def __init__(self, path: Path | None = None) -> None:
        self._file: BinaryIO = tempfile.TemporaryFile() if path is None else path.open("w+b")  # type: ignore[assignment]  # noqa: SIM115
        self._sizes, self._ids = array("I"), array("Q")

    def add(self, example: Example) -> None:
        """Append one example."""
        line = to_json(example).encode()
        self._file.write(line)
        self._sizes.append(len(line))
        self._ids.append(int(example.id, 16))

    def __len__(self) -> int:
        return len(self._ids)

    def finish(self) -> Examples:
        """All examples that were added."""
        self._file.flush()
        sizes = np.frombuffer(self._sizes, np.uint32) if self._sizes else np.zeros(0, np.uint32)
        ids = np.frombuffer(self._ids, np.uint64) if self._ids else np.zeros(0, np.uint64)
        offsets = np.zeros(len(sizes), np.uint64)
        np.cumsum(sizes[:-1], out=offsets[1:], dtype=np.uint64)
        return Examples(Lines(self._file), offsets, sizes, ids)


def stored(examples: Iterable[Example]) -> Examples:
    """Store the examples in a file without a name."""
    store = Store()
    for example in examples:
        store.add(example)
    return store.finish()


def opened(path: Path, arrays: dict[str, np.ndarray]) -> Examples:
    """Open examples that were written to `path`; arrays: of `Examples.arrays`."""
    return Examples(Lines(path.open("rb")), arrays["places"], arrays["sizes"], arrays["ids"])
