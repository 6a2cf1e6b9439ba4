"""The parts of a run's page that state facts: data, memory, merge certificate, settings, environment.

What is empty has no heading, a name from the data stays as it is, and what cannot be compared is not compared.
"""

from __future__ import annotations

import json

from whet.base.language import phrase
from whet.report.charts import JsonObject, as_number, own_label, part, plain, points_of, size_text, text_of
from whet.report.findings import counts_table
from whet.report.markup import Html, fold, objects, pairs, paragraph, ratio, safe, score_text, table, told
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
        return paragraph("todo", run.todo(phrase("The data has not been checked yet:"), verb="data check"))
    share = None if part(ledger, "labels") else ratio(ledger.get("supervised_tokens"), ledger.get("tokens"))
    note = phrase("The model learns from {0} of the tokens; the rest is context.", score_text(share, True))
    items: dict[str, object] = {}
    for key, title in _COUNTS.items():
        if _is_told(ledger.get(key)):
            items[phrase(title)] = _count(key, ledger[key])
    dropped = ledger.get("dropped")
    faults = {phrase(title): ledger.get(key) for key, title in _FAULTS.items() if key in ledger}
    faults |= {phrase("Rows left out"): len(dropped) if isinstance(dropped, list) else None}
    for title, count in faults.items():
        if count is not None:
            items[title] = Html(f'<span class="{"bad-text" if count else "good-text"}">{safe(count)}</span>')
    return paragraph("lead", note if share else "") + pairs(items) + _groups(ledger) + _files(ledger)


def _count(key: str, value: object) -> object:
    if key == "packing_fill":
        return score_text(value, True)
    return told(value) if key == "format_reason" else value


def _is_told(value: object) -> bool:
    """True for a value that says something."""
    return isinstance(value, _SHOWN_SCALARS) and not isinstance(value, bool) and value not in ("", 0)


def _groups(ledger: JsonObject) -> str:
    """The labels with their counts, and every other group of the ledger that is not empty."""
    body = ""
    labels, held_out = part(ledger, "labels"), part(ledger, "labels_held_out")
    if labels and ledger.get("task") == "regression":
        body += f"<h3>{phrase('Values')}</h3>{pairs({own_label(name): value for name, value in labels.items()})}"
    elif labels:
        counts = {str(name): int(as_number(count) or 0) for name, count in labels.items()}
        body += counts_table(phrase("Label"), counts)
        if held_out and ledger.get("rows_eval"):
            counts = {str(name): int(as_number(count) or 0) for name, count in held_out.items()}
            body += fold(phrase("Held-out rows of each label"), counts_table(phrase("Label"), counts))
    for key, group in ledger.items():
        if isinstance(group, dict) and key not in ("labels", "labels_held_out"):
            items = {own_label(name): value for name, value in group.items() if _is_told(value)}
            body += f"<h3>{safe(own_label(key))}</h3>{pairs(items)}" if items else ""
    return body


def _files(ledger: JsonObject) -> str:
    files = objects(ledger, "files")
    if not files:
        return ""
    counted = any("rows" in one for one in files)
    name = phrase("Rows") if counted else phrase("Size")
    size = (lambda one: one.get("rows")) if counted else (lambda one: size_text(one.get("bytes")))
    rows = [[one.get("path"), size(one), text_of(one.get("sha256"))[:16]] for one in files]
    columns = {phrase("Path"): "key", name: "num", phrase("SHA-256, first 16"): "code num"}
    return f"<h3>{phrase('Files')}</h3>{table(columns, rows)}"


def memory(run: RunFiles) -> str:
    plan = run.files["plan"]
    seen = [value for _, value in points_of(run.lines["timing"], "memory_bytes") if value is not None]
    measured = as_number(run.files["finished"].get("peak_memory_bytes")) or max(seen, default=None)
    if not plan:
        return paragraph("todo", run.todo(phrase("No plan has been made yet:"), "plan"))
    predicted = predicted_peak(plan)
    classes = {own_label(name): as_number(value) or 0.0 for name, value in part(plan, "memory").items()}
    whole_process = is_whole_process(run)
    largest = max(*classes.values(), predicted or 0, 0 if whole_process else measured or 0, 1)
    rows: list[list[object]] = []
    shown = {**classes, phrase("Predicted peak"): predicted}
    shown |= {} if whole_process else {phrase("Measured peak"): measured}
    for name, value in shown.items():
        css = "bar measured" if name == phrase("Measured peak") else "bar"
        bar = f'<span class="{css}" aria-hidden="true"><i style="width:{100 * (value or 0) / largest:.1f}%"></i></span>'
        rows.append([name, Html(bar), size_text(value)])
    note = _compared(predicted, measured, whole_process)
    columns = {phrase("Part"): "key", "": "wide", phrase("Size"): "num"}
    return f'{paragraph("lead", note)}<div class="card">{table(columns, rows)}</div>'


