"""Recognise the format of a file from the names of its fields and, for lists of turns, from the first turn.

Decided once, from the first rows; every row must then keep to it. Where the names fit no format, or several, the error
says which setting decides: whet does not guess.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from whet.base.errors import UserError, nearest
from whet.data.format.preference import FEEDBACK
from whet.data.format.turns import SHAREGPT, dialect_of
from whet.data.read.read import TURN_FIELDS, Record, kind_of

FormatName = Literal[
    "alpaca", "messages", "sharegpt", "prompt_completion", "text", "classification", "preference", "feedback"
]

# The fields that each format needs, and those it may have besides. Turns may stand in any of TURN_FIELDS.
_TOOLS = ("tools", "functions")
_ASKED = ("prompt", "question", "instruction", "input", "history", "system", *TURN_FIELDS, *_TOOLS)
_FIELDS: dict[FormatName, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "alpaca": (("instruction", "output"), ("input", "system", "history", *_TOOLS)),
    "messages": (("messages",), ("system", *_TOOLS)),
    "sharegpt": (("conversations",), ("system", *_TOOLS)),
    "prompt_completion": (("prompt", "completion"), ("system", *_TOOLS)),
    "text": (("text",), ()),
    "classification": (("text", "label"), ("text_pair",)),
    "preference": (("chosen", "rejected"), _ASKED),
    "feedback": (("label",), ("kto_tag", "completion", "output", *_ASKED)),
}
_EXPECTED = (
    "alpaca (instruction, output), prompt_completion (prompt, completion), text (text), classification (text, label), "
    "messages (messages: a list of {role, content}), sharegpt (conversations: a list of {from, value}), "
    "preference (chosen, rejected) or feedback (an answer and a boolean label)"
)
MOST_NAMES = 50  # that are looked at for a slip of the pen
_PAIRS = (("question", "answer"), ("query", "response"), ("input", "output"))


@dataclass(frozen=True, slots=True)
class Format:
    """A recognised format. reason: the fields that say so, for people; needed: the fields that every row must have."""

    name: FormatName
    reason: str
    needed: tuple[str, ...]

    @property
    def known(self) -> set[str]:
        return {*self.needed, *_FIELDS[self.name][1]}


def recognise(records: Sequence[Record], columns: Mapping[str, str], name: FormatName | None = None) -> Format:
    """The format of `records` (the first hundred or so), after renaming by `columns` (our name -> the file's name).

    With `name` only that format is considered. Raises UserError when none fits or several do.
    """
    if not records:
        raise UserError("there are no rows to recognise a format from", "give at least one row")
    _check_columns(records, columns)
    values = [rename(record.value, columns) for record in records]
    names = tuple(dict.fromkeys(key for value in values for key in value))
    fits = [fit for fit in _fits(values, names) if name in (None, fit.name) and set(columns) <= fit.known]
    if name is None:
        judged = [fit for fit in fits if fit.name in ("preference", "feedback")]
        fits = judged[:1] or fits
    if len(fits) > 1:  # `text` beside a conversation is that conversation rendered, as in the original Alpaca file
        fits = [fit for fit in fits if fit.name not in ("text", "classification")] or fits[-1:]
    if len(fits) != 1:
        raise _unsure(records[0], fits, names, columns, name or "any known format")
    used = [f"{key} (from {columns[key]})" if key in columns else key for key in names if key in fits[0].known]
    ignored = [key for key in names if key not in fits[0].known]
    reason = f"fields {', '.join(used)}" + (f"; ignored: {', '.join(ignored)}" if ignored else "")
    return replace(fits[0], reason=reason)


def _fits(values: Sequence[dict], names: Sequence[str]) -> list[Format]:
    formats = []
    if {"chosen", "rejected"} <= set(names):
        formats.append(Format("preference", "", ("chosen", "rejected")))
    label = next((label for label in FEEDBACK if any(isinstance(v.get(label), bool) for v in values)), None)
    if label is not None and not {"completion", "output", *TURN_FIELDS}.isdisjoint(names):
        formats.append(Format("feedback", "", (label,)))
    plain: tuple[FormatName, ...] = ("alpaca", "prompt_completion", "text", "classification")
    formats += [Format(format, "", _FIELDS[format][0]) for format in plain if set(_FIELDS[format][0]) <= set(names)]
    return formats + [Format(_turn_format(values, key), "", (key,)) for key in TURN_FIELDS if key in names]


def _turn_format(values: Sequence[dict], key: str) -> FormatName:
    """The format of the turns under `key`: role and content, or from and value; the first turn decides."""
    turns = next((value[key] for value in values if isinstance(value.get(key), list) and value[key]), None)
    return "sharegpt" if dialect_of(turns) is SHAREGPT else "messages"


def rename(value: dict, columns: Mapping[str, str]) -> dict:
    """`value` under our names. Mapped fields are moved; a field that a mapping replaces is gone, even in a row that
    lacks the new one."""
    if not columns:
        return value
    taken = {*columns, *columns.values()}
    renamed = {name: item for name, item in value.items() if name not in taken}
    return renamed | {ours: value[theirs] for ours, theirs in columns.items() if theirs in value}


def original(path: str | None, columns: Mapping[str, str]) -> str | None:
    """A path such as messages[2].content in the names of the file."""
    head = re.split(r"[.\[]", path or "", maxsplit=1)[0]
    return columns.get(head, head) + path[len(head) :] if path else None


def _check_columns(records: Sequence[Record], columns: Mapping[str, str]) -> None:
    ours = {name for needed, optional in _FIELDS.values() for name in (*needed, *optional, *TURN_FIELDS)}
    theirs = tuple(dict.fromkeys(name for record in records for name in record.value))
    for name, source in columns.items():
        if name not in ours:
            near, expected = nearest(name, ours), f"one of {', '.join(sorted(ours))}"
            fix = f"did you mean data.columns.{near}?" if near else "write data.columns.NAME=FIELD"
            raise UserError("unknown name", fix, field=f"data.columns.{name}", found=name, expected=expected)
        if source not in theirs:
            near = nearest(source, theirs)
            fix = f"did you mean data.columns.{name}={near}?" if near else "name a field of the file"
            problem, expected = f"no row has the field {source}", f"one of {', '.join(theirs)}"
            raise UserError(problem, fix, records[0].file, None, f"data.columns.{name}", source, expected)


def _unsure(first: Record, fits: list[Format], names: Sequence[str], columns: Mapping[str, str], ask: str) -> UserError:
    fields = kind_of(first.value)
    if fits:
        problem = f"the fields fit several formats: {', '.join(fit.name for fit in fits)}"
        fix = "say which is meant, e.g. " + " ".join(f"data.columns.{n}={columns.get(n, n)}" for n in fits[0].needed)
        return UserError(problem, fix, first.file, first.row, found=fields, expected="the fields of one format")
    if "rejected" in names or "rejected_messages" in names:
        fix = "say which fields are meant: data.columns.chosen=FIELD data.columns.rejected=FIELD"
        problem, expected = "preference data without the two answers", "fields chosen and rejected"
        return UserError(problem, fix, first.file, first.row, found=fields, expected=expected)
    pair = next((pair for pair in _PAIRS if set(pair) <= set(names)), None)
    known = {name for needed, optional in _FIELDS.values() for name in (*needed, *optional)} - {"question"}
    near = {name: nearest(name, known - set(names)) for name in names[:MOST_NAMES] if name not in known}
    misspelt = " ".join(f"data.columns.{ours}={theirs}" for theirs, ours in near.items() if ours)
    fix = "say which fields are meant, e.g. data.columns.prompt={} data.columns.completion={}"
    fix = f"did you mean {misspelt}?" if misspelt and not pair else fix.format(*(pair or _PAIRS[0]))
    return UserError(f"the fields do not fit {ask}", fix, first.file, first.row, found=fields, expected=_EXPECTED)
