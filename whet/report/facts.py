"""The parts of a run's page that state facts: data, memory, merge certificate, settings, environment.

What is empty has no heading, a name from the data stays as it is, and what cannot be compared is not compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from whet.report.charts import JsonObject, as_number, label_of, part, plain, points_of, size_text, text_of
from whet.report.findings import counts_table
from whet.report.markup import Html, fold, objects, pairs, paragraph, ratio, safe, score_text, table
from whet.report.run_files import RunFiles

_COUNTS = {  # of the ledger -> what it counts; those that deserve a look are red when they are not 0
    "format": "Format", "format_reason": "Recognised by", "rows_read": "Rows read", "rows_train": "Rows to learn from",
    "rows_eval": "Rows held out", "rows_test": "Rows for a test", "tokens": "Tokens",
    "supervised_tokens": "Learned tokens", "median_row": "Median row, tokens", "longest_row": "Longest row, tokens",
    "rows_repeated": "Rows that repeat another", "packed_rows": "Packed rows",
    "packing_fill": "Packed rows are full by",
    "rows_redacted": "Rows with personal data replaced",
}  # fmt: skip
_FAULTS = {
    "rows_without_target": "Rows with nothing to learn", "rows_over_length": "Rows over the longest length",
    "tokens_lost": "Tokens cut off", "rows_without_end_of_turn": "Rows without a learned end of turn",
    "rows_on_both_sides": "Rows on both sides of the split", "contradictory_rows": "Rows with contradictory labels",
}  # fmt: skip
_SHOWN_SCALARS = (str, int, float)


def data(run: RunFiles) -> str:
    ledger = run.files["data"]
    if not ledger:
        return paragraph("todo", run.todo("The data has not been checked yet:", "data check"))
    share = None if part(ledger, "labels") else ratio(ledger.get("supervised_tokens"), ledger.get("tokens"))
    note = f"The model learns from {score_text(share, True)} of the tokens; the rest is context." if share else ""
    items: dict[str, object] = {}
    for key, title in _COUNTS.items():
        if _is_told(ledger.get(key)):
            items[title] = score_text(ledger[key], True) if key == "packing_fill" else ledger[key]
    dropped = ledger.get("dropped")
    faults = {title: ledger.get(key) for key, title in _FAULTS.items() if key in ledger}
    faults["Rows left out"] = len(dropped) if isinstance(dropped, list) else None
    for title, count in faults.items():
        if count is not None:
            items[title] = Html(f'<span class="{"bad-text" if count else "good-text"}">{safe(count)}</span>')
    return paragraph("lead", note) + pairs(items) + _groups(ledger) + _files(ledger)


def _is_told(value: object) -> bool:
    """True for a value that says something."""
    return isinstance(value, _SHOWN_SCALARS) and not isinstance(value, bool) and value not in ("", 0)


def _groups(ledger: JsonObject) -> str:
    """The labels with their counts, and every other group of the ledger that is not empty."""
    body = ""
    labels, held_out = part(ledger, "labels"), part(ledger, "labels_held_out")
    if labels and ledger.get("task") == "regression":
        body += f"<h3>Values</h3>{pairs(labels)}"
    elif labels:
        counts = {str(name): int(as_number(count) or 0) for name, count in labels.items()}
        body += counts_table("Label", counts, "Rows")
        if held_out and ledger.get("rows_eval"):
            counts = {str(name): int(as_number(count) or 0) for name, count in held_out.items()}
            body += fold("Held-out rows of each label", counts_table("Label", counts, "Rows"))
    for key, group in ledger.items():
        if isinstance(group, dict) and key not in ("labels", "labels_held_out"):
            told = {name: value for name, value in group.items() if _is_told(value)}
            body += f"<h3>{safe(label_of(key))}</h3>{pairs(told)}" if told else ""
    return body


def _files(ledger: JsonObject) -> str:
    files = objects(ledger, "files")
    if not files:
        return ""
    counted = any("rows" in one for one in files)
    size, name = (lambda one: one.get("rows"), "Rows") if counted else (lambda one: size_text(one.get("bytes")), "Size")
    rows = [[one.get("path"), size(one), text_of(one.get("sha256"))[:16]] for one in files]
    return f"<h3>Files</h3>{table({'Path': 'key', name: 'num', 'SHA-256, first 16': 'code num'}, rows)}"


def memory(run: RunFiles) -> str:
    plan = run.files["plan"]
    seen = [value for _, value in points_of(run.lines["timing"], "memory_bytes") if value is not None]
    measured = as_number(run.files["finished"].get("peak_memory_bytes")) or max(seen, default=None)
    if not plan:
        return paragraph("todo", run.todo("No plan has been made yet:", "plan"))
    predicted = as_number(plan.get("peak_bytes"))
    classes = {label_of(name): as_number(value) or 0.0 for name, value in part(plan, "memory").items()}
    whole_process = is_whole_process(run)
    largest = max(*classes.values(), predicted or 0, 0 if whole_process else measured or 0, 1)
    rows: list[list[object]] = []
    shown = {**classes, "Predicted peak": predicted, **({} if whole_process else {"Measured peak": measured})}
    for name, value in shown.items():
        css = "bar measured" if name.startswith("Measured") else "bar"
        bar = f'<span class="{css}" aria-hidden="true"><i style="width:{100 * (value or 0) / largest:.1f}%"></i></span>'
        rows.append([name, Html(bar), size_text(value)])
    note = _compared(predicted, measured, whole_process)
    return f'{paragraph("lead", note)}<div class="card">{table({"Part": "key", "": "wide", "Size": "num"}, rows)}</div>'


def is_whole_process(run: RunFiles) -> bool:
    """True where measured memory is that of the whole process, libraries included: on a CPU."""
    return run.files["environment"].get("device") == "cpu"


def _compared(predicted: float | None, measured: float | None, whole_process: bool) -> str:
    if not measured or not predicted:
        return "The peak has not been measured yet: no step is recorded."
    if whole_process:
        return (f"Predicted {size_text(predicted)} for the model and its training. On a CPU only the whole process can "
                f"be measured, which held {size_text(measured)} with Python and its libraries, so the two are not "
                "compared.")  # fmt: skip
    off = 100 * (predicted - measured) / measured
    note = f"Predicted {size_text(predicted)}, measured {size_text(measured)}: the plan was "
    return note + (f"{plain(abs(off), 2)} % too {'high' if off > 0 else 'low'}." if off else "exact.")


_CERTIFIED: Mapping[str, tuple[str, bool]] = {  # of a candidate -> its column and whether it is a share
    "mean_kl": ("Mean KL, nats", False), "max_kl": ("Max KL, nats", False),
    "top1_agreement": ("Same top token", True), "greedy_agreement": ("Same greedy answer", True),
    "max_logit_difference": ("Largest logit difference", False),
    "mean_probability_change": ("Mean probability change", False), "mean_value_change": ("Mean value change", False),
    "equal_labels": ("Same labels", True),
}  # fmt: skip


def merge(run: RunFiles) -> str:
    certificate = run.files["merge"]
    if not certificate:
        return paragraph("todo", run.todo("The adapter has not been merged yet:", "merge", recipe=False, rest=" out/"))
    candidates = objects(certificate, "candidates")
    said = {key: form for key, form in _CERTIFIED.items() if any(item.get(key) is not None for item in candidates)}
    rows = [
        [item.get("name"), item.get("dtype"), *(score_text(item.get(key), share) for key, (_, share) in said.items())]
        for item in candidates
    ]
    keys = ("chosen", "prompts", "positions", "path")
    name, prompts, positions, path = (safe(certificate.get(key)) for key in keys)
    names = [(item.get("name"), f"{item.get('name')} base, {item.get('dtype')}") for item in candidates]
    chosen = next((i for i, both in enumerate(names) if certificate.get("chosen") in both), -1)
    columns = {"Candidate": "key", "Type": "", **{title: "num" for title, _ in said.values()}}
    compared = f"{prompts} prompts, {positions} positions" if "positions" in certificate else f"{prompts} rows"
    note = f"Compared on {compared}. Kept: <b>{name}</b>, in <code>{path}</code>."
    return paragraph("lead", note) + (f'<div class="card">{table(columns, rows, chosen)}</div>' if rows else "")


def settings(run: RunFiles) -> str:
    chosen, defaults, columns = [], [], {"Setting": "key", "Value": "code", "Origin": "", "Reason": ""}
    for name in run.files["origins"]:
        item = part(run.files["origins"], name)
        origin, value = item.get("origin"), item.get("value")
        shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        tag = Html(f'<span class="tag{"" if origin == "default" else " accent"}">{safe(origin)}</span>')
        (defaults if origin == "default" else chosen).append([name, shown, tag, item.get("reason") or ""])
    body = table(columns, chosen) if chosen else ""
    body += fold(f"Defaults ({plain(len(defaults))})", table(columns, defaults)) if defaults else ""
    if recipe := run.text("recipe.yaml"):
        body += fold("Resolved recipe", f"<pre>{safe(recipe, 50_000)}</pre>")
    return body or paragraph("todo", "No recipe is stored in this run directory.")


def environment(run: RunFiles) -> str:
    return pairs(run.files["environment"]) if run.files["environment"] else paragraph("todo", "Not recorded.")
