"""What training writes while it runs: metrics.jsonl (a function of the run) and timing.jsonl (of the day)."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from whet.base.extras import require


class Recorder:
    """Appends lines to both files; `rewind` takes them back to a checkpoint, so nothing is ever logged twice."""

    def __init__(self, metrics: Path, timing: Path, followers: Sequence[str] = ()) -> None:
        self._metrics = metrics.open("a", encoding="utf-8")
        self._timing = timing.open("a", encoding="utf-8")
        self._board: Any = None
        if "tensorboard" in followers:
            require("tensorboard", "train.report_to: tensorboard")
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(metrics.parent / "tensorboard"))

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
        self._follow(values)

    def time(self, **values: Any) -> None:
        """One line of timing.jsonl."""
        self._timing.write(json.dumps(values) + "\n")
        self._timing.flush()
        self._follow(values)

    def _follow(self, values: dict[str, Any]) -> None:
        if self._board is None:
            return
        for name, value in values.items():
            if name not in ("kind", "step"):
                self._board.add_scalar(name, value, values["step"])

    def close(self) -> None:
        self._metrics.close()
        self._timing.close()
        if self._board is not None:
            self._board.close()
