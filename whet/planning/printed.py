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
    _print_phases(found)
    _print_fit(found)
    _print_time(found)
    _print_modes(found.get("modes") or [])
    if "several" in found:
        _print_several(found["several"])
    for notice in found["notices"]:
        say(notice, style="yellow")
    assumed = found["assumed"]
    answer(
        f"for {assumed['tokens_per_forward']:,} tokens in a forward pass, {assumed['storage']} weights and "
        f"{assumed['compute']} arithmetic on {assumed['device']}; activations are {translated(assumed['activations'])}",
        style="dim",
    )


def _print_phases(found: dict[str, Any]) -> None:
    """Memory by class and phase; what host memory and disks hold under it."""
    phases = found["phases"]
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("")
    for phase in phases:
        table.add_column(phase, justify="right")
    for name in dict.fromkeys(name for classes in phases.values() for name in classes):
        cells = [bytes_text(classes[name]) if name in classes else "" for classes in phases.values()]
        table.add_row(name, *cells)
    table.add_row("together", *(bytes_text(found["peak_bytes"][phase]) for phase in phases), style="bold")
    if any(found["host"].values()):
        host = [found["host"].get(phase, 0) for phase in phases]
        table.add_row("in host memory", *(bytes_text(count) if count else "" for count in host))
    console(stdout=True).print(table)
    for name, count in found["disk"].items():
        answer(f"on disk, {translated(name)}: {bytes_text(count)}", style="dim")


def _print_time(found: dict[str, Any]) -> None:
    """How long a step and the run take, or why that is not said."""
    seconds, time = found["seconds_per_step"], found["time"]
    if seconds is None:
        answer(f"time: not known: {translated(time['reason'])}", style="dim")
        return
    answer(f"time: {seconds:.3g} s a step, {duration_text(found['seconds'])} for {time['steps']:,} steps, without "
           f"loading, compiling and evaluation; by {translated(time['rests_on'])}")  # fmt: skip


def duration_text(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3.3 min, 5.2 h."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def _print_several(several: dict[str, Any]) -> None:
    """What each of several cards would need."""
    say(several["notice"], style="yellow")
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("way")
    table.add_column("on each", justify="right")
    table.add_column("")
    table.add_column("")
    for name in ("replicate", "shard"):
        way = several[name]
        fit = "" if way["fits"] is None else translated("it fits") if way["fits"] else translated("too large")
        table.add_row(name, bytes_text(way["peak_bytes"]), fit, translated(way["mode"]))
    console(stdout=True).print(table)


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
