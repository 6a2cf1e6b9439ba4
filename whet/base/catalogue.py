"""The Korean catalogue: English templates of whet's texts, and how a shown text is found among them.

A template is a text with numbered places for values: the f-string f"no such {kind}: {name}" is "no such {0}: {1}". The
Korean side has the same places in its own order, `{0:words}` where the value is a text of whet itself. All other values
(paths, rows, names, numbers) pass through unchanged. A text is compared only with the templates that share its rarest
word, the most specific first, and each comparison is linear in the text's length: there are no regular expressions in
it, so no text can make it slow. What could be read in two ways stays English, and so does what is not in the catalogue.
"""

from __future__ import annotations

import functools
import json
import operator
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "builtin" / "korean"
TABLES = "tables"  # names of rows and columns: no texts elsewhere, where the same words are code
PARTS = "parts"  # single words that are whet's own only where a template says so
REPORT = "report"  # texts of pages, which are named where they are written and never looked for
RECIPES = "recipes"  # comments of the recipes that `whet init` prints
FOUND = "found"  # texts of whet in the place of a found value, which are rows and names otherwise
SHORT_LITERAL = 4  # letters: so little of a template says nothing, unless its values are single words
DEEPEST = 4  # texts within texts
_PLACE = re.compile(r"\{(\d+)(:words)?\}")
_WORD = re.compile(r"[A-Za-z]{2,}")
_BETWEEN = re.compile(r"(, |; | and | or )")
_ENDING = ",;"  # how a text begins that is added to the end of others
_JOINED = {" and ": ", ", " or ": " 또는 "}


@dataclass(frozen=True)
class Template:
    """An English text with places, and its Korean. literals: the pieces around the places; numbers: of the places.

    parts: the Korean pieces, text or (number, whether it is a text of whet).
    """

    literals: tuple[str, ...]
    numbers: tuple[int, ...]
    parts: tuple[str | tuple[int, bool], ...]
    letters: int  # how much of the text the template itself says

    def values(self, text: str) -> dict[int, str] | None:
        """The value of each place, or None where the text is another one or could be read in two ways."""
        first, last = self.literals[0], self.literals[-1]
        if len(text) < len(first) + len(last) or not (text.startswith(first) and text.endswith(last)):
            return None
        left = _positions(text, self.literals[1:-1], len(first), len(text) - len(last))
        if left is None:
            return None
        right = _positions_from_right(text, self.literals[1:-1], len(first), len(text) - len(last))
        for literal, one, other in zip(self.literals[1:-1], left, right, strict=True):
            if one != other and _WORD.search(literal):
                return None
        bounds = [len(first), *(edge for at, size in left for edge in (at, at + size)), len(text) - len(last)]
        pieces = [text[begin:end] for begin, end in zip(bounds[::2], bounds[1::2], strict=True)]
        values: dict[int, str] = {}
        broken = any("\n" in literal for literal in self.literals)
        for number, piece in zip(self.numbers, pieces, strict=True):
            if "\n" in piece and not broken:  # a line is looked up by itself
                return None
            if values.setdefault(number, piece) != piece:
                return None
        return values


def _positions(text: str, literals: Iterable[str], begin: int, end: int) -> list[tuple[int, int]] | None:
    """The position and length of each literal, as far left as possible."""
    found = []
    for literal in literals:
        at = text.find(literal, begin, end) if literal else _end_of_word(text, begin, end)
        if at < 0:
            return None
        found.append((at, len(literal)))
        begin = at + len(literal)
    return found


def _end_of_word(text: str, begin: int, end: int) -> int:
    """The end of a value that another one follows at once; that one begins with a space or a sign."""
    return next((at for at in range(begin, end) if text[at] in " ,;("), end)


def _positions_from_right(text: str, literals: tuple[str, ...], begin: int, end: int) -> list[tuple[int, int]]:
    """Places of the literals, as far right as possible; called where there is a match."""
    found = []
    for literal in reversed(literals):
        end = text.rfind(literal, begin, end) if literal else end
        found.append((end, len(literal)))
    return found[::-1]


def template(english: str, korean: str) -> Template:
    """Read one entry of the catalogue."""
    pieces = re.split(r"\{(\d+)\}", english)
    parts: list[str | tuple[int, bool]] = []
    at = 0
    for place in _PLACE.finditer(korean):
        parts += [korean[at : place.start()], (int(place[1]), place[2] is not None)]
        at = place.end()
    parts.append(korean[at:])
    letters = sum(len(word) for literal in pieces[::2] for word in _WORD.findall(literal))
    return Template(tuple(pieces[::2]), tuple(int(number) for number in pieces[1::2]), tuple(parts), letters)


