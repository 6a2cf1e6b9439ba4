"""Read the questions of a benchmark from any file that whet reads; nothing is learned from it.

A benchmark comes as it was published, so its rows need not be of the kind that is learned: a recognised format gives
its question, and a file of no such format the column that usually holds one. Rows without an answer cannot be read as
conversations; they are counted, never skipped unseen.
Gives up: pieces. A question inside a longer document, or with its choices written otherwise, is not found.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice

from whet.base.errors import UserError
from whet.data.example import Example, named
from whet.data.format.recognise import recognise
from whet.data.format.standardise import Dropped, standardise
from whet.data.read.read import Record, kind_of

SAMPLE = 100
QUESTIONS = ("question", "problem", "query", "prompt", "instruction", "input", "text")


@dataclass
class Asked:
    """Facts about the questions of a benchmark. reason: the fields that were compared, for people; blank: rows that
    could not be read, since they have no answer."""

    reason: str = ""
    blank: int = 0


def asked_rows(records: Iterable[Record], file: str, columns: Mapping[str, str], asked: Asked) -> Iterator[Example]:
    """Examples whose questions are those of the benchmark; fills `asked`. columns: of data.columns, where they fit.

    Raises UserError for a file that holds no rows or no questions.
    """
    stream = iter(records)
    sample = list(islice(stream, SAMPLE))
    if not sample:
        raise UserError("the benchmark holds no rows", file=file, fix="give a file with at least one row")
    names = {name for record in sample for name in record.value}
    columns = columns if set(columns.values()) <= names else {}
    try:
        kind = recognise(sample, columns)
    except UserError:
        column = next((name for name in QUESTIONS if all(name in record.value for record in sample)), None)
        if column is None:
            raise
        asked.reason = f"the column {column}"
        yield from (_question(record, column) for record in chain(sample, stream))
        return
    asked.reason = f"{kind.name}: {kind.reason}"
    dropped = Dropped()
    yield from standardise(
        chain(sample, stream), kind, columns, empty="drop", dropped=dropped, preference="check"
    )  # fmt: skip
    asked.blank = len(dropped)


def _question(record: Record, column: str) -> Example:
    text = record.value.get(column)
    if not isinstance(text, str) or "\0" in text:
        raise UserError(
            "the question of a benchmark is no text", "write a text, or leave the row out", record.file, record.row,
            column, kind_of(text), "text",
        )  # fmt: skip
    return named(Example("", None, text, record.file, record.row))
