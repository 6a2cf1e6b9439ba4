"""Build the parts of a report that only a run with labels has: classes, confusions, and rows with their labels.

The table of classes leads with the lowest F1, which deserves the first look; a long one is folded away. The input comes
from `evaluation.labels`, as JSON that may be damaged.
"""

from __future__ import annotations

from collections.abc import Sequence

from whet.base.language import phrase
from whet.report.charts import JsonObject, as_number, part, plain
from whet.report.confusion import STYLE as CONFUSION_STYLE
from whet.report.confusion import confusion
from whet.report.markup import Html, excerpt, fold, objects, paragraph, safe, score_text, spread, table

STYLE = f"{CONFUSION_STYLE}.confusion {{ margin-top: 0.9rem; }}\n"
UNFOLDED = 20  # classes
MOST_CLASSES = 10_000  # read
LARGEST_TABLE = 300
SHOWN_ROWS = 12


def is_labelled(row: JsonObject) -> bool:
    """True if a row of predictions.jsonl is one with a label."""
    return "predicted" in row


def classes(evaluation: JsonObject) -> str:
    """Confusions and the table of classes; empty for an evaluation without labels."""
    labels = part(evaluation, "labels")
    rows: list[tuple[float, list[object]]] = []
    for item in objects(labels, "per_class", MOST_CLASSES):
        score = as_number(item.get("f1"))
        shares = [score_text(item.get(key), True) for key in ("precision", "recall", "f1")]
        rows.append((2.0 if score is None else score, [item.get("class"), item.get("support"), *shares]))
    if not rows:
        return ""
    rows.sort(key=lambda row: row[0])
    lowest = [row for _, row in rows[:LARGEST_TABLE]]
    columns = {phrase("Class"): "key", phrase("Rows"): "num", phrase("Precision"): "num", phrase("Recall"): "num"}
    columns |= {"F1": "num"}
    body = f'<div class="card">{table(columns, lowest)}</div>'
    title = phrase("Classes ({0}), the lowest F1 first", plain(len(rows)))
    if len(rows) > LARGEST_TABLE:
        title = phrase("Classes ({0}), the {1} with the lowest F1", plain(len(rows)), LARGEST_TABLE)
    body = f"<h3>{title}</h3>{body}" if len(rows) <= UNFOLDED else fold(title, body)
    return confusion(labels) + body


def label_samples(rows: Sequence[JsonObject]) -> str:
    """A note, and a table of rows: text, label, prediction and its probability; for values, the error."""
    if any("error" in row for row in rows):
        shown = spread(sorted(rows, key=lambda row: -(as_number(row.get("error")) or 0)), SHOWN_ROWS)
        note = phrase("{0} of {1} rows, from the largest error to the smallest.", len(shown), plain(len(rows)))
        columns = {phrase("Text"): "", phrase("Value"): "num", phrase("Predicted"): "num", phrase("Error"): "num"}
        last = "error"
    else:
        wrong, right = ([row for row in rows if (row.get("exact") is True) is exact] for exact in (False, True))
        bad = spread(wrong, max(SHOWN_ROWS // 2, SHOWN_ROWS - len(right)))
        shown = [*bad, *spread(right, SHOWN_ROWS - len(bad))]
        note = phrase(
            "{0} of {1} rows are right. Shown: {2} that are not and {3} that are, taken at even distances through the "
            "file.", plain(len(right)), plain(len(rows)), len(bad), len(shown) - len(bad),
        )  # fmt: skip
        columns = {phrase("Text"): "", phrase("Label"): "", phrase("Predicted"): "", phrase("Probability"): "num"}
        last = "probability"
    lines = [[_text(row), row.get("label"), _predicted(row), _last(row, last)] for row in shown]
    return f'{paragraph("lead", note)}<div class="card">{table(columns, lines)}</div>'


def _text(row: JsonObject) -> Html:
    second = f'<br><span class="cut">+</span> {excerpt(row["text_pair"])}' if "text_pair" in row else ""
    return Html(f'<span dir="auto">{excerpt(row.get("text"))}{second}</span>')


def _predicted(row: JsonObject) -> Html:
    if "error" in row:
        return safe(row.get("predicted"))
    tone = "good-text" if row.get("exact") is True else "bad-text"
    return Html(f'<span class="{tone}">{safe(row.get("predicted"))}</span>')


def _last(row: JsonObject, key: str) -> str:
    return score_text(row.get(key), key == "probability")
