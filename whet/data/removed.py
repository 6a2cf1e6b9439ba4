"""Records of removed and changed rows, each with its reason, so that nothing disappears from the data.

Every check that can drop a row gives these records; one function writes them to a file. The text of the row is not in
the record, because a row is often removed for being private: file and row lead to it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Removed:
    """A row that was removed or changed. file, row (1-based): its position. kind: the check, one word. reason: one
    sentence for people."""

    file: str
    row: int
    reason: str
    kind: str

    def to_json(self) -> str:
        """One line of JSONL, without the newline."""
        return json.dumps(asdict(self), ensure_ascii=False)
