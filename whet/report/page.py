"""Write a run directory as one HTML file that needs nothing else: no network, no other file, no other room of whet.

Every sentence comes from the files of the run; a missing part is named together with the command that makes it, and a
part without content has no heading. All text that comes from data passes `markup.safe`, and a content security policy
lets only the page's own script run. Gives up: interaction beyond hover.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from string import Template

from whet.base.files import write_text
from whet.report import charts
from whet.report.charts import Curve, as_number, chart, label_of, part, plain, points_of, size_text, text_of
from whet.report.facts import data, environment, is_whole_process, memory, merge, settings
from whet.report.labels import STYLE
from whet.report.markup import Html, paragraph, ratio, safe, score_text
from whet.report.run_files import Evaluation, RunFiles
from whet.report.samples import sample_section
from whet.report.scores import score_section, sentence

__all__ = ("safe", "write_page")

SAMPLES_OF_OTHERS = 4


def verdict(run: RunFiles) -> tuple[str, str]:
    """A tone (good, bad or none) and the result in one sentence, which claims only what an interval supports."""
    for evaluation in run.evaluations:
        said = sentence(evaluation)
        if said is not None:
            return said
    return "", _training_verdict(run)


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
    return ("row", "Labels learned") if part(run.files["data"], "labels") else ("learned token", "Learned tokens")


def identity(run: RunFiles) -> str:
    """Model, data, method and rate in one line; what is not known is left out."""
    parts = {
        "model": run.setting("model.path"), "method": run.setting("method.name"), "data": run.setting("data.dataset"),
        "rate": run.setting("train.learning_rate"), "epochs": run.setting("train.num_train_epochs"),
    }  # fmt: skip
    told = [f"<span>{name} <b>{safe(value, 160)}</b></span>" for name, value in parts.items() if value]
    return f'<p class="identity">{"".join(told)}</p>' if told else ""


def head(run: RunFiles) -> str:
    tone, said = verdict(run)
    problems = "".join(f'<p class="warn small">{safe(text)}</p>' for text in run.problems)
    findings = run.files["finished"].get("findings")
    noted = "".join(
        f'<p class="finding">{safe(text[:1].upper() + text[1:], 600)}.</p>'
        for text in (findings if isinstance(findings, list) else []) if isinstance(text, str)
    )  # fmt: skip
    return f'{identity(run)}<p class="verdict {tone}">{said}</p>{noted}{_stages(run)}{_tiles(run)}{problems}'


def _stages(run: RunFiles) -> str:
    unfinished = "Training not finished" if run.lines["metrics"] else "Not trained"
    stages = {
        "data": ("Data checked", "Data not checked", run.files["data"]),
        "training": ("Trained", unfinished, run.files["finished"]),
        "results": ("Evaluated", "Not evaluated", run.evaluations),
        "merge": ("Merged", "Not merged", run.files["merge"]),
    }
    links = "".join(
        f'<li class="{"done" if done else ""}"><a href="#{name}">{f"✓ {yes}" if done else no}</a></li>'
        for name, (yes, no, done) in stages.items()
    )
    return f'<ul class="stages">{links}</ul>'


def _tiles(run: RunFiles) -> str:
    finished, plan = run.files["finished"], run.files["plan"]
    share = ratio(plan.get("trainable_params"), plan.get("all_params"))
    predicted = "of the whole process" if is_whole_process(run) else f"{size_text(plan.get('peak_bytes'))} predicted"
    facts = {
        "Steps": (text_of(finished.get("steps")), f"best at step {text_of(finished.get('best_step'))}"),
        "Training time": (charts.seconds_text(finished.get("seconds")), label_of(str(finished.get("stopped", "")))),
        _learned(run)[1]: (
            text_of(finished.get("supervised_tokens")),
            f"of {text_of(finished.get('tokens'))}" if _learned(run)[0] != "row" else "",
        ),
        "Peak memory": (size_text(finished.get("peak_memory_bytes")), predicted),
        "Trainable parameters": (text_of(plan.get("trainable_params")), f"{_share_text(share)} of all"),
    }
    tiles = "".join(
        f"<div><dt>{name}</dt><dd>{safe(value)} <small>{'' if '–' in note else safe(note)}</small></dd></div>"
        for name, (value, note) in facts.items()
        if value != "–"
    )
    return f'<dl class="facts">{tiles}</dl>' if tiles else ""


def _share_text(share: float | None) -> str:
    """A share in per cent; one that is not 0 is never called 0."""
    if share is not None and 0 < share < 0.001:
        return f"{100 * share:.1g} %"
    return score_text(share, True)


def results(run: RunFiles) -> str:
    if run.held_out.measured:
        return score_section(run.held_out)
    if run.others:
        return paragraph("todo", run.todo("The held-out rows have not been scored:", "eval", recipe=False))
    return paragraph("todo", run.todo("The answers have not been measured yet:", "eval", recipe=False))


def others(run: RunFiles) -> str:
    """A section for each other choice of rows that was scored."""
    return "".join(_other(one) for one in run.others)


def _other(evaluation: Evaluation) -> str:
    said = sentence(evaluation)
    text = "" if said is None else f'<p class="said">{said[1]}</p>'
    answers = sample_section(evaluation.answers, SAMPLES_OF_OTHERS) if evaluation.answers else ""
    body = f"{text}{score_section(evaluation)}{answers}"
    return f'<section id="{evaluation.key}"><h2>{safe(evaluation.title, 120)}</h2>{body}</section>'


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
    if not run.held_out.answers:
        return paragraph("todo", run.todo("No answers have been written yet:", "eval", recipe=False))
    return sample_section(run.held_out.answers)


def contents(run: RunFiles) -> str:
    """Links to all sections."""
    sections = {"results": "Before and after"} | {one.key: one.title for one in run.others}
    sections |= {
        "training": "Training", "samples": "Sample answers", "data": "Data", "memory": "Memory", "merge": "Merge",
        "settings": "Settings", "environment": "Environment",
    }  # fmt: skip
    links = "".join(f'<li><a href="#{key}">{safe(title, 60)}</a></li>' for key, title in sections.items())
    return Html(f"<ul>{links}</ul>")


def write_page(run_dir: Path) -> Path:
    """Write `run_dir`/report.html, whole or not at all, and return its path."""
    run, here = RunFiles(run_dir), Path(__file__).parent
    template = (here / "page.html").read_text(encoding="utf-8")
    script = template.split("<script>")[1].split("</script>")[0]
    sections = (head, contents, results, others, training, samples, data, memory, merge, settings, environment)
    page = Template(template).substitute(
        {section.__name__: section(run) for section in sections},
        title=safe(run_dir.resolve().name, 120),
        style=(here / "page.css").read_text(encoding="utf-8") + STYLE,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        run_dir=safe(str(run_dir)),
    )
    write_text(run_dir / "report.html", page)
    return run_dir / "report.html"
