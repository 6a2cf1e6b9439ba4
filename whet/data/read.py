"""Data files -> records that know their place.

Everything that can be wrong with bytes is refused here, with file and row: encoding, compression, JSON syntax, and what
JSON parsers commonly let through (duplicate keys, NaN, lone surrogates), because each of those would otherwise change
what is trained on without a word. What the fields mean is `whet.data.standardise`'s business.

JSONL is streamed, one line in memory at a time. A `.json` file is read whole, which is why its size is limited.
A `.txt` file is one document: blank lines inside a document mean something, and only the author knows what, so whet
does not split on them. Whoever wants several documents writes several files or JSONL rows with a `text` field.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
import logging
import lzma
import math
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import BinaryIO, cast

from whet.base.errors import UserError, nearest, shorten

MAX_ROW_BYTES = 1 << 28  # a longer line is a damaged file or a decompression bomb, not a training row
MAX_WHOLE_BYTES = 2 << 30
TURN_FIELDS = ("messages", "conversations", "conversation")

_LOG = logging.getLogger(__name__)
_LFS_POINTER = b"version https://git-lfs"
_UTF16 = ("UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8 OLD > NEW")
_MAGIC = {
    b"\x1f\x8b": ("gzip data", "rename the file so that it ends in .gz"),
    b"\xfd7zXZ\x00": ("xz data", "rename the file so that it ends in .xz"),
    b"PAR1": ("a Parquet file", "convert it to JSONL"),
    b"PK\x03\x04": ("a zip archive", "unpack it first"),
    b"\xff\xfe": _UTF16,
    b"\xfe\xff": _UTF16,
}
_OBJECT_PER_LINE = 'one JSON object per line, such as {"prompt": "…", "completion": "…"}'
_WRITE_JSONL = "write each row with json.dumps(row) and a newline after it"
_COPY_AGAIN = "copy or download the file again"
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True, slots=True)
class Record:
    """One row as it stands in the file. From JSON: proper Unicode, no NaN or Infinity, no key twice in an object.

    row: 1-based; the line number in JSONL, the index in a JSON array, 1 for a text file.
    """

    value: dict
    file: str
    row: int


def read_files(paths: Sequence[str]) -> Iterator[Record]:
    """The records of all `paths` in order; a path is a file, a directory (its data files, by name) or a glob.

    Paths are resolved at once, so a misspelt one is reported before the first file is read.
    """
    files = [file for path in paths for file in data_files(path)]
    if not files:
        raise UserError("no data files were given", "name at least one file, directory or glob")
    seen: set[Path] = set()
    for file in files:
        if (real := file.resolve()) in seen:
            raise UserError("named twice, so its rows would be trained on twice", "name it once", file=str(file))
        seen.add(real)
    return chain.from_iterable(map(_read_file, files))


def sha256(path: str) -> str:
    """Hex digest of the bytes of one file as they lie on disk (compressed if it is compressed)."""
    try:
        with Path(path).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from error


def kind_of(value: object) -> str:
    """What a parsed JSON value is, in JSON's words."""
    match value:
        case list():
            return f"list of {len(value)}"
        case dict():
            return f"object with fields {', '.join(value)}" if value else "empty object"
        case None | bool():
            return json.dumps(value)
    name = {int: "number", float: "number", str: "string"}.get(type(value), type(value).__name__)
    return f"{name} {shorten(repr(value), 60)}"


