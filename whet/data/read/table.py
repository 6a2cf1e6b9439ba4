"""Read CSV and TSV as records, by RFC 4180: every cell stays the text that it is.

Nothing is guessed: "null", "NA", "0012", "1e5" and "TRUE" are strings, an empty cell is "". The delimiter follows from
the suffix, the first line is the header. A quote opens a cell only at its start and may span lines; a quote inside a
cell that does not begin with one is an ordinary character. Blank lines are no rows.

Python's csv module is not used: it has one limit on the length of a cell for the whole process, cannot say where a
quote was opened, and takes a cell that a stray quote spread over many rows for a good one. Here such a cell is refused
when its lines look like rows of their own. Gives up: a real cell that holds such lines must come from JSONL.
Source: RFC 4180.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from functools import partial
from typing import BinaryIO

from whet.base.errors import UserError, shorten
from whet.data.read.record import MAX_ROW_BYTES, Record
from whet.data.read.text import BOM, decode_utf8

_LOG = logging.getLogger(__name__)
_TO_CLOSING_QUOTE = re.compile(r'[^"]*+(?:""[^"]*+)*+"')
_JSON = re.compile(r"[\[{]\s*(?:[\"{]|$)")
_SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
_SWALLOWED = {",": 50, "\t": 2}  # lines inside one cell that would each be a row; a tab in running text is rare
_DOUBLE = "write a quote inside a quoted cell twice, or convert the file to JSONL"


def read_table(delimiter: str, stream: BinaryIO, file: str) -> Iterator[Record]:
    """Read rows as {name in the header: text}; `row` counts from 1 below the header."""
    rows = _Cells(delimiter, stream, file).rows()
    line, names = next(rows, (0, []))
    if not line:
        return
    indexed = len(names) > 1 and not names[0].strip()
    if indexed:  # the index that pandas writes
        _LOG.warning("%s: column 1 has no name and is left out: numbers of rows, as pandas writes them", shorten(file))
    _check_header(names[indexed:], delimiter, file, line)
    for row, (line, cells) in enumerate(rows, 1):
        if len(cells) != len(names):
            what = "too many" if len(cells) > len(names) else "too few"
            raise UserError(
                f"{what} cells in line {line}", _DOUBLE if what == "too many" else "fill in the missing cells", file,
                row, found=f"{len(cells)} cells: {shorten(cells, 80)}",
                expected=f"{len(names)} cells: {shorten(', '.join(names), 80)}",
            )  # fmt: skip
        if indexed and not re.fullmatch(r"\d+", cells[0]):
            raise _unnamed(1, line, names, file)
        yield Record(dict(zip(names[indexed:], cells[indexed:], strict=True)), file, row)


def _check_header(names: list[str], delimiter: str, file: str, line: int) -> None:
    """Refuse names that are absent, alike or surrounded by space, and a header that was written for another kind."""
    other = next((mark for mark in _SEPARATORS if len(names) == 1 and mark in names[0]), None)
    if other is not None:
        kind = {",": ".csv", "\t": ".tsv"}.get(other)
        fix = f"rename the file so that it ends in {kind}" if kind else "save it again with commas"
        problem = f"the header in line {line} has {_SEPARATORS[other]} instead of {_SEPARATORS[delimiter]}"
        raise UserError(problem, fix, file, found=names[0], expected=f"names with {_SEPARATORS[delimiter]} between")
    seen: set[str] = set()
    for column, name in enumerate(names, 1):
        if not name.strip():
            raise _unnamed(column, line, names, file)
        if name != name.strip():
            raise UserError(f"space around a name in the header in line {line}", "remove it", file, found=repr(name))
        if name in seen:
            problem = f"two columns of the header in line {line} have one name"
            raise UserError(problem, "rename or remove one", file, field=name, found=shorten(names))
        seen.add(name)


def _unnamed(column: int, line: int, names: list[str], file: str) -> UserError:
    problem = f"column {column} of the header in line {line} has no name"
    return UserError(problem, "give every column a name", file, found=shorten(names))


class _Cells:
    """The cells of one table, row by row. One row is in memory at a time."""

    def __init__(self, delimiter: str, stream: BinaryIO, file: str) -> None:
        self.delimiter, self.stream, self.file = delimiter, stream, file
        self.line = 0
        self.offset = 0  # of the next line, in bytes
        self.row = 0  # 0 is the header
        self.columns = 0

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        """(number of the line where the row begins, its cells); blank lines are left out."""
        while text := self._next_line():
            start, content = self.line, text.removesuffix("\n").removesuffix("\r")
            if not content:
                continue
            if not self.row and _JSON.match(content):
                fix = "rename the file so that it ends in .jsonl or .json"
                raise self._error("JSON under the name of a table", fix, content)
            cells = self._quoted(text) if '"' in content else self._plain(content).split(self.delimiter)
            self.columns = self.columns or len(cells)
            self.row += 1
            yield start, cells

    def _next_line(self) -> str:
        """The next line with its end, or "" at the end of the file."""
        raw = self.stream.readline(MAX_ROW_BYTES)
        self.line += 1
        if len(raw) == MAX_ROW_BYTES:
            raise self._error(f"line {self.line} has over {MAX_ROW_BYTES} bytes", "check the quotes and line ends")
        text = decode_utf8(raw, self.offset, self.file, self.row or None)
        self.offset += len(raw)
        return text.removeprefix(BOM) if self.line == 1 else text

    def _plain(self, text: str) -> str:
        if "\r" in text:
            fix = "save the file with line feeds at the ends of its lines"
            raise self._error(f"a carriage return inside line {self.line}", fix, text)
        return text

    def _quoted(self, text: str) -> list[str]:
        """The cells of a row with quotes, which may go on over several lines."""
        cells: list[str] = []
        at = 0
        while True:
            if text.startswith('"', at):
                cell, text, at = self._to_closing_quote(text, at + 1, len(cells))
                cells.append(cell)
                if text[at:] in ("", "\n", "\r\n"):
                    return cells
                if not text.startswith(self.delimiter, at):
                    problem = f"text after the closing quote of cell {len(cells)} in line {self.line}"
                    raise self._error(problem, _DOUBLE, text[max(0, at - 40) : at + 40].strip())
            else:
                end = text.find(self.delimiter, at)
                cell = self._plain(text[at:end] if end >= 0 else text[at:].removesuffix("\n").removesuffix("\r"))
                if cell.lstrip(" ").startswith('"'):
                    problem = f"space before the quote of cell {len(cells) + 1} in line {self.line}"
                    raise self._error(problem, "remove the space, or quote all of the cell", cell)
                cells.append(cell)
                if end < 0:
                    return cells
                at = end
            at += len(self.delimiter)

    def _to_closing_quote(self, text: str, at: int, cell: int) -> tuple[str, str, int]:
        """(the cell that begins at `at`, the line where it ends, the offset behind its closing quote)."""
        start, parts, size = self.line, [], 0
        while (closing := _TO_CLOSING_QUOTE.match(text, at)) is None:
            parts.append(text[at:])
            size += len(parts[-1])
            text, at = self._next_line(), 0
            if not text or size > MAX_ROW_BYTES:
                what = "before the end of the file" if not text else f"within {MAX_ROW_BYTES} characters"
                problem = f"the quote that opens cell {cell + 1} in line {start} is not closed {what}"
                raise self._error(problem, _DOUBLE, f'"{parts[0][:60]}')
        inner = parts[1:]
        if self.columns > 1 and len(inner) >= _SWALLOWED.get(self.delimiter, 50) and self._look_like_rows(inner):
            problem = f"the quote that opens cell {cell + 1} in line {start} swallows the {len(inner)} lines below it"
            raise self._error(problem, _DOUBLE, f'"{parts[0][:60]}')
        parts.append(text[at : closing.end() - 1])
        return "".join(parts).replace('""', '"'), text, closing.end()

    def _look_like_rows(self, lines: list[str]) -> bool:
        return all(line.count(self.delimiter) == self.columns - 1 for line in lines)

    def _error(self, problem: str, fix: str, found: str | None = None) -> UserError:
        return UserError(problem, fix, self.file, self.row or None, found=found)


read_csv = partial(read_table, ",")
read_tsv = partial(read_table, "\t")
