"""Write the report of `whet data check` as one HTML file that needs nothing else: no network and no script.

It leads with one sentence and the few numbers that decide whether to train, then the warnings, and only then the
details. A part of the report that is absent is left out with its heading. The size does not follow the rows: of 100,000
dropped rows there are counts by reason and the first few positions. The sentence is only kind when every check that ran
found nothing. All text from data passes `markup.safe` or `masks`, which escape it. Gives up: looking at any row;
`whet data check --show` and `--json` have them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from whet.base.files import write_bytes
from whet.base.language import phrase, written
from whet.report.charts import JsonObject, as_number, own_label, part, plain, size_text, text_of
from whet.report.findings import counts_table, findings, found_faults
from whet.report.histogram import bins_of, histogram
from whet.report.markup import Html, fold, objects, pairs, paragraph, ratio, safe, score_text, table, told
from whet.report.masks import masks, place_text, roles, row_text
from whet.report.static_page import static_page

SHOWN_REASONS, SHOWN_PLACES, SHOWN_LABELS, SHOWN_FILES, SHOWN_WARNINGS = 20, 6, 40, 100, 50
FAULTS = {  # counts in the ledger that are 0 in good data
    "rows_without_target": "rows without anything to learn", "rows_without_end_of_turn": "rows without an end of turn",
    "tokens_lost": "tokens cut off", "rows_on_both_sides": "rows on both sides",
    "contradictory_rows": "contradictory rows",
}  # fmt: skip
LONG_REASON = 500  # characters
COMMAND = "data check"
_NUMBER = re.compile(r"\d[\d,]*")


def data_page(report: JsonObject, rows: Sequence[JsonObject]) -> str:
    """The whole page. report: the object of `whet data check --json`; rows: {file, row, tokens, learned, pieces} as
    `data.loss_mask.masked_rows` gives them. Any key may be absent."""
    sections = {
        "warnings": (phrase("What to look at"), _warnings(report)),
        "lengths": (phrase("Lengths"), histogram(bins_of(report), _limit(report))),
        "learned": (phrase("What is learned"), _learned(report)),
        "masks": (phrase("Rows as the model reads them"), masks(rows)),
        "dropped": (phrase("Dropped rows"), _dropped(report)),
        "quality": (phrase("Quality"), findings(part(report, "quality"))),
        "files": (phrase("Files"), _files(report)),
        "counts": (phrase("All counts"), _counts(report)),
    }
    shown = {name: both for name, both in sections.items() if both[1]}
    jump = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, (title, _) in shown.items())
    jump = f'<nav aria-label="{phrase("Parts")}"><ul class="jump">{jump}</ul></nav>' if jump else ""
    return static_page(
        _title(report), f"{_head(report)}{jump}", shown, command=COMMAND, style="data_page.css",
        eyebrow=phrase("data check"), source=phrase("Made by <code>whet data check</code>."),
    )  # fmt: skip


def write_data_page(path: Path, report: JsonObject, rows: Sequence[JsonObject]) -> Path:
    """Write the page to `path`, whole or not at all. Raises OSError where that is not possible."""
    write_bytes(path, data_page(report, rows).encode("utf-8", errors="replace"))
    return path


def _title(report: JsonObject) -> Html:
    names = [place_text({"file": item.get("path")}) for item in objects(report, "files") if item.get("path")]
    if len(names) > 1:
        return Html(phrase("{0} and {1} more", names[0], plain(len(names) - 1)))
    return names[0] if names else Html(phrase("Your data"))


def verdict(report: JsonObject) -> tuple[str, str]:
    """A tone (good, bad or none) and one sentence: if one can train on this, and the first thing to look at."""
    rows, learned, tokens = (as_number(report.get(key)) for key in ("rows_train", "supervised_tokens", "tokens"))
    if rows == 0:
        return "bad", phrase("<b>No row</b> is left to learn from.")
    if learned == 0:
        return "bad", phrase("<b>Nothing would be learned</b>: no token is a target, so the model would stay as it is.")
    text = phrase("The data can be read")
    if rows == 1:
        text = phrase("There is <b>1</b> row to learn from")
    elif rows is not None:
        text = phrase("There are <b>{0}</b> rows to learn from", plain(rows))
    share = ratio(learned, tokens)
    if share is not None and not part(report, "labels"):
        text = phrase("{0}, and <b>{1}</b> of the tokens are learned", text, score_text(share, True))
    warnings, faults = len(_texts(report)), _faults(report)
    if warnings == 1:
        return "", phrase("{0}. 1 thing deserves a look first.", text)
    if warnings:
        return "", phrase("{0}. {1} things deserve a look first.", text, plain(warnings))
    if faults:
        return "", phrase("{0}. These checks found something: {1}.", text, safe(", ".join(faults).lower(), 600))
    return "good", phrase("{0}. The checks that ran found nothing against it.", text)


def _texts(report: JsonObject) -> list[str]:
    warnings = report.get("warnings")
    return [written(text_of(item)) for item in warnings] if isinstance(warnings, list) else []


def _faults(report: JsonObject) -> list[str]:
    """Names of all faults, with and without a warning."""
    faults = [phrase(name) for key, name in FAULTS.items() if (as_number(report.get(key)) or 0) > 0]
    dropped = report.get("dropped")
    return faults + ([phrase("dropped rows")] if dropped else []) + found_faults(part(report, "quality"))


def _head(report: JsonObject) -> str:
    tone, sentence = verdict(report)
    labelled = bool(part(report, "labels"))
    dropped = report.get("dropped")
    limit = _limit(report)
    share = ratio(report.get("supervised_tokens"), report.get("tokens"))
    held_out = as_number(report.get("rows_eval"))
    most = phrase("of at most {0} tokens", plain(limit)) if limit else phrase("tokens")
    learned = phrase("{0} tokens", text_of(report.get("supervised_tokens")))
    beside = phrase("{0} held out", plain(held_out)) if held_out else ""
    facts = {
        phrase("Rows"): (text_of(report.get("rows_train")), beside),
        phrase("Tokens"): (text_of(report.get("tokens")), ""),
        phrase("Learned"): ("–" if labelled else score_text(share, True), learned),
        phrase("Longest row"): (text_of(report.get("longest_row")), most),
        phrase("Dropped"): (plain(len(dropped)) if isinstance(dropped, list) else "–", phrase("rows")),
        phrase("Warnings"): (plain(len(_texts(report))) if isinstance(report.get("warnings"), list) else "–", ""),
    }
    tiles = "".join(
        f"<div><dt>{name}</dt><dd>{safe(value)} <small>{safe(note)}</small></dd></div>"
        for name, (value, note) in facts.items()
        if value != "–"
    )
    tiles = f'<dl class="facts">{tiles}</dl>' if tiles else ""
    return f'<p class="verdict {tone}">{sentence}</p>{tiles}'


def _warnings(report: JsonObject) -> str:
    texts = _texts(report)
    items = "".join(f"<li>{safe(text, 600)}</li>" for text in texts[:SHOWN_WARNINGS])
    more = phrase("and {0} more", plain(len(texts) - SHOWN_WARNINGS))
    more = paragraph("none", more) if len(texts) > SHOWN_WARNINGS else ""
    return f'<ul class="worries">{items}</ul>{more}' if items else ""


def _limit(report: JsonObject) -> float | None:
    return as_number(report.get("max_length")) or as_number(part(report, "policy").get("max_length"))


def _learned(report: JsonObject) -> str:
    """Learned tokens by role, or the labels; and the settings that decided it."""
    body = ""
    labels = part(report, "labels")
    by_role = dict(roles(report))
    if labels:
        body += f'<div class="card">{_labels(report, labels)}</div>'
    elif by_role:
        body += f'<div class="card">{counts_table(phrase("Role"), by_role, phrase("Learned tokens"))}</div>'
    policy = {own_label(f"data.{key}"): v for key, v in part(report, "policy").items() if v is not None}
    if policy and body:
        body += fold(phrase("Settings behind it"), pairs(policy))
    return body


def _labels(report: JsonObject, labels: JsonObject) -> str:
    """Rows of each label with an example, or mean, spread and range of the values."""
    counts = {name: number for name, value in labels.items() if (number := as_number(value)) is not None}
    if report.get("task") == "regression" or not counts:
        return pairs({own_label(name): value for name, value in labels.items()})
    held_out, examples = part(report, "labels_held_out"), part(report, "label_examples")
    order = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    columns = {phrase("Label"): "key", phrase("Rows"): "num", phrase("Held out"): "num", phrase("For example"): ""}
    rows = [
        [name, plain(count), text_of(held_out.get(name)), safe(examples.get(name) or "", 160)]
        for name, count in order[:SHOWN_LABELS]
    ]
    rest = len(order) - SHOWN_LABELS
    return table(columns, rows) + (paragraph("none", phrase("and {0} more labels", plain(rest))) if rest > 0 else "")


def reasons(dropped: Sequence[object]) -> list[tuple[str, list[JsonObject]]]:
    """Dropped rows by reason, the most frequent first. Reasons that differ in numbers alone are one, with … for
    those."""
    groups: dict[str, list[JsonObject]] = {}
    numbers: dict[str, list[set[str]]] = {}
    for item in dropped:
        if not isinstance(item, dict):
            continue
        reason = text_of(item.get("reason"))[:LONG_REASON]
        form = _NUMBER.sub("\0", reason)
        groups.setdefault(form, []).append(item)
        given = _NUMBER.findall(reason)
        for seen, number in zip(numbers.setdefault(form, [set() for _ in given]), given, strict=True):
            if len(seen) < 2:
                seen.add(number)
    order = sorted(groups.items(), key=lambda pair: -len(pair[1]))
    return [(_filled(form, numbers[form]), items) for form, items in order]


def _filled(form: str, numbers: Sequence[set[str]]) -> str:
    """The form with the numbers that never changed."""
    parts = form.split("\0")
    given = [next(iter(seen)) if len(seen) == 1 else "…" for seen in numbers]
    return "".join(a + b for a, b in zip(parts, [*given, ""], strict=True))


def _places(items: Sequence[JsonObject]) -> Html:
    """The first rows, with the name of a file once for all rows of it."""
    by_file: dict[str, list[str]] = {}
    for item in items[:SHOWN_PLACES]:
        by_file.setdefault(place_text({"file": item.get("file")}), []).append(safe(str(item.get("row")), 20))
    shown = "; ".join(f"{name} {row_text(', '.join(rows))}" for name, rows in by_file.items())
    return Html(shown + (", …" if len(items) > SHOWN_PLACES else ""))


def _dropped(report: JsonObject) -> str:
    dropped = report.get("dropped")
    groups = reasons(dropped) if isinstance(dropped, list) else []
    rows = [[safe(written(reason), 200), plain(len(items)), _places(items)] for reason, items in groups[:SHOWN_REASONS]]
    rest = sum(len(items) for _, items in groups[SHOWN_REASONS:])
    body = table({phrase("Reason"): "key", phrase("Rows"): "num", phrase("Where"): "code"}, rows)
    body += paragraph("none", phrase("and {0} more rows, for other reasons", plain(rest))) if rest else ""
    return f'<div class="card">{body}</div>' if rows else ""


def _files(report: JsonObject) -> str:
    """The files that were read, with their hashes."""
    items = objects(report, "files", SHOWN_FILES)
    given = {
        phrase("Path"): ("key", lambda item: item.get("path")),
        phrase("Rows"): ("num", lambda item: text_of(item.get("rows"))),
        phrase("Size"): ("num", lambda item: size_text(item.get("bytes"))),
        "SHA-256": ("code", lambda item: item.get("sha256")),
    }
    columns = {name: of for name, of in given.items() if any(text_of(of[1](item)) != "–" for item in items)}
    rows = [[of(item) for _, of in columns.values()] for item in items]
    body = table({name: css for name, (css, _) in columns.items()}, rows)
    listed = report.get("files")
    rest = len(listed) - len(items) if isinstance(listed, list) else 0
    body += paragraph("none", phrase("and {0} more files", plain(rest))) if rest > 0 else ""
    return f'<div class="card">{body}</div>' if rows else ""


def _counts(report: JsonObject) -> str:
    """Every number of the ledger, also those that are not above."""
    items = {key: value for key, value in report.items() if isinstance(value, str | int | float) and value != ""}
    items = {own_label(key): told(value) if key == "format_reason" else value for key, value in items.items()}
    return fold(phrase("Show"), pairs(items)) if items else ""
