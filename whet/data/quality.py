"""Find rows that deserve a second look, among those that are learned from and those that are held out.

One pass over the examples counts personal data, odd answers and languages; repeated rows, leaks and contradictions are
found from hashes of the texts, near ones by sketches and exact edit distances (`duplicates`), which takes some
minutes for a million short rows. Nothing is changed here: that is what data.duplicates, data.leakage,
data.personal and data.blocklist are for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from whet.base.console import Progress
from whet.data.batch.store import Examples
from whet.data.detect.answers import Answers
from whet.data.detect.duplicates import Duplicates, exact_duplicates, near_duplicates, text_keys
from whet.data.detect.language import LanguageMix
from whet.data.detect.leakage import SIMILARITY, Leak, contradictions, leaks, leaks_of_first
from whet.data.detect.personal import PersonalData
from whet.data.detect.wording import Wording, words
from whet.data.example import Example
from whet.data.prepare import Prepared

SHOWN, TEXT_CHARACTERS = 10, 300
HELD_BYTES = 8 << 20  # of a side on disk; every row is looked at ten times


def quality_findings(prepared: Prepared, *, near: bool = True) -> dict[str, Any]:
    """Findings by kind, as `--json` and the HTML page show them. near: look for near duplicates and near leaks too."""
    sides = {"train": prepared.train_examples, "held out": prepared.held_out, "test": prepared.test_examples}
    sides = {name: _held(side) for name, side in sides.items() if len(side)}
    findings: dict[str, Any] = _row_by_row(sides)
    train = sides.get("train", ())
    both = Wording(train, "both")
    repeated = near_duplicates(both) if near else exact_duplicates(text_keys(both))
    findings["duplicates"] = _duplicates(repeated, train, near)
    if len(sides) > 1:
        asked = {name: Wording(side, "asked") for name, side in sides.items()}
        findings["leakage"] = [_leak(leak, sides, near) for leak in leaks(asked, SIMILARITY if near else None)]
    if prepared.benchmarks:
        findings["benchmarks"] = _benchmarks(train, prepared.benchmarks, near)
    torn = contradictions(text_keys(Wording(train, "asked")), text_keys(Wording(train, "said")))
    examples = [
        {name: _shown(train[row], with_answer=True) for name, row in zip("ab", group[:2], strict=True)}
        for group in torn.groups[:SHOWN]
    ]
    findings["contradictions"] = {"rows": len(torn.rows), "texts": torn.texts, "examples": examples}
    return findings


def _held(side: Sequence[Example]) -> Sequence[Example]:
    return side.held(HELD_BYTES) if isinstance(side, Examples) else side


def _row_by_row(sides: dict[str, Sequence[Example]]) -> dict[str, Any]:
    personal, answers, languages = PersonalData(), Answers(), LanguageMix()
    total = sum(len(side) for side in sides.values())
    with Progress("looking at rows", total, patience_seconds=2) as bar:
        for side in sides.values():
            for number, example in enumerate(side, 1):
                personal.redacted(example)
                answers.add(example)
                languages.add(words(example, "both"), example.file, example.row)
                if number % 1000 == 0:
                    bar.advance("rows", 1000)
    mix = languages.as_dict()
    return {"personal": personal.as_dict(), "answers": answers.as_dict(), "languages": mix["shares"]}


def _duplicates(repeats: Duplicates, examples: Sequence[Example], near: bool) -> dict[str, Any]:
    """Counts and the first pairs. near_rows: rows that have a near, not an equal, earlier one."""
    repeated = repeats.repeated
    pairs = [(row, int(repeats.same[row]), 1.0) for row in repeated[:SHOWN].tolist()]
    pairs += [(int(b), int(a), float(s)) for (a, b), s in zip(repeats.pairs[:SHOWN], repeats.similarity, strict=False)]
    shown = [{"similarity": round(s, 3), "a": _shown(examples[a]), "b": _shown(examples[b])} for b, a, s in pairs]
    kinds = {"exact_rows": len(repeated), "clusters": len(repeats.clusters())}
    if near:
        kinds["near_rows"] = len(np.setdiff1d(repeats.removable, repeated))
    return kinds | {"examples": shown}


def _leak(leak: Leak, sides: dict[str, Sequence[Example]], near: bool) -> dict[str, Any]:
    """Counts and examples of one leak: rows of the second side whose question the first one has (exact), or one much
    like it (near)."""
    pairs = zip(leak.pairs[:SHOWN].tolist(), leak.similarity[:SHOWN].tolist(), strict=True)
    one, other = sides[leak.into], sides[leak.of]
    shown = [{"similarity": round(s, 3), "a": _shown(one[a]), "b": _shown(other[b])} for (a, b), s in pairs]
    counts = {"exact": len(leak.same)} | ({"near": len(leak.near) - len(leak.same)} if near else {})
    return {"between": [leak.into, leak.of], "rows_to_remove": len(leak.into_near), **counts, "examples": shown}


def _benchmarks(
    train: Sequence[Example], benchmarks: Mapping[str, Sequence[Example]], near: bool
) -> list[dict[str, Any]]:
    """Counts and examples of the rows to learn from whose question stands in a benchmark, or one much like it."""
    asked = {"": Wording(train, "user")} | {name: Wording(rows, "user") for name, rows in benchmarks.items()}
    findings = []
    for leak in leaks_of_first(asked, SIMILARITY if near else None):
        shown = _leak(leak, {"": train, **benchmarks}, near)
        counts = {"exact": len(leak.into_same)} | ({"near": len(leak.into_near) - len(leak.into_same)} if near else {})
        findings.append({"between": ["train", leak.of], **counts, "examples": shown["examples"]})
    return findings


def _shown(example: Example, *, with_answer: bool = False) -> dict[str, Any]:
    text = words(example, "asked")
    shown = {"file": example.file, "row": example.row, "text": text[:TEXT_CHARACTERS]}
    return shown | ({"answer": words(example, "said")[:TEXT_CHARACTERS]} if with_answer else {})


def sentences(findings: dict[str, Any]) -> list[str]:
    """One sentence for each finding that is not empty, with the setting that acts on it."""
    said: list[tuple[int, str]] = []
    repeated = findings["duplicates"]
    said.append((repeated["exact_rows"], "rows that repeat an earlier one: {} (data.duplicates=drop)"))
    said.append((repeated.get("near_rows", 0), "near duplicates of an earlier row: {} (data.duplicates=drop_near)"))
    for leak in findings.get("leakage", ()):
        between = " and ".join(leak["between"])
        said.append((leak["exact"], f"questions that stand in {between}: {{}} (data.leakage=drop)"))
        said.append(
            (leak.get("near", 0), f"questions that are nearly the same in {between}: {{}} (data.leakage=drop_near)")
        )
    for leak in findings.get("benchmarks", ()):
        name = leak["between"][1].replace("{", "{{").replace("}", "}}")
        said.append((leak["exact"], f"rows to learn from whose question stands in {name}: {{}} (data.leakage=drop)"))
        said.append((leak.get("near", 0), f"rows to learn from with nearly a question of {name}: {{}} "
                     "(data.leakage=drop_near)"))  # fmt: skip
    said.append((findings["contradictions"]["rows"], "rows with a question that another row answers otherwise: {}"))
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in findings["personal"]["kinds"].items())
    said.append((findings["personal"]["rows"], f"rows with personal data: {{}}, of it {kinds} (data.personal=redact)"))
    said += [(count, f"answers that look odd, {kind}: {{}}") for kind, count in findings["answers"]["kinds"].items()]
    return [text.format(f"{count:,}") for count, text in said if count]
