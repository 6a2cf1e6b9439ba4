"""Columns: arrays that grow on disk and are mapped when they are done, for any number of rows in bounded memory.

A column is a file of plain numbers; its name, type and length stand beside it in the manifest of the directory
(cache.py). Mapped pages belong to the system, which takes them back when memory is short.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np

BUFFER_BYTES = 1 << 20


class Column:
    """An array that is appended to in the file `path`."""

    def __init__(self, path: Path, dtype: type[np.generic]) -> None:
        self.path, self.dtype, self.length = path, np.dtype(dtype), 0
        self._file: BinaryIO = path.open("wb", buffering=BUFFER_BYTES)

    def extend(self, values: np.ndarray) -> None:
        """Append values [N], converted to the type of the column."""
        data = np.ascontiguousarray(values, self.dtype)
        self._file.write(data.view(np.uint8).data if len(data) else b"")
        self.length += len(data)

    def finish(self) -> np.ndarray:
        """The whole array [N], mapped to be read only."""
        self._file.close()
        return mapped(self.path, self.dtype, (self.length,))


def mapped(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """The array in `path`, mapped to be read only; an empty file cannot be mapped and is an empty array."""
    return np.memmap(path, dtype, "r", shape=shape) if np.prod(shape) else np.zeros(shape, dtype)
