"""Amounts as a person reads them; apart from the console, since the engine prints nothing and imports no console."""

from __future__ import annotations


def bytes_text(count: float) -> str:
    """A number of bytes with a binary unit: 1234567 is '1.2 MiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError
