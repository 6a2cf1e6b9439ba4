"""Write and read a file of scores: a JSON line for each judged row, by `whet data judge`, read for `data.scores`.

A line holds file and row, the row's id, its score and the judge's reason, and the judge: rubric, model, endpoint, date
and the hash of the whole prompt. Rows are found again by the id of their content, so rows may be reordered, and a row
that was changed has no score any more. A row that the judge gave no score (`null`) stays among the rows to learn from;
a row that is not in the file is an error, since it was never judged. Training holds 9 bytes of each line in memory.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from whet.base.console import Progress, say
from whet.base.errors import UserError, shorten
from whet.data.example import Example
from whet.data.judge.endpoint import Endpoint
from whet.data.judge.judge import Rubric, ScoreCounts, Verdict, verdicts, without_low_scores
from whet.data.judge.output import json_lines, replies_beside
from whet.data.removed import Removed

WORST = 10
UNJUDGED = 0
_AGAIN = "whet data judge writes it anew, and asks nothing twice"


def judge_rows(
    examples: Sequence[Example], endpoint: Endpoint, out: Path, rubric: Rubric = "quality", least: int = 1
) -> dict[str, Any]:
    """Ask for a score of each example and write them to `out`; returns the summary that `--json` prints.

    least: rows below it are counted. Only replies are written before all of them are there. Raises UserError as
    `ask_all` does.
    """
    if not len(examples):
        raise UserError("there is no row to judge", "name data with rows to learn from", field="data.dataset")
    seen, dropped, asked = ScoreCounts(), 0, 0
    worst: list[tuple[int, int, dict[str, Any]]] = []

    def written(file: IO[str]) -> Iterator[tuple[Example, Verdict]]:
        nonlocal asked
        judged = verdicts(examples, endpoint, replies_beside(out), rubric)
        with Progress("judging rows", len(examples)) as bar:
            for number, (example, verdict) in enumerate(judged):
                line = _line(example, verdict, rubric)
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                asked += not verdict.cached
                if verdict.score is not None:
                    shown = {name: line[name] for name in ("file", "row", "score", "reason")}
                    keep = heapq.heappush if len(worst) < WORST else heapq.heappushpop
                    keep(worst, (-verdict.score, -number, shown))
                bar.advance("rows")
                yield example, verdict

    def note(_: Removed) -> None:
        nonlocal dropped
        dropped += 1

    with json_lines((out, lambda line: {"score", "rubric", "prompt_sha256"} <= set(line))) as (file,):
        for _ in without_low_scores(written(file), least, seen, note):
            pass
        if seen.unjudged == len(examples):
            raise UserError(
                "no reply is a score", "choose a model that keeps to a JSON form", field="model", found=endpoint.model
            )  # fmt: skip
    ranked = [shown for _, _, shown in sorted(worst, key=lambda one: one[:2], reverse=True)]
    return {
        "out": str(out), "rows": len(examples), "asked": asked, "rubric": rubric,
        "model": endpoint.model, "scores": seen.as_dict(), "least": least, "rows_below": dropped, "worst": ranked,
    }  # fmt: skip


def _line(example: Example, verdict: Verdict, rubric: str) -> dict[str, Any]:
    return {
        "file": example.file, "row": example.row, "id": example.id, "score": verdict.score, "reason": verdict.reason,
        "rubric": rubric, "model": verdict.model, "endpoint": verdict.endpoint, "date": verdict.date,
        "prompt_sha256": verdict.prompt_sha256,
    }  # fmt: skip


def print_judged(summary: dict[str, Any]) -> None:
    """Print the summary for people: a histogram, and the worst rows with file and row."""
    rows = summary["scores"]["rows"]
    most = max(rows.values(), default=0)
    say(f"{summary['rows']:,} rows judged by {summary['model']} for {summary['rubric']} -> {summary['out']}")
    for score in sorted(rows, reverse=True):
        bar = "█" * round(30 * rows[score] / most) if most else ""
        say(f"  {score}  {bar} {rows[score]:,}", style="dim")
    if summary["scores"]["unjudged"]:
        say(f"! {summary['scores']['unjudged']:,} rows got no score, and stay", style="yellow")
    for one in summary["worst"]:
        say(f"  {one['file']} row {one['row']}: {one['score']}, {shorten(one['reason'], 100)}")
    if summary["least"] > 1:
        say(f"below {summary['least']}: {summary['rows_below']:,} rows")
    say(f"data.scores={summary['out']} data.least_score={max(2, summary['least'])} learns without the rows below")


@dataclass(frozen=True)
class ScoreFile:
    """The scores of a file. ids: uint64 [N], ascending, no two alike; scores: int8 [N], UNJUDGED or 1 to 5."""

    path: str
    rubric: str
    model: str
    sha256: str
    ids: np.ndarray
    scores: np.ndarray

    def of(self, ids: np.ndarray) -> np.ndarray:
        """The score of each row, int8 [R]; -1 if the file has none. ids: uint64 [R]."""
        index = np.minimum(np.searchsorted(self.ids, ids), max(0, len(self.ids) - 1))
        known = self.ids[index] == ids if len(self.ids) else np.zeros(len(ids), bool)
        return np.where(known, self.scores[index] if len(self.ids) else -1, -1).astype(np.int8)


def read_scores(path: str) -> ScoreFile:
    """The scores in the file `path`. Raises UserError for the first line that is none, or a row with two scores."""
    ids, scores, digest = array("Q"), array("b"), hashlib.sha256()
    rubric, model = "", ""
    try:
        with Path(path).expanduser().open("rb") as file:
            for row, line in enumerate(file, 1):
                digest.update(line)
                number, score, said_by = _parsed(line, path, row)
                if row > 1 and said_by != (rubric, model):
                    raise UserError(
                        "the scores are of several judges or rubrics", _AGAIN, path, row, found=" by ".join(said_by),
                        expected=f"{rubric} by {model}",
                    )  # fmt: skip
                rubric, model = said_by
                ids.append(number)
                scores.append(score)
    except OSError as error:
        raise UserError(
            f"the scores cannot be read: {error.strerror or error}", "whet data judge writes such a file", path,
            field="data.scores",
        ) from error  # fmt: skip
    if not ids:
        raise UserError("the file holds no scores", _AGAIN, path, field="data.scores")
    arrays = np.array(ids, np.uint64), np.array(scores, np.int8)
    return _unique(ScoreFile(path, rubric, model, digest.hexdigest(), *arrays))


def _unique(given: ScoreFile) -> ScoreFile:
    """The scores in order of ids, each id once. Raises UserError for a row with two scores."""
    order = np.lexsort((given.scores, given.ids))
    ids, scores = given.ids[order], given.scores[order]
    again = ids[1:] == ids[:-1]
    torn = np.flatnonzero(again & (scores[1:] != scores[:-1]))
    if len(torn):
        row = int(max(order[torn[0]], order[torn[0] + 1])) + 1
        raise UserError("one row has two scores", _AGAIN, given.path, row, "score", expected="one score for each id")
    first = np.concatenate([[True], ~again])
    return ScoreFile(given.path, given.rubric, given.model, given.sha256, ids[first], scores[first])


def _parsed(line: bytes, path: str, row: int) -> tuple[int, int, tuple[str, str]]:
    try:
        value = json.loads(line)
        score = UNJUDGED if value["score"] is None else value["score"]
        said_by = (value["rubric"], value["model"])
        if not re.fullmatch("[0-9a-f]{16}", value["id"]) or type(score) is not int or not 0 <= score <= 5:
            raise ValueError
        if (score == UNJUDGED and value["score"] is not None) or not all(isinstance(part, str) for part in said_by):
            raise ValueError
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise UserError(
            "not a line of scores", _AGAIN, path, row, found=shorten(line.decode("utf-8", "replace"), 80),
            expected='{"id": 16 hex digits, "score": 1 to 5 or null, "rubric": …, "model": …}',
        ) from error  # fmt: skip
    return int(value["id"], 16), score, said_by


def below(
    ids: np.ndarray, scored: ScoreFile, least: int, examples: Sequence[Example]
) -> tuple[np.ndarray, np.ndarray, int]:
    """(rows below `least` as indices, the scores of all rows int8 [R], number of rows without a score).

    ids: uint64 [R]; examples: the rows themselves. Raises UserError where a row is not in the file.
    """
    scores = scored.of(ids)
    unknown = np.flatnonzero(scores < 0)
    if len(unknown):
        example = examples[int(unknown[0])]
        other = len(unknown) == len(ids)
        raise UserError(
            "these are the scores of other rows" if other else "a row to learn from was never judged",
            "whet data judge with the same --out asks for what is missing", example.file, example.row, "data.scores",
            f"{scored.path}: {len(unknown):,} of {len(ids):,} rows are not in it", "a line for each row",
        )  # fmt: skip
    return np.flatnonzero((scores < least) & (scores != UNJUDGED)), scores, int((scores == UNJUDGED).sum())


def removed_for(example: Example, score: int, least: int, scored: ScoreFile) -> Removed:
    """The record of a row that its score leaves out; the judge's words, which may quote the row, are not in it."""
    reason = f"score {score} of 5 is below {least} ({scored.rubric}, by {scored.model})"
    return Removed(example.file, example.row, reason, "judge")
