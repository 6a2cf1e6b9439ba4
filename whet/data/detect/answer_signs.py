"""Signs that can be seen in one answer alone, as bits and short forms; `detect.answers` compares them over the set.

Each sign is narrow on purpose. A list may end without a full stop, code may end anywhere, a poem repeats itself: prose
here means a last line of eight words or more that is no list, heading, table, code or address.
"""

from __future__ import annotations

import json
import re
import zlib
from collections import Counter
from dataclasses import dataclass
from enum import IntFlag


class Signs(IntFlag):
    """Signs of one answer as flags; 16 bits at most."""

    EMPTY = 1
    NO_WORDS = 2
    COPY = 4
    REFUSAL = 8
    REPEATED = 16
    OPEN_FENCE = 32
    OPEN_BRACKET = 64
    STOPS = 128
    PROSE = 256
    NO_CLOSE = 512
    NOT_JSON = 1024
    BRIEF = 2048


@dataclass(frozen=True, slots=True)
class AnswerSigns:
    """All signs of one answer. flags: `Signs`; start, end: the sign with which the answer and its last line begin;
    label: the whole answer if it is short; keys: the field names of an object, as JSON. None where there is none."""

    characters: int
    flags: int
    start: str | None
    end: str | None
    label: str | None
    keys: str | None


_LABEL_CHARACTERS = 40
_CANNOT = r"(?:can'?t|can ?not|do not|don'?t|am unable|'?m unable|am not|'?m not)"
_REFUSALS = re.compile(
    r"\bas an? (?:ai|artificial intelligence) (?:language )?model\b"
    rf"|\bas an? ai(?: assistant)?, i ?{_CANNOT}\b"
    rf"|^(?:i'?m|i am) (?:sorry|afraid),? (?:but )?i ?{_CANNOT}\b[^.]{{0,40}}"
    r"\b(?:assist|help|fulfil|comply|provide|answer)"
    r"|^i (?:can'?t|can ?not) (?:assist|help|comply) with (?:that|this)"
    r"|(?:ai|인공지능)\s?언어\s?모델(?:로서|이기\s?때문|이므로|입니다)|^(?:저는\s)?(?:ai|인공지능)로서"
    r"|^죄송(?:합니다|하지만)[^.]{0,40}(?:도와드릴|답변(?:해\s?)?드릴|제공(?:해\s?)?드릴|대답할)\s?수\s?없",
    re.IGNORECASE,
)
_FENCE = re.compile(r"^\s{0,3}(```+|~~~+)", re.MULTILINE)
# Words that cannot be the last: what follows them is missing.
_STOPS = re.compile(
    r"(?:[,;]|\b(?:and|or|the|a|an|of|to|with|because|which|is|are|for)|(?:그리고|하지만|그러나|또는|및|왜냐하면))$"
)
_BRIEF = re.compile(r"[-+]?[\d.,/%$]+|[A-Za-z]|yes|no|true|false|네|예|아니요|아니오|참|거짓", re.IGNORECASE)
# Lists, headings, tables, code, addresses, fields; a hashtag, a name after a dash or a name with a dot at the end.
_NO_PROSE = re.compile(
    r"^\s*(?:[-*•·>|#+]|\d+[.)]|[A-Za-z][.)]\s|```|    |\t)|https?://|[{}<>=|\\]|`[^`]*$"
    r"|^\s*[\w ]{1,30}:|(?:#\w+|[-–—~]\s?[A-Z][^-–—~]{0,40}|\S*\.\S+)$"
)
_CLOSED = re.compile(r"[.!?…。！？:;)\]}\"'”’」』》*_~`%℃$]$|[^\w\s]$|(?:[ㅋㅎㅠㅜ~^]+)$")
_MARK = re.compile(r"\S{1,24}")


def signs_of(answer: str, question: str) -> AnswerSigns:
    """The signs of `answer`, given the user's last message."""
    text = answer.strip()
    if not text:
        return AnswerSigns(0, Signs.EMPTY | Signs.NOT_JSON, None, None, "", None)
    flags = Signs(0)
    if not any(map(str.isalnum, text)):
        flags |= Signs.NO_WORDS
    if len(text) >= 15 and _folded(text) == _folded(question):
        flags |= Signs.COPY
    if _BRIEF.fullmatch(text.rstrip(".")):
        flags |= Signs.BRIEF
    if _REFUSALS.search(text[:400]):
        flags |= Signs.REFUSAL
    if _repeats(text):
        flags |= Signs.REPEATED
    value, keys = _json(text)
    if not value:
        flags |= Signs.NOT_JSON | _end_signs(text)
    last = text.rsplit("\n", 1)[-1].strip()
    label = text if len(text) <= _LABEL_CHARACTERS and "\n" not in text else None
    return AnswerSigns(len(text), int(flags), _mark(text), _mark(last) if last != text else None, label, keys)


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def _mark(line: str) -> str | None:
    """The first word of a line if it is a sign (####, Answer:, <think>), not a word of the language."""
    match = _MARK.match(line)
    word = match[0] if match else ""
    return word if len(word) > 1 and re.search(r"[:#<>\]\[=*{}|]", word) else None


def _end_signs(text: str) -> Signs:
    """The signs of the text's end."""
    flags = Signs(0)
    fences = _FENCE.findall(text)
    if len(fences) % 2 and not text.endswith(fences[-1]):
        return Signs.OPEN_FENCE
    last = text.rsplit("\n", 1)[-1]
    if text[0] in "{[" and text[-1] not in "}]" and re.match(r'[{\[]\s*(?:"|\{|\[)', text):
        flags |= Signs.OPEN_BRACKET
    if fences and text.endswith(fences[-1]):
        return flags
    words = last.split()
    if len(words) < 8 or _NO_PROSE.search(last):
        return flags
    flags |= Signs.PROSE
    if not _CLOSED.search(last):
        flags |= Signs.NO_CLOSE
    return flags | (Signs.STOPS if len(text) >= 80 and _STOPS.search(last) else Signs(0))


def _json(text: str) -> tuple[bool, str | None]:
    """(True if the whole text is a JSON object or list, the field names of an object in order of the alphabet)."""
    if text[0] not in "{[" or text[-1] not in "}]":
        return False, None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False, None
    return True, json.dumps(sorted(value)[:50], ensure_ascii=False) if isinstance(value, dict) else None


def _repeats(text: str) -> bool:
    """True if a phrase of six words, or 24 characters where there are no spaces, makes up half of a long text.

    Compression is the cheap first look: text that is written for the first time shrinks to a half or a third.
    """
    if len(text) < 200:
        return False
    head = text[:20_000]
    data = head.encode("utf-8", "replace")
    if len(data) < 6 * len(zlib.compress(data, 1)):
        return False
    words = head.split()
    width = 6
    if len(words) < len(head) / 15:
        words, width = list(head), 24
    grams = Counter(tuple(words[start : start + width]) for start in range(len(words) - width + 1))
    if not grams:
        return False
    gram, count = grams.most_common(1)[0]
    return count >= 5 and len(set(gram)) > 1 and 2 * count * width >= len(words) / 2 and _same_lines(head, count)


def _same_lines(text: str, count: int) -> bool:
    """True if most lines or sentences occur again as a whole; those of a table or a list differ by a word."""
    parts = [part.strip() for part in re.split(r"[\n.!?。]", text) if part.strip()]
    again = sum(number for number in Counter(parts).values() if number > 1)
    return len(parts) < 3 or 2 * again >= len(parts)
