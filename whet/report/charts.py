"""Draw curves of a run from `metrics.jsonl` and `timing.jsonl`, as inline SVG for the HTML page.

The SVG holds lines only, drawn in a square of 1000 x 1000 that CSS stretches to any width; strokes do not stretch
(`vector-effect`) and all words are HTML beside it, so text keeps its size on a phone and colours follow the theme.
Long curves are thinned to their extremes per bucket, never averaged: a spike of one step stays visible. Values that
are missing or not finite leave a gap and are counted under the chart. Gives up: zooming.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from statistics import median

from whet.base.language import named, phrase

Point = tuple[float, float | None]  # a step and its value; None where there is nothing finite to draw
JsonObject = dict[str, object]

POINT_LIMIT = 1000
WIDE = 10  # highest value over the median
_LARGEST_DRAWN = 1e100  # beyond it, differences overflow a double
_ACRONYMS = {"f1": "F1", "json": "JSON", "kl": "KL", "mae": "MAE", "mcc": "MCC", "mse": "MSE", "r2": "R²"}
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def read_records(path: Path) -> tuple[list[JsonObject], int]:
    """The JSON objects of a .jsonl file and the number of lines that are none (a killed run leaves half a line)."""
    if not path.is_file():
        return [], 0
    records: list[JsonObject] = []
    unreadable = 0
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict):
                records.append(record)
            else:
                unreadable += 1
    return records, unreadable


def as_number(value: object) -> float | None:
    """`value` as a finite float, or None for anything else (text, booleans, NaN, infinite values)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) <= _LARGEST_DRAWN else None  # NaN compares false


def part(record: JsonObject, *keys: str) -> JsonObject:
    """The object at record[key][key]..., or {} where there is none."""
    for key in keys:
        inner = record.get(key)
        record = inner if isinstance(inner, dict) else {}
    return record


def points_of(records: Iterable[JsonObject], field: str, kind: str | None = None) -> list[Point]:
    """`field` by step, in order of steps. A step written twice (the run was resumed before it) counts once, the last.

    Empty when no record has the field, so that a chart is left out rather than drawn empty.
    """
    by_step: dict[float, float | None] = {}
    seen = False
    for record in records:
        step = as_number(record.get("step"))
        if step is None or (kind is not None and record.get("kind") != kind):
            continue
        seen = seen or field in record
        by_step[step] = as_number(record.get(field))
    return sorted(by_step.items(), key=lambda item: item[0]) if seen else []


def thin(points: Sequence[Point], limit: int = POINT_LIMIT) -> list[Point]:
    """At most `limit` points: first, last, and the lowest and highest of each bucket between. `limit` >= 4."""
    if len(points) <= limit:
        return list(points)
    inner, buckets = points[1:-1], (limit - 2) // 2
    thinned = [points[0]]
    for index in range(buckets):
        bucket = inner[index * len(inner) // buckets : (index + 1) * len(inner) // buckets]
        finite = [(value, position) for position, (_, value) in enumerate(bucket) if value is not None]
        if not finite:
            thinned.append((bucket[0][0], None))
            continue
        thinned += [bucket[position] for position in sorted({min(finite)[1], max(finite)[1]})]
    return [*thinned, points[-1]]


def smooth(points: Sequence[Point]) -> tuple[list[Point], int]:
    """Centred mean over a fortieth of the curve on either side, and its width in points (1: nothing was smoothed).

    Centred, so it does not lag as an exponential mean does; shorter at the start, where the loss falls fastest, and
    one-sided at the end. Gaps stay gaps.
    """
    half = len(points) // 40
    if half == 0:
        return list(points), 1
    sums, counts = [0.0], [0]
    for _, value in points:
        sums.append(sums[-1] + (value or 0.0))
        counts.append(counts[-1] + (value is not None))
    result: list[Point] = []
    for index, (step, value) in enumerate(points):
        reach = min(half, index)
        low, high = index - reach, min(index + reach + 1, len(points))
        mean = (sums[high] - sums[low]) / max(1, counts[high] - counts[low])
        result.append((step, None if value is None else mean))
    return result, 2 * half + 1


def ticks(low: float, high: float, count: int = 4, whole: bool = False) -> list[float]:
    """About `count` round numbers (1, 2, 2.5 or 5 times a power of ten) from at or below `low` to at or above `high`.

    whole: only whole numbers, for steps.
    """
    if not high > low:
        room = abs(low) * 0.1 or 1.0
        low, high = (low, low) if whole else (low - room, high + room)
    if high == low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * nice for nice in (1, 2, 2.5, 5, 10) if power * nice >= rough * 0.999)
    if whole:
        step = max(1.0, float(round(step)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12 - math.floor(math.log10(step))) for index in range(first, last + 1)]


