"""The report of `whet data check`: counts, lengths and warnings, as one JSON object and as text."""

from __future__ import annotations

from typing import Any

from whet.base.console import answer, console
from whet.base.errors import UserError, shorten
from whet.data.labels import imbalance, labels_text
from whet.data.loss_mask import length_histogram
from whet.data.prepare import Prepared
from whet.data.quality import sentences

IMBALANCED, FEW_ROWS, MOST_SHOWN = 10, 5, 20
PAGE_BINS = 32


def report_of(prepared: Prepared, quality: dict[str, Any] | None = None) -> dict[str, Any]:
    """The ledger, the lengths and all warnings, as one JSON object. quality: of `quality.quality_findings`."""
    ledger = prepared.ledger
    repeated = ledger.rows_repeated and quality is None
    lines = warnings(prepared) + ([f"{ledger.rows_repeated:,} rows repeat an earlier one"] if repeated else [])
    for name, counts in ledger.benchmarks.items() if quality is None else ():
        if counts["rows_learned"]:
            lines.append(f"{counts['rows_learned']:,} rows to learn from ask a question of {name} (data.leakage=drop)")
    lines += [] if quality is None else sentences(quality)
    result = {**ledger.as_dict(), "lengths": length_histogram(prepared, PAGE_BINS), "warnings": lines}
    result |= {} if quality is None else {"quality": quality}
    return result | ({"label_examples": label_examples(prepared)} if prepared.task.labels else {})


def check_strictly(report: dict[str, Any]) -> None:
    """Raise UserError if the report has a warning."""
    if report["warnings"]:
        raise UserError(
            f"{len(report['warnings'])} findings, and --strict allows none", field="data",
            found="; ".join(report["warnings"]), expected="no findings", fix="act on them, or leave out --strict",
        )  # fmt: skip


def warnings(prepared: Prepared) -> list[str]:
    """Sentences about things that will probably hurt, none of which stops a run."""
    ledger = prepared.ledger
    lines = []
    if ledger.dropped:
        first = ledger.dropped[0]
        where = f"{first['file']} row {first['row']} ({first['reason']})"
        lines.append(f"{len(ledger.dropped):,} rows are dropped, the first is {where}")
    if ledger.tokens_lost:
        lines.append(f"{ledger.tokens_lost:,} tokens are lost to data.max_length={prepared.max_length}")
    for name, count in ledger.not_rendered.items():
        lines.append(f"{count:,} rows have {name} that the chat template leaves out, so it is not learned")
    for part in (ledger.mixture, ledger.added, ledger.replay):
        lines += part.get("notes", ())
    if ledger.scores.get("rows_unjudged"):
        lines.append(f"{ledger.scores['rows_unjudged']:,} rows got no score from the judge and are learned from")
    for name, counts in ledger.benchmarks.items():
        if counts["not_compared"]:
            lines.append(f"{counts['not_compared']:,} rows of {name} have no answer and were not compared")
    if ledger.rows_without_end_of_turn:
        lines.append(f"{ledger.rows_without_end_of_turn:,} rows do not teach the end of the turn")
    if ledger.rows_on_both_sides:
        lines.append(f"{ledger.rows_on_both_sides:,} rows stand in training and in the held-out rows")
    if ledger.contradictory_rows:
        lines.append(f"{ledger.contradictory_rows:,} rows have a text that stands in another row with another label")
    return lines + _label_warnings(prepared)


def _label_warnings(prepared: Prepared) -> list[str]:
    """Warnings about labels: one value for all, imbalance, few rows, one label on every row."""
    task, counts, rows = prepared.task, prepared.ledger.labels, prepared.ledger.rows_train
    if task.name == "regression":
        return ["all rows have the same value, so there is nothing to learn"] if counts.get("std") == 0 else []
    lines = []
    ratio = imbalance(counts)
    if task.name == "classification" and ratio is not None and ratio > IMBALANCED:
        most, least = max(counts, key=lambda name: counts[name]), min(counts, key=lambda name: counts[name])
        lines.append(f"{most} has {ratio:,.0f} times the rows of {least}: judge by macro F1, not by accuracy")
    few = [name for name, count in counts.items() if count < FEW_ROWS]
    if few:
        lines.append(f"{len(few):,} labels have fewer than {FEW_ROWS} rows, {few[0]} for one")
    always = [name for name, count in counts.items() if task.name == "multi_label" and count == rows]
    if always:
        lines.append(f"{always[0]} is a label of every row")
    return lines