def data_files(path: str) -> list[Path]:
    """The files that one path of a recipe stands for, sorted by name whatever the locale or the file system's order."""
    if not path.strip():
        raise UserError("the name of a data file is empty", "name a file, directory or glob", field="data.dataset")
    place = Path(path).expanduser()
    try:
        if place.is_file():
            if _split_suffix(place)[0] in _READERS:
                return [place]
            fix, found = "convert it to JSONL: " + _OBJECT_PER_LINE, f"suffix {place.suffix or '(none)'}"
            raise UserError("unknown kind of file", fix, file=path, found=found, expected=_SUFFIXES)
        if place.is_dir():
            return _only_data(path, list(place.iterdir()))
        if place.exists():
            raise UserError("not a regular file", "save the data to a file first", file=path)
        if glob.has_magic(path):
            found = glob.glob(str(place), recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
            return _only_data(path, [Path(name) for name in found])
        raise _missing(path, place)
    except OSError as error:
        raise _unreadable(path, error) from error


def _split_suffix(place: Path) -> tuple[str, str]:
    """`a.jsonl.xz` -> (".jsonl", ".xz"); the second is empty for a plain file."""
    packing = place.suffix.lower()
    return (Path(place.stem).suffix.lower(), packing) if packing in _UNPACKERS else (packing, "")


def _only_data(path: str, candidates: list[Path]) -> list[Path]:
    """The data files among `candidates`. Text beside rows is refused: it is nearly always a README or a licence."""
    candidates = sorted((c for c in candidates if not c.name.startswith(".") and c.is_file()), key=str)
    files = [c for c in candidates if _split_suffix(c)[0] in _READERS]
    if not files:
        found = ", ".join(c.name for c in candidates[:5]) or "no files"
        raise UserError("no data files here", "name a data file", file=path, found=found, expected=_SUFFIXES)
    texts = [f for f in files if _split_suffix(f)[0] == ".txt"]
    if texts and len(texts) != len(files):
        rows = next(f for f in files if f not in texts)
        problem, found = "rows beside plain text: only one kind can be meant", f"{rows.name} and {texts[0].name}"
        raise UserError(problem, f"name the kind, such as {rows.parent}/*{rows.suffix}", path, found=found)
    return files


def _missing(path: str, place: Path) -> UserError:
    parent = place.parent
    if not parent.is_dir():
        return UserError("no such file", f"correct the path: there is no directory {parent}", file=path)
    near = nearest(place.name, sorted(p.name for p in parent.iterdir()))
    return UserError("no such file", f"did you mean {parent / near}?" if near else "correct the path", file=path)


def _unreadable(path: str, error: OSError) -> UserError:
    return UserError(f"cannot be read: {error.strerror or error}", "check the path and its permissions", file=path)


def _read_file(place: Path) -> Iterator[Record]:
    suffix, packing = _split_suffix(place)
    file = str(place)
    try:
        with place.open("rb") as raw:
            _check_head(raw.read(64), file, packing)
            raw.seek(0)
            unpacked = _UNPACKERS[packing](raw) if packing else raw
            records = _READERS[suffix](io.BufferedReader(cast(io.RawIOBase, unpacked), 1 << 18), file)
            first = next(records, None)
            if first is None:
                raise UserError("the file has no rows", "fill it, or remove it from the recipe", file=file)
            yield first
            yield from records
    except EOFError as error:
        raise UserError(f"the {packing} data is cut off", _COPY_AGAIN, file=file, found="end of file") from error
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"the {packing} data is damaged", _COPY_AGAIN, file=file, found=str(error)) from error
    except OSError as error:
        raise _unreadable(file, error) from error


def _check_head(head: bytes, file: str, packing: str) -> None:
    """Refuse a file whose first bytes are not what its name says."""
    if not head:
        raise UserError("the file is empty (0 bytes)", "fill it, or remove it from the recipe", file=file)
    if head.startswith(_LFS_POINTER):
        raise UserError("git-lfs pointer instead of data", "git lfs pull", file=file, found=head.decode("latin-1"))
    remove = f"remove {packing} from the file's name, or compress it"
    found, fix = next((what for magic, what in _MAGIC.items() if head.startswith(magic)), ("", remove))
    expected = {"": "", ".gz": "gzip data", ".xz": "xz data"}[packing]
    if found != expected:
        problem, expected = "the content is not what the file's name says", expected or "UTF-8 text"
        raise UserError(problem, fix, file, found=found or f"bytes {head[:8]!r}", expected=expected)


def _decode_utf8(raw: bytes, offset: int, file: str, row: int | None) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = "" if row else f" (line {raw.count(10, 0, error.start) + 1})"
        problem, found = f"invalid UTF-8 at byte offset {offset + error.start}{line}", f"byte 0x{raw[error.start]:02x}"
        fix = "save the file as UTF-8 (for Korean text from Windows: iconv -f CP949 -t UTF-8 OLD > NEW)"
        raise UserError(problem, fix, file, row, found=f"{found} ({error.reason})", expected="UTF-8") from error


