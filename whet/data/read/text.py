"""Decode bytes as text, and read a text file as its one row.

A `.txt` or `.md` file is one document: blank lines inside a document mean something, and only the author knows what, so
whet does not split on them. Several documents are several files, or JSONL rows with a `text` field. Text that is
plainly something else (JSON rows, a web page saved under a text's name) is refused, because it would otherwise be
learned as it stands.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import BinaryIO

from whet.base.errors import UserError
from whet.data.read.record import MAX_WHOLE_BYTES, OBJECT_PER_LINE, Record

BOM = "\ufeff"


def decode_utf8(raw: bytes, offset: int, file: str, row: int | None) -> str:
    """Decode `raw`, which stands `offset` bytes into the file; UserError names the byte that is not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = "" if row else f" (line {raw.count(10, 0, error.start) + 1})"
        problem, found = f"invalid UTF-8 at byte offset {offset + error.start}{line}", f"byte 0x{raw[error.start]:02x}"
        fix = "save the file as UTF-8 (for Korean text from Windows: iconv -f CP949 -t UTF-8 OLD > NEW)"
        raise UserError(problem, fix, file, row, found=f"{found} ({error.reason})", expected="UTF-8") from error


def read_whole(stream: BinaryIO, file: str, start: bytes = b"") -> bytes:
    """`start` and all that is left of `stream`; UserError above MAX_WHOLE_BYTES."""
    raw = start + stream.read(MAX_WHOLE_BYTES + 1)
    if len(raw) > MAX_WHOLE_BYTES:
        fix = "write it as .jsonl, which is streamed: " + OBJECT_PER_LINE
        raise UserError(f"over {MAX_WHOLE_BYTES} bytes, too large to be read whole", fix, file=file)
    return raw


def read_text(stream: BinaryIO, file: str) -> Iterator[Record]:
    """The whole file as the field `text` of one row; nothing when it is blank."""
    text = decode_utf8(read_whole(stream, file), 0, file, None).removeprefix(BOM)
    if not text or text.isspace():
        return
    if text.lstrip()[:1] in ("{", "[") and _is_json(text.strip()):
        fix = "rename the file so that it ends in .jsonl (or .json for one array)"
        raise UserError("JSON rows under the name of plain text", fix, file, 1, found=text[:60], expected="plain text")
    yield Record({"text": text}, file, 1)


def _is_json(text: str) -> bool:
    """True if the first line, or all of the text, is a JSON object or a list of objects."""
    for part in (text.partition("\n")[0], text):
        try:
            value = json.loads(part)
        except (ValueError, RecursionError):
            continue
        return isinstance(value, dict) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))
    return False
