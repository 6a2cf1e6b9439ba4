"""Ask the process that runs chat templates (`render_process`), and end it where a run takes too long or too much.

There is one for this process, started with the first run and kept; after a run that broke a limit the next one gets a
new process. A reply costs some fifty microseconds more than a call would; most rows need none, because a recorded run
stands for them (`skeleton`). Gives up: systems that start no processes.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from whet.base.errors import UserError
from whet.data.template.render_process import MOST_CHARACTERS, MOST_TIMES

SECONDS = 10.0  # for one conversation, which takes a thousandth of a second
CHARACTERS_PER_SECOND = 1_000_000  # further time for long ones
START_SECONDS = 60.0
BLOCK_RUNS, BLOCK_CHARACTERS = 64, 1_000_000  # that are asked for at once
MOST_REPLY_BYTES = 1 << 31
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from whet.data.template.render_process import serve; serve()"
)


class TemplateRefusal(Exception):
    """A conversation that the template refuses. args: its reason."""


class TemplateLimit(UserError):
    """A template that does not end, or writes or needs too much."""


class Run(NamedTuple):
    """One run of a template. kind: plain, traced or watched; tools: JSON text of their definitions, or None; prompt:
    with the header of the answer to come."""

    kind: str
    messages: Sequence[dict[str, Any]]
    tools: str | None
    prompt: bool

    @property
    def characters(self) -> int:
        return sum(len(message["content"]) for message in self.messages) + len(self.tools or "")

    def written(self) -> str:
        """The request for the other process, as JSON."""
        return json.dumps(self._asdict() | {"most": MOST_CHARACTERS + MOST_TIMES * self.characters})


class IsolatedTemplate:
    """One template with the variables that it may use, run by the other process."""

    def __init__(self, source: str, variables: dict[str, Any], seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self._definition = json.dumps([source, variables])
        self._name = hashlib.sha256(self._definition.encode()).hexdigest()[:16]
        self._ahead: dict[str, dict[str, Any]] = {}

    def ask_ahead(self, runs: Iterable[Run]) -> None:
        """Ask for several runs at once, whose replies `run` then has at hand; those before are forgotten.

        Where one of a block breaks a limit the block has no replies, and each is asked for by itself.
        """
        self._ahead.clear()
        block: list[str] = []
        size = 0
        for run in chain(runs, [None]):
            if block and (run is None or len(block) == BLOCK_RUNS or size > BLOCK_CHARACTERS):
                reply = _process().ask(self._name, self._definition, block, self.seconds)
                if isinstance(reply, list):
                    self._ahead |= zip(block, reply, strict=True)
                block, size = [], 0
            if run is not None:
                block.append(run.written())
                size += len(block[-1])

    def run(self, run: Run) -> dict[str, Any]:
        """The reply of `render_process.run`. Raises TemplateRefusal, and TemplateLimit for a run that was ended."""
        request = run.written()
        reply = self._ahead.pop(request, None)
        if reply is None:
            seconds = self.seconds + run.characters / CHARACTERS_PER_SECOND
            answer = _process().ask(self._name, self._definition, [request], seconds)
            reply = answer[0] if isinstance(answer, list) else {"limit": answer}
        if "refused" in reply:
            raise TemplateRefusal(reply["refused"])
        if "limit" in reply:
            what = reply["limit"]
            endless = what.endswith("seconds")
            raise TemplateLimit(
                "the chat template does not come to an end" if endless else "the chat template writes too much",
                field="model.chat_template", found=f"{_counted(run.messages)}, {what}",
                expected=f"a text, within {self.seconds:g} seconds", fix="use model.chat_template=chatml or alpaca",
            )  # fmt: skip
        return reply


def _counted(messages: Sequence[dict[str, Any]]) -> str:
    return f"{len(messages)} messages" if len(messages) != 1 else "one message"


class _RenderProcess:
    """The other process, and what it was told. owner: the process that started it, since a fork may not use it too."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        paths = [str(Path(__file__).parents[3]), *(path for path in sys.path if Path(path).is_absolute())]
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", _BOOT, json.dumps(paths)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, bufsize=0,
        )  # fmt: skip
        self._known: set[str] = set()
        self._rest = b""
        if not self._line(START_SECONDS):
            self.close()
            raise UserError(
                "the process that runs chat templates did not start", "check that this Python may start processes",
                field="model.chat_template", found=sys.executable,
            )  # fmt: skip

    def ask(self, name: str, definition: str, requests: Sequence[str], seconds: float) -> list[dict[str, Any]] | str:
        """The replies to requests about the template `name`; what they broke, where there are none in time."""
        lines = [f'["{name}",[{",".join(requests)}]]\n']
        if name not in self._known:
            lines.insert(0, f'["{name}",{definition[1:]}\n')
            self._known.add(name)
        line: bytes | None = None
        try:
            with contextlib.suppress(BrokenPipeError):  # it ended, as the read tells
                self._write("".join(lines).encode())
            line = self._line(seconds)
        finally:
            if not line:  # also after an interrupt: what comes later would answer another request
                self.close()
        if line:
            return json.loads(line)
        return f"{seconds:.3g} seconds" if line is None else "more memory or time than there is for it"

    def _write(self, data: bytes) -> None:
        stream = self._process.stdin
        assert stream is not None
        view = memoryview(data)
        while view:
            view = view[stream.write(view) or 0 :]

    def _line(self, seconds: float) -> bytes | None:
        """The next line of the reply, None where it did not come in time, b"" where the process ended."""
        stream, deadline = self._process.stdout, time.monotonic() + seconds
        assert stream is not None
        parts, size = [self._rest], len(self._rest)
        with selectors.DefaultSelector() as selector:
            selector.register(stream, selectors.EVENT_READ)
            while b"\n" not in parts[-1]:
                left = deadline - time.monotonic()
                if left <= 0 or size > MOST_REPLY_BYTES or not selector.select(left):
                    return None
                part = stream.read(1 << 20)
                if not part:
                    return b""
                parts.append(part)
                size += len(part)
        line, _, self._rest = b"".join(parts).partition(b"\n")
        return line

    def close(self) -> None:
        """End the process at once."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._process.kill()
        self._process.wait()
        if _current == [self]:
            _current.clear()


_current: list[_RenderProcess] = []


def _process() -> _RenderProcess:
    """The process that runs templates for this one, started where there is none."""
    if not _current or _current[0].owner != os.getpid():
        _current[:] = [_RenderProcess()]
    return _current[0]


@atexit.register
def _close() -> None:
    if _current and _current[0].owner == os.getpid():
        _current[0].close()
