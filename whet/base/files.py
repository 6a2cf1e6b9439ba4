"""Write files so that they are either there whole or not at all, also after a power cut."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def sync(path: Path) -> None:
    """Flush a file or a directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a file beside `path`, flush it and rename it: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented UTF-8 JSON, as `write_text`; NaN is refused, since it is not JSON."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read the JSON value in `path`."""
    return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Give a new directory to fill, which becomes `path` only when the block ends well and replaces an older one.

    Files are flushed first, then the directory is renamed and its parent flushed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    remove_tree(beside)
    beside.mkdir()
    try:
        yield beside
        for file in sorted(beside.rglob("*")):
            sync(file)
        sync(beside)
        if path.exists():
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            remove_tree(old)
            path.rename(old)
            beside.rename(path)
            remove_tree(old)
        else:
            beside.rename(path)
        sync(path.parent)
    finally:
        remove_tree(beside)


def remove_tree(path: Path) -> None:
    """Remove a directory of ours and all in it, if it is there."""
    import shutil

    if path.exists():
        shutil.rmtree(path)