def plain(value: float, digits: int = 4) -> str:
    """12345.0 -> 12,345; 0.123456 -> 0.1235; 0.00002 -> 2×10⁻⁵. At most `digits` significant after the whole part."""
    if value == 0 or (float(value).is_integer() and abs(value) < 1e15):
        return f"{value:,.0f}".replace("-", "−")
    power = math.floor(math.log10(abs(value)))
    if power < -4 or power >= 15:
        mantissa = f"{value / 10.0**power:.{digits - 2}f}".rstrip("0").rstrip(".")
        return f"{mantissa}×10{str(power).translate(_SUPERSCRIPT)}".replace("-", "−")
    text = f"{value:,.{max(0, digits - 1 - power)}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−")


def text_of(value: object) -> str:
    """A JSON value in words: 12,345, yes, a list with commas; a dash for what is absent or not finite."""
    if isinstance(value, bool):
        return phrase("yes") if value else phrase("no")
    if isinstance(value, list):
        return ", ".join(map(text_of, value)) or "–"
    if isinstance(value, dict):
        return ", ".join(f"{key} {text_of(item)}" for key, item in value.items()) or "–"
    number = as_number(value)
    if number is None:
        return value if isinstance(value, str) else "–"
    return plain(number)


def label_of(key: str) -> str:
    """The English label of any key."""
    words = " ".join(_ACRONYMS.get(word, word) for word in key.replace("_", " ").split())
    return words[:1].upper() + words[1:]


def own_label(key: str) -> str:
    """The label of a key that whet wrote, as people read it. A name from the data takes `label_of`, or none."""
    spelled = " ".join(key.replace("_", " ").split())
    shown = named(spelled)
    return label_of(key) if shown == spelled else shown


