"""Base against tuned for models that write a sequence from a sequence: the sources as they were trained on, encoded.

The base is pretrained for writing, so it is asked too, unlike one with a new head for labels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from whet.data.prepare import Prepared
from whet.engine.answer.encoder_decoder import EncoderDecoderSession
from whet.engine.answer.session import TextSession
from whet.evaluation.metrics import score
from whet.evaluation.texts import base_and_tuned, comparison, write_answers
from whet.opening import open_answerer
from whet.runs import Run


def evaluate_sequences(run: Run, prepared: Prepared, rows: int) -> dict[str, Any]:
    """Score base and tuned on the first `rows` held-out rows; writes the answers, returns the evaluation."""
    recipe, task, tokenizer = run.recipe, prepared.task, prepared.row_tokenizer.tokenizer
    sources = [prepared.evaluation.row(index)[0] for index in range(rows)]
    examples = [prepared.held_out[int(source)] for source in prepared.evaluation.sources[:rows]]
    assert prepared.evaluation.answers is not None, "rows of an encoder-decoder have answers"
    longest = int(prepared.evaluation.answers.lengths[:rows].max())
    limit = recipe.eval.max_new_tokens or max(8, int(1.25 * longest) + 1)

    def write(session: TextSession, done: Callable[[int], None]) -> list[str]:
        assert isinstance(session, EncoderDecoderSession)
        ids = session.answer(
            sources, max_new_tokens=limit, batch_size=recipe.eval.per_device_eval_batch_size, done=done
        )
        return tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    base, tuned = base_and_tuned(open_answerer(run, row_tokenizer=prepared.row_tokenizer, task=task), rows, write)
    references = [example.answer for example in examples]
    scores = {name: score(texts, references, recipe.eval.metrics) for name, texts in (("base", base), ("tuned", tuned))}
    write_answers(run.results, examples, references, base, tuned)
    return {"task": task.name, **comparison(scores, rows, limit)}
