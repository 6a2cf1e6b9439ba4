"""Which rows are held out: decided by a hash of the row, so that a row never changes side.

Adding rows, reordering the file or training on another machine moves no row from one side to the other, and a row that
occurs twice is on one side only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def held_out(ids: Sequence[str], val_size: float) -> list[bool]:
    """True for each row that is held out. val_size < 1: a share; >= 1: so many rows, those of the lowest hashes."""
    if val_size <= 0:
        return [False] * len(ids)
    places = [int.from_bytes(hashlib.sha256(f"split:{name}".encode()).digest()[:8], "big") / 2**64 for name in ids]
    if val_size < 1:
        return [place < val_size for place in places]
    ranked = sorted(set(places))
    limit = ranked[min(int(val_size), len(ranked)) - 1]
    return [place <= limit for place in places]
