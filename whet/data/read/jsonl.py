"""Read JSON and JSONL as records, and refuse faults that JSON parsers commonly accept.

Duplicate keys, NaN, Infinity and lone surrogates would each change the training data without notice. JSONL is streamed,
one line in memory at a time. A `.json` file is read whole, which is why its size is limited.
"""

from __future__ import annotations

import io
import json
import logging
import math
import re
from collections.abc import Iterator
from functools import partial
from typing import BinaryIO, cast

from whet.base.errors import UserError
from whet.data.read.record import COPY_AGAIN, MAX_ROW_BYTES, OBJECT_PER_LINE, TURN_FIELDS, Record, kind_of
from whet.data.read.text import BOM, decode_utf8, read_whole

_LOG = logging.getLogger(__name__)
_WRITE_JSONL = "write each row with json.dumps(row) and a newline after it"
_SPACE = re.compile(r"[ \t\r\n]*")


def read_jsonl(stream: BinaryIO, file: str) -> Iterator[Record]:
    """Read one object per line. Lines end at \\n only: `str.splitlines` would also cut at a U+2028 inside a string."""
    offset = 0
    started = False
    for row, line in enumerate(iter(partial(stream.readline, MAX_ROW_BYTES), b""), 1):
        if len(line) == MAX_ROW_BYTES:
            raise UserError(f"a line of over {MAX_ROW_BYTES} bytes", _WRITE_JSONL, file, row)
        content = (line.removeprefix(b"\xef\xbb\xbf") if row == 1 else line).strip(b" \t\r\n")
        if content:
            if not started and content.startswith(b"["):  # an array under the wrong name: nothing is in doubt
                raw = read_whole(stream, file, b"\n" * (row - 1) + line)
                yield from _read_array(decode_utf8(raw, 0, file, None).removeprefix(BOM), file)
                return
            started = True
            text = decode_utf8(content, offset + line.index(content), file, row)
            value, end = _parse(text, 0, file, row)
            if end != len(text):
                raise _after_object(text[end:].lstrip(), file, row)
            yield Record(_require_object(value, file, row), file, row)
        offset += len(line)


def read_json(stream: BinaryIO, file: str) -> Iterator[Record]:
    """Read an array of objects, one object per line, or one object around the array."""
    raw = read_whole(stream, file)
    text = decode_utf8(raw, 0, file, None).removeprefix(BOM).strip(" \t\r\n")
    if not text:
        return
    first_line = text.partition("\n")[0].rstrip()
    if text.startswith("["):
        yield from _read_array(text, file)
    elif first_line.endswith("}") and len(first_line) < len(text):
        del text
        yield from read_jsonl(io.BytesIO(raw), file)
    else:
        value, end = _parse(text, 0, file, None)
        if end != len(text):
            raise _after_object(text[end:].lstrip(), file, None)
        yield from _read_object(_require_object(value, file, None), file)


def _read_array(text: str, file: str) -> Iterator[Record]:
    """Read an array item by item, so that an error names its row and only one parsed row is held beside the text."""
    at = _skip_space(text, _skip_space(text, 0) + 1)
    row = 0
    while at < len(text) and (row > 0 or text[at] != "]"):
        row += 1
        value, at = _parse(text, at, file, row)
        yield Record(_require_object(value, file, row), file, row)
        at = _skip_space(text, at)
        if text[at : at + 1] != ",":
            break
        at = _skip_space(text, at + 1)
    if text[at : at + 1] != "]":
        what = "is cut off" if at == len(text) else "is broken"
        problem, found = f"the JSON array {what} after this row", text[at : at + 40] or "end of file"
        fix, expected = f"{COPY_AGAIN}, or write it again with json.dump", "a comma and the next object, or ]"
        raise UserError(problem, fix, file, row or None, found=found, expected=expected)
    if rest := text[at + 1 :].strip():
        raise UserError("text after the end of the JSON array", "remove it", file=file, row=row or None, found=rest)


def _read_object(value: dict, file: str) -> Iterator[Record]:
    """The rows inside a lone object, or the object itself as the only row when nothing in it looks like rows."""
    lists = [k for k, v in value.items() if isinstance(v, list) and v and all(isinstance(i, dict) for i in v)]
    if not lists or not {"prompt", *TURN_FIELDS}.isdisjoint(value):
        yield Record(value, file, 1)
        return
    if len(lists) > 1:
        problem, fix = "several lists, and only one can be the rows", "save the one that is meant as a file of its own"
        raise UserError(problem, fix, file=file, found=f"lists {', '.join(lists)}", expected="one list of objects")
    _LOG.info("%s: its rows are the list in field %s", file, lists[0])
    for row, item in enumerate(value[lists[0]], 1):
        yield Record(item, file, row)


