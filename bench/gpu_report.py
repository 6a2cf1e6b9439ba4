"""Table and plot of the GPU benchmark's JSON files: read back from the folder, so that they can be made at any time."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

NAME_WIDTH = 48
WHET_COLOUR, PEER_COLOUR = "#1f6f54", "#b8b8b8"


def value(row: dict[str, Any], first_step: bool) -> float | None:
    """The figure that the case is about: real tokens per second, or seconds to the first step."""
    if not first_step:
        return row.get("tokens_per_second")
    return row.get("first_step_seconds") or row.get("wall_seconds")


def medians(case: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By name, first come first: a row with the median figure over its repeats, or the failed one."""
    grouped: dict[str, list[dict[str, Any]]] = {}
    for row in case["rows"]:
        grouped.setdefault(row["name"], []).append(row)
    found = {}
    for name, rows in grouped.items():
        good = [row for row in rows if "failed" not in row and value(row, case["first_step"]) is not None]
        figure = statistics.median(value(row, case["first_step"]) or 0.0 for row in good) if good else None
        found[name] = {**(good or rows)[0], "figure": figure}
    return found


def line(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"  {row['name']:{NAME_WIDTH}} failed: {row['failed'].splitlines()[-1][:90]}"
    speed, memory, first = (row.get(k) or 0 for k in ("tokens_per_second", "peak_allocated_gib", "first_step_seconds"))
    step = 1000 * (row.get("median_seconds") or 0)
    first = first or row.get("wall_seconds", 0)
    return f"  {row['name']:{NAME_WIDTH}} {speed:9,.0f} {step:9.1f} {memory:7.2f} {first:7.1f}"


def table(case: dict[str, Any]) -> str:
    """The case for the terminal; the last column compares with the best peer (> 1: better).

    First steps are compared by the state of the compile caches.
    """
    rows, first = medians(case), case["first_step"]
    best: dict[str, float] = {}
    for name, row in rows.items():
        if row["system"] != "whet" and row["figure"]:
            caches = name.rpartition(", ")[2] if first else ""
            best[caches] = (min if first else max)(best.get(caches, row["figure"]), row["figure"])
    heading = f"  {'':{NAME_WIDTH}} {'tok/s':>9} {'ms/step':>9} {'GiB':>7} {'1st, s':>7} {'× best peer':>12}"
    lines = [f"{case['case']}: {case['title']}", heading]
    for name, row in rows.items():
        figure, text = row["figure"], line(row)
        other = best.get(name.rpartition(", ")[2] if first else "")
        if figure and other:
            text += f" {other / figure if first else figure / other:12.2f}"
        lines.append(text)
    return "\n".join([*lines, *(f"  not run for lack of time: {text}" for text in case["left_out"])])


def plot(cases: list[dict[str, Any]], out: Path) -> None:
    """One panel per case, one bar per system, whet's in its own colour."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return
    heights = [max(2, len(medians(case))) for case in cases]
    figure = Figure(figsize=(9, 0.34 * sum(heights) + 0.9 * len(cases)), layout="constrained")
    panels = figure.subplots(len(cases), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, case in zip(panels, cases, strict=True):
        draw(panel, case)
    figure.savefig(out / "gpu.png", dpi=130)


def draw(panel: Any, case: dict[str, Any]) -> None:
    """The bars of one case, each with its figure and its peak memory."""
    rows, first = medians(case), case["first_step"]
    figures = [row["figure"] or 0 for row in rows.values()]
    colours = [WHET_COLOUR if row["system"] == "whet" else PEER_COLOUR for row in rows.values()]
    texts = []
    for row in rows.values():
        text = "failed" if row["figure"] is None else f"{row['figure']:,.0f}{' s' if first else ''}"
        memory = row.get("peak_allocated_gib")
        texts.append(f"{text}  ({memory:.1f} GiB)" if memory else text)
    panel.bar_label(panel.barh(list(rows), figures, color=colours), texts, padding=3, fontsize=8)
    panel.invert_yaxis()
    panel.set_xlim(0, 1.25 * max([*figures, 1e-9]))
    unit = "seconds, less is better" if first else "real tokens per second"
    panel.set_title(f"{case['title']} ({unit})", fontsize=9, loc="left")
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)


def show(out: Path, names: Iterable[str]) -> None:
    """Print and plot every case that lies in the folder."""
    places = [place for place in (out / f"{name}.json" for name in names) if place.exists()]
    cases = [case for case in (json.loads(place.read_text(encoding="utf-8")) for place in places) if case["rows"]]
    print("\n\n".join(map(table, cases)))
    if cases:
        plot(cases, out)
