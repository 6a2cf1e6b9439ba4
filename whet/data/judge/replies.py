"""Replies that were paid for, kept: an append-only JSONL file with one line for each, found by the prompt's hash.

Only places in the file are held in memory (about 100 bytes a reply), and a reply is read when it is asked for. A last
line that a kill cut off is taken away when the file is opened; any other line that is not ours is an error, since
skipping it would ask, and pay, again without a word.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from types import TracebackType

from whet.base.errors import UserError


class Replies:
    """Use as a context manager. `get` and `put` may be called from several threads, by one process at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[bytes, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Replies:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        self._file.seek(0)
        place = 0
        for row, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break
            self._places[bytes.fromhex(self._read(line, row)[0])] = place
            place += len(line)
        self._file.truncate(place)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._places)

    def _read(self, line: bytes, row: int | None) -> tuple[str, str]:
        try:
            value = json.loads(line)
            key, text = value["key"], value["reply"]
            if not isinstance(text, str) or len(bytes.fromhex(key)) != 32:
                raise ValueError
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise UserError(
                "not a line of kept replies", "move the file away: the replies in it are asked for again",
                str(self.path), row, expected='{"key": …, "model": …, "reply": …}',
            ) from error  # fmt: skip
        return key, text

    def get(self, key: str) -> str | None:
        """The text of the reply to the prompt with this hash, None when there is none yet."""
        with self._lock:
            place = self._places.get(bytes.fromhex(key))
            if place is None:
                return None
            self._file.seek(place)
            line = self._file.readline()
        return self._read(line, None)[1]

    def put(self, key: str, model: str, reply: str) -> None:
        """Keep a reply; it is on its way to the disk when this returns."""
        line = json.dumps({"key": key, "model": model, "reply": reply}).encode() + b"\n"
        with self._lock:
            self._file.seek(0, os.SEEK_END)
            self._places[bytes.fromhex(key)] = self._file.tell()
            self._file.write(line)
            self._file.flush()
