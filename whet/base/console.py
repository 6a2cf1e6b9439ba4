"""The console: all that a person reads while a command runs, on stderr; stdout belongs to the answer.

On a terminal there is a live progress bar; elsewhere (a log file, CI) a plain line every few seconds. Whatever is
written here is made safe to show first (`base.visible`).
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from whet.base.amounts import bytes_text as bytes_text  # part of what a person reads
from whet.base.disk import disk_fault
from whet.base.errors import UserError
from whet.base.language import console_class, translated
from whet.base.visible import visible, visible_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

PLAIN_EVERY_SECONDS = 5.0
WIDE = 400  # characters of a line that goes to no terminal
_consoles: dict[tuple[bool, type[Console]], Console] = {}  # by stream and class, which the language decides


def console(*, stdout: bool = False) -> Console:
    """The rich console of stderr, or of stdout for an answer that is meant for people."""
    kind = (stdout, console_class())
    if kind not in _consoles:
        found = _console(stdout)
        if not found.is_terminal:  # a file or a pipe has no width, so nothing is cut or broken
            found = _console(stdout, width=WIDE)
        _consoles[kind] = found
    return _consoles[kind]


def _console(stdout: bool, **options: Any) -> Console:
    from rich.segment import Segment

    class SafeConsole(console_class()):  # type: ignore[misc]
        """rich's console, whose own control sequences reach the terminal and nobody else's."""

        def render(self, *args: Any, **kwargs: Any) -> Iterator[Segment]:
            for segment in super().render(*args, **kwargs):
                text = segment.text if segment.control else visible(segment.text)
                yield segment if text is segment.text else Segment(text, segment.style)

    if (sys.stdout if stdout else sys.stderr) is None:  # a program without a terminal, as pythonw
        return SafeConsole(file=io.StringIO(), highlight=False, soft_wrap=True, **options)
    return SafeConsole(stderr=not stdout, highlight=False, soft_wrap=True, **options)


def say(text: str, style: str | None = None) -> None:
    """Print one line to stderr."""
    console().print(text, style=style, markup=False)


def answer(text: str, style: str | None = None) -> None:
    """Print one line of an answer that is meant for people to stdout."""
    console(stdout=True).print(text, style=style, markup=False)


def readable_streams() -> None:
    """Let a terminal that cannot write a character get its number instead of ending the program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def write_error(text: str) -> None:
    """Write to stderr as it is, if it can be written; for what is no line of its own, as errors and prompts."""
    with contextlib.suppress(OSError):
        _write(sys.stderr, visible(text))


def write_answer(text: str) -> None:
    """Write to stdout as it is, but safe to show. Raises UserError where it cannot be written."""
    _write_out(visible(text))


def write_json(value: Any, indent: int | None = None) -> None:
    """Write a value to stdout as JSON, in characters that stdout has. Raises UserError where it cannot be written."""
    if sys.stdout is None:
        raise UserError("standard output is closed", expected="an open one for --json", fix="remove >&-")
    text = json.dumps(value, ensure_ascii=False, indent=indent, default=str)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        text = json.dumps(value, indent=indent, default=str)
    _write_out(visible_json(text) + "\n")


def _write_out(text: str) -> None:
    try:
        _write(sys.stdout, text)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _unwritten(error) from error


def _write(stream: TextIO | None, text: str) -> None:
    if stream is None:
        return
    try:
        stream.write(text)
    except UnicodeEncodeError:  # a terminal of ASCII
        encoding = stream.encoding or "ascii"
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
    stream.flush()


def flush_answer() -> None:
    """Write what waits for stdout now, while somebody can hear of it. Raises UserError where it cannot be written."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _unwritten(error) from error


def _unwritten(error: OSError) -> Exception:
    drop_answer()
    return disk_fault(error, "standard output") or error


def drop_answer() -> None:
    """Give up what still waits for stdout, which nobody reads or nothing can hold: it would be tried again at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def quiet_libraries() -> None:
    """Keep other libraries' notices and progress bars out of whet's output."""
    for name in ("transformers", "peft", "bitsandbytes", "torch.distributed", "httpx", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
    warnings.filterwarnings("ignore", message="Unsupported layer type")  # PEFT, of layers that are handed to it
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()


class Progress:
    """A progress bar with free text at its end; use as a context manager and call `advance`.

    patience_seconds: work that ends earlier shows no bar.
    """

    def __init__(self, title: str, total: int, start: int = 0, patience_seconds: float = 0.0) -> None:
        self.title, self.total, self.done, self.patience_seconds = translated(title), total, start, patience_seconds
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None
        self._last, self._first, self._from = 0.0, time.monotonic(), start
        self._width = 0

    def __enter__(self) -> Progress:
        if not self.patience_seconds:
            self._open()
        return self

    def _open(self) -> None:
        if console().is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"), TextColumn(translated("eta")), TimeRemainingColumn(),
                console=console(),
            )  # fmt: skip
            self._task = self._bar.add_task(self.title, total=self.total, completed=self.done, text="")
            self._bar.start()

    def advance(self, text: str = "", by: int = 1) -> None:
        """Move on by `by` and show `text`."""
        self.done += by
        if self.patience_seconds:
            if time.monotonic() - self._first < self.patience_seconds:
                return
            self.patience_seconds = 0.0
            self._open()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.done, text=translated(text))
            return
        now = time.monotonic()
        if now - self._last >= PLAIN_EVERY_SECONDS or self.done >= self.total:
            self._last = now
            rate = (self.done - self._from) / max(now - self._first, 1e-9)
            left = (self.total - self.done) / rate if rate > 0 else 0.0
            say(f"{self.title} {self.done}/{self.total}  {text}  eta {left:.0f} s".replace("    ", "  "))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
