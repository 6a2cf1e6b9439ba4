"""A plan in the terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from whet.base.console import answer, bytes_text, console, say
from whet.base.language import translated


def print_plan(found: dict[str, Any]) -> None:
    """Print what `whet plan --json` gives."""
    trainable, total = found["trainable_params"], found["all_params"]
    answer(f"{found['model']}: {trainable:,} of {total:,} parameters are trained ({100 * trainable / total:.2f} %)")
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(justify="right")
    for name, count in found["memory"].items():
        table.add_row(name, bytes_text(count))
    table.add_row("together", bytes_text(found["peak_bytes"]), style="bold")
    if found["host_bytes"]:
        table.add_row("in host memory", bytes_text(found["host_bytes"]))
    console(stdout=True).print(table)
    _print_fit(found)
    _print_modes(found.get("modes") or [])
    for notice in found["notices"]:
        say(notice, style="yellow")
    assumed = found["assumed"]
    answer(
        f"for {assumed['tokens_per_forward']:,} tokens in a forward pass, {assumed['storage']} weights and "
        f"{assumed['compute']} arithmetic on {assumed['device']}; activations are {translated(assumed['activations'])}",
        style="dim",
    )


def _print_fit(found: dict[str, Any]) -> None:
    """Whether it fits, and what would."""
    if found["fits"] is None:
        return
    name, free = translated(found["assumed"]["hardware"]), bytes_text(found["free_bytes"])
    if found["fits"]:
        answer(f"fits on {name}, where {free} are free", style="green")
    else:
        answer(f"does not fit on {name}, where {free} are free", style="red")
    longest = found.get("longest_row_tokens")
    if found["fits"] and longest:
        answer(f"the longest forward pass in this layout: {longest:,} tokens")
    if found.get("least_bytes"):
        card = found["smallest_card"] or "no single card that is known"
        answer(f"in the leanest layout {bytes_text(found['least_bytes'])} must be free: {card}")


def _print_modes(modes: list[dict[str, Any]]) -> None:
    """What each memory mode would take."""
    if not modes:
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("memory mode")
    table.add_column("peak", justify="right")
    table.add_column("in host memory", justify="right")
    table.add_column("")
    for mode in modes:
        host = bytes_text(mode["host_bytes"]) if mode["host_bytes"] else ""
        fit = translated("it fits") if mode["fits"] else translated("too large")
        table.add_row(translated(mode["mode"]), bytes_text(mode["peak_bytes"]), host, fit)
    console(stdout=True).print(table)
