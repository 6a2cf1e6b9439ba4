"""Base against tuned on held-out rows: the same prompts, the same model object, the adapter off and on.

Every answer is written beside its reference, and every difference comes with its confidence interval.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

from whet import runs
from whet.base.console import say
from whet.base.errors import UserError
from whet.data.example import Example
from whet.data.prepare import Prepared
from whet.engine.answer.session import TextSession
from whet.evaluation.labels import evaluate_labels
from whet.evaluation.metrics import score
from whet.evaluation.sequences import evaluate_sequences
from whet.evaluation.texts import base_and_tuned, comparison, write_answers
from whet.opening import open_answerer
from whet.runs import Run

Split = Literal["eval", "test"]
USUAL_ROWS = 200
SHOWN_CONFUSIONS = 5


def evaluate(run: Run, *, max_rows: int | None = None, split: Split = "eval") -> dict[str, Any]:
    """Score base and tuned model; writes results/evaluation.json and results/predictions.jsonl, returns the former.

    split: the held-out rows, or those for a test, whose scores go to results/test.json.

    Of a labelled task every held-out row is read, since a row takes one pass; of written answers the first 200, unless
    `max_rows` or the recipe says otherwise. Raises UserError when there is nothing held out, the run is unfinished, or
    the tokenizer or the labels are not the trained ones.
    """
    recipe = run.recipe
    prepared = runs.rows_of(run)
    if split == "test":
        if not prepared.test_examples:
            raise UserError(
                "there are no test rows", field="data.test_size", found="0 test rows",
                expected="data.test_size above 0 when training, or data.test_dataset",
                fix="whet eval RUN without --split scores the held-out rows",
            )  # fmt: skip
        prepared = replace(prepared, evaluation=prepared.test, held_out=prepared.test_examples)
    task, limit = prepared.task, max_rows or recipe.eval.max_rows
    if task.name == "causal":
        result = _evaluate_written(run, prepared, limit or USUAL_ROWS)
    else:
        _require_rows(prepared)
        held = len(prepared.evaluation)
        if task.labelled:
            result = evaluate_labels(run, prepared, min(held, limit or held))
        else:
            result = evaluate_sequences(run, prepared, min(held, limit or USUAL_ROWS))
    result["split"] = split
    run.write("results/evaluation.json" if split == "eval" else "results/test.json", result)
    return result


def _evaluate_written(run: Run, prepared: Prepared, limit: int) -> dict[str, Any]:
    settings, row_tokenizer = run.recipe.eval, prepared.row_tokenizer
    examples = _held_out(prepared, limit)
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

    answerer = open_answerer(run, row_tokenizer=row_tokenizer, task=prepared.task)
    base, tuned = base_and_tuned(answerer, len(examples), write)
    scores = {name: score(texts, references, settings.metrics) for name, texts in (("base", base), ("tuned", tuned))}
    write_answers(run.results, examples, references, base, tuned)
    return comparison(scores, len(examples), longest)


def _held_out(prepared: Prepared, limit: int) -> Sequence[Example]:
    if prepared.row_tokenizer.template is None:
        raise UserError(
            "raw text has no answers to score", field="data.format", found="text", expected="conversations",
            fix="the held-out loss is in metrics.jsonl",
        )  # fmt: skip
    _require_rows(prepared)
    return prepared.held_out[:limit]


def _require_rows(prepared: Prepared) -> None:
    if not prepared.held_out:
        raise UserError(
            "no rows are held out, so there is nothing to score on", field="data.val_size", found="0 held-out rows",
            expected="data.val_size above 0, or data.eval_dataset", fix="data.eval_dataset=FILE",
        )  # fmt: skip


def print_scores(result: dict[str, Any]) -> None:
    """Print the table of base against tuned."""
    from rich.table import Table

    from whet.base.console import console

    before = "baseline" if "baseline" in result else "base"
    table = Table(title=f"{before} against tuned, {result['rows']} held-out rows", title_justify="left")
    for name, justify in (("metric", "left"), (before, "right"), ("tuned", "right"), ("difference", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name, value in result["tuned"]["metrics"].items():
        difference = result["difference"].get(name)
        interval = f"{difference['low']:+.3f} … {difference['high']:+.3f}" if difference else ""
        table.add_row(name, f"{result['base']['metrics'][name]:.3f}", f"{value:.3f}", interval)
    console().print(table)
    if "baseline" in result:
        say(f"baseline: {result['baseline']}", style="dim")
    for pair in result.get("labels", {}).get("most_confused", [])[:SHOWN_CONFUSIONS]:
        say(f"  {pair['reference']} taken for {pair['predicted']}: {pair['rows']}")
    if result["skipped"]:
        say(f"not computed: {', '.join(result['skipped'])} (pip install 'whet[eval]')", style="dim")