def _read_whole(stream: BinaryIO, file: str, start: bytes = b"") -> str:
    raw = start + stream.read(MAX_WHOLE_BYTES + 1)
    if len(raw) > MAX_WHOLE_BYTES:
        fix = "write it as .jsonl, which is streamed: " + _OBJECT_PER_LINE
        raise UserError(f"over {MAX_WHOLE_BYTES} bytes, too large to be read whole", fix, file=file)
    return _decode_utf8(raw, 0, file, None).removeprefix("\ufeff")


def _read_txt(stream: BinaryIO, file: str) -> Iterator[Record]:
    text = _read_whole(stream, file)
    if text and not text.isspace():
        yield Record({"text": text}, file, 1)


def _read_jsonl(stream: BinaryIO, file: str) -> Iterator[Record]:
    """One object per line. Lines end at \\n only: `str.splitlines` would also cut at a U+2028 inside a string."""
    offset = 0
    started = False
    for row, line in enumerate(iter(partial(stream.readline, MAX_ROW_BYTES), b""), 1):
        if len(line) == MAX_ROW_BYTES:
            raise UserError(f"a line of over {MAX_ROW_BYTES} bytes", _WRITE_JSONL, file, row)
        content = (line.removeprefix(b"\xef\xbb\xbf") if row == 1 else line).strip(b" \t\r\n")
        if content:
            if not started and content.startswith(b"["):  # an array under the wrong name: nothing is in doubt
                yield from _read_array(_read_whole(stream, file, b"\n" * (row - 1) + line), file)
                return
            started = True
            text = _decode_utf8(content, offset + line.index(content), file, row)
            value, end = _parse(text, 0, file, row)
            if end != len(text):
                raise _after_object(text[end:].lstrip(), file, row)
            yield Record(_require_object(value, file, row), file, row)
        offset += len(line)


def _read_json(stream: BinaryIO, file: str) -> Iterator[Record]:
    """An array of objects, one object per line, or one object around the array."""
    text = _read_whole(stream, file).strip(" \t\r\n")
    if not text:
        return
    first_line = text.partition("\n")[0].rstrip()
    if text.startswith("["):
        yield from _read_array(text, file)
    elif first_line.endswith("}") and len(first_line) < len(text):
        stream.seek(0)
        yield from _read_jsonl(stream, file)
    else:
        value, end = _parse(text, 0, file, None)
        if end != len(text):
            raise _after_object(text[end:].lstrip(), file, None)
        yield from _read_object(_require_object(value, file, None), file)


def _read_array(text: str, file: str) -> Iterator[Record]:
    """Item by item, so that an error names its row and only one parsed row is held beside the text."""
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
        fix, expected = f"{_COPY_AGAIN}, or write it again with json.dump", "a comma and the next object, or ]"
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
    """The JSON value at `start` and where it ends."""
    try:
        value, end = _DECODER.raw_decode(text, start)
        source = text[start:end]
        if "\\ud" in source or "\\uD" in source or "NaN" in source or "Infinity" in source:
            _check_leaves(value)
        return value, end
    except UserError as error:
        error.file, error.row = file, row
        raise
    except RecursionError as error:
        found = text[start : start + 40]
        raise UserError("nested too deeply", "flatten the row", file, row, found=found) from error
    except json.JSONDecodeError as error:
        raise _syntax_error(text, start, error, file, row) from error
    except ValueError as error:
        raise UserError("a number too long for JSON readers", "write it as a string", file, row) from error


def _check_leaves(root: object) -> None:
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
    return UserError(problem, fix, file, row, found=rest, expected=_OBJECT_PER_LINE)


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
        fix = f"{_COPY_AGAIN}; a file whose objects span several lines must be an array in a .json file"
    where = f"column {at - start + 1}" if row else f"line {error.lineno}, column {error.colno}"
    found = text[max(start, at - 30) : at + 30] or "end of file"
    return UserError(f"{problem} ({where})", fix, file, row, found=found, expected=_OBJECT_PER_LINE)


# A new kind of file is one function and one line here.
_READERS: dict[str, Callable[[BinaryIO, str], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".txt": _read_txt,
}
_UNPACKERS: dict[str, Callable[[BinaryIO], object]] = {".gz": gzip.open, ".xz": lzma.open}
_SUFFIXES = f"{', '.join(_READERS)}, each also with {' or '.join(_UNPACKERS)}"
