"""Scores of base and tuned: how a metric is called and scaled, one metric in a sentence, all of them in a table.

Every share stands in per cent, whatever the metric is called; a name is the one that the field uses.
"""

from __future__ import annotations

from whet.base.language import phrase
from whet.report.charts import JsonObject, as_number, label_of, part, plain
from whet.report.labels import classes
from whet.report.markup import LIST_LIMIT, Html, fold, number_text, paragraph, safe, score_text, table, told
from whet.report.run_files import Evaluation

_RATES = {
    "accuracy", "match", "f1", "rate", "recall", "precision", "agreement", "rouge", "rouge1", "rouge2", "rougel",
    "bleu", "chrf",
}  # fmt: skip
_LOWER_IS_BETTER = {"loss", "perplexity", "error", "errors", "kl", "wer", "cer", "mse", "mae"}
_NAMES = {
    "rouge_l": "ROUGE-L", "bleu": "BLEU", "chrf": "chrF", "mcc": "MCC", "mse": "MSE", "mae": "MAE", "r2": "R²",
    "token_f1": "Token F1", "macro_f1": "Macro F1", "micro_f1": "Micro F1", "pearson": "Pearson correlation",
    "spearman": "Spearman correlation", "loss": "Loss per token", "perplexity": "Perplexity",
    "exact_match": "Exact match", "accuracy": "Accuracy", "balanced_accuracy": "Balanced accuracy",
    "subset_accuracy": "Subset accuracy", "hamming_accuracy": "Hamming accuracy",
}  # fmt: skip
FIRST = ("loss", "perplexity")
_OF_FIELD = "_accuracy"  # in the name of a metric that counts one field of the answers


def metric_name(name: str) -> str:
    """A metric as people call it; one that the user computes keeps its name, as a field of the answers does."""
    if name in _NAMES:
        return phrase(_NAMES[name])
    field = name.removesuffix(_OF_FIELD)
    return phrase("{0} accuracy", label_of(field)) if field not in ("", name) else label_of(name)


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
            ends = number_text(low, self.rate, True), score_text(high, self.rate, True)
            self.sure, self.span = not low <= 0 <= high, phrase("{0} to {1}", *ends)


def scores(evaluation: JsonObject) -> list[Score]:
    """All metrics, those of the loss first."""
    base, tuned = (part(evaluation, who, "metrics") for who in ("base", "tuned"))
    names = {**tuned, **base}
    return [Score(evaluation, name) for name in sorted(names, key=lambda name: name not in FIRST)]


def head_score(evaluation: JsonObject) -> Score | None:
    """The metric to look at first: as the evaluation says, else an accuracy, else exact match."""
    measured = [score for score in scores(evaluation) if score.tuned is not None]
    chosen = next((score for score in measured if score.name == evaluation.get("head")), None)
    first = chosen or next((score for score in measured if score.name.endswith("accuracy")), None)
    return first or next((s for s in measured if s.name == "exact_match"), measured[0] if measured else None)


def sentence(evaluation: Evaluation) -> tuple[str, str] | None:
    """A tone (good, bad or none) and the result in one sentence, which claims only what an interval supports."""
    score, where = head_score(evaluation.scores), evaluation.counted
    if score is None:
        return None
    title, after = safe(metric_name(score.name)), score_text(score.tuned, score.rate)
    now = phrase("{0} is <b>{1}</b>{2}", title, after, where)
    if "baseline" in evaluation.scores:
        return _against_baseline(score, now)
    if score.base is None or score.tuned is None:
        return "", phrase("{0}. The base model was not measured, so the change is unknown.", now)
    if score.base == score.tuned:
        return "", phrase("{0}, before training and after.", now)
    said = title, score_text(score.base, score.rate), after, _perplexity(evaluation, score), where
    text = phrase("{0} fell from <b>{1}</b> to <b>{2}</b>{3}{4}", *said)
    if score.tuned > score.base:
        text = phrase("{0} rose from <b>{1}</b> to <b>{2}</b>{3}{4}", *said)
    if not score.span:
        return "", phrase("{0}. No confidence interval was computed, so this may be chance.", text)
    if not score.sure:
        return "", phrase(
            "{0}, but the confidence interval of the change, {1}, includes no change: not proven.", text, score.span
        )
    tone = "good" if score.better else "bad"
    return tone, phrase("{0}. The confidence interval of the change is {1}.", text, score.span)


