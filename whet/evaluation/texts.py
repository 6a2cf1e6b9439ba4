"""What an evaluation of written answers comes to: metrics of base and tuned side by side, and every answer on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from whet.base.files import write_text
from whet.data.example import Example
from whet.evaluation.compare import paired
from whet.evaluation.metrics import Scores, exact_match


def comparison(scores: dict[str, Scores], rows: int, limit: int) -> dict[str, Any]:
    """scores: of "base" and "tuned" on the same `rows` rows; limit: longest answer in tokens."""
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
    """predictions.jsonl: every answer beside its reference; mismatches.jsonl: those that are not exact."""
    lines, wrong = [], []
    flags = exact_match(tuned, references)
    for example, reference, before, after, flag in zip(examples, references, base, tuned, flags, strict=True):
        prompt = "\n\n".join(message.content for message in example.question)
        row = {"id": example.id, "prompt": prompt, "reference": reference, "base": before, "tuned": after}
        lines.append(json.dumps(row | {"exact": bool(flag)}, ensure_ascii=False) + "\n")
        wrong += [] if flag else [lines[-1]]
    write_text(results / "predictions.jsonl", "".join(lines))
    write_text(results / "mismatches.jsonl", "".join(wrong))
