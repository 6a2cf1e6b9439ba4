"""Open a data file: watch it, hash it while it is read, unpack it, and check that its content fits its name.

A file that changes while it is read would give rows of two states, so its size, time and inode are compared at the end
with those at the start. Gives up: a change that keeps both size and time is not seen here; the hash that is stored with
a run shows it later. zstd comes from Python 3.14 on with Python, before that from `backports.zstd`, which is the same
code: of the bindings, it alone reports a file that is cut off.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import os
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, cast

from whet.base.errors import UserError
from whet.base.extras import require
from whet.data.read.record import COPY_AGAIN

HEAD_BYTES = 64
# Text packs to a tenth; what unpacks to over a hundred times its size would be read for hours, or fills the memory.
MOST_TIMES, UNPACKED_AT_LEAST = 100, 256 << 20
BUFFER_BYTES, PACKED_BUFFER_BYTES = 1 << 18, 1 << 15
_LFS_POINTER = b"version https://git-lfs"
_UTF16 = ("UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8 OLD > NEW")
_UTF32 = ("UTF-32 text", "convert it: iconv -f UTF-32 -t UTF-8 OLD > NEW")
_PICKLE = ("a Python pickle, which can run code when it is opened", "save the rows as JSONL")
PARQUET, ARROW_FILE, ARROW_STREAM = "a Parquet file", "an Arrow file", "an Arrow stream"
_MAGIC = {  # the longer of two that begin alike stands first
    b"\x1f\x8b": ("gzip data", "rename the file so that it ends in .gz"),
    b"\xfd7zXZ\x00": ("xz data", "rename the file so that it ends in .xz"),
    b"\x28\xb5\x2f\xfd": ("zstd data", "rename the file so that it ends in .zst"),
    b"BZh": ("bzip2 data", "rename the file so that it ends in .bz2"),
    b"PAR1": (PARQUET, "rename the file so that it ends in .parquet"),
    b"ARROW1\x00\x00": (ARROW_FILE, "rename the file so that it ends in .arrow"),
    b"\xff\xff\xff\xff": (ARROW_STREAM, "rename the file so that it ends in .arrow"),
    b"FEA1": ("a Feather file of version 1", "save it again with pyarrow.feather.write_feather"),
    b"PK\x03\x04": ("a zip archive or an Excel file", "unpack it first, or save the sheet as CSV UTF-8"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "unpack it first"),
    b"SQLite format 3\x00": ("an SQLite database", "export the table as JSONL"),
    b"%PDF-": ("a PDF", "save its text as .txt"),
    b"\x80\x04\x95": _PICKLE,
    b"\x80\x05\x95": _PICKLE,
    b"\xff\xfe\x00\x00": _UTF32,
    b"\x00\x00\xfe\xff": _UTF32,
    b"\xff\xfe": _UTF16,
    b"\xfe\xff": _UTF16,
}
_WEB_PAGE = ("<!doctype html", "<html")
_PACKED_AS = {"": "", ".gz": "gzip data", ".xz": "xz data", ".zst": "zstd data", ".bz2": "bzip2 data"}
PACKINGS = tuple(packing for packing in _PACKED_AS if packing)


class WatchedFile(io.RawIOBase):
    """A file on disk, read from its start, that knows whether it changed meanwhile.

    hashed: take the sha256 of what is read; only for files that are read in order.
    """

    def __init__(self, path: Path, file: str, *, hashed: bool) -> None:
        super().__init__()
        self.path, self.file = path, file
        self._raw = path.open("rb", buffering=0)
        self._start = _state(os.fstat(self._raw.fileno()))
        self._digest = hashlib.sha256() if hashed else None
        self._in_order = True

    @property
    def size(self) -> int:
        """Bytes of the file when it was opened."""
        return self._start[0]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0, /) -> int:
        self._in_order = False
        return self._raw.seek(offset, whence)

    def tell(self) -> int:
        return self._raw.tell()

    def read(self, size: int = -1, /) -> bytes:
        """At most what the file held when it was opened: a damaged file may ask for any number of bytes."""
        left = max(0, self._start[0] - self._raw.tell())
        return super().read(left if size < 0 else min(size, left)) or b""

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        count = self._raw.readinto(buffer)
        if self._digest is not None and self._in_order:
            self._digest.update(memoryview(buffer)[:count])
        return count

    def close(self) -> None:
        """Do nothing: a reader around it closes it when it is done, and the file is still needed then."""

    def __exit__(self, *_: object) -> None:
        self._raw.close()
        super().close()

    def changed(self) -> UserError | None:
        """The error, if this is no longer the file that was opened; else None."""
        held = _state(os.fstat(self._raw.fileno()))
        try:
            there = _state(self.path.stat())
        except OSError:
            there = None
        if held == there == self._start:
            return None
        found = "another file, or none" if there is None or there[2:] != self._start[2:] else f"{there[0]} bytes"
        problem, fix = "the file changed while it was read", "wait until nothing writes to it, then start again"
        return UserError(problem, fix, self.file, found=found, expected=f"{self._start[0]} bytes as at the start")

    def fingerprint(self) -> dict[str, str | int]:
        """path, bytes and sha256 of the file as it lies on disk; what was not read yet is read now."""
        if self._digest is None or not self._in_order:
            self._raw.seek(0)
            self._digest, self._in_order = hashlib.sha256(), True
        block = bytearray(1 << 20)
        while self.readinto(memoryview(block)):
            pass
        if error := self.changed():
            raise error
        return {"path": self.file, "bytes": self._start[0], "sha256": self._digest.hexdigest()}


def _state(facts: os.stat_result) -> tuple[int, int, int, int]:
    return facts.st_size, facts.st_mtime_ns, facts.st_ino, facts.st_dev


def unreadable(path: str, error: OSError) -> UserError:
    """The error for a path that the system does not let us read."""
    return UserError(f"cannot be read: {error.strerror or error}", "check the path and its permissions", file=path)


def text_stream(disk: WatchedFile, packing: str) -> BinaryIO:
    """The unpacked bytes of `disk`, whose first bytes were checked: on disk and, when packed, inside."""
    # Little is read ahead of what is unpacked, so that the sizes can be compared early.
    stream: BinaryIO = io.BufferedReader(disk, PACKED_BUFFER_BYTES if packing else BUFFER_BYTES)
    check_head(stream.peek(HEAD_BYTES)[:HEAD_BYTES], disk.file, (_PACKED_AS[packing],), packing)  # type: ignore[attr-defined]
    if not packing:
        return stream
    inside = io.BufferedReader(_Unpacked(disk, cast(BinaryIO, _OPEN[packing](stream))), BUFFER_BYTES)
    if head := inside.peek(HEAD_BYTES)[:HEAD_BYTES]:
        check_head(head, disk.file, ("",), packing, inside=True)
    return inside


class _Unpacked(io.RawIOBase):
    """The bytes inside of a packed file, as long as they are not far more than those of the file."""

    def __init__(self, disk: WatchedFile, inside: BinaryIO) -> None:
        super().__init__()
        self._disk, self._inside, self._size = disk, inside, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        part = self._inside.read(len(buffer))
        buffer[: len(part)] = part
        self._size += len(part)
        check_growth(self._size, self._disk.tell(), self._disk.file)
        return len(part)


def check_growth(unpacked: int, packed: int, file: str) -> None:
    """Refuse a file that unpacks to far more bytes than it has (a decompression bomb)."""
    if unpacked > max(UNPACKED_AT_LEAST, MOST_TIMES * packed):
        raise UserError(
            f"the file unpacks to over {MOST_TIMES} times its size", "unpack it first, if that is meant", file,
            found=f"{unpacked:,} bytes from {packed:,}", expected="packed rows, which are some ten times smaller",
        )  # fmt: skip


def damage_of(packing: str) -> tuple[type[Exception], ...]:
    """The exceptions that the library for `packing` raises for damaged data."""
    return (gzip.BadGzipFile, zlib.error, lzma.LZMAError, *([_zstd().ZstdError] if packing == ".zst" else []))


def check_head(head: bytes, file: str, expected: tuple[str, ...], packing: str = "", *, inside: bool = False) -> None:
    """Refuse a file whose first bytes are none of `expected` (names of kinds; "" is text)."""
    if not head:
        raise UserError("the file is empty (0 bytes)", "fill it, or remove it from the recipe", file=file)
    if head.startswith(_LFS_POINTER):
        raise UserError("git-lfs pointer instead of data", "git lfs pull", file=file, found=head.decode("latin-1"))
    fix = f"remove {packing} from the file's name, or compress it" if packing else COPY_AGAIN
    found, fix = next((what for magic, what in _MAGIC.items() if head.startswith(magic)), ("", fix))
    if not found and "" in expected:
        found, fix = _not_text(head) or ("", "")
    if found in expected:
        return
    if inside:
        fix = f"pack the text alone with {packing}"
    problem = f"the content {'inside ' if inside else ''}is not what the file's name says"
    wanted = " or ".join(name or "UTF-8 text" for name in expected)
    raise UserError(problem, fix, file, found=found or f"bytes {head[:8]!r}", expected=wanted)


def _not_text(head: bytes) -> tuple[str, str] | None:
    """UTF-16 without a mark at its start, or a web page."""
    pairs = head[: len(head) // 2 * 2]
    if len(pairs) >= 8 and (not any(pairs[::2]) or not any(pairs[1::2])) and any(pairs):
        return "UTF-16 text without its mark", _UTF16[1].replace("UTF-16", "UTF-16LE" if pairs[0] else "UTF-16BE", 1)
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith(tuple(word.encode() for word in _WEB_PAGE)):
        return "a web page instead of data", "download the data file itself (its raw link)"
    return None


def _zstd() -> ModuleType:
    if sys.version_info >= (3, 14):
        from compression import zstd

        return zstd
    return require("backports.zstd", "a .zst file")


def _open_zstd(stream: BinaryIO) -> BinaryIO:
    return _zstd().open(stream)


_OPEN: dict[str, Callable[[BinaryIO], object]] = {
    ".gz": lambda stream: gzip.GzipFile(fileobj=stream),
    ".xz": lzma.open,
    ".zst": _open_zstd,
    ".bz2": bz2.open,
}
