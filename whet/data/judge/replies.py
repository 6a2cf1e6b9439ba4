"""Store replies that were paid for: an append-only JSONL file with one line for each, found by the prompt's hash.

Each line holds the model, the endpoint and the date of the reply, so that rows made from it can tell them too. Only
offsets in the file are held in memory (about 100 bytes a reply), and a reply is read when it is asked for. A last line
that a kill cut off is removed when the file is opened; any other line that is not ours is an error, since skipping it
would ask, and pay, again without notice. An empty file is removed when it is closed.
"""

from __future__ import annotations

import json
import os
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from whet.base.errors import UserError


@dataclass(frozen=True, slots=True)
class StoredReply:
    """A reply as it came. endpoint: the host that gave it; date: in UTC (2026-01-31T12:00:00Z); "" if unknown."""

    text: str
    endpoint: str = ""
    date: str = ""


class Replies:
    """The file of replies, to be used as a context manager. `get` and `put` may be called from several threads of one
    process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offsets: dict[bytes, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Replies:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        self._file.seek(0)
        offset = 0
        for row, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break
            self._offsets[self._read(line, row)[0]] = offset
            offset += len(line)
        self._file.truncate(offset)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        empty = self._file.seek(0, os.SEEK_END) == 0
        self._file.close()
        if empty:
            self.path.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self._offsets)

    def _read(self, line: bytes, row: int | None) -> tuple[bytes, StoredReply]:
        try:
            value = json.loads(line)
            key = bytes.fromhex(value["key"])
            said = [value["reply"], value.get("endpoint", ""), value.get("date", "")]
            if len(key) != 32 or not all(isinstance(part, str) for part in said):
                raise ValueError
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise UserError(
                "not a line of kept replies", "move the file away: the replies in it are asked for again",
                str(self.path), row, expected='{"key": …, "model": …, "reply": …}',
            ) from error  # fmt: skip
        return key, StoredReply(*said)

    def get(self, key: str) -> StoredReply | None:
        """The reply to the prompt with this hash, None when there is none yet."""
        with self._lock:
            offset = self._offsets.get(bytes.fromhex(key))
            if offset is None:
                return None
            self._file.seek(offset)
            line = self._file.readline()
        return self._read(line, None)[1]

    def put(self, key: str, model: str, endpoint: str, text: str) -> StoredReply:
        """Store a reply that came just now; it is on its way to the disk when this returns."""
        reply = StoredReply(text, endpoint, datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))
        value = {"key": key, "model": model, "endpoint": endpoint, "date": reply.date, "reply": text}
        line = json.dumps(value).encode() + b"\n"
        with self._lock:
            self._file.seek(0, os.SEEK_END)
            self._offsets[bytes.fromhex(key)] = self._file.tell()
            self._file.write(line)
            self._file.flush()
        return reply