def _perplexity(evaluation: Evaluation, score: Score) -> str:
    """ " (perplexity 22 to 3.3)" beside a loss."""
    other = Score(evaluation.scores, "perplexity")
    if score.name != "loss" or other.base is None or other.tuned is None:
        return ""
    return phrase(" (perplexity {0} to {1})", plain(other.base, 3), plain(other.tuned, 3))


def _against_baseline(score: Score, text: str) -> tuple[str, str]:
    """The verdict on a run whose base cannot answer: compared with one constant answer for all rows."""
    before = score_text(score.base, score.rate)
    text = phrase("{0}; one answer for all rows would have <b>{1}</b>", text, before)
    if not score.span:
        return "", phrase("{0}. No confidence interval was computed, so the difference may be chance.", text)
    if not score.sure:
        return "", phrase(
            "{0}, and the confidence interval of the difference, {1}, includes none: not proven.", text, score.span
        )
    tone = "good" if score.better else "bad"
    return tone, phrase("{0}. The confidence interval of the difference is {1}.", text, score.span)


def score_section(evaluation: Evaluation) -> str:
    """The table of all metrics, and for labels the classes and confusions."""
    rows, found = [], evaluation.scores
    for score in scores(found):
        colour = "" if not score.sure else "good-text" if score.better else "bad-text"
        change = Html(f'<span class="{colour}">{score_text(score.change, score.rate, True)}</span>')
        values = [score_text(value, score.rate) for value in (score.base, score.tuned)]
        p = "–" if score.p is None else "< 0.001" if score.p < 0.001 else plain(score.p, 2)
        rows.append([metric_name(score.name), _track(score), *values, change, score.span or "–", p])
    before, change = phrase("Base"), phrase("Change")
    if "baseline" in found:
        before, change = phrase("Baseline"), phrase("Difference")
    columns = {phrase("Metric"): "key", "": ""}
    columns |= dict.fromkeys((before, phrase("Tuned"), change, phrase("Confidence interval"), "p"), "num")
    notes = "; ".join(_notes(evaluation))
    body = f'{paragraph("lead", notes)}<div class="card">{table(columns, rows)}</div>{classes(found)}'
    skipped = found.get("skipped")
    if isinstance(skipped, list) and skipped:
        items = "".join(f"<li>{safe(item)}</li>" for item in skipped[:LIST_LIMIT])
        body += fold(phrase("Skipped ({0})", plain(len(skipped))), f"<ul>{items}</ul>")
    return body


def _notes(evaluation: Evaluation) -> list[str]:
    """The rows that were scored, how they were answered, and what they are compared with."""
    found = evaluation.scores
    notes = [phrase("{0} {1}", safe(found["rows"]), safe(evaluation.of))] if "rows" in found else []
    conversations = as_number(found.get("conversations"))
    if conversations is not None and conversations != found.get("rows"):
        notes.append(phrase("answers of {0} conversations", plain(conversations)))
    notes += [safe(told(found["decoding"]))] if "decoding" in found else []
    notes += [phrase("baseline: {0}", safe(told(found["baseline"])))] if "baseline" in found else []
    return notes


def _track(score: Score) -> Html:
    """A line from 0 to 100 %: ring at the base score, dot at the tuned one."""
    if not score.rate or score.base is None or score.tuned is None:
        return Html("")
    base, tuned = 100 * score.base, 100 * score.tuned
    between = f'<i style="left:{min(base, tuned):.1f}%;width:{abs(tuned - base):.1f}%"></i>'
    ends = f'<b class="from" style="left:{base:.1f}%"></b><b style="left:{tuned:.1f}%"></b>'
    return Html(f'<span class="range" aria-hidden="true">{between}{ends}</span>')
