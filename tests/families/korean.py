"""docs/families.ko.md from docs/families.md: the same tables, so that both pages are of one run.

`python tests/families/korean.py` writes it from the page as it stands; `make families` writes both.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from whet.base.catalogue import FOUND, Catalogue, catalogue, catalogue_of

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
TWIN = PAGE.with_name("families.ko.md")
TEXTS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
WORDS: dict[str, str] = TEXTS["words"]  # of headings, and of the lines and columns of tables
# Each paragraph on one line, with what it says of a run in numbered places.
PARAGRAPHS = Catalogue(TEXTS["paragraphs"])


def twin(page: str) -> str:
    """The Korean of the page. Raises LookupError for a paragraph without Korean."""
    return "\n\n".join(map(_block, page.rstrip("\n").split("\n\n"))) + "\n"


def _block(block: str) -> str:
    heading = re.fullmatch(r"(#+ )(.*)", block)
    if block.startswith("|"):
        return "\n".join(map(_row, block.split("\n")))
    if heading:
        return heading[1] + WORDS[heading[2]]
    if block.removesuffix(":") in WORDS:
        return f"{WORDS[block.removesuffix(':')]}:"
    paragraph = block.replace("\n", " ")
    korean = PARAGRAPHS.translated(paragraph)
    if korean == paragraph:
        raise LookupError(f"tests/families/korean.json has no Korean for {paragraph!r}")
    return korean


def _row(line: str) -> str:
    """A row of a table: its words, and the reason where it is one of whet's."""
    first, *rest = line.removeprefix("| ").removesuffix(" |").split(" | ")
    if set(first) == {"-"}:
        return line
    how = ", ".join(WORDS.get(part, part) for part in first.split(", "))
    return "| " + " | ".join([how, *map(_reason, rest)]) + " |"


def _reason(text: str) -> str:
    """A reason in Korean as the terminal says it; what libraries say, and what was cut, as it is."""
    if text in WORDS:
        return WORDS[text]
    problem, bracket, found = text.partition(" (")
    known = catalogue().translated(problem)
    if known == problem or "Error:" in problem:
        return text
    whole = found.endswith(")") and "Error:" not in found
    return known + bracket + (f"{_found(found[:-1])})" if whole else found)


def _found(text: str) -> str:
    shown = catalogue_of(FOUND).translated(text)
    return catalogue().words(text) if shown == text else shown


if __name__ == "__main__":
    TWIN.write_text(twin(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