def _unique(pairs: list[tuple[str, object]]) -> dict:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in value if keys.count(key) > 1)
        raise UserError("duplicate key: only one of its values can be meant", "remove the other", field=twice)
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _skip_space(text: str, at: int) -> int:
    return cast("re.Match[str]", _SPACE.match(text, at)).end()


def _parse(text: str, start: int, file: str, row: int | None) -> tuple[object, int]:
    """(the JSON value at `start`, the offset behind it)."""
    try:
        value, end = _DECODER.raw_decode(text, start)
        source = text[start:end]
        if "\\ud" in source or "\\uD" in source or "NaN" in source or "Infinity" in source:
            check_leaves(value)
        return value, end
    except UserError as error:
        error.file, error.row = file, row
        raise
    except RecursionError as error:
        raise UserError("nested too deeply", "flatten the row", file, row, found=text[start : start + 40]) from error
    except json.JSONDecodeError as error:
        raise _syntax_error(text, start, error, file, row) from error
    except ValueError as error:
        raise UserError("a number too long for JSON readers", "write it as a string", file, row) from error


def check_leaves(root: object) -> None:
    """Refuse lone surrogates and numbers that are not finite. A stack, because rows may be nested as deep as Python."""
    stack: list[tuple[str, object]] = [("", root)]
    while stack:
        path, value = stack.pop()
        if isinstance(value, dict):
            for key, item in value.items():
                name = f"{path}.{ascii(key)[1:-1]}".lstrip(".")
                stack += [(name, key), (name, item)]
        elif isinstance(value, list):
            stack += [(f"{path}[{index}]", item) for index, item in enumerate(value)]
        elif isinstance(value, float) and not math.isfinite(value):
            raise UserError("not a JSON number", "write null", field=path, found=str(value), expected="a finite number")
        elif isinstance(value, str) and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                found = f"\\u{ord(value[error.start]):04x} at character {error.start}"
                fix = "write both halves, or remove it"
                raise UserError("lone surrogate: half of a character", fix, field=path, found=found) from error


def _require_object(value: object, file: str, row: int | None) -> dict:
    if isinstance(value, dict):
        return value
    fix, expected = "give every value a field name", 'an object such as {"prompt": "…", "completion": "…"}'
    raise UserError("a row must be a JSON object", fix, file, row, found=kind_of(value), expected=expected)


def _after_object(rest: str, file: str, row: int | None) -> UserError:
    problem, fix = "text after the object", _WRITE_JSONL
    if rest.startswith("{"):
        problem = "several objects on one line"
    elif rest.startswith(","):
        problem, fix = "trailing comma after the object", "remove the comma: only newlines separate the rows"
    return UserError(problem, fix, file, row, found=rest, expected=OBJECT_PER_LINE)


def _syntax_error(text: str, start: int, error: json.JSONDecodeError, file: str, row: int | None) -> UserError:
    at = error.pos
    rest = text[at:]
    problem, fix = f"not valid JSON: {error.msg}", _WRITE_JSONL
    if text.startswith("<", start):
        problem, fix = "a web page or XML instead of JSON", "download the data file itself (its raw link)"
    elif rest.startswith("'"):
        problem = "single quotes, which JSON does not know (a printed Python dict?)"
    elif "trailing comma" in error.msg or (
        rest[:1] in ("}", "]") and text[max(0, at - 99) : at].rstrip().endswith(",")
    ):
        problem, fix = "trailing comma", "remove the comma before the closing bracket"
    elif "control character" in error.msg:
        problem, fix = "unescaped control character in a string", "write it as \\n, \\t or \\u00XX"
    elif not rest.strip() or error.msg.startswith("Unterminated string"):
        problem = "the JSON ends in the middle: the file is truncated, or the object spans several lines"
        fix = f"{COPY_AGAIN}; a file whose objects span several lines must be an array in a .json file"
    where = f"column {at - start + 1}" if row else f"line {error.lineno}, column {error.colno}"
    found = text[max(start, at - 30) : at + 30] or "end of file"
    return UserError(f"{problem} ({where})", fix, file, row, found=found, expected=OBJECT_PER_LINE)
