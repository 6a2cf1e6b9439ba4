"""Draw rows by length as bars, with the limit that `data.max_length` sets.

Bars are SVG in a square that CSS stretches, and words are HTML beside it, as in `charts`. Counts are logarithmic when
the lowest bar would be under a hundredth of the highest, and the page says so; a bar of one row still has a height.
The limit is drawn where the rows reach near it and only named where it lies far off. The numbers follow as a table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from whet.base.language import phrase
from whet.report.charts import JsonObject, as_number, plain, ticks
from whet.report.markup import fold, objects, paragraph, table

FLAT = 100  # a bar this many times lower than the highest cannot be seen
NEAR = 1.5  # times the longest row: farther off, drawing the limit would press the rows into a stripe
MOST_BARS = 200
ONE_ROW = 0.35  # height of a bar of one row on a logarithmic axis, in powers of ten

Bin = tuple[float, float, float]


class Counts:
    """The vertical axis of a histogram. most, least: rows of the highest bar and of the lowest that is not empty."""

    def __init__(self, most: float, least: float) -> None:
        self.log = most > FLAT * least
        powers = range(math.ceil(math.log10(most)) + 1) if self.log else ()
        self.marks = [10.0**power for power in powers] or [m for m in ticks(0, most, whole=True) if m >= 0]
        self.top = math.log10(self.marks[-1]) + ONE_ROW if self.log else self.marks[-1]

    def height_of(self, rows: float) -> float:
        """The height of a bar of `rows`: 0 at the foot, 1 at the top."""
        if not self.log:
            return rows / self.top
        return (math.log10(rows) + ONE_ROW) / self.top if rows >= 1 else 0.0


def bins_of(report: JsonObject) -> list[Bin]:
    """(from, to, rows) of each bar, in order; `to` is exclusive."""
    bins: list[Bin] = []
    for item in objects(report, "lengths", MOST_BARS):
        low, high, rows = (as_number(item.get(key)) for key in ("from", "to", "rows"))
        if low is not None and high is not None and rows is not None and rows >= 0:
            bins.append((low, max(high, low + 1), rows))
    return sorted(bins)


def histogram(bins: Sequence[Bin], limit: float | None) -> str:
    """A figure and its numbers; empty when there are no rows. limit: max_length in tokens, where it is known."""
    counts = [rows for _, _, rows in bins if rows]
    if not counts:
        return ""
    axis = Counts(max(counts), min(counts))
    first, longest = min(low for low, _, _ in bins), max(high for _, high, _ in bins)
    if longest - first <= 1:
        return paragraph("lead", phrase("All {0} rows have {1} tokens.", plain(sum(counts)), plain(first)))
    edge = None if limit is None else limit + 1  # a row of exactly the limit is still on its left
    near = edge is not None and first < edge <= NEAR * longest
    last = max(longest, edge + 0.02 * (edge - first)) if near and edge else longest
    summary = phrase("{0} rows of {1} to {2} tokens", plain(sum(counts)), plain(first), plain(longest - 1))
    left, grid = _rows_axis(axis)
    drawn = "".join(_bar(one, axis, first, last) for one in bins)
    flag = ""
    if near and edge and limit:
        x = (edge - first) / (last - first)
        drawn += f'<path class="limit" d="M{1000 * x:.2f} 0V1000"/>'
        side = " before" if x > 0.5 else ""
        flag = f'<span class="flag{side}" style="left:{100 * x:.2f}%">max_length {plain(limit)}</span>'
    unit = phrase("{0}, logarithmic", phrase("rows")) if axis.log else phrase("rows")
    unit += phrase("; data.max_length is {0}", plain(limit)) if limit and not near else ""
    figure = (
        f'<figure class="chart histogram"><figcaption><h3>{phrase("Rows by length")}</h3>'
        f'<span class="unit">{unit}</span></figcaption><div class="plot">'
        f'<div class="ys" aria-hidden="true">{left}</div><div class="canvas">'
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" aria-label="{summary}">{grid}{drawn}</svg>'
        f'{flag}</div><div class="xs" aria-hidden="true">{_tokens_axis(first, last)}</div>'
        f'<div class="xname" aria-hidden="true">{phrase("tokens")}</div></div></figure>'
    )
    rows = [[f"{plain(low)}–{plain(high - 1)}" if high - 1 > low else plain(low), plain(n)] for low, high, n in bins]
    return figure + fold(phrase("The numbers"), table({phrase("Tokens"): "key", phrase("Rows"): "num"}, rows))


def _bar(one: Bin, axis: Counts, first: float, last: float) -> str:
    low, high, rows = one
    x, wide, tall = 1000 * (low - first) / (last - first), 1000 * (high - low) / (last - first), axis.height_of(rows)
    return f'<rect x="{x:.2f}" y="{1000 - 1000 * tall:.2f}" width="{0.92 * wide:.2f}" height="{1000 * tall:.2f}"/>'


def _rows_axis(axis: Counts) -> tuple[str, str]:
    """(labels, lines across); only as many labels as have room."""
    left = grid = ""
    apart = max(1, math.ceil(len(axis.marks) / 7))
    for mark in axis.marks[::apart]:
        down = 1 - axis.height_of(mark)
        left += f'<span style="top:{100 * down:.2f}%">{plain(mark)}</span>'
        grid += f'<path class="grid" d="M0 {1000 * down:.1f}H1000"/>'
    return left, grid + ('<path class="grid" d="M0 1000H1000"/>' if axis.log else "")


def _tokens_axis(first: float, last: float) -> str:
    marks = [mark for mark in ticks(first, last, 5, whole=True) if first <= mark <= last]
    if len(marks) > 1 and max(b - a for a, b in pairwise(marks)) < 1:
        marks = marks[:1]
    positions = [(mark, 100 * (mark - first) / (last - first)) for mark in marks]
    return "".join(
        f'<span{" class=end" if x > 97 else ""} style="left:{x:.2f}%">{plain(mark)}</span>' for mark, x in positions
    )
