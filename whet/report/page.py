"""Write a run directory as one HTML file that needs nothing else: no network, no other file, no other room of whet.

Every sentence comes from the files of the run; a missing part is named together with the command that makes it. All
text that comes from data passes `markup.safe`, and a content security policy lets only the page's own script run.
Gives up: interaction beyond hover.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from string import Template

from whet.base.files import write_text
from whet.report import charts
from whet.report.charts import (
    Curve,
    JsonObject,
    as_number,
    chart,
    label_of,
    part,
    plain,
    points_of,
    size_text,
    text_of,
)
from whet.report.labels import STYLE, classes, is_labelled, label_samples
from whet.report.markup import (
    LIST_LIMIT,
    Html,
    excerpt,
    fold,
    objects,
    pairs,
    paragraph,
    ratio,
    safe,
    score_text,
    spread,
    table,
)

SAMPLE_COUNT = 8
_RATES = {"accuracy", "match", "f1", "rate", "recall", "precision", "agreement", "rouge", "rouge1", "rouge2", "rougel"}
_LOWER_IS_BETTER = {"loss", "perplexity", "error", "errors", "kl", "wer", "cer", "mse", "mae"}


class RunFiles:
    """The files of a run directory. files: JSON objects by stem, empty if absent; lines: those of JSONL files by stem;
    problems: sentences on unreadable files."""

    def __init__(self, path: Path) -> None:
        self.path, self.problems = path, list[str]()
        self.files: dict[str, JsonObject] = {}
        self.lines: dict[str, list[JsonObject]] = {}
        for name in ("origins", "environment", "data", "plan", "finished", "results/evaluation", "results/merge"):
            try:
                content = json.loads(self.text(f"{name}.json") or "{}")
            except (ValueError, RecursionError):
                content = None
            if not isinstance(content, dict):
                self.problems.append(f"{name}.json is not a JSON object and was left out")
            self.files[Path(name).name] = content if isinstance(content, dict) else {}
        for name in ("metrics", "timing", "results/predictions"):
            self.lines[Path(name).name], unreadable = charts.read_records(path / f"{name}.jsonl")
            if unreadable:
                self.problems.append(f"{name}.jsonl: {plain(unreadable)} unreadable line(s) left out")

    def text(self, name: str) -> str:
        path = self.path / name
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    def todo(self, text: str, verb: str, recipe: bool = True, rest: str = "") -> Html:
        """A sentence on a step that has not been done yet, with the command that does it."""
        target = shlex.quote(str(self.path / "recipe.yaml" if recipe else self.path))
        return Html(f"{text} <code>{safe(f'whet {verb} {target}{rest}', 600)}</code>")


class Score:
    """One metric: base and tuned score, their difference and its interval. sure: the interval does not hold zero."""

    def __init__(self, evaluation: JsonObject, name: str) -> None:
        base, tuned = (as_number(part(evaluation, who, "metrics").get(name)) for who in ("base", "tuned"))
        difference = part(evaluation, "difference", name)
        keys = ("low", "high", "p_value", "mean_difference")
        low, high, self.p, change = (as_number(difference.get(key)) for key in keys)
        self.name, self.base, self.tuned, words = name, base, tuned, set(name.lower().split("_"))
        self.rate = bool(words & _RATES) and all(0 <= s <= 1 for s in (base, tuned) if s is not None)
        self.change = tuned - base if change is None and base is not None and tuned is not None else change
        self.better = ((self.change or 0) > 0) != bool(words & _LOWER_IS_BETTER)
        self.sure, self.span = False, ""
        if low is not None and high is not None:
            start = score_text(low, self.rate, True).removesuffix(" points")
            self.sure, self.span = not low <= 0 <= high, f"{start} to {score_text(high, self.rate, True)}"


def scores(run: RunFiles) -> list[Score]:
    evaluation = run.files["evaluation"]
    base, tuned = (part(evaluation, who, "metrics") for who in ("base", "tuned"))
    return [Score(evaluation, name) for name in {**tuned, **base}]


def verdict(run: RunFiles) -> tuple[str, str]:
    """A tone (good, bad or none) and the result in one sentence, which claims only what an interval supports."""
    measured = [score for score in scores(run) if score.tuned is not None]
    if not measured:
        return "", _training_verdict(run)
    first = next((s for s in measured if s.name.endswith("accuracy")), None)
    score = first or next((s for s in measured if s.name == "exact_match"), measured[0])
    rows = as_number(run.files["evaluation"].get("rows"))
    where = f" on {plain(rows)} held-out {'row' if rows == 1 else 'rows'}" if rows is not None else ""
    title, after = safe(label_of(score.name)), f"<b>{score_text(score.tuned, score.rate)}</b>"
    if "baseline" in run.files["evaluation"]:
        return _against_baseline(score, f"{title} is {after}{where}")
    if score.base is None or score.tuned is None:
        return "", f"{title} is {after}{where}. The base model was not measured, so the change is unknown."
    if score.base == score.tuned:
        return "", f"{title} is {after}{where}, before training and after."
    moved = "rose" if score.tuned > score.base else "fell"
    text = f"{title} {moved} from <b>{score_text(score.base, score.rate)}</b> to {after}{where}"
    if not score.span:
        return "", f"{text}. No confidence interval was computed, so this may be chance."
    if not score.sure:
        return "", f"{text}, but the confidence interval of the change, {score.span}, includes no change: not proven."
    return "good" if score.better else "bad", f"{text}. The confidence interval of the change is {score.span}."


def _against_baseline(score: Score, text: str) -> tuple[str, str]:
    """The verdict on a run whose base cannot answer: compared with one constant answer for all rows."""
    text += f"; one answer for all rows would have <b>{score_text(score.base, score.rate)}</b>"
    if not score.span:
        return "", f"{text}. No confidence interval was computed, so the difference may be chance."
    if not score.sure:
        return "", f"{text}, and the confidence interval of the difference, {score.span}, includes none: not proven."
    return "good" if score.better else "bad", f"{text}. The confidence interval of the difference is {score.span}."


def _training_verdict(run: RunFiles) -> str:
    metrics, finished = run.lines["metrics"], run.files["finished"]
    steps = points_of(metrics, "loss", "train")
    if not steps and not finished:
        return run.todo("Nothing has been trained yet:", "train")
    held_out = points_of(metrics, "eval_loss", "eval")
    losses = [value for _, value in held_out or steps if value is not None]
    moved = f" from <b>{plain(losses[0])}</b> to <b>{plain(losses[-1])}</b>." if len(losses) > 1 else ""
    moved = moved and f" {'Evaluation' if held_out else 'Training'} loss went{moved}"
    count = text_of(finished.get("steps", steps[-1][0] if steps else None))
    if not finished:
        return run.todo(f"Training has not finished; {count} steps are recorded.{moved} To train:", "train")
    how = "stopped early" if finished.get("stopped") == "early_stopping" else "finished"
    text = f"Training {how} after {count} steps.{moved} Whether the answers are better has not been measured:"
    return run.todo(text, "eval", recipe=False)


def _learned(run: RunFiles) -> tuple[str, str]:
    """(the unit that a loss is a mean over, the title of the count of targets): a row with labels is one target."""
    return ("row", "Labels learned") if part(run.files["data"], "labels") else ("supervised token", "Supervised tokens")


def head(run: RunFiles) -> str:
    finished, plan, (tone, sentence) = run.files["finished"], run.files["plan"], verdict(run)
    stages = {
        "data": ("Data checked", "Data not checked", run.files["data"]),
        "training": ("Trained", "Training not finished" if run.lines["metrics"] else "Not trained", finished),
        "results": ("Evaluated", "Not evaluated", scores(run)),
        "merge": ("Merged", "Not merged", run.files["merge"]),
    }
    links = "".join(
        f'<li class="{"done" if done else ""}"><a href="#{name}">{f"✓ {yes}" if done else no}</a></li>'
        for name, (yes, no, done) in stages.items()
    )
    share = ratio(plan.get("trainable_params"), plan.get("all_params"))
    facts = {
        "Steps": (text_of(finished.get("steps")), f"best at step {text_of(finished.get('best_step'))}"),
        "Training time": (charts.seconds_text(finished.get("seconds")), label_of(str(finished.get("stopped", "")))),
        _learned(run)[1]: (
            text_of(finished.get("supervised_tokens")),
            f"of {text_of(finished.get('tokens'))}" if _learned(run)[0] != "row" else "",
        ),
        "Peak memory": (
            size_text(finished.get("peak_memory_bytes")),
            f"{size_text(plan.get('peak_bytes'))} predicted",
        ),
        "Trainable parameters": (text_of(plan.get("trainable_params")), f"{score_text(share, True)} of all"),
    }
    tiles = "".join(
        f"<div><dt>{name}</dt><dd>{safe(value)} <small>{'' if '–' in note else safe(note)}</small></dd></div>"
        for name, (value, note) in facts.items()
        if value != "–"
    )
    problems = "".join(f'<p class="warn small">{safe(text)}</p>' for text in run.problems)
    tiles = f'<dl class="facts">{tiles}</dl>' if tiles else ""
    return f'<p class="verdict {tone}">{sentence}</p><ul class="stages">{links}</ul>{tiles}{problems}'


def results(run: RunFiles) -> str:
    rows, evaluation = [], run.files["evaluation"]
    for score in scores(run):
        colour = "" if not score.sure else "good-text" if score.better else "bad-text"
        change = Html(f'<span class="{colour}">{score_text(score.change, score.rate, True)}</span>')
        values = [score_text(value, score.rate) for value in (score.base, score.tuned)]
        p = "–" if score.p is None else "< 0.001" if score.p < 0.001 else plain(score.p, 2)
        rows.append([label_of(score.name), _track(score), *values, change, score.span or "–", p])
    if not rows:
        return paragraph("todo", run.todo("The answers have not been measured yet:", "eval", recipe=False))
    before, change = ("Baseline", "Difference") if "baseline" in evaluation else ("Base", "Change")
    columns = {"Metric": "key", "": ""}
    columns |= dict.fromkeys((before, "Tuned", change, "Confidence interval", "p"), "num")
    notes = [f"{safe(evaluation['rows'])} held-out rows"] if "rows" in evaluation else []
    notes += [safe(evaluation["decoding"])] if "decoding" in evaluation else []
    notes += [f"baseline: {safe(evaluation['baseline'])}"] if "baseline" in evaluation else []
    body = f'{paragraph("lead", "; ".join(notes))}<div class="card">{table(columns, rows)}</div>{classes(evaluation)}'
    skipped = evaluation.get("skipped")
    if isinstance(skipped, list) and skipped:
        items = "".join(f"<li>{safe(item)}</li>" for item in skipped[:LIST_LIMIT])
        body += fold(f"Skipped ({plain(len(skipped))})", f"<ul>{items}</ul>")
    return body


def _track(score: Score) -> Html:
    """A line from 0 to 100 %: ring at the base score, dot at the tuned one."""
    if not score.rate or score.base is None or score.tuned is None:
        return Html("")
    base, tuned = 100 * score.base, 100 * score.tuned
    between = f'<i style="left:{min(base, tuned):.1f}%;width:{abs(tuned - base):.1f}%"></i>'
    ends = f'<b class="from" style="left:{base:.1f}%"></b><b style="left:{tuned:.1f}%"></b>'
    return Html(f'<span class="range" aria-hidden="true">{between}{ends}</span>')


def training(run: RunFiles) -> str:
    metrics, timing, best = run.lines["metrics"], run.lines["timing"], as_number(run.files["finished"].get("best_step"))

    def single(title: str, points: Sequence[charts.Point], unit: str = "", is_bytes: bool = False) -> str:
        return chart(title, [Curve(title.lower(), points)], unit, is_bytes=is_bytes, from_zero=True)

    drawn = (
        chart("Loss", charts.loss_curves(metrics), f"per {_learned(run)[0]}", best_step=best),
        single("Learning rate", points_of(metrics, "learning_rate", "train")),
        single("Gradient norm", points_of(metrics, "grad_norm", "train")),
        single("Memory", points_of(timing, "memory_bytes"), is_bytes=True),
        single("Speed", points_of(timing, "tokens_per_second"), "tokens/s"),
    )
    body = f'<div class="charts">{"".join(drawn)}</div>'
    return body if any(drawn) else paragraph("todo", run.todo("No step has been recorded yet:", "train"))


def samples(run: RunFiles) -> str:
    rows = run.lines["predictions"]
    if not rows:
        return paragraph("todo", run.todo("No answers have been written yet:", "eval", recipe=False))
    if any(map(is_labelled, rows)):
        return label_samples([row for row in rows if is_labelled(row)])
    right, wrong = ([row for row in rows if _is_exact(row) == exact] for exact in (True, False))
    bad = spread(wrong, max(SAMPLE_COUNT // 2, SAMPLE_COUNT - len(right)))
    good = spread(right, SAMPLE_COUNT - len(bad))
    note = (
        f"{plain(len(right))} of {plain(len(rows))} tuned answers match the reference exactly. Shown: {len(bad)} that "
    )
    note += f"do not and {len(good)} that do, taken at even distances through the file."
    return paragraph("lead", note) + "".join(_sample(row) for pair in zip_longest(bad, good) for row in pair if row)


def _is_exact(row: JsonObject) -> bool:
    return row.get("exact", row.get("tuned") == row.get("reference")) is True


def _sample(row: JsonObject) -> str:
    css, badge = ("good", "✓ exact") if _is_exact(row) else ("bad", "✗ differs")
    answers = "".join(
        f'<div class="{key} {css}"><h4>{label_of(key)}</h4><p dir="auto">{excerpt(row.get(key))}</p></div>'
        for key in ("base", "tuned", "reference")
    )
    title = f'<header><b>{safe(row.get("id"), 80)}</b><span class="tag {css}">{badge}</span></header>'
    prompt = f'<p class="prompt" dir="auto">{excerpt(row.get("prompt"))}</p>'
    return f'<article class="card sample">{title}{prompt}<div class="answers">{answers}</div></article>'


def data(run: RunFiles) -> str:
    ledger = run.files["data"]
    if not ledger:
        return paragraph("todo", run.todo("The data has not been checked yet:", "data check"))
    share = None if part(ledger, "labels") else ratio(ledger.get("supervised_tokens"), ledger.get("tokens"))
    note = f"The model learns from {score_text(share, True)} of the tokens; the rest is context." if share else ""
    groups = {key: value for key, value in ledger.items() if isinstance(value, dict)}
    items = {key: value for key, value in ledger.items() if key != "files" and key not in groups}
    for key in items:
        if key.startswith(("rows_without", "rows_over", "tokens_lost")):
            items[key] = Html(f'<span class="{"bad-text" if items[key] else "good-text"}">{safe(items[key])}</span>')
    body = paragraph("lead", note) + pairs(items)
    for key, group in groups.items():
        body += f"<h3>{safe(label_of(key))}</h3>{pairs(group)}"
    rows = [[f.get("path"), f.get("rows"), text_of(f.get("sha256"))[:16]] for f in objects(ledger, "files")]
    files = table({"Path": "key", "Rows": "num", "SHA-256, first 16": "code num"}, rows)
    return body + (f"<h3>Files</h3>{files}" if rows else "")


def memory(run: RunFiles) -> str:
    plan = run.files["plan"]
    seen = [value for _, value in points_of(run.lines["timing"], "memory_bytes") if value is not None]
    measured = as_number(run.files["finished"].get("peak_memory_bytes")) or max(seen, default=None)
    if not plan:
        return paragraph("todo", run.todo("No plan has been made yet:", "plan"))
    predicted = as_number(plan.get("peak_bytes"))
    classes = {label_of(name): as_number(value) or 0.0 for name, value in part(plan, "memory").items()}
    largest = max(*classes.values(), predicted or 0, measured or 0, 1)
    rows: list[list[object]] = []
    for name, value in {**classes, "Predicted peak": predicted, "Measured peak": measured}.items():
        css = "bar measured" if name.startswith("Measured") else "bar"
        bar = f'<span class="{css}" aria-hidden="true"><i style="width:{100 * (value or 0) / largest:.1f}%"></i></span>'
        rows.append([name, Html(bar), size_text(value)])
    note = "The peak has not been measured yet: no step is recorded."
    if measured and predicted:
        off = 100 * (predicted - measured) / measured
        note = f"Predicted {size_text(predicted)}, measured {size_text(measured)}: the plan was "
        note += f"{plain(abs(off), 2)} % too {'high' if off > 0 else 'low'}." if off else "exact."
    return f'{paragraph("lead", note)}<div class="card">{table({"Part": "key", "": "wide", "Size": "num"}, rows)}</div>'


_CERTIFIED = {  # what a certificate says of a candidate -> its column and whether it is a share
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


def write_page(run_dir: Path) -> Path:
    """Write `run_dir`/report.html, whole or not at all, and return its path."""
    run, here = RunFiles(run_dir), Path(__file__).parent
    template = (here / "page.html").read_text(encoding="utf-8")
    script = template.split("<script>")[1].split("</script>")[0]
    sections = (head, results, training, samples, data, memory, merge, settings, environment)
    page = Template(template).substitute(
        {section.__name__: section(run) for section in sections},
        title=safe(run_dir.resolve().name, 120),
        style=(here / "page.css").read_text(encoding="utf-8") + STYLE,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        run_dir=safe(str(run_dir)),
    )
    write_text(run_dir / "report.html", page)
    return run_dir / "report.html"
