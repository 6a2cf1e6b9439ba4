"""Train in children of one process that has imported everything and computed nothing, so that forking it is safe.

Reads a JSON object a line: {"settings": [...], "until": "trained" | "ready", "die_at": N | null, "phase": FILE}.
Answers with the child's pid and, when it has ended, its exit status. The child notes in FILE what it is doing, one
byte; with die_at it kills itself with SIGKILL in front of its Nth file operation inside the run directory.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import sys
from pathlib import Path
from typing import Any

PHASES = ("start", "step", "evaluate", "save", "finish", "done")
WRITES = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree")


def note_phases(path: str) -> Any:
    """Wrap the parts of the loop so that each says when it begins; returns a function that notes a phase."""
    from whet.training import run as run_module
    from whet.training.loop import Loop

    with Path(path).open("r+b") as file:
        byte = mmap.mmap(file.fileno(), 1)

    def note(phase: str) -> None:
        byte[0] = PHASES.index(phase)

    def wrapped(method: Any, phase: str) -> Any:
        def call(*args: Any) -> Any:
            note(phase)
            result = method(*args)
            note("step")
            return result

        return call

    for name, phase in (("_step", "step"), ("_evaluate", "evaluate"), ("_save", "save")):
        setattr(Loop, name, wrapped(getattr(Loop, name), phase))
    run_module.finish = wrapped(run_module.finish, "finish")
    return note


def die_at(operation: int, directory: str) -> None:
    """SIGKILL in front of this file operation inside `directory`, counted from 1."""
    seen = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in WRITES or not any(directory in str(part) for part in args[:2]):
            return
        if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
            return
        seen += 1
        if seen == operation:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def child(order: dict[str, Any]) -> None:
    import torch

    from whet.base.console import quiet_libraries
    from whet.recipe import parse
    from whet.training.run import train
    from whet.training.setup import get_ready

    torch.set_num_threads(1)
    quiet_libraries()
    note = note_phases(order["phase"])
    parsed = parse(None, order["settings"])
    if order["die_at"] is not None:
        assert parsed.recipe.output_dir is not None
        die_at(order["die_at"], parsed.recipe.output_dir)
    if order["until"] == "ready":
        get_ready(parsed)
    else:
        train(parsed)
    note("done")


def serve() -> None:
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch  # noqa: F401

    import whet.training.run  # noqa: F401

    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            with Path(order["phase"]).with_suffix(".log").open("a") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            try:
                child(order)
                os._exit(0)
            finally:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
        print(pid, flush=True)
        sys.stdin.readline()  # "reap": until then the number stays the child's, also when it has ended
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