def predicted_peak(plan: JsonObject) -> float | None:
    """Bytes of training's peak in a plan, which older versions wrote as the only one."""
    return as_number(part(plan, "peak_bytes").get("train", plan.get("peak_bytes")))


def is_whole_process(run: RunFiles) -> bool:
    """True where measured memory is that of the whole process, libraries included: on a CPU."""
    return run.files["environment"].get("device") == "cpu"


def _compared(predicted: float | None, measured: float | None, whole_process: bool) -> str:
    if not measured or not predicted:
        return phrase("The peak has not been measured yet: no step is recorded.")
    both = size_text(predicted), size_text(measured)
    if whole_process:
        return phrase(
            "Predicted {0} for the model and its training. On a CPU only the whole process can be measured, which held "
            "{1} with Python and its libraries, so the two are not compared.", *both,
        )  # fmt: skip
    off = 100 * (predicted - measured) / measured
    if not off:
        return phrase("Predicted {0}, measured {1}: the plan was exact.", *both)
    if off > 0:
        return phrase("Predicted {0}, measured {1}: the plan was {2} % too high.", *both, plain(off, 2))
    return phrase("Predicted {0}, measured {1}: the plan was {2} % too low.", *both, plain(-off, 2))


_CERTIFIED = {  # of a candidate -> its column
    "mean_kl": "Mean KL, nats", "max_kl": "Max KL, nats", "top1_agreement": "Same top token",
    "greedy_agreement": "Same greedy answer", "max_logit_difference": "Largest logit difference",
    "mean_probability_change": "Mean probability change", "mean_value_change": "Mean value change",
    "equal_labels": "Same labels",
}  # fmt: skip
_SHARES = {"top1_agreement", "greedy_agreement", "equal_labels"}


def merge(run: RunFiles) -> str:
    certificate = run.files["merge"]
    if not certificate:
        text = phrase("The adapter has not been merged yet:")
        return paragraph("todo", run.todo(text, "merge", recipe=False, rest=" out/"))
    candidates = objects(certificate, "candidates")
    said = [key for key in _CERTIFIED if any(item.get(key) is not None for item in candidates)]
    rows = [
        [told(item.get("name")), item.get("dtype"), *(score_text(item.get(key), key in _SHARES) for key in said)]
        for item in candidates
    ]
    prompts, positions, path = (safe(certificate.get(key)) for key in ("prompts", "positions", "path"))
    names = [(item.get("name"), f"{item.get('name')} base, {item.get('dtype')}") for item in candidates]
    chosen = next((i for i, both in enumerate(names) if certificate.get("chosen") in both), -1)
    columns = {phrase("Candidate"): "key", phrase("Type"): "", **{phrase(_CERTIFIED[key]): "num" for key in said}}
    name = safe(told(certificate.get("chosen")))
    note = phrase("Compared on {0} rows. Kept: <b>{1}</b>, in <code>{2}</code>.", prompts, name, path)
    if "positions" in certificate:
        note = phrase(
            "Compared on {0} prompts, {1} positions. Kept: <b>{2}</b>, in <code>{3}</code>.",
            prompts, positions, name, path,
        )  # fmt: skip
    return paragraph("lead", note) + (f'<div class="card">{table(columns, rows, chosen)}</div>' if rows else "")


def settings(run: RunFiles) -> str:
    chosen, defaults = [], []
    columns = {phrase("Setting"): "key", phrase("Value"): "code", phrase("Origin"): "", phrase("Reason"): ""}
    for name in run.files["origins"]:
        item = part(run.files["origins"], name)
        origin, value = item.get("origin"), item.get("value")
        shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        tag = Html(f'<span class="tag{"" if origin == "default" else " accent"}">{safe(told(origin))}</span>')
        (defaults if origin == "default" else chosen).append([name, shown, tag, told(item.get("reason") or "")])
    body = table(columns, chosen) if chosen else ""
    body += fold(phrase("Defaults ({0})", plain(len(defaults))), table(columns, defaults)) if defaults else ""
    if recipe := run.text("recipe.yaml"):
        body += fold(phrase("Resolved recipe"), f"<pre>{safe(recipe, 50_000)}</pre>")
    return body or paragraph("todo", phrase("No recipe is stored in this run directory."))


def environment(run: RunFiles) -> str:
    facts = {own_label(name): value for name, value in run.files["environment"].items()}
    return pairs(facts) if facts else paragraph("todo", phrase("Not recorded."))
