"""Tell if the network may be used: one question, asked in one way by all code that would use it."""

from __future__ import annotations

import os


def is_offline() -> bool:
    """True if the network is forbidden, by --offline or by HF_HUB_OFFLINE before the start."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
