"""The command line: run one verb, print its answer or its error. Its words stand in `whet.arguments`.

People read stderr; with `--json` the answer is one object on stdout. Bad input ends with exit code 2 and one clear
error, Ctrl-C with 130. Nothing heavy is imported before a verb needs it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

from whet.arguments import parse_words
from whet.base.errors import UserError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb and exit: 0 done, 1 our mistake, 2 bad input, 130 interrupted."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Run one verb; returns the exit code."""
    try:
        words = parse_words(arguments)
    except UserError as error:
        return _refused(error, "--json" in arguments)
    if words.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        answer = words.call(words)
    except UserError as error:
        return _refused(error, words.json)
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        return 130
    except BrokenPipeError:
        return 0
    except Exception as error:  # the one place that may catch everything
        if words.traceback:
            raise
        problem = f"{type(error).__name__}: {error}"
        sys.stderr.write(
            f"error: whet itself failed: {problem}\n  fix:      the same command with --traceback says where\n"
        )
        return 1
    if words.json and answer is not None:
        sys.stdout.write(json.dumps(answer, ensure_ascii=False, indent=1, default=str) + "\n")
    return 0


def _refused(error: UserError, as_json: bool) -> int:
    sys.stderr.write(f"error: {error}\n")
    if as_json:
        sys.stdout.write(json.dumps({"error": error.as_dict()}, ensure_ascii=False, indent=1) + "\n")
    return 2
