"""Find personal data in the rows, count it, and mask it or replace it by placeholders such as [EMAIL].

Digits with a check digit, keys with a known start and e-mail addresses have a shape of their own, so patterns and
arithmetic find them at a speed no model has, the same on every run. One search first tells that most texts hold none. A
number that could as well be an order number is not reported: a finding is meant to be right nearly always, so that
`redact` does not eat prices and dates.
Gives up: names and addresses of people; anything in a script whose digits are not folded here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from whet.data.detect.personal_patterns import GROUPS, NEAR, Kind, Rule
from whet.data.detect.texts import texts, with_texts
from whet.data.example import Example
from whet.data.removed import Removed

PLACEHOLDERS: Mapping[Kind, str] = {
    "secret": "[SECRET]",
    "email": "[EMAIL]",
    "iban": "[IBAN]",
    "resident_number": "[RESIDENT_NUMBER]",
    "card": "[CARD]",
    "ssn": "[SSN]",
    "business_number": "[BUSINESS_NUMBER]",
    "driving_licence": "[DRIVING_LICENCE]",
    "passport": "[PASSPORT]",
    "phone": "[PHONE]",
    "ip": "[IP]",
    "bank_account": "[BANK_ACCOUNT]",
}
SHOWN = 5
Action = Literal["report", "redact", "drop"]
# One character for one, so that an offset in the folded text is the same offset in the text.
_FOLD = str.maketrans("０１２３４５６７８９＠．：（）＋－–—‐‑‒−\u00a0\u3000", "0123456789@.:()+-------  ")


class Finding(NamedTuple):
    """A piece of personal data. kind: its kind; start, end: its span in the text, in characters."""

    kind: Kind
    start: int
    end: int


def find(text: str) -> list[Finding]:
    """Personal data in `text`, in order, none overlapping another."""
    folded = text if text.isascii() else text.translate(_FOLD)
    rules = [rule for gate, group in GROUPS if gate.search(folded) for rule in group]
    spans: list[tuple[int, int, Kind, int]] = [
        (span[0], rank, rule.kind, span[1]) for rank, rule in enumerate(rules) for span in _spans(rule, folded)
    ]
    taken: list[tuple[int, int, Kind, int]] = []
    for now in sorted(spans):
        if taken and now[0] < taken[-1][3]:
            if taken[-1][1] <= now[1]:
                continue
            taken.pop()
        taken.append(now)
    return [Finding(kind, start, end) for start, _, kind, end in taken]


def _spans(rule: Rule, text: str) -> Iterator[tuple[int, int]]:
    """The spans that `rule` finds. An earlier rule is the surer one and keeps a span that a later one claims too."""
    for match in rule.pattern.finditer(text):
        if rule.near and not rule.near.search(text[max(0, match.start() - NEAR) : match.start()]):
            continue
        span = match.span() if rule.check is None else rule.check(match)
        if span is not None:
            yield span


def redact(text: str, findings: Sequence[Finding]) -> str:
    """`text` with each finding replaced by its placeholder, such as [EMAIL]. findings: as `find` gives them."""
    parts, position = [], 0
    for kind, start, end in findings:
        parts += [text[position:start], PLACEHOLDERS[kind]]
        position = end
    return "".join([*parts, text[position:]])


def masked(text: str, finding: Finding) -> str:
    """The finding, masked for a report: its first two characters and its shape, at most 24 characters."""
    value = text[finding.start : finding.end]
    hidden = "".join("•" if character.isalnum() else character for character in value[2:24])
    return f"{value[:2]}{hidden}{'…' if len(value) > 24 else ''}"


@dataclass
class PersonalData:
    """Counts of personal data so far. kinds: findings of each kind; rows: rows that hold any; examples: the first few
    of each kind, masked."""

    rows: int = 0
    kinds: Counter[Kind] = field(default_factory=Counter)
    examples: list[dict[str, str | int]] = field(default_factory=list)

    def redacted(self, example: Example) -> Example:
        """`example` with placeholders, or itself if it holds no personal data; counts the findings. The id stays."""
        hits = [(text, findings) for text in texts(example) if (findings := find(text))]
        if not hits:
            return example
        self.rows += 1
        for text, findings in hits:
            for finding in findings:
                self.kinds[finding.kind] += 1
                if self.kinds[finding.kind] <= SHOWN:
                    position: dict[str, str | int] = {"file": example.file, "row": example.row}
                    self.examples.append({**position, "kind": finding.kind, "shown": masked(text, finding)})
        return with_texts(example, lambda text: redact(text, find(text)))

    def as_dict(self) -> dict[str, Any]:
        """Plain values for `--json` and the HTML page."""
        return {"rows": self.rows, "kinds": dict(self.kinds.most_common()), "examples": self.examples}


def without_personal_data(
    examples: Iterable[Example], action: Action, seen: PersonalData, note: Callable[[Removed], None]
) -> Iterator[Example]:
    """The examples as `action` wants them, in order: as they are, redacted, or without those that hold any.

    seen: counts the findings. note: called once for each row that was changed or dropped.
    """
    for example in examples:
        before = seen.kinds.copy()
        changed = seen.redacted(example)
        if changed is not example and action != "report":
            kinds = ", ".join(f"{count} {kind}" for kind, count in (seen.kinds - before).items())
            done = "replaced by placeholders" if action == "redact" else "the row is dropped"
            note(Removed(example.file, example.row, f"personal data ({kinds}): {done}", "personal"))
            if action == "drop":
                continue
        yield changed if action == "redact" else example
