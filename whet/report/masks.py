"""Show rows with their loss mask: roles, learned text, and the special tokens that are hidden elsewhere.

Learned text is underlined, heavier and on a tint, and a screen reader reads it out: colour is never the only sign. A
long piece is cut in its middle, so that both its edges (where masks go wrong) and the end of the turn stay visible.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import groupby

from whet.base.language import named, phrase
from whet.report.charts import JsonObject, as_number, label_of, own_label, part, plain, text_of
from whet.report.markup import Html, objects, paragraph, safe, visible

SHOWN_ROWS = 16
FIRST_PIECES, LAST_PIECES = 80, 12
WIDE, NARROW = (700, 160), (40, 20)  # characters at the head and the tail of a piece that is cut
ROW_CHARACTERS = 4000  # after which pieces are cut narrowly
ROLES = ("system", "user", "assistant", "tool", "template", "text", "label", "answer")  # any other is the user's own


def masks(rows: Sequence[JsonObject]) -> str:
    """The rows as cards under a legend; empty when there are none. rows: {file, row, tokens, learned, pieces}."""
    cards = [_row(row) for row in rows[:SHOWN_ROWS] if objects(row, "pieces")]
    if not cards:
        return ""
    note = phrase("From the arrays that training uses. The model answers for what is marked; the rest is context.")
    return paragraph("lead", note) + f'{_key()}<div class="examples">{"".join(cards)}</div>'


def _key() -> str:
    return (
        f'<ul class="key-list" aria-hidden="true"><li><mark>{phrase("learned")}</mark></li><li>{phrase("only read")}'
        f'</li><li><span class="token">{phrase("special token")}</span></li><li><i class="newline">↵</i> '
        f"{phrase('line break')}</li></ul>"
    )


def _row(row: JsonObject) -> str:
    tokens, learned = as_number(row.get("tokens")), as_number(row.get("learned"))
    facts = phrase("{0} tokens", plain(tokens)) if tokens is not None else ""
    facts += phrase(", {0} learned", plain(learned)) if facts and learned is not None else ""
    tag = f'<span class="tag">{facts}</span>' if facts else ""
    pieces = objects(row, "pieces", limit=1_000_000)
    left_out = len(pieces) - FIRST_PIECES - LAST_PIECES
    first, last = (pieces[:FIRST_PIECES], pieces[-LAST_PIECES:]) if left_out > 0 else (pieces, [])
    known = any(piece.get("role") for piece in pieces)
    body = _turns(first, known, ROW_CHARACTERS)
    if last:
        body += f'<p class="cut">{phrase("… {0} more pieces", plain(left_out))}</p>'
        body += _turns(last, known, 0)
    head = f'<header><b class="place">{place_text(row)}</b>{tag}</header>'
    return f'<article class="card sample">{head}{body}</article>'


def place_text(item: JsonObject) -> Html:
    """The position of a row: the name of its file and its number."""
    name = text_of(item.get("file")).replace("\\", "/").rpartition("/")[2] if "file" in item else ""
    return safe(f"{name} {row_text(item['row'])}".strip() if "row" in item else name.strip(), 120)


def row_text(row: object) -> str:
    """The number of a row, or several with commas."""
    return phrase("row {0}", row)


def role_name(role: object) -> object:
    """A role as people read it."""
    return named(str(role)) if role in ROLES else role


def _turns(pieces: Sequence[JsonObject], known: bool, room: int) -> str:
    """Pieces of one role side by side, turns one below the other; `room` characters before pieces are cut narrowly."""
    body = ""
    for role, group in groupby(pieces, key=lambda piece: piece.get("role")):
        css = " between" if role == "template" else ""
        who = safe(role_name(role), 30) if role else ""
        said = ""
        for piece in group:
            text = text_of(piece.get("text")) if piece.get("text") else ""
            said += _piece(piece, text, WIDE if room > 0 else NARROW)
            room -= len(text)
        body += f'<div class="who{css}">{who}</div>' if known else ""
        body += f'<div class="said{css}" dir="auto">{said.removesuffix(_LINE_END)}</div>'
    return f'<div class="turns{"" if known else " plain"}">{body}</div>'


_LINE_END = "<wbr>\n"  # nothing but the end of a line, so that a block that ends with one has no empty line below


def _piece(piece: JsonObject, text: str, edges: tuple[int, int]) -> str:
    head, tail = edges
    if piece.get("special") is True:
        inner = f'<span class="token">{_marks(text[:200])}</span>'
    elif len(text) > head + tail:
        note = phrase(" … {0} more characters … ", plain(len(text) - head - tail))
        note = f'<span class="cut">{note}</span>'
        inner = _marks(text[:head]) + note + _marks(text[-tail:])
    else:
        inner = _marks(text)
    if piece.get("learned") is not True:
        return inner
    end = _LINE_END if inner.endswith(_LINE_END) else ""
    said = f'<span class="unseen">[{phrase("learned")}: </span>{inner.removesuffix(_LINE_END)}'
    said += '<span class="unseen">]</span>'
    return f"<mark>{said}</mark>{end}"


def _marks(text: str) -> str:
    """Escaped text whose line breaks can be seen."""
    return escape(visible(text)).replace("\n", f'<i class="newline" aria-hidden="true">↵</i>{_LINE_END}')


def roles(report: JsonObject) -> list[tuple[str, float]]:
    """Learned tokens by role, the most first."""
    by_role = part(report, "supervised_by_role")
    counts = [(own_label(role) if role in ROLES else label_of(str(role)), as_number(n)) for role, n in by_role.items()]
    return sorted(((name, value) for name, value in counts if value is not None), key=lambda pair: -pair[1])
