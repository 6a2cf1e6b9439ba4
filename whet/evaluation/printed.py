"""Print an evaluation in the terminal: the table of base against tuned, and what was confused most."""

from __future__ import annotations

from typing import Any

from whet.base.console import answer, console

SHOWN_CONFUSIONS = 5


def print_scores(result: dict[str, Any]) -> None:
    """Print the table of base against tuned."""
    from rich.table import Table

    before = "baseline" if "baseline" in result else "base"
    table = Table(
        title=f"{before} against tuned, {result['rows']} {result.get('of', 'held-out rows')}", title_justify="left"
    )
    for name, justify in (("metric", "left"), (before, "right"), ("tuned", "right"), ("difference", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name, value in result["tuned"]["metrics"].items():
        difference = result["difference"].get(name)
        interval = f"{difference['low']:+.3f} … {difference['high']:+.3f}" if difference else ""
        table.add_row(name, f"{result['base']['metrics'][name]:.3f}", f"{value:.3f}", interval)
    console(stdout=True).print(table)
    if "baseline" in result:
        answer(f"baseline: {result['baseline']}", style="dim")
    for pair in result.get("labels", {}).get("most_confused", [])[:SHOWN_CONFUSIONS]:
        answer(f"  {pair['reference']} taken for {pair['predicted']}: {pair['rows']}")
    if result["skipped"]:
        answer(f"not computed: {', '.join(result['skipped'])} (pip install 'whet[eval]')", style="dim")
