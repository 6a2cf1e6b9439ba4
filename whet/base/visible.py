"""Make text safe to show: what a terminal or a browser would obey is made visible instead.

Data, labels, names of files, keys of recipes and what a model writes may hold escape sequences that clear the screen or
hide a line, marks that turn the direction of writing, or half characters that no encoding has. `visible` is the one
place that knows them; consoles, pages and errors all use it.
"""

from __future__ import annotations

import re

_NEWLINES = re.compile(r"\r\n?|[\x85\u2028\u2029]")
_CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u202a-\u202e\u2028\u2029\u2060-\u2069\ufeff\ud800-\udfff\ufff9-\ufffb"
    r"\ufffe\uffff\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """Escape sequences as ␛, marks of direction and lone surrogates as ⟨U+202E⟩; line breaks and tabs stay."""
    if text.isprintable():
        return text
    return _CONTROL.sub(_shown, _NEWLINES.sub("\n", text))


def visible_json(text: str) -> str:
    """JSON text with the same characters as \\u escapes, so that it says the same and a terminal obeys nothing."""
    return text if text.isprintable() else _CONTROL.sub(_escaped, text)


def _shown(match: re.Match[str]) -> str:
    return chr(0x2400 + ord(match[0])) if match[0] < " " else f"⟨U+{ord(match[0]):04X}⟩"


def _escaped(match: re.Match[str]) -> str:
    units = match[0].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))
