"""Base against tuned for models that write a sequence from a sequence: the sources as they were trained on, encoded.

The base is pretrained for writing, so it is asked too, unlike one with a new head for labels.
"""

from __future__ import annotations

from typing import Any

from whet.base.console import Progress
from whet.data.prepare import Prepared
from whet.engine.answer.sequence import answer_sources
from whet.engine.load.load import load_model
from whet.engine.load.open import Opened, open_trained
from whet.evaluation.metrics import score
from whet.evaluation.texts import comparison, write_answers
from whet.runs import Run


def evaluate_sequences(run: Run, prepared: Prepared, rows: int) -> dict[str, Any]:
    """Score base and tuned on the first `rows` held-out rows; writes the answers, returns the evaluation."""
    recipe, task, tokenizer = run.recipe, prepared.task, prepared.tokeniser.tokenizer
    opened = open_trained(recipe.model, recipe.base, run.trained, recipe.method, task)
    sources = [prepared.evaluation.row(index)[0] for index in range(rows)]
    examples = [prepared.held_out[int(source)] for source in prepared.evaluation.sources[:rows]]
    assert prepared.evaluation.answers is not None, "rows of an encoder-decoder have answers"
    longest = int(prepared.evaluation.answers.lengths[:rows].max())
    limit = recipe.eval.max_new_tokens or max(8, int(1.25 * longest) + 1)

    def written(network: Any, title: str) -> list[str]:
        ids = answer_sources(
            network, sources, max_new_tokens=limit, batch_size=recipe.eval.per_device_eval_batch_size,
            done=lambda n: bar.advance(title, n),
        )  # fmt: skip
        return tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    with Progress("answering", 2 * rows) as bar:
        tuned = written(opened.answering, "tuned")
        base = _base(opened, run, prepared, written)
    references = [example.answer for example in examples]
    scores = {name: score(texts, references, recipe.eval.metrics) for name, texts in (("base", base), ("tuned", tuned))}
    write_answers(run.results, examples, references, base, tuned)
    return {"task": task.name, **comparison(scores, rows, limit)}


def _base(opened: Opened, run: Run, prepared: Prepared, written: Any) -> list[str]:
    if opened.wrapped is not None:
        with opened.base_only():
            return written(opened.answering, "base")
    return written(load_model(run.recipe.model, opened.placement, prepared.task), "base")
