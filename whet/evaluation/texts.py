"""Written answers of base and tuned to the same prompts: asked for, scored side by side, and kept on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from whet.base.console import Progress
from whet.base.files import write_text
from whet.data.example import Example
from whet.engine.answer.session import TextSession, text_session
from whet.evaluation.compare import paired
from whet.evaluation.metrics import Scores, exact_match
from whet.opening import Answerer, open_base, tell

Write = Callable[[TextSession, Callable[[int], None]], list[str]]  # texts by a session; calls with how many are done


def base_and_tuned(answerer: Answerer, rows: int, write: Write) -> tuple[list[str], list[str]]:
    """Texts of the base and of the tuned model, each for `rows` prompts.

    One session with what was trained on and then off, or the base loaded anew where nothing can be switched off.
    """

    def texts_of(session: TextSession, title: str) -> list[str]:
        def done(count: int) -> None:
            bar.advance(title, count)
            tell(session)

        texts = write(session, done)
        tell(session)
        return texts

    with Progress("answering", 2 * rows) as bar, text_session(answerer.opened) as session:
        tuned = texts_of(session, "tuned")
        if answerer.opened.wrapped is not None:
            with session.base():
                return texts_of(session, "base"), tuned
        session.release()
        with text_session(open_base(answerer)) as base:
            return texts_of(base, "base"), tuned


def comparison(scores: dict[str, Scores], rows: int, limit: int) -> dict[str, Any]:
    """The evaluation: metrics and paired differences. scores: of "base" and "tuned" on the same `rows` rows; limit:
    longest answer in tokens."""
    base, tuned = scores["base"], scores["tuned"]
    shared = [name for name in tuned.rows if name in base.rows]
    return {
        "rows": rows,
        "decoding": f"greedy, at most {limit} new tokens",
        "base": {"metrics": base.metrics},
        "tuned": {"metrics": tuned.metrics},
        "difference": {name: asdict(paired(base.rows[name], tuned.rows[name])) for name in shared},
        "skipped": tuned.skipped,
    }


def write_answers(
    results: Path, examples: Sequence[Example], references: list[str], base: list[str], tuned: list[str]
) -> None:
    """Write predictions.jsonl, every answer beside its reference, and mismatches.jsonl, those that are not exact."""
    lines, wrong = [], []
    flags = exact_match(tuned, references)
    for example, reference, before, after, flag in zip(examples, references, base, tuned, flags, strict=True):
        prompt = "\n\n".join(message.content for message in example.question)
        row = {"id": example.id, "prompt": prompt, "reference": reference, "base": before, "tuned": after}
        lines.append(json.dumps(row | {"exact": bool(flag)}, ensure_ascii=False) + "\n")
        wrong += [] if flag else [lines[-1]]
    write_text(results / "predictions.jsonl", "".join(lines))
    write_text(results / "mismatches.jsonl", "".join(wrong))
