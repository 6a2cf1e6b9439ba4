"""The report of a run: written at its end, and again where a fault came in between."""

from __future__ import annotations

import os
from pathlib import Path


def write_report(directory: Path, *, per_row: bool) -> None:
    """Write the plot of the loss and the page of the run in `directory`. per_row: losses are of rows, not tokens."""
    from whet.report.loss_plot import write_loss_plot
    from whet.report.page import write_page

    write_loss_plot(directory, per_row=per_row)
    write_page(directory)


def lacks_report(directory: Path) -> bool:
    """True if a finished run was killed, or its disk was full, before its report was written: there is none, or one of
    before its last steps. What cannot be written is left alone."""
    ended = (directory / "finished.json").stat().st_mtime_ns
    report = [directory / "loss.png", directory / "report.html"]
    whole = all(file.is_file() and file.stat().st_mtime_ns >= ended for file in report)
    return not whole and os.access(directory, os.W_OK)