def label_examples(prepared: Prepared) -> dict[str, str]:
    """The text of the first row of each label."""
    labels, texts = prepared.train.labels, {}
    assert labels is not None
    for index, name in enumerate(prepared.task.labels):
        rows = (labels[:, index] > 0).nonzero()[0] if labels.ndim == 2 else (labels == index).nonzero()[0]
        if len(rows):
            example = prepared.train_examples[int(prepared.train.sources[rows[0]])]
            texts[name] = " | ".join(part for part in (example.text, example.text_pair) if part is not None)
    return texts


def _print_labels(prepared: Prepared) -> None:
    """Print rows and an example of each label, the commonest first, or the mean and spread of the values."""
    from rich.table import Table
    from rich.text import Text

    ledger = prepared.ledger
    answer(f"task: {ledger.task}, {labels_text(ledger.task, ledger.labels)}")
    if not prepared.task.labels:
        return
    table = Table(box=None, pad_edge=False)
    for name, justify in (("label", "left"), ("rows", "right"), ("held out", "right"), ("for example", "left")):
        table.add_column(name, justify=justify, overflow="ellipsis", no_wrap=name != "for example")  # type: ignore[arg-type]
    shown = sorted(ledger.labels.items(), key=lambda pair: -pair[1])
    examples = label_examples(prepared)
    for name, count in shown[:MOST_SHOWN]:
        text = shorten(examples.get(name, ""), 60)
        table.add_row(Text(name), f"{count:,}", f"{ledger.labels_held_out.get(name, 0):,}", Text(text, style="dim"))
    console(stdout=True).print(table)
    if len(shown) > MOST_SHOWN:
        answer(f"  and {len(shown) - MOST_SHOWN:,} more labels; --json shows all", style="dim")


def print_report(prepared: Prepared, report: dict[str, Any] | None = None, stand_in: str | None = None) -> None:
    """Print the report for people.

    report: of `report_of`, if it was computed; stand_in: the model whose tokenizer counted, if no recipe named one.
    """
    from rich.table import Table

    ledger = prepared.ledger
    answer(f"format: {ledger.format} ({ledger.format_reason})")
    if stand_in is not None:
        answer(f"tokens as {stand_in} counts them; a recipe, or model.path=…, counts with your model", style="dim")
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(justify="right")
    share = 100 * ledger.supervised_tokens / max(1, ledger.tokens)
    for name, value in (
        ("rows to learn from", f"{ledger.rows_train:,}"),
        *([("of these added", f"{ledger.added['rows']:,}")] if ledger.added else []),
        ("rows held out", f"{ledger.rows_eval:,}"),
        *([("rows for a test", f"{ledger.rows_test:,}")] if ledger.rows_test else []),
        ("tokens", f"{ledger.tokens:,}"),
        *([] if ledger.labels else [("learned tokens", f"{ledger.supervised_tokens:,} ({share:.0f} %)")]),
        ("median row", f"{ledger.median_row:,} tokens"),
        ("longest row", f"{ledger.longest_row:,} tokens"),
    ):
        table.add_row(name, value)
    if ledger.packing_fill is not None:
        table.add_row("packed rows", f"{ledger.packed_rows:,} ({100 * ledger.packing_fill:.1f} % full)")
    console(stdout=True).print(table)
    if ledger.labels:
        _print_labels(prepared)
    bins = length_histogram(prepared)
    most = max((b["rows"] for b in bins), default=0)
    for b in bins:
        bar = "█" * round(30 * b["rows"] / most) if most else ""
        answer(f"  {b['from']:>5}–{max(b['from'], b['to'] - 1):<5} {bar} {b['rows']:,}", style="dim")
    for warning in warnings(prepared) if report is None else report["warnings"]:
        answer(f"! {warning}", style="yellow")
