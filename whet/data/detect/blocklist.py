"""Find words that must not be in the rows: block lists of the user's own, matched all at once.

A file holds one word or phrase a line, `#` starts a comment, and `re:` a regular expression. Case, Unicode form and
the kind of white space do not matter. A word in letters that are written with spaces between words (Latin, Cyrillic,
Greek) is found as a word of its own, so that `ass` is not in `class`; a word in Korean, Japanese or Chinese is found
anywhere, because particles follow it without a space.

All words become one pattern that shares their beginnings, so the time does not grow with each word of the list.
Regular expressions are the user's; each has a time limit a row, so that a bad one is an error and not a hang.
Gives up: spelling that is meant to escape a list (`s h i t`); that is what `re:` is for.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import regex

from whet.base.errors import UserError
from whet.data.detect.texts import texts
from whet.data.example import Example
from whet.data.removed import Removed

Action = Literal["report", "drop"]
MOST_CHARACTERS = 200
SECONDS_A_ROW = 2.0
SHOWN = 5
_SHARED = 8  # characters of a beginning that are shared at most; deeper nesting gains nothing
_SPACED = r"\p{Latin}\p{Cyrillic}\p{Greek}\p{Nd}_"


def folded(text: str) -> str:
    """`text` as it is compared: NFKC, no case."""
    return text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()


@dataclass(frozen=True)
class BlockList:
    """The words of one or more files as patterns. words: how many words and phrases; the patterns find them in folded
    text."""

    words: int
    free: regex.Pattern[str] | None
    bounded: regex.Pattern[str] | None
    expressions: tuple[tuple[regex.Pattern[str], str, int], ...]

    @classmethod
    def read(cls, paths: Sequence[str]) -> BlockList:
        """Read a block list from files. Raises UserError, with file and line, for a file that cannot be read and for a
        line that is no regular expression."""
        words: set[str] = set()
        expressions = []
        for path in paths:
            for row, line in enumerate(_lines(path), 1):
                entry = line.strip()
                if not entry or entry.startswith("#"):
                    continue
                if entry.startswith("re:"):
                    expressions.append((_expression(entry[3:].strip(), path, row), path, row))
                    continue
                word = " ".join(folded(entry).split())
                if len(word) > MOST_CHARACTERS:
                    raise UserError("the phrase is too long for a block list", "write its most telling part", path, row,
                                    found=f"{len(word)} characters", expected=f"at most {MOST_CHARACTERS}")  # fmt: skip
                words.add(word)
        if not words and not expressions:
            raise UserError("the block list holds no word", "write one word or phrase a line", file=", ".join(paths))
        spaced = {word for word in words if regex.search(rf"[{_SPACED}]", word[0] + word[-1])}
        return cls(len(words), _pattern(words - spaced, ""), _pattern(spaced, _SPACED), tuple(expressions))

    def find(self, text: str) -> list[str]:
        """The words of the list that `text` holds, each once, in order of position; regular expressions last."""
        plain = folded(text)
        offsets: dict[str, int] = {}
        for pattern in (self.free, self.bounded):
            for match in pattern.finditer(plain) if pattern else ():
                offsets.setdefault(" ".join(match[0].split()), match.start())
        words = sorted(offsets, key=lambda word: offsets[word])
        for pattern, path, row in self.expressions:
            try:
                hit = pattern.search(text, timeout=SECONDS_A_ROW)
            except TimeoutError as error:
                raise UserError(
                    f"the regular expression takes over {SECONDS_A_ROW:g} s on one row",
                    "write it without nested repetitions", path, row, found=pattern.pattern,
                ) from error  # fmt: skip
            if hit:
                words.append(f"re:{pattern.pattern}")
        return words


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        problem = "not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror or str(error)
        raise UserError(f"the block list cannot be read: {problem}", "check data.blocklist", file=path) from error


def _expression(source: str, path: str, row: int) -> regex.Pattern[str]:
    try:
        expression = regex.compile(source, regex.IGNORECASE)
    except regex.error as error:
        problem = f"not a regular expression: {error}"
        raise UserError(problem, "escape its signs with \\, or remove `re:`", path, row, found=source) from error
    if expression.search("") is not None:
        raise UserError(
            "the regular expression matches every text", "make it ask for at least one character", path, row,
            found=source,
        )  # fmt: skip
    return expression


def _pattern(words: set[str], border: str) -> regex.Pattern[str] | None:
    """One pattern for all words. border: characters that may not touch a word that begins or ends with one of them."""
    if not words:
        return None
    body = _shared(sorted(words), 0)
    if border:
        return regex.compile(rf"(?:(?<![{border}])|(?![{border}]))(?:{body})(?:(?![{border}])|(?<![{border}]))")
    return regex.compile(body)


def _shared(words: Sequence[str], depth: int) -> str:
    """Alternatives, the longest first, under their common first characters. words: sorted, from `depth` on."""
    if depth == _SHARED or len(words) == 1:
        ends = sorted((word[depth:] for word in words), key=len, reverse=True)
        return "(?:" + "|".join(_escaped(end) for end in ends) + ")"
    groups: dict[str, list[str]] = {}
    for word in words:
        groups.setdefault(word[depth : depth + 1], []).append(word)
    last = "" in groups
    parts = [_escaped(first) + _shared(rest, depth + 1) for first, rest in groups.items() if first]
    return "(?:" + "|".join([*parts, *([""] if last else [])]) + ")"


def _escaped(text: str) -> str:
    return r"\s+".join(regex.escape(part) for part in text.split(" "))


@dataclass
class Blocked:
    """Counts of blocked words so far. words: rows that hold each word; rows: rows that hold any; examples: the first
    few."""

    rows: int = 0
    words: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, str | int]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for `--json` and the HTML page."""
        return {"rows": self.rows, "words": dict(self.words.most_common(50)), "examples": self.examples}


def without_blocked(
    examples: Iterable[Example], words: BlockList, action: Action, seen: Blocked, note: Callable[[Removed], None]
) -> Iterator[Example]:
    """The examples, without those that hold a word of the list where `action` is drop. Every message is looked at.

    seen: counts the words. note: called once for each row that is dropped.
    """
    for example in examples:
        blocked = list(dict.fromkeys(word for text in texts(example) for word in words.find(text)))
        if blocked:
            seen.rows += 1
            seen.words.update(blocked)
            if len(seen.examples) < SHOWN:
                seen.examples.append({"file": example.file, "row": example.row, "word": blocked[0]})
            if action == "drop":
                note(Removed(example.file, example.row, f"on the block list: {', '.join(blocked[:3])}", "blocklist"))
                continue
        yield example
