"""Find answers that would teach something unwanted: empty, cut off, repeating, refusing, or unlike all the others.

An answer is judged by the set it stands in. A missing full stop means nothing among chat lines and a lot where 98 of
100 answers end with one; so the rows are read once, a few numbers of each are stored (about 40 bytes), and the habits
of most rows are known before any row is called an exception. A habit of fewer than `CLOSE_SHARE` or `FORM_SHARE` of the
rows is no rule, and no row is reported for breaking it.
Gives up: whether an answer is true, and anything that only a reader can tell. A finding is a question to the owner of
the data, meant to be right nearly always; it is better to miss one.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from whet.data.detect.answer_signs import Signs, signs_of
from whet.data.example import Example
from whet.data.removed import Removed

Kind = Literal[
    "empty", "no_words", "too_short", "too_long", "truncated", "refusal", "repeated", "copy_of_question", "format"
]
SHOWN = 5
ENOUGH_ROWS = 50
CLOSE_SHARE = 0.98
FORM_SHARE = 0.95
MOST_FORMS = 10_000  # different ones remembered; a set with more of them has no common form
MOST_LABELS = 100


@dataclass
class _Frequencies:
    """The form of each row and how often each form occurs, by number; forms beyond the limit all have the number -1,
    which is never reported."""

    numbers: dict[str, int] = field(default_factory=dict)
    counts: Counter[int] = field(default_factory=Counter)
    rows: array[int] = field(default_factory=lambda: array("i"))

    def add(self, form: str | None) -> None:
        number = -1
        if form is not None and (form in self.numbers or len(self.numbers) < MOST_FORMS):
            number = self.numbers.setdefault(form, len(self.numbers))
            self.counts[number] += 1
        self.rows.append(number)

    def usual(self) -> tuple[int, str] | None:
        """The number and the form that at least `FORM_SHARE` of all rows have, if there is one."""
        for number, count in self.counts.most_common(1):
            if count >= FORM_SHARE * len(self.rows):
                return number, next(name for name, known in self.numbers.items() if known == number)
        return None


class Answers:
    """The answers of a set: `add` each example once, in any order, then ask for the findings."""

    def __init__(self) -> None:
        self._files: dict[str, int] = {}
        self._positions = (array("i"), array("q"))
        self._lengths = array("i")
        self._flags = array("H")
        self._forms = {name: _Frequencies() for name in ("start", "end", "label", "keys")}

    def __len__(self) -> int:
        return len(self._lengths)

    def add(self, example: Example) -> None:
        """Count one example. Raw text, rows with a label and calls of tools are no answers."""
        if not example.messages or (example.messages[-1].tool_calls and not example.answer):
            return
        question = next((m.content for m in reversed(example.question) if m.role == "user"), "")
        signs = signs_of(example.answer or "", question or "")
        self._positions[0].append(self._files.setdefault(example.file, len(self._files)))
        self._positions[1].append(example.row)
        self._lengths.append(signs.characters)
        self._flags.append(signs.flags)
        for name, form in self._forms.items():
            form.add(getattr(signs, name))

    def findings(self) -> Iterator[Removed]:
        """One record for each row that has something against it, in order of adding; the gravest reason wins."""
        files = list(self._files)
        rules = [*self._alone(), *self._lengths_apart(), *self._cut_off(), *self._form()]
        for index in range(len(self)):
            for kind, reason, applies in rules:
                if applies(index):
                    yield Removed(files[self._positions[0][index]], self._positions[1][index], reason, kind)
                    break

    def as_dict(self) -> dict[str, Any]:
        """kinds: rows of each kind; examples: the first few of each; usual: what most answers do."""
        kinds, examples = Counter[str](), list[dict[str, str | int]]()
        for odd in self.findings():
            kinds[odd.kind] += 1
            if kinds[odd.kind] <= SHOWN:
                examples.append({"file": odd.file, "row": odd.row, "kind": odd.kind, "reason": odd.reason})
        return {"answers": len(self), "kinds": dict(kinds.most_common()), "examples": examples, "usual": self.usual()}

    def usual(self) -> list[str]:
        """Sentences on what nearly all answers have in common, for people; [] where they have nothing."""
        return [reason.removeprefix("not ") for _, reason, _ in self._form()]

    def _flag(self, flag: Signs) -> Callable[[int], bool]:
        return lambda index: bool(self._flags[index] & flag)

    def _share(self, flag: Signs) -> float:
        return sum(bool(flags & flag) for flags in self._flags) / max(1, len(self))

    def _alone(self) -> list[_Rule]:
        """Rules for answers that are odd in any set, unless so many are that the set is about them."""
        rules: list[_Rule] = []
        for kind, flag, reason, limit in (
            ("empty", Signs.EMPTY, "the answer is empty", 1.0),
            ("no_words", Signs.NO_WORDS, "the answer has neither a letter nor a digit", 0.02),
            ("copy_of_question", Signs.COPY, "the answer repeats the question word for word", 0.05),
            (
                "refusal",
                Signs.REFUSAL,
                "a stock phrase: the assistant refuses, or speaks of itself as an AI model",
                0.2,
            ),
            ("repeated", Signs.REPEATED, "the same words come again and again", 0.05),
        ):
            if self._share(flag) <= limit:
                rules.append((kind, reason, self._flag(flag)))
        return rules

    def _lengths_apart(self) -> list[_Rule]:
        """Rules for lengths far outside those of nearly all answers, by a factor and not by a rank: perhaps no row has
        one."""
        if len(self) < ENOUGH_ROWS:
            return []
        ordered, last = sorted(self._lengths), len(self) - 1
        low, median, high = (ordered[round(share * last)] for share in (0.01, 0.5, 0.99))
        short, long = min(low // 4, median // 20), max(5 * high, 20 * median, 2000)
        return [
            ("too_short", f"at most {short:,} characters, where the median is {median:,} and 99 % have {low:,} or more",
             lambda index: self._lengths[index] <= short and not self._flags[index] & Signs.BRIEF),
            ("too_long", f"over {long:,} characters, where the median is {median:,} and 99 % have {high:,} or fewer",
             lambda index: self._lengths[index] > long),
        ]  # fmt: skip

    def _cut_off(self) -> list[_Rule]:
        """Rules for brackets or code fences that stay open, and for a last sentence that stops in the middle."""
        rules: list[_Rule] = [("truncated", "the answer stops in the middle", self._flag(Signs.STOPS))]
        if self._share(Signs.OPEN_FENCE) <= 0.02:
            rules.append(("truncated", "code fences do not come in pairs", self._flag(Signs.OPEN_FENCE)))
        if self._share(Signs.OPEN_BRACKET) <= 0.02:
            rules.append(("truncated", "an object or list is opened and not closed", self._flag(Signs.OPEN_BRACKET)))
        prose = sum(bool(flags & Signs.PROSE) for flags in self._flags)
        without = sum(flags & (Signs.PROSE | Signs.NO_CLOSE) == Signs.PROSE | Signs.NO_CLOSE for flags in self._flags)
        if prose >= ENOUGH_ROWS and without <= (1 - CLOSE_SHARE) * prose:
            share = f"{100 * (1 - without / prose):.1f} %"
            rules.append(("truncated", f"a long sentence without its closing sign, which {share} of the others have",
                          self._flag(Signs.NO_CLOSE)))  # fmt: skip
        return rules

    def _form(self) -> list[_Rule]:
        """Rules for answers without the form that nearly all have: JSON, its fields, a few labels, a beginning."""
        if len(self) < ENOUGH_ROWS:
            return []
        rules: list[_Rule] = []
        usual = self._forms["keys"].usual()
        json_share = 1 - self._share(Signs.NOT_JSON)
        if json_share >= FORM_SHARE:
            rules.append(("format", "not JSON, as the other answers are", self._flag(Signs.NOT_JSON)))
        if usual is not None and usual[1] != "[]":
            fields = ", ".join(json.loads(usual[1]))
            rules.append(("format", f"not an object with the fields {fields}", self._unlike("keys", usual[0])))
        labels = self._labels()
        if labels:
            known = {self._forms["label"].numbers[name] for name in labels}
            rows = self._forms["label"].rows
            names = ", ".join(labels[:5]) + (", …" if len(labels) > 5 else "")
            rules.append(("format", f"not one of the {len(labels)} answers that the others give: {names}",
                          lambda index: rows[index] not in known))  # fmt: skip
            return rules
        for name, position in (("start", "beginning"), ("end", "last line beginning")):
            usual = self._forms[name].usual()
            if usual is not None and json_share < FORM_SHARE:
                rules.append(("format", f'not {position} with "{usual[1]}"', self._unlike(name, usual[0])))
        return rules

    def _unlike(self, name: str, number: int) -> Callable[[int], bool]:
        rows = self._forms[name].rows
        return lambda index: rows[index] != number

    def _labels(self) -> list[str]:
        """The few answers that are nearly all there are, the commonest first; [] where answers are not labels."""
        form = self._forms["label"]
        names = {number: name for name, number in form.numbers.items()}
        often = max(5, len(self) // 1000)
        common = [
            (names[number], count) for number, count in form.counts.most_common(MOST_LABELS + 1) if count >= often
        ]
        rows = sum(count for _, count in common)
        few = 1 < len(common) <= min(MOST_LABELS, len(self) // 20)
        return [name for name, _ in common] if few and rows >= 0.98 * len(self) else []


_Rule = tuple[str, str, Callable[[int], bool]]
