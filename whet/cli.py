"""The command line: run one verb, print its answer or its error. Its words stand in `whet.arguments`.

People read stderr; with `--json` the answer is one object on stdout. Bad input ends with exit code 2 and one clear
error, Ctrl-C with 130. Nothing heavy is imported before a verb needs it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from whet.arguments import parse_words
from whet.base import language
from whet.base.console import drop_answer, flush_answer, readable_streams, write_error, write_json
from whet.base.disk import disk_fault
from whet.base.errors import UserError
from whet.base.out_of_memory import memory_fault

# How long a thread of GNU OpenMP that waits tries again before it sleeps: about 0.1 ms instead of several, in which it
# holds a processor that another process could use, and that the thread it waits for may need (bench/busy.py).
WAITING = ("GOMP_SPINCOUNT", "10000")
# Memory of a GPU in segments that grow: in blocks of fixed sizes up to a tenth of a full card is lost between tensors
# (bench/memory.py: a 70B in FP8 ran out of memory with 14.6 GiB free in pieces).
GROWING = ("PYTORCH_ALLOC_CONF", "expandable_segments:True")
SAID_BY_USER = {
    WAITING: ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"), GROWING: ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb and exit: 0 done, 1 our mistake, 2 bad input, 130 interrupted."""
    for setting, same in SAID_BY_USER.items():  # read once, when torch is imported
        if not any(name in os.environ for name in same):
            os.environ[setting[0]] = setting[1]
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Run one verb; returns the exit code."""
    readable_streams()
    try:
        language.choose(arguments)
        words = parse_words(arguments)
    except UserError as error:
        return _refused(error, "--json" in arguments)
    if words.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        answer = words.call(words)
        if words.json and answer is not None:
            write_json(answer, indent=1)
        flush_answer()
    except UserError as error:
        return _refused(error, words.json)
    except KeyboardInterrupt:
        write_error(language.translated("\ninterrupted") + "\n")
        return 130
    except BrokenPipeError:  # who read the answer had enough of it
        drop_answer()
        return 0
    except Exception as error:  # the one place that may catch everything
        if words.traceback:
            raise
        fault = disk_fault(error) or memory_fault(error)
        if fault is not None:
            return _refused(fault, words.json)
        problem = f"{type(error).__name__}: {error}"
        write_error(language.translated(
            f"error: whet itself failed: {problem}\n  fix:      the same command with --traceback says where"
        ) + "\n")  # fmt: skip
        return 1
    return 0


def _refused(error: UserError, as_json: bool) -> int:
    write_error(language.error_text(error) + "\n")
    if as_json:
        try:
            write_json({"error": error.as_dict()}, indent=1)
            flush_answer()
        except (OSError, UserError):  # it is said on stderr already
            drop_answer()
    return 2
