"""The directory in which whet remembers what it would else compute again.

`WHET_CACHE` names the directory, or `off`. What is remembered is found by its content, so that it can be deleted at any
time and is never out of date.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path | None:
    """The directory, which need not exist yet, or None where nothing is to be remembered."""
    chosen = os.environ.get("WHET_CACHE", "")
    if chosen.lower() in ("off", "0", "none"):
        return None
    base = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "whet"
    return base.expanduser()
