"""Base against tuned for models that write a sequence from a sequence: the sources as they were trained on, encoded.

The base is pretrained for writing, so it is asked too, unlike one with a new head for labels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from whet.engine.answer.encoder_decoder import EncoderDecoderSession
from whet.engine.answer.session import TextSession
from whet.evaluation.custom import ComputeMetrics, with_custom
from whet.evaluation.likelihood import LOSS_METRICS, losses_of_both, scored_rows
from whet.evaluation.metrics import score
from whet.evaluation.rows import Chosen
from whet.evaluation.texts import Compared, asked, comparison, write_answers
from whet.opening import open_answerer


def evaluate_sequences(chosen: Chosen, rows: int, more: ComputeMetrics | None = None) -> dict[str, Any]:
    """Score base and tuned on the first `rows` rows; writes the answers, returns the evaluation."""
    prepared, settings = chosen.prepared, chosen.run.recipe.eval
    tokenizer = prepared.row_tokenizer.tokenizer
    sources = [prepared.evaluation.row(index)[0] for index in range(rows)]
    examples = [prepared.held_out[int(source)] for source in prepared.evaluation.sources[:rows]]
    assert prepared.evaluation.answers is not None, "rows of an encoder-decoder have answers"
    longest = int(prepared.evaluation.answers.lengths[:rows].max())
    limit = settings.max_new_tokens or max(8, int(1.25 * longest) + 1)

    def write(session: TextSession, done: Callable[[int], None]) -> list[str]:
        assert isinstance(session, EncoderDecoderSession)
        ids = session.answer(sources, max_new_tokens=limit, batch_size=settings.per_device_eval_batch_size, done=done)
        return tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    answerer = open_answerer(chosen.run, row_tokenizer=prepared.row_tokenizer, task=prepared.task)
    answers = asked(answerer, examples, write)
    losses = None
    if settings.metrics is None or not set(LOSS_METRICS).isdisjoint(settings.metrics):
        losses = losses_of_both(answerer, scored_rows(prepared.evaluation, range(rows)), None)
    references = [example.answer for example in examples]
    names = None if settings.metrics is None else [name for name in settings.metrics if name not in LOSS_METRICS]
    scores = {name: score(texts, references, names) for name, texts in answers.sides.items()}
    write_answers(chosen, examples, references, answers)
    result = comparison(Compared(scores, losses, settings.metrics), references, limit)
    return {"task": prepared.task.name, **with_custom(result, more, answers.sides, references)}
