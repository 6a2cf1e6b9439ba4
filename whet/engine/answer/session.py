"""Sessions: a loaded model that answers any number of questions and is put back as it was at the end.

    with session(opened) as asked:
        asked.answer(prompts, stop_ids=stop_ids, max_new_tokens=64, batch_size=32)
        with asked.base():
            asked.answer(prompts, stop_ids=stop_ids, max_new_tokens=64, batch_size=32)

For its life a session owns what answering needs beside the weights: evaluation mode, attention with a cache, dense
copies of quantised layers, the proof that cached decoding is right, the decoder with its cache and its graphs. The
first question sets it up, `close` puts it back; `answer.state` says how it never answers from another state of the
model. There is one class for each kind of model: `DecoderSession`, `EncoderDecoderSession`, `LabelSession`. What a
person should be told waits in `notices`. A model has one session at a time.

Where later work belongs, without a change for callers that are here now: sampling in `answer.choice` (and its settings
for transformers' `generate` in `answer.generate` and `answer.encoder_decoder`); rows that come and go in `answer.rows`
(admit, take out), `answer.static_cache` (a position for each row, rows aligned to the left, masks from lengths) and a
second loop in `answer.decode` (prompts in chunks between steps), which a decoder session would own beside `Decoder`.
"""

from __future__ import annotations

from whet.engine.answer.encoder_decoder import EncoderDecoderSession
from whet.engine.answer.generate import DEFAULT, DecoderSession, DecodingOptions
from whet.engine.answer.logits import LabelSession
from whet.engine.load.open import Opened

TextSession = DecoderSession | EncoderDecoderSession


def session(opened: Opened, options: DecodingOptions = DEFAULT) -> TextSession | LabelSession:
    """A session with an opened model, of the kind that its task asks for. options: for decoders."""
    return label_session(opened) if opened.task.labelled else text_session(opened, options)


def text_session(opened: Opened, options: DecodingOptions = DEFAULT) -> TextSession:
    """A session with a model that writes: a decoder, or an encoder-decoder."""
    assert not opened.task.labelled, f"a model for {opened.task.name} does not write"
    if opened.task.name == "seq2seq":
        return EncoderDecoderSession(opened.answering, opened.base_only)
    return DecoderSession(opened.answering, opened.base_only, options)


def label_session(opened: Opened) -> LabelSession:
    """A session with a model that has a head for labels or values."""
    assert opened.task.labelled, f"a model for {opened.task.name} has no head for labels"
    return LabelSession(opened.answering, opened.base_only)