def size_text(value: object) -> str:
    number = as_number(value)
    if number is None or abs(number) < 1024:
        return "–" if number is None else f"{plain(number)} B"
    power = min(4, math.floor(math.log2(abs(number))) // 10)
    size = number / 1024.0**power
    return f"{size:,.{1 if abs(size) >= 10 else 2}f} {('KiB', 'MiB', 'GiB', 'TiB')[power - 1]}"


def seconds_text(value: object) -> str:
    seconds = as_number(value)
    if seconds is None or seconds < 60:
        return "–" if seconds is None else phrase("{0} s", plain(round(seconds, 1)))
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return phrase("{0} min {1} s", minutes, rest)
    return phrase("{0} h {1} min", plain(minutes // 60), minutes % 60)


def is_wide(values: Sequence[float]) -> bool:
    """True if a few high values would flatten all others on a linear axis, which is then logarithmic."""
    return bool(values) and min(values) > 0 and max(values) > WIDE * median(values)


@dataclass(frozen=True)
class Axis:
    """A vertical axis: values are divided by `scale`, then with `log` replaced by their logarithm to base ten."""

    marks: tuple[float, ...]
    scale: float = 1.0
    unit: str = ""
    log: bool = False

    def height_of(self, value: float) -> float:
        """The height of `value`: 0 at the lowest mark, 1 at the highest."""
        shown = math.log10(value / self.scale) if self.log else value / self.scale
        return (shown - self.marks[0]) / (self.marks[-1] - self.marks[0])

    def label(self, mark: float) -> str:
        return plain(10.0**mark if self.log else mark, 6)


def axis_for(values: Sequence[float], unit: str, is_bytes: bool, from_zero: bool) -> Axis:
    """The axis that shows `values`: binary units for bytes, a power of ten in the unit for very small or large
    numbers, logarithmic when one spike would flatten everything else."""
    low, high = min(values), max(values)
    if is_bytes:
        scale, unit = next(
            ((s, u) for s, u in ((2.0**30, "GiB"), (2.0**20, "MiB"), (1024.0, "KiB")) if high >= s), (1.0, "B")
        )
    elif is_wide(values):
        bottom, top = math.floor(math.log10(low)), math.ceil(math.log10(high))
        step = max(1, math.ceil((top - bottom) / 5))
        unit = phrase("{0}, logarithmic", unit) if unit else phrase("logarithmic")
        return Axis(tuple(float(n) for n in range(bottom, top + step, step)), 1.0, unit, True)
    else:
        power = math.floor(math.log10(1.1 * max(abs(low), abs(high)) or 1.0))  # 9.9e-5 is read as 0.99×10⁻⁴
        scale = 1.0 if -3 < power < 6 else 10.0**power
        if scale != 1.0:
            unit = f"{unit} ×10{str(power).translate(_SUPERSCRIPT)}".strip()
    if from_zero or 0 <= low < 0.35 * high:
        low, high = min(low, 0.0), max(high, 0.0) or 1.0
    return Axis(tuple(ticks(low / scale, high / scale)), scale, unit)


@dataclass(frozen=True)
class Curve:
    """One line. style: a CSS class of page.css (train, raw, eval); dots: show every point, for sparse curves."""

    name: str
    points: Sequence[Point]
    style: str = "train"
    dots: bool = False


def chart(
    title: str,
    curves: Sequence[Curve],
    unit: str = "",
    *,
    is_bytes: bool = False,
    from_zero: bool = False,
    best_step: float | None = None,
) -> str:
    """An HTML figure with the curves over steps; empty text when there is no finite value to draw."""
    values = [value for curve in curves for _, value in curve.points if value is not None]
    if not values:
        return ""
    axis = axis_for(values, unit, is_bytes, from_zero)
    steps = [step for curve in curves for step, _ in curve.points]
    first, last = min(steps), max(steps)
    if first == last:
        first, last = first - 1, last + 1

    def across(step: float) -> float:
        return (step - first) / (last - first)

    marks = [mark for mark in ticks(min(steps), max(steps), 5, whole=True) if min(steps) <= mark <= max(steps)]
    left = below = grid = ""
    for index, mark in enumerate(axis.marks):
        down = 1 - index / (len(axis.marks) - 1)
        left += f'<span style="top:{100 * down:.2f}%">{axis.label(mark)}</span>'
        grid += f'<path class="grid" d="M0 {1000 * down:.1f}H1000"/>'
    for mark in marks:
        end = ' class="end"' if across(mark) > 0.97 else ""  # a centred label would leave the card
        below += f'<span{end} style="left:{100 * across(mark):.2f}%">{plain(mark)}</span>'
    lines = "".join(_path(curve, axis, across) for curve in curves)
    flag = ""
    if best_step is not None and min(steps) <= best_step <= max(steps):
        side = " before" if across(best_step) > 0.6 else ""
        grid += f'<path class="best" d="M{1000 * across(best_step):.2f} 0V1000"/>'
        text = phrase("best: step {0}", plain(best_step))
        flag = f'<span class="flag{side}" style="left:{100 * across(best_step):.2f}%">{text}</span>'
    unit_text = f'<span class="unit">{escape(axis.unit)}</span>' if axis.unit else ""
    ends = (plain(end) for end in (min(values), max(values), min(steps), max(steps)))
    summary = phrase("{0}: {1} to {2}, steps {3} to {4}", title, *ends)
    return (
        f'<figure class="chart"><figcaption><h3>{escape(title)}</h3>{unit_text}{_legend(curves)}</figcaption>'
        f'<div class="plot" data-x="{first:g},{last:g}" data-y="{axis.marks[0]:g},{axis.marks[-1]:g}"'
        f'{" data-log" if axis.log else ""}><div class="ys" aria-hidden="true">{left}</div><div class="canvas">'
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" aria-label="{escape(summary)}">'
        f'{grid}{lines}</svg>{flag}</div><div class="xs" aria-hidden="true">{below}</div>'
        f'<div class="xname" aria-hidden="true">{phrase("optimiser step")}</div></div>{_gaps(curves)}</figure>'
    )


def _path(curve: Curve, axis: Axis, across: Callable[[float], float]) -> str:
    """The line, broken at gaps. A lone point becomes a line of no length, which round caps show as a dot."""
    points = thin(curve.points)
    parts: list[str] = []
    dots: list[str] = []
    for index, (step, value) in enumerate(points):
        if value is None:
            continue
        point = f"{1000 * across(step):.2f} {1000 - 1000 * axis.height_of(value):.1f}"
        begins = index == 0 or points[index - 1][1] is None
        alone = begins and (index + 1 == len(points) or points[index + 1][1] is None)
        parts.append(f"{'M' if begins else 'L'}{point}")
        if alone or (curve.dots and len(points) <= 60):
            dots.append(f"M{point}h.01")
    marks = f'<path class="dot {curve.style}" d="{"".join(dots)}"/>' if dots else ""
    return f'<path class="line {curve.style}" data-name="{escape(curve.name)}" d="{"".join(parts)}"/>{marks}'


def _legend(curves: Sequence[Curve]) -> str:
    if len(curves) < 2:
        return ""
    items = "".join(f'<li><i class="{curve.style}"></i>{escape(curve.name)}</li>' for curve in curves)
    return f'<ul class="legend">{items}</ul>'


def _gaps(curves: Sequence[Curve]) -> str:
    counts = [
        (curve.name, missing)
        for curve in curves
        if curve.style != "raw" and (missing := [step for step, value in curve.points if value is None])
    ]
    return "".join(
        f'<p class="warn small">{_gap(escape(name), len(missing), plain(missing[0]))}</p>' for name, missing in counts
    )


def _gap(name: str, missing: int, first: str) -> str:
    if missing == 1:
        return phrase("{0}: {1} value missing or not finite, first at step {2}", name, missing, first)
    return phrase("{0}: {1} values missing or not finite, first at step {2}", name, plain(missing), first)


def loss_curves(metrics: Sequence[JsonObject], phrase: Callable[..., str] = phrase) -> list[Curve]:
    """Train loss (raw and smoothed) and eval loss, as far as they were recorded. phrase: `str.format` for English."""
    raw = points_of(metrics, "loss", "train")
    mean, width = smooth(raw)
    apart = round(median([b - a for (a, _), (b, _) in pairwise(raw)])) if width > 1 else 1
    if width > 1 and apart == 1:
        names = phrase("train, every step"), phrase("train, mean of {0} steps", plain(width))
    else:
        every = phrase("train, every {0} steps", plain(apart))
        names = every, phrase("train, mean of {0} logged steps", plain(width))
    curves = [Curve(names[0], raw, "raw"), Curve(names[1], mean)] if width > 1 else []
    if raw and width == 1:
        curves.append(Curve(phrase("train"), mean))
    held_out = points_of(metrics, "eval_loss", "eval")
    return [*curves, Curve(phrase("eval"), held_out, "eval", dots=True)] if held_out else curves
