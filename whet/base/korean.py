"""The Korean forms of what whet shows: an error, the console, help, recipes. Imported only when Korean is read."""

from __future__ import annotations

import argparse
import re
from itertools import groupby
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from whet.base.catalogue import FOUND, RECIPES, TABLES, catalogue, catalogue_of
from whet.base.errors import UserError, shorten

LABELS = {"found": "현재 값:", "expected": "올바른 값:", "fix": "해결:"}
_LABEL_CELLS = 11
_COMMENT_CELLS = 118
_CHOICES = re.compile(r"(?:[^ ]+, )*[^ ]+ or [^ ]+")


def error_in_korean(error: UserError) -> str:
    """The lines of an error. Values that were found are the user's, and stay as they are."""
    values = error.as_dict()  # what is secret in them is hidden already
    problem, fix, expected = (_sentence(str(values[name] or "")) for name in ("problem", "fix", "expected"))
    row = "" if values["row"] is None else f"{values['row']}행"
    field = f"{values['field']} 필드" if values["field"] else ""
    where = ", ".join(part for part in (str(values["file"] or ""), row, field) if part)
    lines = [f"오류: {where}: {problem}" if where else f"오류: {problem}"]
    if values["found"] is not None:
        lines.append(_labelled("found", catalogue_of(FOUND).translated(shorten(values["found"]))))
    if values["expected"] is not None:
        lines.append(_labelled("expected", expected))
    if fix:
        lines.append(_labelled("fix", fix))
    return "\n".join(lines)


def _sentence(text: str) -> str:
    """A text of whet, or choices of single words, which are code but for the word between them."""
    shown = catalogue().translated(text)
    return re.sub(" or (?=[^ ]+$)", " 또는 ", text) if shown == text and _CHOICES.fullmatch(text) else shown


def _labelled(name: str, text: str) -> str:
    label = LABELS[name]
    return f"  {label}{' ' * (_LABEL_CELLS - cell_len(label))}{text}"


class KoreanConsole(Console):
    """A console that translates plain strings and the names in tables; a `Text` is data and stays as it is."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print in Korean."""
        super().print(*(_shown(one) for one in objects), **options)


def _shown(one: Any) -> Any:
    if isinstance(one, str):
        return catalogue().translated(one)
    return _table(one) if isinstance(one, Table) else one


def _table(table: Table) -> Table:
    """A table with its title, its headers and, where it has no headers, its cells in Korean."""
    words = catalogue_of(TABLES)
    title = catalogue().translated(table.title) if isinstance(table.title, str) else table.title
    shown = Table(
        title=title, title_justify=table.title_justify, box=table.box, pad_edge=table.pad_edge,
        show_header=table.show_header,
    )  # fmt: skip
    for column in table.columns:
        made = column.copy()
        if isinstance(made.header, str):
            made.header = words.translated(made.header)
        shown.columns.append(made)
    cells = zip(*(column.cells for column in table.columns), strict=True)
    for row, of_row in zip(table.rows, cells, strict=True):
        named = [one if table.show_header or not isinstance(one, str) else _cell(one) for one in of_row]
        shown.add_row(*named, style=row.style, end_section=row.end_section)
    return shown


def _cell(text: str) -> str:
    named = catalogue_of(TABLES).translated(text)
    return named if named != text else catalogue().translated(text)


class KoreanHelp(argparse.RawDescriptionHelpFormatter):
    """argparse's help with every text in Korean, broken by the cells that Hangul takes."""

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: str | None = None) -> None:
        """The line of usage."""
        super().add_usage(usage, actions, groups, "사용법: " if prefix is None else prefix)

    def start_section(self, heading: str | None) -> None:
        """A section with a heading."""
        super().start_section(catalogue().translated(heading) if heading else heading)

    def add_text(self, text: str | None) -> None:
        """A paragraph; a description is the short text of its verb as a sentence."""
        if text is None or text is argparse.SUPPRESS:
            return
        shown = catalogue().translated(text)
        if shown == text and text.endswith("."):
            short = text[0].lower() + text[1:-1]
            inner = catalogue().translated(short)
            shown = text if inner == short else f"{inner}."
        super().add_text(shown)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return catalogue().translated(action.help) if action.help else action.help

    def _split_lines(self, text: str, width: int) -> list[str]:
        return _broken(text, width)


def _broken(text: str, width: int) -> list[str]:
    """Lines of at most `width` cells, where no word is longer."""
    lines, line = [], ""
    for word in text.split():
        if line and cell_len(line) + 1 + cell_len(word) > width:
            lines.append(line)
            line = ""
        line = f"{line} {word}" if line else word
    return [*lines, line]


def recipe_in_korean(text: str) -> str:
    """A recipe with Korean comments; a comment that is not known stays, and so does all that is none."""
    known = catalogue_of(RECIPES).exact
    made: list[str] = []
    for alone, group in groupby(text.splitlines(), key=lambda line: line.startswith("#")):
        lines = list(group)
        block = " ".join(line.removeprefix("#").strip() for line in lines)
        if alone and block in known:
            lines = [f"# {line}" for line in _broken(known[block], _COMMENT_CELLS)]
        elif not alone:
            parts = (line.partition(" # ") for line in lines)
            lines = [f"{setting}{mark}{known.get(comment, comment)}" for setting, mark, comment in parts]
        made += lines
    return "".join(f"{line}\n" for line in made)
