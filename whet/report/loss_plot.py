"""Draw the loss of a run as one PNG, for those who want a picture and no page.

The words are Korean where people read Korean and a font of this machine has Hangul; without one they stay English, as
boxes would say nothing. The fonts looked for are those that systems bring along, by name.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whet.base import language
from whet.base.files import write_bytes
from whet.report.charts import is_wide, loss_curves, read_records, thin

if TYPE_CHECKING:
    from matplotlib.font_manager import FontProperties

HANGUL_FONTS = (
    "Apple SD Gothic Neo", "AppleGothic", "Malgun Gothic", "NanumGothic", "NanumBarunGothic", "Noto Sans KR",
    "Noto Sans CJK KR", "Noto Sans CJK JP", "Source Han Sans KR", "UnDotum", "Baekmuk Dotum",
)  # fmt: skip
_LOOKS = {"raw": ("#0b6e69", 0.8, 0.28), "train": ("#0b6e69", 2.0, 1.0), "eval": ("#b4530a", 2.0, 1.0)}


def write_loss_plot(run_dir: Path, per_row: bool = False) -> Path:
    """Write `run_dir`/loss.png, 1600 x 900: the same curves as on the page, or a picture that says there are none.

    per_row: the loss is a mean over rows, not over supervised tokens.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    font = hangul_font() if language.korean() else None
    phrase: Callable[..., str] = language.phrase if font else str.format
    curves = loss_curves(read_records(run_dir / "metrics.jsonl")[0], phrase)
    figure = Figure(figsize=(8, 4.5), dpi=200, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)  # this canvas only: pyplot and its global backend are never touched
    axes = figure.add_subplot()
    for curve in curves:
        colour, width, alpha = _LOOKS[curve.style]
        points = thin(curve.points)
        marker = "o" if len(points) == 1 or (curve.dots and len(points) <= 60) else ""
        heights = [math.nan if value is None else value for _, value in points]
        axes.plot(
            [x for x, _ in points], heights, color=colour, lw=width, alpha=alpha, label=curve.name, marker=marker, ms=5
        )
    values = [value for curve in curves for _, value in curve.points if value is not None]
    axes.set_yscale("log" if (wide := is_wide(values)) else "linear")
    look: dict[str, Any] = {"fontproperties": font} if font else {}
    if curves:
        axes.legend(frameon=False, prop=font)
    else:
        axes.text(
            0.5, 0.5, phrase("no loss recorded yet"), ha="center", va="center", transform=axes.transAxes,
            color="#5a636d", **look,
        )  # fmt: skip
    unit = phrase("loss per row") if per_row else phrase("loss per supervised token")
    axes.set_xlabel(phrase("optimiser step"), **look)
    axes.set_ylabel(phrase("{0}, logarithmic", unit) if wide else unit, **look)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#e3e1da", lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    write_bytes(run_dir / "loss.png", buffer.getvalue())
    return run_dir / "loss.png"


def hangul_font() -> FontProperties | None:
    """A font of this machine that can draw Hangul, or None."""
    from matplotlib.font_manager import FontProperties, fontManager, get_font

    for file in (entry.fname for entry in fontManager.ttflist if entry.name in HANGUL_FONTS):
        if Path(file).is_file() and get_font(file).get_char_index(ord("한")):
            return FontProperties(fname=file)
    return None
