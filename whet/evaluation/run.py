"""Base against tuned on rows that were not learned: the same questions, the same model object, the adapter off and on.

Every answer is written beside its reference, and every difference comes with its confidence interval. Of written
answers the loss and the perplexity are measured too, which alone say something of free text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from whet.base.errors import UserError
from whet.engine.answer.session import TextSession
from whet.evaluation.compare import paired
from whet.evaluation.custom import ComputeMetrics, with_custom
from whet.evaluation.labels import evaluate_labels
from whet.evaluation.likelihood import LOSS_METRICS, Losses, chosen_rows, losses_of_both, scored_rows
from whet.evaluation.metrics import score
from whet.evaluation.rows import HELD_OUT, Chosen, Split
from whet.evaluation.rows import chosen_rows as rows_to_score
from whet.evaluation.sequences import evaluate_sequences
from whet.evaluation.texts import Compared, asked, comparison, write_answers
from whet.evaluation.turns import turns_of
from whet.opening import open_answerer
from whet.runs import Run

USUAL_ROWS = 200


def evaluate(
    run: Run, *, max_rows: int | None = None, split: Split = "eval", data: Sequence[str] = (),
    compute_metrics: ComputeMetrics | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Score base and tuned model; writes the scores and every answer to `results/`, returns the scores.

    split: the held-out rows, or those for a test; data: files whose rows are scored instead. Each has results of its
    own (`evaluation.json`, `test.json`, `data-NAME-HASH.json`, with predictions beside them). compute_metrics: more
    metrics, from predictions and references.

    Of a labelled task every row is read, since a row takes one pass; of written answers the first 200, unless
    `max_rows` or the recipe says otherwise. Raises UserError when there is nothing to score, the run is unfinished, or
    the tokenizer or the labels are not the trained ones.
    """
    with rows_to_score(run, split, data) as chosen:
        task, limit = chosen.prepared.task, max_rows or run.recipe.eval.max_rows
        _require_rows(chosen)
        if task.name == "causal":
            result = _evaluate_written(chosen, limit, compute_metrics)
        elif task.labelled:
            held = len(chosen.prepared.evaluation)
            result = evaluate_labels(chosen, min(held, limit or held), compute_metrics)
        else:
            rows = min(len(chosen.prepared.evaluation), limit or USUAL_ROWS)
            result = evaluate_sequences(chosen, rows, compute_metrics)
        result |= {"split": split if not data else "data", "of": chosen.title}
        if data:
            result["files"] = [dict(entry) for entry in chosen.prepared.ledger.files]
        run.write(f"results/{chosen.name}.json", result)
    return result


def _evaluate_written(chosen: Chosen, limit: int | None, more: ComputeMetrics | None) -> dict[str, Any]:
    run, prepared = chosen.run, chosen.prepared
    settings, row_tokenizer = run.recipe.eval, prepared.row_tokenizer
    answerer = open_answerer(run, row_tokenizer=row_tokenizer, task=prepared.task)
    rows = prepared.evaluation
    losses = None
    if settings.metrics is None or not set(LOSS_METRICS).isdisjoint(settings.metrics):
        losses = losses_of_both(answerer, scored_rows(rows, chosen_rows(rows, limit)), None)
    if row_tokenizer.template is None:
        return _of_losses(losses)
    turns = turns_of(prepared.held_out, limit or USUAL_ROWS, run.recipe.data.loss_on)
    examples = turns.examples
    prompts = [row_tokenizer.prompt(example.unanswered) for example in examples]
    references = [example.answer for example in examples]
    longest = settings.max_new_tokens or max(8, int(1.25 * row_tokenizer.longest_reply(examples)) + 1)

    def write(session: TextSession, done: Callable[[int], None]) -> list[str]:
        ids = session.answer(
            prompts, stop_ids=row_tokenizer.stop_ids(), max_new_tokens=longest,
            batch_size=settings.per_device_eval_batch_size, done=done,
        )  # fmt: skip
        texts = row_tokenizer.tokenizer.batch_decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return [row_tokenizer.answered(example.unanswered, text) for example, text in zip(examples, texts, strict=True)]

    answers = asked(answerer, examples, write)
    names = None if settings.metrics is None else [name for name in settings.metrics if name not in LOSS_METRICS]
    scores = {name: score(texts, references, names) for name, texts in answers.sides.items()}
    write_answers(chosen, examples, references, answers)
    compared = Compared(scores, losses, settings.metrics, turns.by_conversation)
    result = comparison(compared, references, longest) | {"conversations": turns.conversations}
    return with_custom(result, more, answers.sides, references)


def _of_losses(losses: Losses | None) -> dict[str, Any]:
    """The evaluation of raw text, which has no answers to write."""
    if losses is None:
        raise UserError(
            "raw text has no answers to score", field="eval.metrics", found="metrics of answers",
            expected="loss, perplexity or auto", fix="eval.metrics=auto",
        )  # fmt: skip
    scores = losses.scores()
    base, tuned = scores["base"], scores["tuned"]
    return {
        "rows": len(losses.weights), "decoding": "the loss of the rows, nothing written", "head": "loss",
        "base": {"metrics": base.metrics}, "tuned": {"metrics": tuned.metrics},
        "difference": {"loss": asdict(paired(base.rows["loss"], tuned.rows["loss"]))}, "skipped": [],
    }  # fmt: skip


def _require_rows(chosen: Chosen) -> None:
    if chosen.name == HELD_OUT and not chosen.prepared.held_out:
        raise UserError(
            "no rows are held out, so there is nothing to score on", field="data.val_size", found="0 held-out rows",
            expected="data.val_size above 0, data.eval_dataset, or another file", fix="whet eval RUN --data FILE",
        )  # fmt: skip
    if not len(chosen.prepared.evaluation) and chosen.prepared.task.name != "causal":
        raise UserError("every row was left out, so there is nothing to score", fix="a larger data.max_length")
