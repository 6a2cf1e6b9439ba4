"""Run chat templates in a process of its own, which holds nothing but jinja and can be ended at any moment.

A template is a program by whoever made the model. jinja's sandbox keeps it from files and from Python's inner parts,
but neither from endless loops nor from texts of any size (`2 ** 10 ** 9`, `[0] * 10 ** 10`, a list that holds itself
twice, forty times over). Only the system can: so every run happens here, under limits of memory and processor time
(`isolated` has the limit of wall-clock time). Requests and replies are lines of JSON on standard input and output.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from whet.data.template.sandbox import compiled, template_errors, watching
from whet.data.template.traced import TOOLS, Source, spans_of, traced_value
from whet.data.template.watched import RecordedRun, Unfollowed, parts_of

REASONING = ("reasoning_content", "thinking", "reasoning")  # the names that templates know it by
MEMORY_BYTES = 2 << 30
SPARE_SECONDS = 60  # of processor time for one run, should nobody be left to end it
MOST_CHARACTERS = 10_000_000  # of a rendered text, and so many for each that its contents have
MOST_TIMES = 20

Request = dict[str, Any]


class Definition(NamedTuple):
    """A template: its source, and the variables that it may use."""

    source: str
    variables: dict[str, Any]


def run(template: Definition, request: Request) -> dict[str, Any]:
    """The reply to one request: a rendered text, perhaps with the sources of its characters, or why there is none.

    request: kind (plain, traced or watched), messages, tools (JSON text or None) and prompt.
    """
    source, variables = template
    messages, tools = request["messages"], request["tools"]
    defined = None if tools is None else json.loads(tools)
    recorded = None
    if request["kind"] == "traced":
        messages = traced_messages(messages)
        defined = None if tools is None else traced_value(defined, Source(TOOLS, "tools"), paths=False)
    elif request["kind"] == "watched":
        recorded = RecordedRun([message["content"] for message in messages])
        messages = [message | {"content": value} for message, value in zip(messages, recorded.watched(), strict=True)]
    try:
        of_source = compiled if recorded is None else watching
        text = of_source(source).render(
            messages=messages, tools=defined, documents=None, add_generation_prompt=request["prompt"], **variables
        )
    except Unfollowed:
        return {"refused": "it cannot be repeated"}
    except template_errors() as error:
        return {"refused": str(error)[:2000]}
    if recorded is not None:
        return _recorded(recorded, text)
    if len(text) > request["most"]:
        return {"limit": f"a text of {len(text):,} characters"}
    return {"text": str.__str__(text), "spans": [[*span[:2], *span.source, span.offset] for span in spans_of(text)]}


def traced_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with every text in them traced to its source."""
    return [
        {
            name: value if name == "role" else traced_value(
                value, Source(index, "reasoning" if name in REASONING else name)
            )
            for name, value in message.items()
        }
        for index, message in enumerate(messages)
    ]  # fmt: skip


def _recorded(run: RecordedRun, text: object) -> dict[str, Any]:
    if run.spoiled:
        return {"refused": "it cannot be repeated"}
    guards = [[guard.ask.__name__, guard.index, guard.asked, guard.answer] for guard in run.guards.values()]
    return {"parts": list(parts_of(text)), "guards": guards}


def serve() -> None:
    """Answer requests until standard input ends. A line is `[name, source, variables]`, which defines a template, or
    `[name, requests]`, which a line with as many replies answers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent decides
    _limit_memory()
    templates: dict[str, Definition] = {}
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    answers.write("{}\n")  # ready
    answers.flush()
    for line in sys.stdin.buffer:
        name, *rest = json.loads(line)
        if len(rest) == 2:
            templates[name] = Definition(*rest)
            continue
        _limit_time()
        answers.write(json.dumps([_answer(templates[name], request) for request in rest[0]]) + "\n")
        answers.flush()


def _answer(template: Definition, request: Request) -> dict[str, Any]:
    try:
        return run(template, request)
    except MemoryError:
        return {"limit": "more memory than there is for it"}


def _limit_memory() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # where the system has no such limit
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _limit_time() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (int(used) + SPARE_SECONDS, hard))


if __name__ == "__main__":
    serve()
