"""A lock on a directory: one process writes in it at a time, and a dead one keeps nobody out.

The lock is the operating system's, on the file `lock.json`, so it ends with its owner however that ends, and a process
that got the number of a dead one is never taken for it. The file says who holds it: host, process, start. Where another
host left it, the system's lock says too little: over NFS without locks (`nolock`, `local_lock`), Lustre without `flock`
and file systems in user space two hosts do not see each other's. So such a file is believed, and the error says how to
remove it. Gives up: locks on Windows.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from whet.base.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FILE = "lock.json"
_mine: set[tuple[int, int]] = set()  # (device, inode) of the locks of this process, whose threads see no lock of it
_guard = threading.Lock()


class DirectoryLock:
    """The lock of one directory; a context manager that lets it go, if it was taken, at the end of the block."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / FILE
        self._handle: int | None = None
        self._key = (0, 0)

    def __enter__(self) -> DirectoryLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def take(self) -> None:
        """Hold the lock from now on. Raises UserError where another process holds it, and OSError."""
        if self._handle is not None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            with _guard:  # closing any handle of the file would let go of this process' lock on it
                if _key_of(self.path) in _mine:
                    raise self._held({"host": socket.gethostname(), "process": os.getpid(), "started": None})
                handle = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
                self._lock(handle)
                if _key_of(self.path) == (key := _key_of(handle)):
                    _mine.add(key)
                    self._handle, self._key = handle, key
                    break
                os.close(handle)  # who held it before has removed it meanwhile: another file has the name now
        try:
            self._sign()
        except BaseException:
            self._drop()
            raise

    def release(self) -> None:
        """Let the lock go, if it was taken."""
        if self._handle is not None:
            self.path.unlink(missing_ok=True)
            self._drop()

    def _drop(self) -> None:
        with _guard:
            if self._handle is not None:
                os.close(self._handle)
                _mine.discard(self._key)
                self._handle = None

    def _lock(self, handle: int) -> None:
        """Lock the file behind `handle`. Raises UserError, and closes it, where another process holds it."""
        held = False
        try:
            if fcntl is not None:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            held = True
        except OSError:  # no locks on this file system
            held = _is_running(_owner(handle))
        if held:
            owner = _owner(handle)
            os.close(handle)
            raise self._held(owner)

    def _sign(self) -> None:
        """Write who holds the lock. Raises UserError where another host has not let it go."""
        assert self._handle is not None
        owner, here = _owner(self._handle), socket.gethostname()
        if owner.get("host", here) != here:
            raise self._held(owner)
        started = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        who = {"host": here, "process": os.getpid(), "began": _began(os.getpid()), "started": started}
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, (json.dumps(who) + "\n").encode(), 0)

    def _held(self, owner: dict[str, Any]) -> UserError:
        host, here = owner.get("host"), socket.gethostname()
        who = f"process {owner.get('process', '?')} on {host or '?'}"
        since = f", since {owner['started']}" if owner.get("started") else ""
        elsewhere = host not in (None, here)
        return UserError(
            "another process is writing in this directory", file=str(self.path.parent), found=who + since,
            expected="one process at a time",
            fix=f"wait for its end; if it is no more, remove {self.path}" if elsewhere else
            "wait for its end or stop it, or give another output_dir",
        )  # fmt: skip


def _key_of(file: Path | int) -> tuple[int, int]:
    try:
        state = os.fstat(file) if isinstance(file, int) else file.stat()
    except FileNotFoundError:
        return (-1, -1)
    return state.st_dev, state.st_ino


def _owner(handle: int) -> dict[str, Any]:
    """Who holds the lock as its file says; {} where it says nothing."""
    try:
        said = json.loads(os.pread(handle, 4096, 0))
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _is_running(owner: dict[str, Any]) -> bool:
    """Whether the process that a file without a lock names still runs here, and is not a later one of its number."""
    number = owner.get("process")
    if owner.get("host") != socket.gethostname() or not isinstance(number, int) or number == os.getpid():
        return False
    began = _began(number)
    return began is not None and began == owner.get("began")


def _began(number: int) -> str | None:
    """When a process began, in the kernel's own count; None where it is no more, or the system does not say."""
    try:
        return Path(f"/proc/{number}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
