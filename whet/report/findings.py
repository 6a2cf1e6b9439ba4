"""Show the findings of the quality checks in one form: counts as bars, pairs of rows side by side, examples.

Nothing here knows a check by name, except for the sentence in front of duplicates and leakage, so a new check shows up
by itself and none is left out for being new. In a pair, the difference of the two texts is underlined: all between
their common beginning and end, which for one changed word is that word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest

from whet.base.language import named, phrase
from whet.report.charts import JsonObject, as_number, label_of, own_label, part, plain, text_of
from whet.report.markup import Html, objects, pairs, paragraph, safe, score_text, table, told
from whet.report.masks import place_text

SHOWN_EXAMPLES, SHOWN_COUNTS, SHOWN_COLUMNS = 8, 30, 5
TEXT_CHARACTERS, LONGEST_COMPARED, HEADING_CHARACTERS = 400, 20_000, 60
NAMES = {
    "duplicates": "Duplicates", "leakage": "Leakage", "contradictions": "Contradictions", "personal": "Personal data",
    "answers": "Answers", "languages": "Languages", "blocklist": "Block list",
    "benchmarks": "Benchmarks",
}  # fmt: skip
NOTES = {
    "duplicates": "Each repeat gives a text more weight and teaches nothing new.",
    "leakage": "Rows that are also in the held-out data make its results look better than they are.",
    "benchmarks": "Rows that are also in a benchmark make its score worth nothing.",
    "contradictions": "The same question with different answers: the model can be right on one of them only.",
    "personal": "A model can repeat what it has read.",
}
SIDES = {"train", "held out", "test"}  # of the rows; others are benchmarks, which have names of the user's
OWN_FIELDS = {"kind", "reason"}  # of an example: texts of whet; every other field stands as it is
FACTS = {"languages"}  # says what the data are, and finds no fault
NOT_FAULTS = {"similarity", "threshold", "checked", "rows_checked", "seconds"}  # numbers that count no bad row


def found_faults(quality: JsonObject) -> list[str]:
    """Names of the checks that found at least one row."""
    return [_name(key) for key, value in quality.items() if key not in FACTS and _total(value) > 0]


def findings(quality: JsonObject) -> str:
    """A section for each check that found something, and one line with those that found nothing."""
    body, clean = "", []
    for key, value in quality.items():
        if not (isinstance(value, dict | list) and value):
            continue
        if key not in FACTS and _total(value) == 0:
            clean.append(_name(key))
            continue
        note = paragraph("lead", phrase(NOTES[key])) if key in NOTES else ""
        body += f'<h3 id="{_anchor(key)}">{safe(_name(key))}</h3>{note}{_cards(key, value)}'
    if clean:
        body += paragraph("none", phrase("Looked for and not found: {0}.", safe(", ".join(clean).lower(), 600)))
    return body


def _name(key: str) -> str:
    return phrase(NAMES[key]) if key in NAMES else label_of(str(key))


def _anchor(key: object) -> str:
    return "".join(letter for letter in str(key) if letter.isascii() and letter.isalnum())


def _total(value: object) -> float:
    """All counts in a finding together; examples count when no number is given."""
    if isinstance(value, list):
        return sum(map(_total, value))
    if not isinstance(value, dict):
        return 0.0
    numbers = [as_number(item) or 0.0 for key, item in value.items() if key not in NOT_FAULTS]
    inner = [_total(item) for item in value.values() if isinstance(item, dict)]
    examples = value.get("examples")
    return sum(numbers) + sum(inner) + (len(examples) if isinstance(examples, list) else 0)


def _cards(key: str, value: object) -> str:
    if isinstance(value, list):
        items = [item for item in value if isinstance(item, dict)]
        return "".join(f'<div class="card">{_card(key, item)}</div>' for item in items[:SHOWN_COUNTS])
    return f'<div class="card">{_card(key, value)}</div>' if isinstance(value, dict) else ""


def _card(key: str, finding: JsonObject) -> str:
    """One finding: its sides, its numbers, its counts by kind, its examples."""
    between = finding.get("between")
    body = ""
    if isinstance(between, list) and len(between) == 2:
        sides = (safe(named(one) if one in SIDES else one, 100) for one in map(str, between))
        body += f"<h3>{phrase('Between {0} and {1}', *sides)}</h3>"
    counts = {name: number for name, value in finding.items() if (number := as_number(value)) is not None}
    if key in FACTS:
        return body + shares_table(phrase("Language"), counts)
    body += pairs({own_label(name): plain(number) for name, number in counts.items()}) if counts else ""
    for name, value in finding.items():
        inner = part(finding, name)
        numbers = {kind: number for kind, item in inner.items() if (number := as_number(item)) is not None}
        if numbers:
            body += counts_table(singular(name), {named(str(kind)): number for kind, number in numbers.items()})
        elif isinstance(value, str):
            body += paragraph("lead", f"{safe(own_label(name))}: {safe(value)}")
    return body + _examples(objects(finding, "examples", SHOWN_EXAMPLES))


def singular(name: str) -> str:
    """kinds -> Kind: the head of a column from the name of a collection."""
    return own_label(str(name).removesuffix("s"))


def heading(text: str) -> Html:
    """A head for `table`, which repeats it in an attribute, where no markup may stand."""
    return safe(text[:HEADING_CHARACTERS])


def counts_table(title: str, counts: Mapping[str, float], unit: str = "") -> str:
    """A table of name, bar, count and share of each, the largest first; those that do not fit are counted.

    unit: the heading of the counts; "" for rows.
    """
    whole, most = sum(counts.values()), max([*counts.values(), 1e-300])
    order = sorted(counts.items(), key=lambda pair: (-pair[1], str(pair[0])))
    rows = [
        [str(name), bar(value / most), plain(value), score_text(value / whole if whole else 0, True)]
        for name, value in order[:SHOWN_COUNTS]
    ]
    more = phrase("and {0} more", plain(len(order) - SHOWN_COUNTS))
    rest = f'<p class="none">{more}</p>' if len(order) > SHOWN_COUNTS else ""
    columns = {heading(title): "key", "": "", heading(unit or phrase("Rows")): "num", phrase("Share"): "num"}
    return f'<div class="counts">{table(columns, rows)}{rest}</div>'


def shares_table(title: str, shares: Mapping[str, float]) -> str:
    """A table of name, bar and share of each, the largest first."""
    order = sorted(shares.items(), key=lambda pair: (-pair[1], str(pair[0])))[:SHOWN_COUNTS]
    rows = [[str(name), bar(value), score_text(value, True)] for name, value in order]
    return f'<div class="counts">{table({heading(title): "key", "": "", phrase("Share"): "num"}, rows)}</div>'


def bar(share: float) -> Html:
    return Html(
        f'<span class="bar" aria-hidden="true"><i style="width:{100 * min(1.0, max(0.0, share)):.1f}%"></i></span>'
    )


def _examples(items: Sequence[JsonObject]) -> str:
    twins = [item for item in items if isinstance(item.get("a"), dict) and isinstance(item.get("b"), dict)]
    others = [item for item in items if item not in twins]
    return "".join(map(_twins, twins)) + (_plain_examples(others) if others else "")


def _twins(item: JsonObject) -> str:
    """Two rows side by side, with what differs underlined."""
    first, second = part(item, "a"), part(item, "b")
    texts = [text_of(side.get("text"))[:LONGEST_COMPARED] for side in (first, second)]
    same = texts[0] == texts[1]
    shown = (_clip(texts[0]), f'<span class="cut">{phrase("the same text")}</span>') if same else differing(*texts)
    body = "".join(
        f'<div><h4 class="place">{place_text(side)}{_rest(side)}</h4><p dir="auto">{text}</p></div>'
        for side, text in zip((first, second), shown, strict=True)
    )
    likeness = None if same else as_number(item.get("similarity"))
    alike = phrase("{0} alike", score_text(likeness, True))
    note = f'<p class="same">{alike}</p>' if likeness is not None else ""
    return f'<div class="twins">{body}{note}</div>'


def _rest(side: JsonObject) -> str:
    """All other fields of a side, such as a label or an answer."""
    more = [f"{named(name)} {value}" for name, value in side.items() if name not in ("file", "row", "text")]
    return f" · {safe(', '.join(more), 120)}" if more else ""


def differing(first: str, second: str) -> tuple[str, str]:
    """Both texts as HTML, underlined between their common beginning and their common end."""
    head = _common(first, second)
    tail = _common(first[head:][::-1], second[head:][::-1])
    start = max(0, head - TEXT_CHARACTERS // 2)
    shown = []
    for text in (first, second):
        end = len(text) - tail
        stop = min(len(text), end + TEXT_CHARACTERS // 2)
        middle = _clip(text[head:end])
        before, after = safe(text[start:head], TEXT_CHARACTERS), safe(text[end:stop], TEXT_CHARACTERS)
        shown.append(f"{'…' * (start > 0)}{before}<u>{middle}</u>{after}{'…' * (stop < len(text))}")
    return shown[0], shown[1]


def _common(first: str, second: str) -> int:
    """Characters in which two texts begin alike."""
    return next((n for n, (a, b) in enumerate(zip_longest(first, second)) if a != b), len(first))


def _clip(text: str) -> Html:
    return safe(text, TEXT_CHARACTERS)


def _plain_examples(items: Sequence[JsonObject]) -> str:
    """Examples as a table: file and row, and the fields of each."""
    names = list(dict.fromkeys(name for item in items for name in item if name not in ("file", "row")))
    placed = any("file" in item or "row" in item for item in items)
    columns = {phrase("Row"): "code"} if placed else {}
    columns |= {heading(own_label(str(name))): "" for name in names[:SHOWN_COLUMNS]}
    rows = []
    for item in items:
        cells: list[object] = [place_text(item)] if placed else []
        rows.append(
            cells
            + [
                _clip_cell(told(item.get(name)) if name in OWN_FIELDS else item.get(name))
                for name in names[:SHOWN_COLUMNS]
            ]
        )
    return table(columns, [row[: len(columns)] for row in rows])


def _clip_cell(value: object) -> Html:
    return safe(value if value is not None else "", TEXT_CHARACTERS)
