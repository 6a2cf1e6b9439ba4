"""What was taken out of the data or changed in it, and why: one record for each row, so that nothing disappears.

Every check that can drop a row gives these records; one place writes them to a file. The text of the row is not in
the record, because what was removed is often removed for being private: file and row lead to it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Removed:
    """file, row (1-based): where the row stands. kind: which check, one word. reason: one sentence for people."""

    file: str
    row: int
    reason: str
    kind: str

    def to_json(self) -> str:
        """One line of JSONL, without the newline."""
        return json.dumps(asdict(self), ensure_ascii=False)
