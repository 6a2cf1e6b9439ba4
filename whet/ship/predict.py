"""Labels, values or texts of a run for rows that nobody has labelled: one JSON object for each row of input.

Rows come as lines of text, or as JSON lines with `text` and perhaps `text_pair`; which of the two, the name of the file
or else its first line tells. They are read, answered and written a few batches at a time, so a file may be of any
length, and answers come in the order of the rows. Empty lines of text are passed over; each answer carries its row's
number. Texts become tokens as they did in training, `data.max_length` included.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from whet.base.console import Progress, write_error, write_json
from whet.base.errors import UserError, shorten
from whet.data.labels import encode_typed
from whet.engine.answer.encoder_decoder import EncoderDecoderSession
from whet.engine.answer.logits import LabelSession, decisions, probabilities
from whet.engine.answer.session import session
from whet.engine.task import Task
from whet.opening import Answerer, open_answerer, tell
from whet.runs import Run

BATCHES_TOGETHER = 8  # sorted by length among themselves
LONGEST_ANSWER = 256
_JSON_SUFFIXES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Input:
    """A row to answer: its text, a second text or None, and its number from 1 on."""

    text: str
    text_pair: str | None
    row: int


@dataclass(frozen=True)
class Predictor:
    """A trained model that answers rows, in a session that lasts until the predictor is closed."""

    answerer: Answerer
    session: LabelSession | EncoderDecoderSession
    batch_size: int
    max_length: int | None

    def __enter__(self) -> Predictor:
        return self

    def __exit__(self, *_: object) -> None:
        self.session.close()

    @property
    def task(self) -> Task:
        return self.answerer.opened.task

    def answers(self, inputs: Sequence[Input]) -> list[dict[str, Any]]:
        """One object for each input, in order: row, and label and probability, or labels, value or text."""
        ids, types = self._encoded(inputs)
        if isinstance(self.session, LabelSession):
            said = labelled(self.task, self.session.logits(ids, types, batch_size=self.batch_size))
        else:
            written = self.session.answer(ids, max_new_tokens=LONGEST_ANSWER, batch_size=self.batch_size)
            tokenizer: Any = self.answerer.row_tokenizer.tokenizer
            texts = tokenizer.batch_decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            said = [{"text": text} for text in texts]
        tell(self.session)
        return [{"row": one.row, **answer} for one, answer in zip(inputs, said, strict=True)]

    def _encoded(self, inputs: Sequence[Input]) -> tuple[list[Any], list[Any]]:
        """Token ids and types of each input; those with a second text are encoded as pairs."""
        rows: list[Any] = [None] * len(inputs)
        for paired in (False, True):
            indices = [index for index, one in enumerate(inputs) if (one.text_pair is not None) is paired]
            if not indices:
                continue
            if paired and self.task.name == "seq2seq":
                raise UserError(
                    "an encoder-decoder reads one text", row=inputs[indices[0]].row, field="text_pair",
                    fix="write both texts into text, as in training",
                )  # fmt: skip
            pairs = [inputs[index].text_pair or "" for index in indices] if paired else None
            texts = [inputs[index].text for index in indices]
            encoded = encode_typed(self.answerer.row_tokenizer.tokenizer, texts, pairs, self.max_length)
            for index, row in zip(indices, encoded, strict=True):
                rows[index] = row
        return [ids for ids, _ in rows], [types for _, types in rows]


def open_predictor(run: Run) -> Predictor:
    """The model of a labelled or sequence-to-sequence run. Raises UserError for a run that goes on with a text."""
    recipe, task = run.recipe, run.task
    if task.name == "causal" and run.trained.is_dir():
        raise UserError(
            "the run was trained to write answers in a conversation, not to label rows", file=str(run.path),
            expected="a run with labels, or one of an encoder-decoder", fix=f"whet chat {run.path}",
        )  # fmt: skip
    answerer = open_answerer(run)
    asked = session(answerer.opened)
    assert isinstance(asked, LabelSession | EncoderDecoderSession)
    return Predictor(answerer, asked, recipe.eval.per_device_eval_batch_size, recipe.data.max_length)


def labelled(task: Task, logits: NDArray[np.float32]) -> list[dict[str, Any]]:
    """Logits [R, C] in words: of each row its value, or its label or labels and the probabilities of all."""
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
        rows.append({**said, "probabilities": sure})
    return rows


def predict(
    predictor: Predictor, inputs: Iterable[Input], together: int = BATCHES_TOGETHER
) -> Iterator[dict[str, Any]]:
    """The answers to `inputs`, in order, computed `together` batches at a time as they are asked for."""
    waiting = iter(inputs)
    while chunk := list(islice(waiting, together * predictor.batch_size)):
        yield from predictor.answers(chunk)


def given(texts: Iterable[Any], file: str | None = None) -> Iterator[Input]:
    """Rows given in Python: texts, pairs of texts, or objects with `text` and `text_pair`. Raises UserError."""
    for row, value in enumerate(texts, 1):
        if isinstance(value, str):
            value = {"text": value}
        elif isinstance(value, tuple | list) and len(value) == 2:
            value = {"text": value[0], "text_pair": value[1]}
        yield _input(value, row, file)


def read_inputs(lines: Iterable[str], file: str) -> Iterator[Input]:
    """The rows of a file of text lines or JSON lines. Raises UserError with file and row for what is neither."""
    numbered = ((row, line.rstrip("\r\n")) for row, line in enumerate(lines, 1))
    filled = ((row, line) for row, line in numbered if line.strip())
    first = next(filled, None)
    if first is None:
        raise UserError("the input holds no rows", file=file, fix="give at least one line")
    as_json = Path(file).suffix.lower() in _JSON_SUFFIXES or _is_row(first[1])
    for row, line in chain([first], filled):
        yield _input(_parsed(line, row, file), row, file) if as_json else Input(line, None, row)


def predict_file(run: Run, source: str, *, quiet: bool) -> list[dict[str, Any]]:
    """Answer the rows of a file, or of standard input for "-"; one JSON line each on stdout, or with `quiet` a list.

    A progress bar is shown where answers do not go to the same terminal. Raises UserError for bad rows.
    """
    person = source == "-" and sys.stdin.isatty()
    total = None if source == "-" else _count(Path(source))
    shown = total is not None and (quiet or not sys.stdout.isatty())
    answers = []
    with (
        open_predictor(run) as predictor,
        _opened(source) as lines,
        Progress("predicting", total or 0) if shown else nullcontext() as bar,
    ):
        if person:
            write_error("One text a line; Ctrl-D ends.\n")
            predictor = replace(predictor, batch_size=1)
        inputs = read_inputs(_decoded(lines, source), source)
        for answer in predict(predictor, inputs, 1 if person else BATCHES_TOGETHER):
            if quiet:
                answers.append(answer)
            else:
                write_json(answer)
            if bar is not None:
                bar.advance()
    return answers


def _input(value: Any, row: int, file: str | None) -> Input:
    if not isinstance(value, dict):
        raise UserError(
            "a row is an object with a text", file=file, row=row, found=f"{value!r} ({type(value).__name__})",
            expected='{"text": "..."}, perhaps with "text_pair"', fix="write one object a line, or only plain text",
        )  # fmt: skip
    for name in ("text", "text_pair"):
        part = value.get(name)
        if part is None and name == "text_pair":
            continue
        if not isinstance(part, str) or not part.strip():
            found = "nothing" if part is None else f"{part!r} ({type(part).__name__})"
            raise UserError(
                f"the row has no {name}", file=file, row=row, field=name, found=found,
                expected="text that is not empty", fix=f"fill {name} in, or leave the row out",
            )  # fmt: skip
    return Input(value["text"], value.get("text_pair"), row)


def _is_row(line: str) -> bool:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and "text" in value


def _parsed(line: str, row: int, file: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(
            "the line is not JSON", file=file, row=row, found=shorten(line), expected='{"text": "..."}',
            fix="write one object a line; for lines of plain text give the file another name than .jsonl",
        ) from error  # fmt: skip


def _opened(source: str) -> Any:
    return nullcontext(sys.stdin.buffer) if source == "-" else Path(source).open("rb")


def _decoded(lines: IO[bytes], source: str) -> Iterator[str]:
    for row, line in enumerate(lines, 1):
        try:
            yield line.decode("utf-8-sig" if row == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"the line is not UTF-8: byte {error.start}", file=source, row=row, fix="save the file as UTF-8"
            ) from error


def _count(path: Path) -> int:
    """Lines that are not blank. Raises UserError for what is no file."""
    if not path.is_file():
        raise UserError("there is no such file", file=str(path), fix="give a file, or - for standard input")
    with path.open("rb") as lines:
        return sum(1 for line in lines if line.strip())
