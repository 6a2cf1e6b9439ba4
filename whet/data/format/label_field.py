"""Read the label of a row as it stands in the file; its meaning is decided by `data.labels`."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from whet.base.errors import UserError
from whet.data.example import Label
from whet.data.read.read import kind_of

FIELD = "label"
EXPECTED = "a name, a number, a list of names, or a list of 0 and 1"


class LabelledText(NamedTuple):
    """A text, perhaps with a second one, and its label."""

    text: str
    pair: str | None
    label: Label


def read_label(value: object) -> Label:
    """The label in `value`. Raises UserError."""
    match value:
        case bool() | int():
            return value
        case float() if math.isfinite(value):
            return value
        case str() if value.strip() and "\0" not in value:
            return value
        case list():
            return _several(value)
    raise _wrong(FIELD, value)


def read_number(label: Label) -> Label:
    """The value of a label, which may be written as text, as in a table. Raises UserError."""
    if not isinstance(label, str):
        return label
    text = label.strip()
    if re.fullmatch(r"[+-]?\d+,\d+", text):
        raise UserError(
            "a decimal comma: this may be a number or two", f"write {text.replace(',', '.')}", field=FIELD,
            found=text, expected="a number with a point",
        )  # fmt: skip
    try:
        value = float(text) if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text) else math.nan
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(
            "this is no value to learn", "write a number, or model.task=classification for names", field=FIELD,
            found=kind_of(label), expected="a number",
        )  # fmt: skip
    return value


def _several(values: list) -> tuple[str, ...] | tuple[int, ...]:
    names = [isinstance(value, str) for value in values]
    if all(names):
        for index, value in enumerate(values):
            if not value.strip() or "\0" in value:
                raise _wrong(f"{FIELD}[{index}]", value)
        if len(set(values)) < len(values):
            raise UserError("a label twice in one row", "name it once", field=FIELD, found=", ".join(values))
        return tuple(values)
    for index, value in enumerate(values):
        # A float is what data frames write for 0 and 1.
        if isinstance(value, str) or not isinstance(value, bool | int | float) or value not in (0, 1):
            raise _wrong(f"{FIELD}[{index}]", value)
    return tuple(int(value) for value in values)


def _wrong(where: str, value: object) -> UserError:
    kind = "not a number" if isinstance(value, float) else kind_of(value)
    return UserError("this is no label", f"write {EXPECTED}", field=where, found=kind, expected=EXPECTED)
