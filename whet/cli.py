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
from whet.base.console import complain, drop_answer, flush_answer, print_json, readable_streams
from whet.base.disk import disk_fault
from whet.base.errors import UserError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb and exit: 0 done, 1 our mistake, 2 bad input, 130 interrupted."""
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
            print_json(answer)
        flush_answer()
    except UserError as error:
        return _refused(error, words.json)
    except KeyboardInterrupt:
        complain(language.translated("\ninterrupted"))
        return 130
    except BrokenPipeError:  # who read the answer had enough of it
        drop_answer()
        return 0
    except Exception as error:  # the one place that may catch everything
        if words.traceback:
            raise
        fault = disk_fault(error)
        if fault is not None:
            return _refused(fault, words.json)
        problem = f"{type(error).__name__}: {error}"
        complain(
            language.translated(
                f"error: whet itself failed: {problem}\n  fix:      the same command with --traceback says where"
            )
        )
        return 1
    return 0


def _refused(error: UserError, as_json: bool) -> int:
    complain(language.error_text(error))
    if as_json:
        try:
            print_json({"error": error.as_dict()})
            flush_answer()
        except (OSError, UserError):  # it is said on stderr already
            drop_answer()
    return 2
