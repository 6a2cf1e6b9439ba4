"""Tell the languages of rows apart: by script, and for Latin letters by their commonest words.

A letter of Hangul or Kana names its language at once, so counting letters is exact and fast where a model would be
slow and guess. English is told from other languages in Latin letters by function words, which make up about half of
any English sentence. A word of Latin letters among Korean is a name or a term, not a second language: a row is mixed
only when the second script holds a good part of it.
Gives up: telling Cyrillic or Latin languages other than English apart, and a text of one or two words.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

Language = Literal["ko", "en", "ja", "zh", "cyrillic", "latin_other", "other", "code", "digits", "none"]

_SHOWN = 5
_MIXED_SHARE = 0.25
_MIXED_LETTERS = 15
_HEAD = 4000  # characters that are looked at: the mix of a text shows early
_TERMS = 0.4  # weight of Latin letters that show no grammar beside another script: names and terms
# A syllable or character says as much as this many letters.
_WEIGHTS: dict[Language, float] = {"ko": 2.5, "zh": 4.0, "ja": 2.5}
_SCRIPTS: tuple[tuple[Language, re.Pattern[str]], ...] = (
    ("ko", re.compile(r"[\uac00-\ud7a3\u1100-\u11ff\u3131-\u318e]+")),
    ("ja", re.compile(r"[\u3041-\u30ff\uff66-\uff9f]+")),
    ("zh", re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+")),
    ("cyrillic", re.compile(r"[\u0400-\u052f]+")),
)
_LATIN = re.compile(r"[A-Za-z\u00c0-\u024f\u1e00-\u1eff]+(?:['’][A-Za-z]+)?")
_LETTER = re.compile(r"[^\W\d_]+")
# Function words.
_ENGLISH_WORDS = (
    "the of and to in is that it for was on are as with his they at be this have from or had by but not what all were "
    "we when your can said there use an each which she do how their if will up about out many then them these so some "
    "her would make like him into has look more see no way could my than been who its now did get may i you he me our "
    "am does don't it's i'm please why where let's want need just any here"
)
_OTHER_WORDS = (
    "de la el los las que y en un una por con para del se es der die das und ist nicht ein eine mit für auf von den "
    "zu im le les des et du dans une est pour pas qui sur au il di che è non per della sono um os uma não dos het van "
    "een niet och att som är på og det jeg ikke nie się że bir ve için bu ne yang dan ini itu"
)
_ENGLISH, _OTHERS = frozenset(_ENGLISH_WORDS.split()), frozenset(_OTHER_WORDS.split())
# Addresses, code and tags are no language of the row.
_NO_TEXT = re.compile(
    r"```.*?(?:```|$)|`[^`\n]*`|(?:https?://|www\.)[!-~]+|[!-~]+@[!-~]+|<[^<>\n]{1,200}>|&\w+;", re.DOTALL
)
_CODE = re.compile(
    r"^\s*(?:def |class |import |from \w+ import|#include|public |private |function |const |let |var |return\b|"
    r"SELECT |INSERT |<\?php|<!DOCTYPE|<html|package |using |fn |\}|\{)|[;{}]\s*$|=>|\(\);|</\w+>",
    re.MULTILINE,
)
_ASCII_LETTER = re.compile(r"[A-Za-z]")


def language(text: str) -> Language:
    """The language that most of `text` is in; code, digits (no letters) or none (no word at all) where it is none."""
    return languages(text)[0]


def languages(text: str) -> tuple[Language, ...]:
    """The language of most of `text`, then each other one that holds at least a quarter of it and 15 letters."""
    text = text[:_HEAD]
    if not text.strip():
        return ("none",)
    if text.isascii() and len(_CODE.findall(text)) > max(1, text.count("\n") // 3):
        return ("code",)
    if any(sign in text for sign in ("`", "://", "www", "@", "<", "&")):
        text = _NO_TEXT.sub(" ", text)
    if text.isascii():
        return (_latin(_LATIN.findall(text))[0] if _ASCII_LETTER.search(text) else _without_letters(text),)
    weights: dict[Language, float] = {
        name: _WEIGHTS.get(name, 1.0) * sum(map(len, script.findall(text))) for name, script in _SCRIPTS
    }
    if weights["ja"]:  # Chinese characters beside Kana are Japanese
        weights["ja"] += weights["zh"] * _WEIGHTS["ja"] / _WEIGHTS["zh"]
        weights["zh"] = 0.0
    words = _LATIN.findall(text)
    latin = float(sum(map(len, words)))
    if latin:
        name, evidence = _latin(words)
        weights[name] = latin if evidence or not any(weights.values()) else _TERMS * latin
    known = sum(weights.values())
    if known == 0:
        return (_without_letters(text),)
    ordered: list[Language] = sorted(weights, key=lambda name: -weights[name])
    letters = sum(map(len, _LETTER.findall(text)))
    counted = latin + sum(weights[name] / _WEIGHTS.get(name, 1.0) for name, _ in _SCRIPTS)
    if letters > 2 * counted:
        return ("other",)
    more: list[Language] = [
        n for n in ordered[1:] if weights[n] >= _MIXED_SHARE * known and weights[n] >= _MIXED_LETTERS
    ]
    return (ordered[0], *more)


def _without_letters(text: str) -> Language:
    if any(map(str.isdigit, text)):
        return "digits"
    return "other" if any(map(str.isalpha, text)) else "none"


def _latin(words: list[str]) -> tuple[Language, int]:
    """(language, number of its function words): English when they outnumber those of other languages and accents.

    One or two words of plain ASCII without any are called English, as that is what such words mostly are.
    """
    folded = [word.lower().replace("’", "'") for word in words]
    english, others = (sum(map(known.__contains__, folded)) for known in (_ENGLISH, _OTHERS))
    foreign = sum(not word.isascii() for word in folded)
    if others + foreign > english and others + foreign > (0 if foreign else 1):
        return "latin_other", others + foreign
    return "en", english


@dataclass
class LanguageMix:
    """Counts of the rows of each language so far. mixed: rows with more than one, by pair; examples: the first few of
    those."""

    rows: Counter[Language] = field(default_factory=Counter)
    mixed: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, str | int]] = field(default_factory=list)

    def add(self, text: str, file: str, row: int) -> None:
        """Count one row."""
        present = languages(text)
        self.rows[present[0]] += 1
        if len(present) > 1:
            pair = "+".join(present)
            self.mixed[pair] += 1
            if len(self.examples) < _SHOWN:
                self.examples.append({"file": file, "row": row, "languages": pair})

    def as_dict(self) -> dict[str, Any]:
        """shares: of all rows, the largest first; mixed: rows by pair of languages."""
        total = max(1, self.rows.total())
        shares = {name: round(count / total, 6) for name, count in self.rows.most_common()}
        return {"shares": shares, "mixed": dict(self.mixed.most_common()), "examples": self.examples}
