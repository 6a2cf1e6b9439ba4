"""Turn records of a recognised format into `Example`s, all of one shape.

Every row must keep to the format: a row that only resembles the others is an error with file and row, never a guess.
Unknown fields are ignored, but one that would change what is learned and cannot be obeyed (a picture, a weight on the
user's words) is refused. A file that mixes formats has to be split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from whet.base.errors import UserError
from whet.data.example import Example, Message, named
from whet.data.format.absent import Nulls, without_absent
from whet.data.format.fields import MEDIA, NothingToLearn, refuse_media
from whet.data.format.label_field import LabelledText
from whet.data.format.preference import Judged, Learned, feedback, pair
from whet.data.format.recognise import Format, FormatName, original, recognise, rename
from whet.data.format.single import Conversation, alpaca, classification, prompt_completion, raw_text, turn_list
from whet.data.read.read import Record

__all__ = ["Dropped", "Example", "Format", "FormatName", "Message", "NothingToLearn", "recognise", "standardise"]

Converted = Conversation | str | LabelledText | list[Judged]
# From a row and the first field that its format needs.
_CONVERTERS: dict[FormatName, Callable[[dict, str], Converted]] = {
    "alpaca": lambda value, _: alpaca(value),
    "messages": turn_list,
    "sharegpt": turn_list,
    "prompt_completion": lambda value, _: prompt_completion(value),
    "text": lambda value, _: raw_text(value),
    "classification": lambda value, _: classification(value),
    "preference": lambda value, _: pair(value),
    "feedback": feedback,
}


@dataclass(slots=True)
class Dropped:
    """Rows and answers that are left out, each as (file, row, reason).

    rows: whole rows, those without an answer under `empty="drop"` and those marked as bad. answers: the rejected
    answers of rows whose chosen one is used. invalid: rows that do not keep to the format. nulls: those that columns
    put in, and those that may be meant.
    """

    rows: list[tuple[str, int, str]] = field(default_factory=list)
    answers: list[tuple[str, int, str]] = field(default_factory=list)
    invalid: list[tuple[str, int, str]] = field(default_factory=list)
    nulls: Nulls = field(default_factory=Nulls)

    def __len__(self) -> int:
        return len(self.rows)

    def list_row(self, error: UserError, *, blank: bool) -> None:
        """List the row that an error is about. blank: it has no answer."""
        listed = self.rows if blank else self.invalid
        listed.append((error.file or "", error.row or 0, f"field {error.field}: {error.problem}"))


def standardise(
    records: Iterable[Record],
    format: Format,
    columns: Mapping[str, str],
    *,
    empty: Literal["error", "drop"] = "error",
    dropped: Dropped | None = None,
    preference: Learned = "error",
    invalid: Literal["error", "drop"] = "error",
) -> Iterator[Example]:
    """The examples of `records`, in order.

    With `empty="drop"` blank answers are left out and listed in `dropped`. preference: for a row that judges its
    answers, "error" refuses it, "chosen" gives the good answer and lists the other in `dropped`, "check" gives both.
    With `invalid="drop"` rows that do not keep to the format are left out and listed. Raises UserError.
    """
    listing = empty == "drop" or preference == "chosen" or invalid == "drop"
    assert dropped is not None or not listing, "nothing is dropped uncounted"
    convert = _CONVERTERS[format.name]
    nothing = True
    for record in records:
        value = rename(record.value, columns)
        if record.columnar:
            value = without_absent(value, Nulls() if dropped is None else dropped.nulls)
        try:
            if not MEDIA.isdisjoint(value):
                refuse_media(value)
            content = convert(value, format.needed[0])
        except UserError as error:
            error.file, error.row, error.field = record.file, record.row, original(error.field, columns)
            blank = empty == "drop" and isinstance(error, NothingToLearn)
            if dropped is None or not (blank or invalid == "drop"):
                raise
            dropped.list_row(error, blank=blank)
            continue
        if isinstance(content, list):
            used = _used_answers(content, record, format, preference, dropped)
            nothing = nothing and not used
            yield from (_chat(judged.chat, record) for judged in used)
            continue
        nothing = False
        if isinstance(content, Conversation):
            yield _chat(content, record)
        elif isinstance(content, LabelledText):
            yield named(Example("", None, content.text, record.file, record.row, content.label, content.pair))
        else:
            yield named(Example("", None, content, record.file, record.row))
    if nothing and dropped is not None:
        _refuse_nothing(dropped, format)


def _refuse_nothing(dropped: Dropped, format: Format) -> None:
    """Raise UserError where every row was left out."""
    if dropped.invalid:
        file, row, reason = dropped.invalid[0]
        problem, fix = "no row keeps to the format", "mend the rows, or name their fields with data.columns"
        raise UserError(problem, fix, file, row, found=reason)
    if dropped.rows:
        file, row, reason = dropped.rows[0]
        blank = format.name != "feedback"
        problem = "nothing to learn: every row is blank" if blank else "nothing to learn: no row is marked as good"
        raise UserError(problem, "check the field", file, row, found=reason)


def _used_answers(
    sides: list[Judged], record: Record, format: Format, preference: Learned, dropped: Dropped | None
) -> list[Judged]:
    """The answers of one row that are used; the others are listed."""
    if preference == "check":
        return sides
    if preference == "error":
        kind = "preference data" if format.name == "preference" else "boolean feedback (preference data)"
        raise UserError(
            f"{kind}: rows that say which answer is better, and data.preference does not say what to learn from them",
            "data.preference=chosen learns the good answers and lists the others as left out",
            record.file, record.row, format.needed[-1], ", ".join(record.value), "rows with one answer",
        )  # fmt: skip
    assert dropped is not None
    for side in sides:
        if not side.good:
            reason = f"field {side.side}: the answer that was not preferred (data.preference=chosen)"
            (dropped.answers if len(sides) > 1 else dropped.rows).append((record.file, record.row, reason))
    return [side for side in sides if side.good]


def _chat(chat: Conversation, record: Record) -> Example:
    return named(Example(
        "", tuple(chat.messages), None, record.file, record.row, tools=chat.tools, completion_from=chat.completion_from
    ))  # fmt: skip
