"""The tuned model of a labelled task on held-out rows, against the best answer that does not read them.

A base model has no head for the labels, and a random one says nothing: its accuracy measures the seed. So the baseline
is the best constant answer to the held-out rows themselves (the commonest class, for a number the mean), which is on
the strict side, and the result says that this stands in the place of the base. Rows are compared in pairs with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whet.base.console import Progress
from whet.base.errors import UserError, nearest
from whet.base.files import write_text
from whet.engine.answer.logits import Row, decisions, probabilities
from whet.engine.answer.session import label_session
from whet.engine.load.open import Opened
from whet.engine.task import Task
from whet.evaluation.compare import paired
from whet.evaluation.custom import ComputeMetrics, with_custom
from whet.evaluation.label_metrics import details, majority, score_classes, score_labels, score_values
from whet.evaluation.metrics import Scores
from whet.evaluation.rows import Chosen
from whet.opening import open_answerer, tell
from whet.runs import Run

_SCORES: dict[str, Callable[[Any, Any], Scores]] = {
    "classification": score_classes, "multi_label": score_labels, "regression": score_values,
}  # fmt: skip
_DECIDED = {
    "classification": "the likeliest class", "multi_label": "labels of a probability over one half",
    "regression": "the value of the head",
}  # fmt: skip
HEADLESS = "a base model has no head for these labels, and a random one says nothing"


def evaluate_labels(chosen: Chosen, rows: int, more: ComputeMetrics | None = None) -> dict[str, Any]:
    """Score the first `rows` rows; writes predictions and mismatches, returns the evaluation. Raises UserError when the
    labels of the data are not those that were trained on."""
    run, prepared = chosen.run, chosen.prepared
    recipe, task = run.recipe, prepared.task
    check_labels(run, task)
    opened = open_answerer(run, row_tokenizer=prepared.row_tokenizer, task=task).opened
    held = prepared.evaluation
    assert held.labels is not None, "rows of a labelled task have labels"
    spans, references = [held.span(index) for index in range(rows)], held.labels[:rows]
    types = None if held.types is None else [held.types[span] for span in spans]
    with Progress("labelling", rows) as bar:
        logits = predict(
            opened, [held.ids[span] for span in spans], recipe.eval.per_device_eval_batch_size, types,
            lambda count: bar.advance("", count),
        )  # fmt: skip
    predicted = decisions(task, logits)
    result = judge(task, predicted, references, recipe.eval.metrics)
    result["mismatches"] = _write_predictions(chosen, logits, predicted, references)
    named = [names_of(task, one) for one in references]
    constant = [names_of(task, one) for one in majority(references)]
    sides = {"base": constant, "tuned": [names_of(task, one) for one in predicted]}
    return with_custom(result, more, sides, named)


def predict(
    opened: Opened, rows: Sequence[Row], batch_size: int, types: Sequence[Row] | None = None,
    done: Callable[[int], None] | None = None,
) -> NDArray[np.float32]:  # fmt: skip
    """Logits [R, C] of `rows` of token ids, in the order given and whatever stands beside a row in its batch."""
    with label_session(opened) as session:
        logits = session.logits(rows, types, batch_size=batch_size, done=done)
        tell(session)
    expected = (len(rows), len(opened.task.labels) or 1)
    assert logits.shape == expected, f"{logits.shape} for {len(rows)} rows of {opened.task}"
    return logits


def check_labels(run: Run, task: Task) -> None:
    """Raises UserError unless `task`, as the data is read now, is the task of the run, label by label."""
    trained = run.task
    if trained == task or not run.trained.is_dir():
        return
    of_run, of_data = trained.name, task.name
    if trained.name == task.name:
        of_run, of_data = ", ".join(trained.labels), ", ".join(task.labels)
    raise UserError(
        "the labels of the data are not those that the run was trained on", file=str(run.trained / "labels.json"),
        found=of_data, expected=of_run, fix="evaluate with the data as it was when the run was trained",
    )  # fmt: skip


def judge(task: Task, predicted: NDArray[Any], references: NDArray[Any], names: Sequence[str] | None) -> dict[str, Any]:
    """Metrics of predictions and of the constant answer, their paired difference, and the tables per class.

    names: the metrics to keep, None for all. Raises UserError for one that the task does not have.
    """
    constant = majority(references)
    tuned, base = (_only(_SCORES[task.name](one, references), names) for one in (predicted, constant))
    result = {
        "task": task.name,
        "rows": len(references),
        "decoding": _DECIDED[task.name],
        "baseline": f"{_constant(task, constant[0])}, said of every row; {HEADLESS}",
        "base": {"metrics": base.metrics},
        "tuned": {"metrics": tuned.metrics},
        "difference": {name: asdict(paired(base.rows[name], rows)) for name, rows in tuned.rows.items()},
        "skipped": tuned.skipped,
    }
    if task.name != "regression":
        result["labels"] = details(predicted, references, task.labels)
    return result


def _only(scores: Scores, names: Sequence[str] | None) -> Scores:
    """The scores of these names, None for all."""
    if names is None:
        return scores
    for name in names:
        if name not in scores.metrics:
            near = nearest(name, scores.metrics)
            raise UserError(
                "the task has no such metric", field="eval.metrics", found=name, expected=", ".join(scores.metrics),
                fix=f"write {near}" if near else "remove it, or leave the choice to whet",
            )  # fmt: skip
    metrics = {name: scores.metrics[name] for name in names}
    return Scores(metrics, {name: rows for name, rows in scores.rows.items() if name in names}, scores.skipped)


def _constant(task: Task, said: Any) -> str:
    """The constant answer in words."""
    if task.name == "regression":
        return f"the mean of the references, {float(said):.4g}"
    if task.name == "multi_label":
        return f"the labels of over half of the rows ({', '.join(names_of(task, said)) or 'none'})"
    return f"the commonest class, {names_of(task, said)}"


def names_of(task: Task, answer: Any) -> Any:
    """A decision or reference as a person names it: a class, a list of labels, or a number."""
    if task.name == "regression":
        return float(answer)
    if task.name == "multi_label":
        return [name for name, on in zip(task.labels, answer, strict=True) if on]
    return task.labels[int(answer)]


def _write_predictions(
    chosen: Chosen, logits: NDArray[np.float32], predicted: NDArray[Any], references: NDArray[Any]
) -> int:
    """Write predictions.jsonl, every row with its label, what was predicted and how surely, and mismatches.jsonl, the
    wrong ones, for a regression the tenth with the largest errors. Returns the number of these."""
    prepared = chosen.prepared
    task = prepared.task
    sure = None if task.name == "regression" else _confidence(task, logits, predicted)
    lines, errors = [], []
    for index, (said, reference) in enumerate(zip(predicted, references, strict=True)):
        example = prepared.held_out[int(prepared.evaluation.sources[index])]
        row: dict[str, Any] = {"id": example.id, "text": example.text}
        row |= {} if example.text_pair is None else {"text_pair": example.text_pair}
        row |= {"label": names_of(task, reference), "predicted": names_of(task, said)}
        if sure is None:
            errors.append(abs(float(said) - float(reference)))
            row["error"] = errors[-1]
        else:
            errors.append(float(np.any(said != reference)))
            row |= {"probability": sure[index], "exact": not errors[-1]}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    order = sorted(range(len(lines)), key=lambda index: -errors[index])
    wrong = [index for index in order if errors[index] > 0]
    if sure is None:
        wrong = wrong[: (len(lines) + 9) // 10]
    write_text(chosen.path("predictions"), "".join(lines))
    write_text(chosen.path("mismatches"), "".join(lines[index] for index in wrong))
    return len(wrong)


def _confidence(task: Task, logits: NDArray[np.float32], predicted: NDArray[Any]) -> list[float]:
    """The probability of each predicted class; of labels that of the least sure decision about one of them."""
    sure = probabilities(task, logits)
    if task.name == "classification":
        picked = np.take_along_axis(sure, predicted[:, None], axis=1)[:, 0]
    else:
        picked = np.where(predicted == 1, sure, 1 - sure).min(axis=1)
    return [round(float(value), 6) for value in picked]
