"""Write files so that they are either there whole or not at all, also after a power cut.

A file or directory is written under a hidden name beside its own, flushed, and renamed; the directory above is flushed
last. The hidden one is locked meanwhile, so that what a killed process left behind is told from what
another one is writing, and is removed by whoever writes there next. Files get the permissions that the umask says,
whatever the library that wrote them chose.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

HIDDEN_NAME_CHARACTERS = 40  # of the name that a hidden file stands for: the whole has to fit into 255 bytes
TEMPORARY = (".tmp", ".old")


def sync(path: Path) -> None:
    """Flush a file or a directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def hidden_beside(path: Path, suffix: str = ".tmp") -> Path:
    """A hidden name beside `path` that no other process uses."""
    return path.with_name(f".{path.name[:HIDDEN_NAME_CHARACTERS]}.{os.getpid()}-{secrets.token_hex(4)}{suffix}")


@contextmanager
def whole_file(path: Path, mode: Literal["w", "wb"] = "w") -> Iterator[IO[Any]]:
    """Give a new file to fill (UTF-8 text, or bytes), which becomes `path` only when the block ends well.

    A reader sees the old file or the new one. What killed processes left behind for the same `path` is removed first.
    Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, path.name)
    beside = hidden_beside(path)
    encoding, newline = ("utf-8", "") if mode == "w" else (None, None)
    try:
        with beside.open(mode, encoding=encoding, newline=newline) as file:
            _lock(file.fileno())
            yield file
            flush(file)
        beside.replace(path)
        sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def flush(file: IO[Any]) -> None:
    """Bring what was written to an open file onto the disk. Raises OSError."""
    file.flush()
    os.fsync(file.fileno())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, as `whole_file`."""
    with whole_file(path, "wb") as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, as `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented UTF-8 JSON, as `write_bytes`; NaN is refused, since it is not JSON."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read the JSON value in `path`."""
    return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def hidden_directory(path: Path) -> Iterator[Path]:
    """A new hidden directory beside `path`, removed at the end of the block if it is still there.

    What killed processes left behind for the same `path` is removed first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, path.name)
    beside = hidden_beside(path)
    beside.mkdir()
    held = _locked(beside)
    try:
        yield beside
    finally:
        remove_tree(beside)
        if held is not None:
            os.close(held)


@contextmanager
def whole_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Give a new directory to fill, which becomes `path` only when the block ends well.

    replace: a directory that stands there is whet's own and makes way; without it only an empty one does. Files are
    flushed first, then the directory is renamed and its parent flushed. Raises OSError.
    """
    with hidden_directory(path) as beside:
        yield beside
        mode = beside.stat().st_mode & 0o666
        for file in sorted(beside.rglob("*")):
            if file.is_file():
                file.chmod(mode)  # safetensors' own are for the owner alone
            sync(file)
        sync(beside)
        if replace and path.exists():
            old = hidden_beside(path, ".old")
            path.rename(old)
            beside.rename(path)
            remove_tree(old)
        else:
            beside.rename(path)
        sync(path.parent)


def sweep(directory: Path, name: str = "") -> None:
    """Remove what killed writes left behind in `directory`: it never got its name, so nobody can miss it.

    name: only what was to become this entry; without it the caller has the directory to himself, and what cannot be
    locked goes as well. What another process is writing stays.
    """
    for path in directory.glob(".*"):
        whole, _, _ = path.stem[1:].rpartition(".")
        if path.suffix not in TEMPORARY or (name and whole != name[:HIDDEN_NAME_CHARACTERS]):
            continue
        with contextlib.suppress(BlockingIOError):
            held = _locked(path)
            if held is not None or not name:
                remove_tree(path)
            if held is not None:
                os.close(held)


def remove_tree(path: Path) -> None:
    """Remove a directory of ours and all in it, if it is there."""
    import shutil

    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_whole(path: Path) -> None:
    """Remove a file or directory of ours so that it is there whole or not at all: its name goes first, then what is in
    it, which `sweep` finds where that was broken off."""
    nameless = hidden_beside(path, ".old")
    path.rename(nameless)
    remove_tree(nameless)


def _locked(path: Path) -> int | None:
    """An open handle that locks a file or directory until it is closed; None where there are no such locks.

    Raises BlockingIOError where another process holds it.
    """
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        return None
    try:
        if _lock(handle):
            return handle
    except BlockingIOError:
        os.close(handle)
        raise
    os.close(handle)
    return None


def _lock(handle: int) -> bool:
    """Lock what is open; False where there are no such locks (NFS, Windows). BlockingIOError where it is locked."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True
