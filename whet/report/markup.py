"""Build safe HTML: the few elements that every part of the report consists of.

All text that comes from data passes `safe` (control characters shown, not obeyed; then HTML-escaped), and long cells
are cut with a note. Markup is an `Html`, so that nothing is escaped twice and nothing is left unescaped by accident.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from whet.base.language import korean, phrase, written
from whet.base.visible import visible
from whet.report.charts import JsonObject, as_number, plain, text_of

LIST_LIMIT = 100


class Html(str):
    """A string of markup that whet wrote. `safe` passes it through and escapes everything else."""

    __slots__ = ()


def safe(value: object, limit: int = 300) -> Html:
    """`value` as safe text, never translated: cut to `limit` characters, control characters visible, HTML-escaped."""
    if isinstance(value, Html):
        return value
    text = text_of(value)
    if len(text) <= limit:
        return Html(escape(visible(text)))
    note = phrase("… {0} more characters", plain(len(text) - limit))
    return Html(f'{escape(visible(text[:limit]))} <span class="cut">{note}</span>')


def score_text(value: object, rate: bool, signed: bool = False) -> str:
    """0.912 -> 91.2 % for a rate, 0.912 otherwise; `signed` for differences, of rates in points."""
    number = number_text(value, rate, signed)
    if not rate or number == "–":
        return number
    return phrase("{0} points", number) if signed else f"{number} %"


def number_text(value: object, rate: bool, signed: bool = False) -> str:
    """The same without its unit."""
    number = as_number(value)
    if number is None:
        return "–"
    shown = round(number * 100, 1) if rate else number
    return f"{'+' if signed and shown > 0 else ''}{plain(shown)}"


def told(value: object) -> object:
    """A text that whet itself wrote into a file, as people read it; anything but a text as it is."""
    return written(value) if isinstance(value, str) else value


def capital(text: str) -> str:
    """The text as an English sentence begins; a Korean one may begin with a name from the data."""
    return text if korean() else text[:1].upper() + text[1:]


def objects(record: JsonObject, key: str, limit: int = LIST_LIMIT) -> list[JsonObject]:
    """The objects of the list at `key`, at most `limit`; none where there is no list."""
    items = record.get(key)
    return [item for item in items if isinstance(item, dict)][:limit] if isinstance(items, list) else []


def ratio(share: object, whole: object) -> float | None:
    top, bottom = as_number(share), as_number(whole)
    return top / bottom if top is not None and bottom else None


def table(columns: Mapping[str, str], rows: Sequence[Sequence[object]], chosen: int = -1) -> str:
    """columns: head -> class (key, num, code or empty). Every cell repeats its head for narrow screens."""
    head = "".join(f'<th scope="col" class="{css}">{name}</th>' for name, css in columns.items())
    body = ""
    for number, row in enumerate(rows):
        body += "<tr class=chosen>" if number == chosen else "<tr>"
        for (name, css), cell in zip(columns.items(), row, strict=True):
            body += f'<td class="{css}" data-label="{name}">{safe(cell)}</td>'
        body += "</tr>"
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def pairs(items: Mapping[str, object]) -> str:
    """Names and values, as they are given."""
    rows = "".join(f"<div><dt>{safe(key)}</dt><dd>{safe(value)}</dd></div>" for key, value in items.items())
    return f'<dl class="pairs">{rows}</dl>'


def paragraph(css: str, text: str) -> str:
    return f'<p class="{css}">{text}</p>'


def fold(title: str, body: str) -> str:
    return f"<details><summary>{title}</summary>{body}</details>"


def excerpt(value: object) -> Html:
    """Text with its line breaks, cut after 700 characters or 16 lines."""
    text = text_of(value)
    if not text:
        return Html(f'<span class="cut">{phrase("empty")}</span>')
    return safe(text, len("\n".join(text[:700].split("\n")[:16])))


def spread(rows: Sequence[JsonObject], count: int) -> list[JsonObject]:
    """`count` of the rows at even distances."""
    count = min(count, len(rows))
    return [rows[index * len(rows) // count] for index in range(count)]
