"""`whet data check`: what the data are, what exactly is learned from them, and whether that can work."""

from __future__ import annotations

from typing import Any

from whet.base.console import console, say
from whet.data.prepare import Prepared
from whet.data.show import length_histogram


def report(prepared: Prepared) -> dict[str, Any]:
    """The ledger, the lengths and what deserves a second look, as one JSON object."""
    ledger = prepared.ledger
    return {**ledger.as_dict(), "lengths": length_histogram(prepared), "warnings": warnings(prepared)}


def warnings(prepared: Prepared) -> list[str]:
    """Sentences on what will probably hurt, none of which stops a run."""
    ledger = prepared.ledger
    found = []
    if ledger.dropped:
        first = ledger.dropped[0]
        found.append(f"{len(ledger.dropped):,} rows are dropped, the first is {first['file']} row {first['row']} "
                     f"({first['reason']})")  # fmt: skip
    if ledger.tokens_lost:
        found.append(f"{ledger.tokens_lost:,} tokens are lost to data.max_length={prepared.max_length}")
    if ledger.rows_without_end_of_turn:
        found.append(f"{ledger.rows_without_end_of_turn:,} rows do not teach the end of the turn")
    if ledger.rows_on_both_sides:
        found.append(f"{ledger.rows_on_both_sides:,} rows stand in training and in the held-out rows")
    duplicates = len(prepared.train_examples) - len({example.id for example in prepared.train_examples})
    if duplicates:
        found.append(f"{duplicates:,} rows repeat another one exactly")
    return found


def show(prepared: Prepared) -> None:
    """The same for people."""
    from rich.table import Table

    ledger = prepared.ledger
    say(f"format: {ledger.format} ({ledger.format_reason})")
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(justify="right")
    share = 100 * ledger.supervised_tokens / max(1, ledger.tokens)
    for name, value in (
        ("rows to learn from", f"{ledger.rows_train:,}"),
        ("rows held out", f"{ledger.rows_eval:,}"),
        ("tokens", f"{ledger.tokens:,}"),
        ("learned tokens", f"{ledger.supervised_tokens:,} ({share:.0f} %)"),
        ("median row", f"{ledger.median_row:,} tokens"),
        ("longest row", f"{ledger.longest_row:,} tokens"),
    ):
        table.add_row(name, value)
    if ledger.packing_fill is not None:
        table.add_row("packed rows", f"{ledger.packed_rows:,} ({100 * ledger.packing_fill:.1f} % full)")
    console().print(table)
    bins = length_histogram(prepared)
    most = max((b["rows"] for b in bins), default=0)
    for b in bins:
        bar = "█" * round(30 * b["rows"] / most) if most else ""
        say(f"  {b['from']:>5}–{max(b['from'], b['to'] - 1):<5} {bar} {b['rows']:,}", style="dim")
    for warning in warnings(prepared):
        say(f"! {warning}", style="yellow")
