"""What training writes while it runs: metrics.jsonl (a function of the run) and timing.jsonl (of the day)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Recorder:
    """Appends lines to both files; `rewind` takes them back to a checkpoint, so nothing is ever logged twice."""

    def __init__(self, metrics: Path, timing: Path) -> None:
        self._metrics = metrics.open("a", encoding="utf-8")
        self._timing = timing.open("a", encoding="utf-8")

    def rewind(self, offsets: dict[str, int]) -> None:
        """Forget everything written after the checkpoint that stored `offsets`."""
        for name, file in (("metrics", self._metrics), ("timing", self._timing)):
            file.flush()
            os.ftruncate(file.fileno(), offsets[name])

    def offsets(self) -> dict[str, int]:
        """Bytes of both files, flushed to the disk."""
        result = {}
        for name, file in (("metrics", self._metrics), ("timing", self._timing)):
            file.flush()
            os.fsync(file.fileno())
            result[name] = os.fstat(file.fileno()).st_size
        return result

    def metric(self, **values: Any) -> None:
        """One line of metrics.jsonl."""
        self._metrics.write(json.dumps(values, allow_nan=False) + "\n")
        self._metrics.flush()

    def time(self, **values: Any) -> None:
        """One line of timing.jsonl."""
        self._timing.write(json.dumps(values) + "\n")
        self._timing.flush()

    def close(self) -> None:
        self._metrics.close()
        self._timing.close()