class Catalogue:
    """Entries that can be looked up by a text as it is shown."""

    def __init__(self, entries: Mapping[str, str], parts: Mapping[str, str] | None = None) -> None:
        self._parts = parts or {}
        self.exact = {english: korean for english, korean in entries.items() if not _PLACE.search(english)}
        templates = [template(english, korean) for english, korean in entries.items() if _PLACE.search(english)]
        words = [{word for literal in one.literals for word in _whole_words(literal)} for one in templates]
        common = Counter(word for of_one in words for word in of_one)
        self._endings = {english: korean for english, korean in self.exact.items() if english[:1] in _ENDING}
        self._by_word: dict[str, list[tuple[int, Template]]] = defaultdict(list)
        pairs = sorted(zip(templates, words, strict=True), key=lambda pair: _precision(pair[0]), reverse=True)
        for rank, (one, of_one) in enumerate(pairs):
            rarest = min(of_one, key=lambda word: (common[word], word)) if of_one else ""
            self._by_word[rarest].append((rank, one))

    def translated(self, text: str, depth: int = 0) -> str:
        """The Korean of a text; of each line where the whole is not known; the text itself where nothing is."""
        whole = self._whole(text, depth)
        if whole is not None:
            return whole
        if "\n" in text:
            return "\n".join(self.translated(line, depth) for line in text.split("\n"))
        body = text.strip(" !")
        if body and body != text and (inner := self._whole(body, depth)) is not None:
            at = text.index(body)
            return text[:at] + inner + text[at + len(body) :]
        for ending, korean in self._endings.items():
            if text.endswith(ending) and (inner := self._whole(text.removesuffix(ending), depth)) is not None:
                return inner + korean
        for head, separator, tail in (text.partition(": "), text.rpartition(": "), text.rpartition("  ")):  # a name
            if separator and tail in self.exact:
                return head + separator + self.exact[tail]
        head, bracket, tail = text.rpartition(" (")
        if bracket and tail.endswith(")") and head in self.exact:
            return f"{self.exact[head]} ({self.words(tail[:-1], depth)})"
        return text

    def words(self, text: str, depth: int = 0) -> str:
        """A text of whet within another one: as it is, or put together with commas. Where every member of a list is
        known, no template is tried on the list."""
        if text in self._parts or text in self.exact:
            return self._parts.get(text) or self.exact[text]
        pieces = _BETWEEN.split(text)
        known = [self._part(piece, depth) for piece in pieces[::2]]
        if (len(pieces) == 1 or not all(known)) and (whole := self._whole(text, depth)) is not None:
            return whole
        body = text.strip(" ()")
        if body and body != text and (inner := self._part(body, depth)) is not None:
            return text.replace(body, inner)
        if len(pieces) == 1 or not (any(known) or all(" " not in piece for piece in pieces[::2])):
            return text
        shown = [piece if now is None else now for piece, now in zip(pieces[::2], known, strict=True)]
        return shown[0] + "".join(
            _JOINED.get(between, between) + one for between, one in zip(pieces[1::2], shown[1:], strict=True)
        )

    def _part(self, text: str, depth: int) -> str | None:
        return self._parts[text] if text in self._parts else self._whole(text, depth)

    def _whole(self, text: str, depth: int) -> str | None:
        if text in self.exact:
            return self.exact[text]
        if depth > DEEPEST:
            return None
        candidates = [
            pair
            for word in {"", *_WORD.findall(text)} & self._by_word.keys()
            for pair in self._by_word[word]
            if text.startswith(pair[1].literals[0]) and text.endswith(pair[1].literals[-1])
        ]
        for _, one in sorted(candidates, key=operator.itemgetter(0)):
            values = one.values(text)
            if values is not None and (shown := self._filled(one, values, depth)) is not None:
                return shown
        return None

    def _filled(self, one: Template, values: Mapping[int, str], depth: int) -> str | None:
        """The Korean with its values; None where so little was said that the text need not be one of whet's."""
        shown = {
            part: self.words(values[part[0]], depth + 1) if part[1] else values[part[0]]
            for part in one.parts
            if not isinstance(part, str)
        }
        if one.letters <= SHORT_LITERAL and any(" " in values[part[0]] == now for part, now in shown.items()):
            return None
        return "".join(part if isinstance(part, str) else shown[part] for part in one.parts)


def _precision(one: Template) -> tuple[int, int]:
    return one.letters, sum(map(len, one.literals))


def _whole_words(literal: str) -> list[str]:
    """Words that a value beside the literal cannot be a part of."""
    inner = re.sub(r"^[A-Za-z]+|[A-Za-z]+$", " ", literal)
    return _WORD.findall(inner)


@functools.cache
def _entries(folder: Path = FOLDER) -> dict[str, dict[str, str]]:
    return {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))}


@functools.cache
def catalogue() -> Catalogue:
    """The entries of all sentences."""
    rooms = _entries()
    apart = (TABLES, PARTS, REPORT, RECIPES)
    texts = {english: ko for room, texts in rooms.items() if room not in apart for english, ko in texts.items()}
    return Catalogue(texts, rooms.get(PARTS))


@functools.cache
def by_english() -> dict[str, str]:
    """The Korean of each text by its whole English; its places are ready for `str.format`."""
    rooms = _entries()
    order = [*(room for room in rooms if room not in (REPORT, RECIPES)), REPORT]
    return {english: _PLACE.sub(r"{\1}", ko) for room in order for english, ko in rooms.get(room, {}).items()}


@functools.cache
def catalogue_of(room: str) -> Catalogue:
    """The entries of one file: `tables`, with single words, or `found`, without templates that say next to nothing."""
    texts = {**(_entries().get(PARTS, {}) if room == TABLES else {}), **_entries().get(room, {})}
    if room == FOUND:
        texts = {
            english: korean
            for english, korean in texts.items()
            if not _PLACE.search(english) or template(english, korean).letters > SHORT_LITERAL
        }
    return Catalogue(texts)
