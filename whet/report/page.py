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
from whet.base.language import korean, phrase, written
from whet.report import charts
from whet.report.charts import Curve, as_number, chart, own_label, part, plain, points_of, size_text, text_of
from whet.report.facts import data, environment, is_whole_process, memory, merge, predicted_peak, settings
from whet.report.labels import STYLE
from whet.report.markup import Html, capital, paragraph, ratio, safe, score_text
from whet.report.run_files import Evaluation, RunFiles
from whet.report.samples import sample_section
from whet.report.scores import score_section, sentence

__all__ = ("safe", "write_page")

SAMPLES_OF_OTHERS = 4
_HEADINGS = {
    "results": "Before and after", "training": "Training", "samples": "Sample answers", "data": "Data",
    "memory": "Memory, predicted and measured", "merge": "Merge certificate", "settings": "Settings",
    "environment": "Environment",
}  # fmt: skip
_IN_CONTENTS = {"memory": "Memory", "merge": "Merge"}  # shorter than the heading
_IDENTITY = {
    "model.path": "model", "method.name": "method", "data.dataset": "data", "train.learning_rate": "rate",
    "train.num_train_epochs": "epochs",
}  # fmt: skip


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
        return run.todo(phrase("Nothing has been trained yet:"), "train")
    held_out = points_of(metrics, "eval_loss", "eval")
    losses = [plain(value) for _, value in held_out or steps if value is not None]
    moved = ""
    if len(losses) > 1 and held_out:
        moved = phrase(" Evaluation loss went from <b>{0}</b> to <b>{1}</b>.", losses[0], losses[-1])
    elif len(losses) > 1:
        moved = phrase(" Training loss went from <b>{0}</b> to <b>{1}</b>.", losses[0], losses[-1])
    said = text_of(finished.get("steps", steps[-1][0] if steps else None)), moved
    if not finished:
        text = phrase("Training has not finished; {0} steps are recorded.{1} To train:", *said)
        return run.todo(text, "train")
    if finished.get("stopped") == "early_stopping":
        ended = phrase("Training stopped early after {0} steps.{1}", *said)
    else:
        ended = phrase("Training finished after {0} steps.{1}", *said)
    text = phrase("{0} Whether the answers are better has not been measured:", ended)
    return run.todo(text, "eval", recipe=False)


def _is_labelled(run: RunFiles) -> bool:
    """True if a row with its labels is one target, and the loss a mean over rows."""
    return bool(part(run.files["data"], "labels"))


def identity(run: RunFiles) -> str:
    """Model, data, method and rate in one line; what is not known is left out."""
    parts = {phrase(name): run.setting(path) for path, name in _IDENTITY.items()}
    told = [f"<span>{name} <b>{safe(value, 160)}</b></span>" for name, value in parts.items() if value]
    return f'<p class="identity">{"".join(told)}</p>' if told else ""


def head(run: RunFiles) -> str:
    tone, said = verdict(run)
    problems = "".join(f'<p class="warn small">{safe(text)}</p>' for text in run.problems)
    findings = run.files["finished"].get("findings")
    texts = [written(text) for text in (findings if isinstance(findings, list) else []) if isinstance(text, str)]
    noted = "".join(f'<p class="finding">{safe(capital(text), 600)}.</p>' for text in texts)
    return f'{identity(run)}<p class="verdict {tone}">{said}</p>{noted}{_stages(run)}{_tiles(run)}{problems}'


def _stages(run: RunFiles) -> str:
    unfinished = phrase("Training not finished") if run.lines["metrics"] else phrase("Not trained")
    stages = {
        "data": (phrase("Data checked"), phrase("Data not checked"), run.files["data"]),
        "training": (phrase("Trained"), unfinished, run.files["finished"]),
        "results": (phrase("Evaluated"), phrase("Not evaluated"), run.evaluations),
        "merge": (phrase("Merged"), phrase("Not merged"), run.files["merge"]),
    }
    links = "".join(
        f'<li class="{"done" if done else ""}"><a href="#{name}">{f"✓ {yes}" if done else no}</a></li>'
        for name, (yes, no, done) in stages.items()
    )
    return f'<ul class="stages">{links}</ul>'


