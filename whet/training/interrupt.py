"""Ctrl-C while a run trains: the first one asks for a stop after the running step, a second one is Python's own."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from whet.base.console import say


class CtrlC:
    """While it is entered, the first Ctrl-C calls `asked`; only the main thread can be asked."""

    def __init__(self, asked: Callable[[], None]) -> None:
        self.asked = asked
        self.before: Any = None

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGINT, self._heard)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        self.asked()
        signal.signal(signal.SIGINT, self.before)
        say("stopping after this step; Ctrl-C again stops at once", style="yellow")

    def __exit__(self, *error: object) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)
