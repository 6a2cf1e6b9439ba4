"""The files of a run directory as the report reads them: JSON that may be missing, damaged or hostile."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from whet.base.language import korean, phrase, written
from whet.report import charts
from whet.report.charts import JsonObject, as_number, part, plain, text_of
from whet.report.markup import Html, capital, safe

FILES = ("origins", "environment", "data", "plan", "finished", "results/evaluation", "results/merge")
MOST_EVALUATIONS = 20


@dataclass
class Evaluation:
    """Scores of one choice of rows and the answers to them. key: for links; of: "held-out rows", "rows of new.csv", as
    people read it."""

    key: str
    of: str
    scores: JsonObject = field(default_factory=dict)
    answers: list[JsonObject] = field(default_factory=list)

    @property
    def measured(self) -> bool:
        return bool(part(self.scores, "tuned", "metrics") or part(self.scores, "base", "metrics"))

    @property
    def title(self) -> str:
        return capital(self.of)

    @property
    def counted(self) -> str:
        """ " on 100 held-out rows", or "" where the number is not known."""
        rows = as_number(self.scores.get("rows"))
        if rows is None:
            return ""
        of = self.of.replace("rows", "row", 1) if rows == 1 and not korean() else self.of
        return phrase(" on {0} {1}", plain(rows), safe(of))


class RunFiles:
    """The files of a run directory. files: JSON objects by stem, empty if absent; lines: those of JSONL files by stem;
    held_out: the evaluation of the held-out rows; others: of a test and of other files; problems: sentences on
    unreadable files."""

    def __init__(self, path: Path) -> None:
        self.path, self.problems = path, list[str]()
        self.files: dict[str, JsonObject] = {Path(name).name: self._object(name) for name in FILES}
        self.lines: dict[str, list[JsonObject]] = {}
        for name in ("metrics", "timing"):
            self.lines[name] = self._records(name)
        answers = self._records("results/predictions")
        self.held_out = Evaluation("results", phrase("held-out rows"), self.files["evaluation"], answers)
        self.others = [*self._others()]

    @property
    def evaluations(self) -> list[Evaluation]:
        """All that were scored, the held-out rows first."""
        return [one for one in (self.held_out, *self.others) if one.measured]

    def _others(self) -> list[Evaluation]:
        found = []
        for file in sorted((self.path / "results").glob("*.json"))[: MOST_EVALUATIONS + 2]:
            if file.stem in ("evaluation", "merge"):
                continue
            scores = self._object(f"results/{file.stem}")
            if not part(scores, "tuned", "metrics"):
                continue
            of = scores.get("of")
            of = written(of) if isinstance(of, str) else phrase("{0} rows", file.stem)
            answers = self._records(f"results/{file.stem}.predictions")
            found.append(Evaluation(f"rows-{len(found) + 1}", of, scores, answers))
        return sorted(found, key=lambda one: one.scores.get("split") != "test")

    def _object(self, name: str) -> JsonObject:
        try:
            content = json.loads(self.text(f"{name}.json") or "{}")
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            self.problems.append(phrase("{0} is not a JSON object and was left out", f"{name}.json"))
        return content if isinstance(content, dict) else {}

    def _records(self, name: str) -> list[JsonObject]:
        records, unreadable = charts.read_records(self.path / f"{name}.jsonl")
        if unreadable:
            self.problems.append(phrase("{0}: {1} unreadable line(s) left out", f"{name}.jsonl", plain(unreadable)))
        return records

    def text(self, name: str) -> str:
        path = self.path / name
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    def setting(self, path: str) -> str:
        """The value of a setting as text, "" where it is not known."""
        value = part(self.files["origins"], path).get("value")
        return "" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else text_of(value)

    def todo(self, text: str, verb: str, recipe: bool = True, rest: str = "") -> Html:
        """A sentence on a step that has not been done yet, with the command that does it."""
        target = shlex.quote(str(self.path / "recipe.yaml" if recipe else self.path))
        return Html(f"{text} <code>{safe(f'whet {verb} {target}{rest}', 600)}</code>")
