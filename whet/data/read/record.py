"""Records, rows as they stand in a file, and the limits that every reader keeps.

It stands apart from the readers because all of them make records and none of them needs another.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from whet.base.errors import shorten

MAX_ROW_BYTES = 1 << 26  # a longer row is a damaged file or a decompression bomb, not a training row
MAX_WHOLE_BYTES = 2 << 30
TURN_FIELDS = ("messages", "conversations", "conversation")
OBJECT_PER_LINE = 'one JSON object per line, such as {"prompt": "…", "completion": "…"}'
COPY_AGAIN = "copy or download the file again"


@dataclass(frozen=True, slots=True)
class Record:
    """One row: proper Unicode, no NaN or Infinity, no field twice in an object, whatever the file was.

    file: its path, or hub:owner/name@commit/path. row: 1-based; the line number in JSONL, the index in a JSON array or
    a table (the header is not counted), 1 for a text file. columnar: of a format that writes null for an absent field.
    """

    value: dict
    file: str
    row: int
    columnar: bool = False


def kind_of(value: object) -> str:
    """The kind of a parsed JSON value, in JSON's words."""
    match value:
        case list():
            return f"list of {len(value)}"
        case dict():
            return f"object with fields {', '.join(value)}" if value else "empty object"
        case None | bool():
            return json.dumps(value)
    name = {int: "number", float: "number", str: "string"}.get(type(value), type(value).__name__)
    return f"{name} {shorten(repr(value), 60)}"
