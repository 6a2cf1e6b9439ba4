"""Hide keys and passwords in what is printed and written: tokens of known services, and those in addresses.

An error shows what was found, and what was found may hold a key that was pasted into the wrong place. Shapes that
nothing else has are hidden everywhere. Gives up: passwords without a shape.
"""

from __future__ import annotations

import re

HIDDEN = "[SECRET]"
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}"
    r"|github_pat_[A-Za-z0-9_]{20,}|glpat-[A-Za-z0-9_-]{16,}|xox[abprs]-[A-Za-z0-9-]{10,}|AKIA[A-Z0-9]{12,}"
    r"|AIza[A-Za-z0-9_-]{20,}|eyJ[A-Za-z0-9_-]{6,}\.[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]+)?)"
)
_PASSWORD = re.compile(r"(?P<before>[A-Za-z][A-Za-z0-9+.-]{1,15}://)(?P<secret>[^\s/@:]*:?[^\s/@]+)(?=@)")
_QUERY = re.compile(
    r"(?i)(?P<before>[?&#](?:access_?token|api_?key|auth|key|password|secret|sig(?:nature)?|token)=)(?P<secret>[^\s&#]+)"
)


def hide(text: str) -> str:
    """`text` with every key and password replaced."""
    text = _TOKEN.sub(HIDDEN, text)
    for pattern in (_PASSWORD, _QUERY):
        text = pattern.sub(lambda found: found["before"] + HIDDEN, text)
    return text


def holds_secret(text: str) -> bool:
    """True if a key or a password stands in the text."""
    return any(pattern.search(text) is not None for pattern in (_TOKEN, _PASSWORD, _QUERY))
