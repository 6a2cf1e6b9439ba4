"""Rows that nobody has answered yet, read from whatever training reads: a text or two to label, or a conversation.

Columns are called as the run's `data.columns` say, where the file has such columns. Of a row for training the answer is
left out: a last turn of the assistant, `output`, `completion`, `label`. Files are read twice, once to check and to
count every row before a model is loaded, and once while they are answered; so they may be of any length.
A `.txt` file and standard input hold one text a line, or JSON lines; in training a `.txt` file is one document.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

from whet.base.errors import UserError, shorten
from whet.data.example import Example, Message
from whet.data.format.recognise import original, rename
from whet.data.format.single import are_turns, check_prompt, prompt_of, tools_of
from whet.data.read.read import data_files, kind_of, read_files
from whet.data.read.unpack import unreadable
from whet.engine.task import Task
from whet.runs import Run

STANDARD_INPUT = "-"
_WRITERS_ROW = "messages, prompt, instruction (and input), or text"


@dataclass(frozen=True)
class Question:
    """A row to answer: a text, perhaps with a second one, or a conversation that ends before the answer.

    row: its number from 1 on in `file`, None where the rows come from no file.
    """

    text: str
    text_pair: str | None
    row: int
    file: str | None = None
    chat: Example | None = None


@dataclass(frozen=True)
class Asks:
    """What the rows of a run's task are read as. columns: our names to those of the file."""

    task: Task
    columns: Mapping[str, str]

    @classmethod
    def of(cls, run: Run) -> Asks:
        return cls(run.task, run.recipe.data.columns)

    def question(self, value: Any, row: int, file: str | None) -> Question:
        """The question of one row. Raises UserError with file, row and field."""
        if not isinstance(value, dict):
            raise UserError(
                "a row is an object with a text", file=file, row=row, found=f"{value!r} ({type(value).__name__})",
                expected='{"text": "..."}, perhaps with "text_pair"', fix="write one object a line, or only plain text",
            )  # fmt: skip
        columns = {ours: theirs for ours, theirs in self.columns.items() if theirs in value}
        named = rename(value, columns)
        if self.task.labelled:
            return _text(named, row, file)
        try:
            return Question("", None, row, file, _conversation(named, row, file))
        except UserError as error:
            error.file, error.row, error.field = file, row, original(error.field, columns)
            raise


def _text(value: Mapping[str, Any], row: int, file: str | None) -> Question:
    for name in ("text", "text_pair"):
        part = value.get(name)
        if part is None and name == "text_pair":
            continue
        if not isinstance(part, str) or not part.strip():
            there = f"columns {', '.join(map(str, value))}" if value else "nothing"
            found = there if part is None else f"{part!r} ({type(part).__name__})"
            raise UserError(
                f"the row has no {name}", file=file, row=row, field=name, found=found,
                expected="text that is not empty", fix=f"fill {name} in, or leave the row out",
            )  # fmt: skip
    return Question(value["text"], value.get("text_pair"), row, file)


def _conversation(value: dict[str, Any], row: int, file: str | None) -> Example:
    """The conversation of a row, closed by an empty answer."""
    if value.get("text_pair") is not None:
        raise UserError(
            "a model that writes reads one text", field="text_pair", found="a second text", expected="one text",
            fix="write both texts into text, as in training",
        )  # fmt: skip
    prompt = prompt_of(value)
    if prompt is not None:
        messages, field = prompt.messages, prompt.field
    elif isinstance(value.get("text"), str):
        messages, field = [Message("user", value["text"])], "text"
    else:
        raise UserError(
            "the row asks nothing", found=kind_of(value), expected=_WRITERS_ROW,
            fix="name the columns as in training, or write the question into text",
        )  # fmt: skip
    while messages and messages[-1].role == "assistant":
        messages = messages[:-1]
    check_prompt(messages, field)
    if not messages[-1].content.strip():
        raise UserError("the question is blank", field=field, found="no text", fix="fill it in, or leave the row out")
    answer = Message("assistant", "")
    return Example("", (*messages, answer), None, file or "", row, tools=tools_of(value))


def given(rows: Iterable[Any], asks: Asks) -> Iterator[Question]:
    """Rows given in Python: texts, pairs of texts, lists of messages, or objects as in a file. Raises UserError."""
    for row, value in enumerate(rows, 1):
        if isinstance(value, str):
            value = {"text": value}
        elif isinstance(value, list) and are_turns(value):
            value = {"messages": value}
        elif isinstance(value, tuple | list) and len(value) == 2:
            value = {"text": value[0], "text_pair": value[1]}
        yield asks.question(value, row, None)


def in_file(source: str, asks: Asks) -> Iterator[Question]:
    """The rows of a file, a directory or a glob, as training reads it. Raises UserError."""
    if Path(source).suffix.lower() == ".txt":
        data_files(source)
        try:
            with Path(source).expanduser().open("rb") as lines:
                yield from in_lines(decoded(lines, source), source, asks)
        except OSError as error:
            raise unreadable(source, error) from error
        return
    for record in read_files([source]):
        yield asks.question(record.value, record.row, record.file)


def in_lines(lines: Iterable[str], file: str, asks: Asks) -> Iterator[Question]:
    """The rows of text lines or JSON lines; the first one tells. Raises UserError for what is neither."""
    numbered = ((row, line.rstrip("\r\n")) for row, line in enumerate(lines, 1))
    filled = ((row, line) for row, line in numbered if line.strip())
    first = next(filled, None)
    if first is None:
        raise UserError("the input holds no rows", file=file, fix="give at least one line")
    read: Callable[[str, int], Any] = lambda line, row: {"text": line}  # noqa: E731
    if _is_row(first[1], asks):
        read = lambda line, row: _parsed(line, row, file)  # noqa: E731
    for row, line in chain([first], filled):
        yield asks.question(read(line, row), row, file)


def _is_row(line: str, asks: Asks) -> bool:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    if not isinstance(value, dict):
        return False
    names = {"text"} if asks.task.labelled else {"text", "messages", "conversations", "prompt", "instruction"}
    return not {*names, *asks.columns.values()}.isdisjoint(value)


def _parsed(line: str, row: int, file: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(
            "the line is not JSON", file=file, row=row, found=shorten(line), expected='{"text": "..."}',
            fix="write one object a line, or plain text in every line",
        ) from error  # fmt: skip


def decoded(lines: IO[bytes], source: str) -> Iterator[str]:
    """Lines of UTF-8. Raises UserError with the row."""
    for row, line in enumerate(lines, 1):
        try:
            yield line.decode("utf-8-sig" if row == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"the line is not UTF-8: byte {error.start}", file=source, row=row, fix="save the file as UTF-8"
            ) from error
