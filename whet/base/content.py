"""Know files by their content: sizes and sha256 of what a directory holds, and what has changed since.

A changed bit, a file that is gone and a file of another origin under the same name all show. Large files are hashed by
several threads, about 1.5 GB a second each, and their hash is remembered for DAYS_REMEMBERED under device, inode, size
and both times of the file. Gives up: bits of a large file that a disk turns beneath the file system within those days.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from whet.base.cache import cache_directory
from whet.base.files import read_json, write_json

REMEMBERED_BYTES = 64 << 20  # smaller files are hashed anew every time
DAYS_REMEMBERED = 7
MOST_REMEMBERED = 1000
THREADS = 4

Files = dict[str, dict[str, Any]]


def files_in(directory: Path, names: Iterable[str] | None = None, *, but: Sequence[str] = ()) -> Files:
    """Name to bytes and sha256 of the files in `directory` and below; names: of these alone. Raises OSError."""
    if names is None:
        entries = sorted(directory.rglob("*"))
        names = [entry.relative_to(directory).as_posix() for entry in entries if entry.is_file()]
    chosen = [name for name in names if name not in but]
    paths = [directory / name for name in chosen]
    if sum(map(_size, paths)) > REMEMBERED_BYTES:
        with ThreadPoolExecutor(THREADS) as threads:
            digests = list(threads.map(_sha256, paths))
    else:
        digests = list(map(_sha256, paths))
    facts = [{"bytes": _size(path), "sha256": digest} for path, digest in zip(paths, digests, strict=True)]
    return dict(zip(chosen, facts, strict=True))


def difference(recorded: Any, directory: Path) -> str | None:
    """The first file in `directory` that is not as it was recorded, in words, or None. Raises OSError."""
    if not isinstance(recorded, Mapping) or not all(isinstance(facts, Mapping) for facts in recorded.values()):
        return "the record of the files is damaged"
    for name, facts in recorded.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if _size(path) != facts.get("bytes"):
            return f"{name} has {_size(path)} bytes instead of {facts.get('bytes')}"
    found = files_in(directory, recorded)
    for name, facts in recorded.items():
        if found[name]["sha256"] != facts.get("sha256"):
            return f"{name} does not match its sha256"
    return None


def digest_of(value: Any) -> str:
    """The sha256 of plain values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size


def _sha256(path: Path) -> str:
    state = path.stat()
    if state.st_size < REMEMBERED_BYTES:
        return _read(path)
    key = ":".join(map(str, (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)))
    known = _remembered().get(key)
    if isinstance(known, list) and time.time() - known[1] < DAYS_REMEMBERED * 86_400:
        return str(known[0])
    digest = _read(path)
    entries = _remembered() | {key: [digest, time.time()]}
    newest = sorted(entries.items(), key=lambda item: item[1][1])[-MOST_REMEMBERED:]
    if (file := _memory()) is not None:
        with contextlib.suppress(OSError):
            write_json(file, dict(newest))
    return digest


def _read(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _memory() -> Path | None:
    place = cache_directory()
    return None if place is None else place / "hashes.json"


def _remembered() -> dict[str, Any]:
    file = _memory()
    try:
        found = read_json(file) if file is not None else {}
    except (OSError, ValueError):
        return {}
    whole = isinstance(found, dict) and all(
        isinstance(value, list) and len(value) == 2 and isinstance(value[1], int | float) for value in found.values()
    )
    return found if whole else {}
