"""Answers of a run to rows that nobody has answered: labels, values or texts, one for each row of input.

Rows are answered and written a few batches at a time, in their order, each under its row's number. Texts become tokens
as they did in training, `data.max_length` included; a run that was trained on conversations answers each row as a
conversation of its own, one that was trained on raw text goes on with it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whet.base.console import Progress, say, write_error
from whet.base.errors import UserError
from whet.base.language import translated
from whet.data.batch.padded import source_text
from whet.data.labels import encode_texts, encode_typed
from whet.data.template.row_tokenizer import RowTokenizer
from whet.engine.answer.encoder_decoder import EncoderDecoderSession
from whet.engine.answer.generate import DecoderSession
from whet.engine.answer.logits import LabelSession, decisions, probabilities
from whet.engine.answer.session import session
from whet.engine.load.load import longest_input
from whet.engine.load.open import check_trained
from whet.engine.task import Task
from whet.opening import Answerer, open_answerer, tell
from whet.runs import Run, chat_tokenizer
from whet.ship.answer_file import check_out, writer
from whet.ship.questions import STANDARD_INPUT, Asks, Question, decoded, in_file, in_lines

BATCHES_TOGETHER = 8  # sorted by length among themselves
LONGEST_ANSWER = 256


@dataclass(frozen=True)
class Wanted:
    """What is wanted of each row. top: the likeliest classes alone, None: all; max_new_tokens: longest text."""

    top: int | None = None
    max_new_tokens: int = LONGEST_ANSWER


@dataclass(frozen=True)
class Predictor:
    """A trained model that answers rows, in a session that lasts until the predictor is closed."""

    answerer: Answerer
    session: LabelSession | EncoderDecoderSession | DecoderSession
    batch_size: int
    max_length: int | None
    wanted: Wanted = Wanted()

    def __enter__(self) -> Predictor:
        return self

    def __exit__(self, *_: object) -> None:
        self.session.close()

    @property
    def task(self) -> Task:
        return self.answerer.opened.task

    def answers(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        """One object for each question, in order: row, and label and probability, or labels, value or text."""
        if isinstance(self.session, LabelSession):
            ids, types = self._encoded(questions)
            logits = self.session.logits(ids, types, batch_size=self.batch_size)
            said = labelled(self.task, logits, self.wanted.top)
        else:
            said = self._written(questions)
        tell(self.session)
        return [{"row": one.row, **answer} for one, answer in zip(questions, said, strict=True)]

    def _written(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        """The text written for each question; cut: it was not finished after `max_new_tokens`."""
        row_tokenizer, limit = self.answerer.row_tokenizer, self.wanted.max_new_tokens
        tokenizer: Any = row_tokenizer.tokenizer
        options: dict[str, Any] = {"max_new_tokens": limit, "batch_size": self.batch_size}
        if isinstance(self.session, EncoderDecoderSession):
            texts = [source_text(one.chat) for one in questions if one.chat is not None]
            written = self.session.answer(encode_texts(tokenizer, texts, max_length=self.max_length), **options)
            replies = tokenizer.batch_decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        else:
            assert isinstance(self.session, DecoderSession)
            prompts = [self._prompt(one) for one in questions]
            written = self.session.answer(prompts, stop_ids=row_tokenizer.stop_ids(), **options)
            replies = tokenizer.batch_decode(written, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            if row_tokenizer.template is not None:
                asked = [one.chat.unanswered for one in questions if one.chat is not None]
                replies = [row_tokenizer.answered(chat, reply) for chat, reply in zip(asked, replies, strict=True)]
        cut = [{"cut": True} if len(ids) >= limit else {} for ids in written]
        return [{"text": text, **more} for text, more in zip(replies, cut, strict=True)]

    def _prompt(self, question: Question) -> list[int]:
        """The tokens after which the model answers. Raises UserError for more than it can read."""
        row_tokenizer, chat = self.answerer.row_tokenizer, question.chat
        assert chat is not None
        if row_tokenizer.template is not None:
            ids = row_tokenizer.prompt(chat.unanswered)
        else:
            (row,) = row_tokenizer.texts([chat.question[-1].content])
            ids = row.ids[:-1].tolist()  # without the end: the model goes on
        readable = longest_input(self.answerer.opened.network.config)
        if readable is not None and len(ids) >= readable:
            raise UserError(
                "the prompt is longer than the model can read", file=question.file, row=question.row,
                found=f"{len(ids):,} tokens", expected=f"below {readable:,}", fix="shorten it, or leave the row out",
            )  # fmt: skip
        return ids

    def _encoded(self, questions: Sequence[Question]) -> tuple[list[Any], list[Any]]:
        """Token ids and types of each question; those with a second text are encoded as pairs."""
        rows: list[Any] = [None] * len(questions)
        for paired in (False, True):
            indices = [index for index, one in enumerate(questions) if (one.text_pair is not None) is paired]
            if not indices:
                continue
            pairs = [questions[index].text_pair or "" for index in indices] if paired else None
            texts = [questions[index].text for index in indices]
            encoded = encode_typed(self.answerer.row_tokenizer.tokenizer, texts, pairs, self.max_length)
            for index, row in zip(indices, encoded, strict=True):
                rows[index] = row
        return [ids for ids, _ in rows], [types for _, types in rows]


def open_predictor(run: Run, wanted: Wanted = Wanted()) -> Predictor:
    """The model of a run, ready to answer rows. Raises UserError."""
    recipe = run.recipe
    check_trained(run.trained)
    raw = RowTokenizer(chat_tokenizer(recipe.model), chat=False) if _learned_raw_text(run) else None
    answerer = open_answerer(run, row_tokenizer=raw)
    asked = session(answerer.opened)
    return Predictor(answerer, asked, recipe.eval.per_device_eval_batch_size, recipe.data.max_length, wanted)


def _learned_raw_text(run: Run) -> bool:
    return run.task.name == "causal" and (run.read("data.json") or {}).get("format") == "text"


def labelled(task: Task, logits: NDArray[np.float32], top: int | None = None) -> list[dict[str, Any]]:
    """Logits [R, C] in words: of each row its value, or its label or labels and the probabilities of all, or of the
    `top` likeliest, these first."""
    decided = decisions(task, logits)
    if task.name == "regression":
        return [{"value": float(value)} for value in decided]
    rows = []
    for decision, shares in zip(decided, probabilities(task, logits), strict=True):
        sure = {name: round(float(share), 6) for name, share in zip(task.labels, shares, strict=True)}
        if task.name == "multi_label":
            said: dict[str, Any] = {"labels": [name for name, on in zip(task.labels, decision, strict=True) if on]}
        else:
            label = task.labels[decision]
            said = {"label": label, "probability": sure[label]}
        if top is not None:
            likeliest = np.argsort(-shares, kind="stable")[:top]
            sure = {task.labels[index]: sure[task.labels[index]] for index in likeliest}
        rows.append({**said, "probabilities": sure})
    return rows


def predict(
    predictor: Predictor, questions: Iterable[Question], together: int = BATCHES_TOGETHER
) -> Iterator[tuple[Question, dict[str, Any]]]:
    """Each question with its answer, in order, computed `together` batches at a time as they are asked for."""
    waiting = iter(questions)
    while chunk := list(islice(waiting, together * predictor.batch_size)):
        yield from zip(chunk, predictor.answers(chunk), strict=True)


def predict_file(
    run: Run, source: str, *, quiet: bool, out: str | None = None, table: bool = False, wanted: Wanted = Wanted(),
) -> list[dict[str, Any]]:  # fmt: skip
    """Answer the rows of a file, or of standard input for "-", on stdout or in the file `out`; with `quiet` returned.

    Every row of a file is checked before the model is loaded. A progress bar is shown where answers do not go to the
    same terminal. Raises UserError.
    """
    check_trained(run.trained)
    target = None if out is None else check_out(out, source, run)
    asks, person = Asks.of(run), source == STANDARD_INPUT and sys.stdin.isatty()
    total = None if source == STANDARD_INPUT else sum(1 for _ in in_file(source, asks))
    shown = total is not None and (quiet or out is not None or not sys.stdout.isatty())
    answers, cut = [], 0
    with (
        open_predictor(run, wanted) as predictor,
        writer(target, asks.task, table=table, top=wanted.top) as sink,
        Progress("predicting", total or 0) if shown else nullcontext() as bar,
    ):
        if person:
            write_error(translated("One text a line; Ctrl-D ends.\n"))
            predictor = replace(predictor, batch_size=1)
        questions = in_file(source, asks) if total is not None else _standard_input(asks)
        for question, answer in predict(predictor, questions, 1 if person else BATCHES_TOGETHER):
            cut += "cut" in answer
            if quiet:
                answers.append(answer)
            if not quiet or out is not None:
                sink.write(question, answer)
                sink.file.flush()
            if bar is not None:
                bar.advance()
    if cut:
        say(f"{cut:,} texts were cut after {wanted.max_new_tokens} tokens (--max-new-tokens N)", style="yellow")
    return answers


def _standard_input(asks: Asks) -> Iterator[Question]:
    return in_lines(decoded(sys.stdin.buffer, STANDARD_INPUT), STANDARD_INPUT, asks)