def _tiles(run: RunFiles) -> str:
    finished, plan = run.files["finished"], run.files["plan"]
    share = ratio(plan.get("trainable_params"), plan.get("all_params"))
    predicted = phrase("{0} predicted", size_text(predicted_peak(plan)))
    learned, of = phrase("Learned tokens"), phrase("of {0}", text_of(finished.get("tokens")))
    if _is_labelled(run):
        learned, of = phrase("Labels learned"), ""
    ended = own_label(str(finished.get("stopped", "")))
    best = phrase("best at step {0}", text_of(finished.get("best_step")))
    facts = {
        phrase("Steps"): (text_of(finished.get("steps")), best),
        phrase("Training time"): (charts.seconds_text(finished.get("seconds")), ended),
        learned: (text_of(finished.get("supervised_tokens")), of),
        phrase("Peak memory"): (
            size_text(finished.get("peak_memory_bytes")),
            phrase("of the whole process") if is_whole_process(run) else predicted,
        ),
        phrase("Trainable parameters"): (
            text_of(plan.get("trainable_params")), phrase("{0} of all", _share_text(share)),
        ),
    }  # fmt: skip
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
        return paragraph("todo", run.todo(phrase("The held-out rows have not been scored:"), "eval", recipe=False))
    return paragraph("todo", run.todo(phrase("The answers have not been measured yet:"), "eval", recipe=False))


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

    unit = phrase("per row") if _is_labelled(run) else phrase("per learned token")
    drawn = (
        chart(phrase("Loss"), charts.loss_curves(metrics), unit, best_step=best),
        single(phrase("Learning rate"), points_of(metrics, "learning_rate", "train")),
        single(phrase("Gradient norm"), points_of(metrics, "grad_norm", "train")),
        single(phrase("Memory"), points_of(timing, "memory_bytes"), is_bytes=True),
        single(phrase("Speed"), points_of(timing, "tokens_per_second"), phrase("tokens/s")),
    )
    body = f'<div class="charts">{"".join(drawn)}</div>'
    return body if any(drawn) else paragraph("todo", run.todo(phrase("No step has been recorded yet:"), "train"))


def samples(run: RunFiles) -> str:
    if not run.held_out.answers:
        return paragraph("todo", run.todo(phrase("No answers have been written yet:"), "eval", recipe=False))
    return sample_section(run.held_out.answers)


def contents(run: RunFiles) -> str:
    """Links to all sections."""
    titles = {key: phrase(title) for key, title in (_HEADINGS | _IN_CONTENTS).items()}
    titles = {"results": titles["results"], **{one.key: one.title for one in run.others}, **titles}
    links = "".join(f'<li><a href="#{key}">{safe(title, 60)}</a></li>' for key, title in titles.items())
    return Html(f"<ul>{links}</ul>")


def sections(run: RunFiles) -> str:
    """All sections with their headings, those of other rows after the results."""
    parts = (results, training, samples, data, memory, merge, settings, environment)
    shown = [
        f'<section id="{part.__name__}"><h2>{phrase(_HEADINGS[part.__name__])}</h2>{part(run)}</section>'
        for part in parts
    ]
    return "\n".join([shown[0], others(run), *shown[1:]])


def write_page(run_dir: Path) -> Path:
    """Write `run_dir`/report.html, whole or not at all, in the language that people read, and return its path."""
    run, here = RunFiles(run_dir), Path(__file__).parent
    template, _, script = (here / "page.html").read_text(encoding="utf-8").partition("<script>")
    script, _, end = script.partition("</script>")
    script = Template(script).substitute(step=phrase("step"))
    page = Template(template).substitute(
        language="ko" if korean() else "en",
        title=safe(run_dir.resolve().name, 120),
        style=(here / "page.css").read_text(encoding="utf-8") + STYLE,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        eyebrow=phrase("run report"),
        head=head(run),
        contents_name=phrase("Contents"),
        contents=contents(run),
        sections=sections(run),
        source=phrase("Everything here was read from <code>{0}</code>.", safe(str(run_dir))),
        alone=phrase("Nothing on this page is loaded from anywhere else."),
    )
    write_text(run_dir / "report.html", f"{page}<script>{script}</script>{end}")
    return run_dir / "report.html"
