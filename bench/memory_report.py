"""What `bench/memory.py` found, as a table, three numbers and a picture: the plan beside what was allocated.

python bench/memory_report.py bench/results/h200/memory-cases.json --plot bench/results/h200/memory.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

GIB = 1 << 30


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The cases that ran, each with its error as a share of what was allocated."""
    cases = json.loads(path.read_text(encoding="utf-8"))["cases"]
    ran = [case for case in cases if "step_peak" in case]
    return [case | {"error_share": case["foretold_peak"] / case["step_peak"] - 1} for case in ran]


def summary(path: Path) -> dict[str, Any]:
    """cases, p95 and max of the error, and how often the plan was wrong about whether a case fits."""
    cases = json.loads(path.read_text(encoding="utf-8"))["cases"]
    errors = np.abs([case["error_share"] for case in rows_of(path)])
    return {
        "cases": len(cases), "p95": float(np.quantile(errors, 0.95)), "max": float(errors.max()),
        "false_fits": [case["case"] for case in cases if case["fits"] and "out_of_memory" in case],
        "false_does_not_fit": [case["case"] for case in cases if not case["fits"] and "out_of_memory" not in case],
    }  # fmt: skip


def draw(path: Path, picture: Path) -> None:
    """Plan against measured peak, both in GiB on logarithmic axes, with lines 5 % off."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    kinds = {"full": "o", "eager": "s", "checkpointing": "^", "in ": "D", "": "v"}
    labels = {"full": "trained whole", "eager": "not compiled", "checkpointing": "all layers run again",
              "in ": "part of the card free", "": "all kept"}  # fmt: skip
    left = rows_of(path)
    for kind, marker in kinds.items():
        these, left = [c for c in left if kind in c["case"]], [c for c in left if kind not in c["case"]]
        points = [(case["step_peak"] / GIB, case["foretold_peak"] / GIB) for case in these]
        if points:
            axes.plot(*zip(*points, strict=True), marker, label=labels[kind], markersize=5, alpha=0.8, linestyle="none")
    ends = np.array([2, 160])
    axes.plot(ends, ends, color="grey", linewidth=0.8)
    for share in (0.95, 1.05):
        axes.plot(ends, ends * share, color="grey", linewidth=0.5, linestyle=":")
    ticks = [2, 4, 8, 16, 32, 64, 128]
    axes.set(xscale="log", yscale="log", xlabel="allocated at most, GiB", ylabel="foretold, GiB", xlim=ends, ylim=ends)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False)
    axes.set_title("Memory of training on one H200: plan and measurement (dotted: 5 %)", fontsize=10)
    figure.savefig(picture, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    for case in rows_of(given.results):
        peaks = f"{case['foretold_peak'] / GIB:.2f} | {case['step_peak'] / GIB:.2f}"
        print(f"| {case['case']} | {peaks} | {100 * case['error_share']:+.1f} % |")
    print(json.dumps(summary(given.results), indent=1))
    if given.plot is not None:
        draw(given.results, given.plot)


if __name__ == "__main__":
    main()
