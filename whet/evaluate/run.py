"""Base against tuned on held-out rows: the same prompts, the same model object, the adapter off and on.

Every answer is kept beside its reference, and every difference comes with its confidence interval.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whet.base.console import Progress, say
from whet.base.errors import UserError
from whet.base.files import write_text
from whet.data.example import Example
from whet.data.goldens import FILE as CONTRACT
from whet.data.goldens import check_contract
from whet.data.prepare import Prepared, prepare
from whet.data.template import use_template
from whet.data.tokenise import Tokeniser
from whet.engine.generate import answer
from whet.engine.load import load_config, load_model, load_tokenizer, longest_input
from whet.engine.open import Opened, open_trained
from whet.evaluate.compare import paired
from whet.evaluate.metrics import Scores, exact_match, score
from whet.recipe import Recipe
from whet.runs import Run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

USUAL_ROWS = 200


def evaluate(run: Run, *, max_rows: int | None = None) -> dict[str, Any]:
    """Score base and tuned model; writes results/evaluation.json and results/predictions.jsonl, returns the former.

    Raises UserError when there is nothing held out, the run is unfinished, or the tokenizer is not the trained one.
    """
    recipe = run.recipe
    prepared = _prepared(recipe)
    examples = _held_out(prepared, max_rows or recipe.eval.max_rows or USUAL_ROWS)
    tokeniser = prepared.tokeniser
    check_contract(tokeniser, run.trained / CONTRACT)
    prompts = [tokeniser.prompt(example.question) for example in examples]
    references = [example.answer for example in examples]
    limit = recipe.eval.max_new_tokens or max(8, int(1.25 * tokeniser.longest_reply(examples)) + 1)
    opened = open_trained(recipe.model, recipe.base, run.trained, recipe.method)
    options = {"stop_ids": tokeniser.stop_ids(), "max_new_tokens": limit}
    with Progress("answering", 2 * len(examples)) as bar:
        tuned = _answers(opened.answering, prompts, tokeniser, recipe, bar, "tuned", options)
        base = _base_answers(opened, prompts, tokeniser, recipe, bar, options)
    base, tuned = (
        [tokeniser.answered(example.question, text) for example, text in zip(examples, texts, strict=True)]
        for texts in (base, tuned)
    )
    scores = {name: score(texts, references, recipe.eval.metrics) for name, texts in (("base", base), ("tuned", tuned))}
    result = _result(scores, len(examples), limit)
    _write_predictions(run.results, examples, references, base, tuned)
    run.write("results/evaluation.json", result)
    return result


def _prepared(recipe: Recipe) -> Prepared:
    tokenizer = load_tokenizer(recipe.model)
    use_template(tokenizer, recipe.model.chat_template)
    return prepare(recipe.data, tokenizer, longest_input(load_config(recipe.model)))


def _held_out(prepared: Prepared, limit: int) -> list[Example]:
    if prepared.tokeniser.template is None:
        raise UserError(
            "raw text has no answers to score", field="data.format", found="text", expected="conversations",
            fix="the held-out loss is in metrics.jsonl",
        )  # fmt: skip
    if not prepared.held_out:
        raise UserError(
            "no rows are held out, so there is nothing to score on", field="data.val_size", found="0 held-out rows",
            expected="data.val_size above 0, or data.eval_dataset", fix="data.eval_dataset=FILE",
        )  # fmt: skip
    return prepared.held_out[:limit]


def _answers(
    network: PreTrainedModel, prompts: list[list[int]], tokeniser: Tokeniser, recipe: Recipe, bar: Progress,
    title: str, options: dict[str, Any],
) -> list[str]:  # fmt: skip
    ids = answer(
        network,
        prompts,
        batch_size=recipe.eval.per_device_eval_batch_size,
        done=lambda n: bar.advance(title, n),
        **options,
    )
    return tokeniser.tokenizer.batch_decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _base_answers(
    opened: Opened, prompts: list[list[int]], tokeniser: Tokeniser, recipe: Recipe, bar: Progress,
    options: dict[str, Any],
) -> list[str]:  # fmt: skip
    if opened.wrapped is not None:
        with opened.base_only():
            return _answers(opened.answering, prompts, tokeniser, recipe, bar, "base", options)
    network = load_model(recipe.model, opened.placement)
    return _answers(network, prompts, tokeniser, recipe, bar, "base", options)


def _result(scores: dict[str, Scores], rows: int, limit: int) -> dict[str, Any]:
    base, tuned = scores["base"], scores["tuned"]
    shared = [name for name in tuned.rows if name in base.rows]
    return {
        "rows": rows,
        "decoding": f"greedy, at most {limit} new tokens",
        "base": {"metrics": base.metrics},
        "tuned": {"metrics": tuned.metrics},
        "difference": {name: asdict(paired(base.rows[name], tuned.rows[name])) for name in shared},
        "skipped": tuned.skipped,
    }


def _write_predictions(
    results: Path, examples: list[Example], references: list[str], base: list[str], tuned: list[str]
) -> None:
    """predictions.jsonl: every answer beside its reference; mismatches.jsonl: those that are not exact."""
    lines, wrong = [], []
    flags = exact_match(tuned, references)
    for example, reference, before, after, flag in zip(examples, references, base, tuned, flags, strict=True):
        prompt = "\n\n".join(message.content for message in example.question)
        row = {"id": example.id, "prompt": prompt, "reference": reference, "base": before, "tuned": after}
        lines.append(json.dumps(row | {"exact": bool(flag)}, ensure_ascii=False) + "\n")
        wrong += [] if flag else [lines[-1]]
    write_text(results / "predictions.jsonl", "".join(lines))
    write_text(results / "mismatches.jsonl", "".join(wrong))


def show(result: dict[str, Any]) -> None:
    """The before/after table."""
    from rich.table import Table

    from whet.base.console import console

    table = Table(title=f"base against tuned, {result['rows']} held-out rows", title_justify="left")
    for name, justify in (("metric", "left"), ("base", "right"), ("tuned", "right"), ("difference", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name, value in result["tuned"]["metrics"].items():
        difference = result["difference"].get(name)
        interval = f"{difference['low']:+.3f} … {difference['high']:+.3f}" if difference else ""
        table.add_row(name, f"{result['base']['metrics'][name]:.3f}", f"{value:.3f}", interval)
    console().print(table)
    if result["skipped"]:
        say(f"not computed: {', '.join(result['skipped'])} (pip install 'whet[eval]')", style="dim")
