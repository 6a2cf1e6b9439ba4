"""Draw the classes that a model confuses: a matrix for up to 20 classes, beyond that the most frequent confusions.

The matrix is a grid of HTML cells with table roles and not an SVG: counts stay text that keeps its size and can be
selected, and the theme's colours follow by themselves. Shade is the share of the row, so that a rare class shows as
plainly as a common one; it ends at 45 % of the colour, where text on it still has a contrast of over 4.5 in both
themes. Columns are headed by numbers, which the rows repeat beside the names: twenty slanted names are hard to read.
On a narrow screen the grid scrolls sideways under its names. Gives up: ordering classes by likeness.

The input comes from `evaluation.label_metrics`, as JSON that may be damaged; nothing is drawn from a value that is not
a square of counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from whet.base.language import phrase
from whet.report.charts import JsonObject, as_number, plain
from whet.report.markup import objects, safe, score_text, table, visible

LARGEST_DRAWN = 20  # classes
LISTED = 20  # confusions
MOST_ON_A_PHONE = 4  # columns that need no scrolling
STRONGEST = 45  # % of the colour in a cell that holds its whole row

STYLE = """
.confusion .scroll { overflow-x: auto; }
.confusion .cells { display: grid; gap: 2px; width: max-content; min-width: min(100%, 40rem);
  font-size: 0.84rem; line-height: 1.3; }
.confusion [role="row"] { display: contents; }
.confusion .cells span { padding: 0.4rem 0.2rem; text-align: center; min-width: 1.9rem; border-radius: 3px; }
.confusion .cells .name { position: sticky; left: 0; max-width: 14rem; padding-left: 0; text-align: left;
  background: var(--card); overflow: hidden; text-overflow: ellipsis; white-space: nowrap; border-radius: 0; }
.confusion .cells .head { color: var(--soft); }
.confusion .cells .right { background: color-mix(in srgb, var(--accent) var(--share), var(--wash)); }
.confusion .cells .wrong { background: color-mix(in srgb, var(--bad) var(--share), var(--wash)); }
.confusion .cells .none { color: transparent; }
.confusion .swipe { display: none; color: var(--soft); font-size: 0.84rem; margin-bottom: 0.4rem; }
@media (max-width: 44rem) { .confusion .swipe { display: block; } .confusion .cells .name { max-width: 9rem; } }
"""  # belongs behind page.css


def confusion(labels: JsonObject) -> str:
    """An HTML figure from {"names", "confusion", "most_confused"}; empty if nothing in them can be drawn.

    With over 20 classes, or without a matrix, the table of the most frequent confusions.
    """
    names = labels.get("names")
    names = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    counts = _square(labels.get("confusion"), len(names))
    if counts and len(counts) <= LARGEST_DRAWN:
        return _figure(phrase("rows: reference; columns: answer of the tuned model"), _matrix(names, counts))
    return _table(labels, counts)


def _square(value: object, size: int) -> list[list[int]]:
    """`value` if it is size x size numbers of rows, at least one of them above 0; otherwise an empty list."""
    lines = [line for line in value if isinstance(line, list)] if isinstance(value, list) else []
    numbers = [[as_number(cell) for cell in line] for line in lines]
    counts = [[int(cell) for cell in line if cell is not None and cell >= 0 and cell.is_integer()] for line in numbers]
    whole = len(counts) == size and all(
        len(line) == len(given) == size for line, given in zip(counts, lines, strict=True)
    )
    return counts if whole and any(map(any, counts)) else []


def _figure(note: str, body: str) -> str:
    return (
        f'<figure class="chart confusion"><figcaption><h3>{phrase("Confusions")}</h3>'
        f'<span class="unit">{safe(note)}</span></figcaption>{body}</figure>'
    )


def _matrix(names: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """The grid: a number and name per row, a cell per answer, and at the end the share of the row that is right."""
    numbers = "".join(
        f'<span role="columnheader" class="head" title="{_attribute(name)}">{column}</span>'
        for column, name in enumerate(names, 1)
    )
    lines = f'<span role="columnheader" class="name head">{phrase("Reference")}</span>{numbers}'
    lines = f'<div role="row">{lines}<span role="columnheader" class="head">{phrase("Right")}</span></div>'
    for index, (name, line) in enumerate(zip(names, counts, strict=True)):
        cells = "".join(_cell(count, sum(line), column == index) for column, count in enumerate(line))
        label = f'<span role="rowheader" class="name" title="{_attribute(name)}">{index + 1} · {safe(name, 60)}</span>'
        recall = score_text(line[index] / sum(line), True) if sum(line) else "–"
        lines += f'<div role="row">{label}{cells}<span role="cell" class="head">{recall}</span></div>'
    total, right = sum(map(sum, counts)), sum(line[index] for index, line in enumerate(counts))
    summary = phrase("Confusions: {0} of {1} right", plain(right), plain(total))
    columns = f"grid-template-columns: auto repeat({len(names)}, minmax(1.9rem, 1fr)) auto"
    grid = f'<div class="cells" role="table" aria-label="{_attribute(summary)}" style="{columns}">{lines}</div>'
    swipe = phrase("→ scrolls sideways: {0} columns", len(names))
    hint = f'<p class="swipe">{swipe}</p>' if len(names) > MOST_ON_A_PHONE else ""
    return f'{hint}<div class="scroll" tabindex="0">{grid}</div>'


def _attribute(text: str) -> str:
    """Text for an HTML attribute; `safe` marks a cut with a tag, which would end the attribute."""
    return escape(visible(text[:300]))


def _cell(count: int, rows: int, is_right: bool) -> str:
    if not count:
        return '<span role="cell" class="none">0</span>'
    share = f"--share:{STRONGEST * count / rows:.1f}%"
    return f'<span role="cell" class="{"right" if is_right else "wrong"}" style="{share}">{plain(count)}</span>'


def _table(labels: JsonObject, counts: Sequence[Sequence[int]]) -> str:
    """The most frequent confusions first, each with its share of the reference's rows, if the matrix gives it."""
    names = labels.get("names")
    rows_of = {name: sum(line) for name, line in zip(names if isinstance(names, list) else [], counts, strict=False)}
    rows: list[list[object]] = []
    for item in objects(labels, "most_confused")[:LISTED]:
        reference, rows_wrong = item.get("reference"), as_number(item.get("rows"))
        if not isinstance(reference, str) or not rows_wrong:
            continue
        of = rows_of.get(reference, 0)
        rows.append(
            [reference, item.get("predicted"), plain(rows_wrong), score_text(rows_wrong / of, True) if of else "–"]
        )
    if not rows:
        return ""
    columns = {phrase("Reference"): "key", phrase("Taken for"): "", phrase("Rows"): "num"}
    columns |= {phrase("Of the reference's rows"): "num"}
    return _figure(phrase("the {0} most frequent", len(rows)), table(columns, rows))
