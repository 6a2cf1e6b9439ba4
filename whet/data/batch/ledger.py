"""The ledger: counts of rows and tokens to learn from, over the whole set, before the first step.

Training on nothing looks like success (a loss of 0.0), and so does a model that never learns to stop. Both can be
counted before any model is loaded, so they are counted, printed, stored with the run and refused by name.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from whet.base.errors import UserError
from whet.data.batch.rows import Rows


@dataclass
class Ledger:
    """Counts of rows and tokens; every row read is trained on, held out, or listed in `dropped` with its reason."""

    format: str = ""
    format_reason: str = ""
    task: str = "causal"
    labels: dict[str, Any] = field(default_factory=dict)
    labels_held_out: dict[str, Any] = field(default_factory=dict)
    contradictory_rows: int = 0
    files: list[dict[str, Any]] = field(default_factory=list)
    policy: dict[str, Any] = field(default_factory=dict)
    rows_read: int = 0
    rows_train: int = 0
    rows_eval: int = 0
    rows_test: int = 0
    rows_redacted: int = 0
    mixture: dict[str, Any] = field(default_factory=dict)
    replay: dict[str, Any] = field(default_factory=dict)
    added: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)
    benchmarks: dict[str, Any] = field(default_factory=dict)
    tokens: int = 0
    supervised_tokens: int = 0
    supervised_by_role: dict[str, int] = field(default_factory=dict)
    rows_without_target: int = 0
    rows_without_end_of_turn: int = 0
    rows_over_length: int = 0
    tokens_lost: int = 0
    longest_row: int = 0
    median_row: int = 0
    packed_rows: int | None = None
    packing_fill: float | None = None
    not_rendered: dict[str, int] = field(default_factory=dict)
    rows_on_both_sides: int = 0
    rows_repeated: int = 0
    unknown_tokens: int = 0
    notes: list[str] = field(default_factory=list)
    dropped: list[dict[str, Any]] = field(default_factory=list)
    sha256: str = ""

    def count(self, train: Rows, evaluation: Rows, test: Rows, role: str) -> None:
        """Fill in the counts of the finished rows. role: the role whose tokens are learned; `label`: one label a
        row."""
        self.rows_train, self.rows_eval, self.rows_test = len(train), len(evaluation), len(test)
        self.tokens, self.supervised_tokens = len(train.ids), train.targets
        self.supervised_by_role = {role: train.targets}
        each = train.lengths
        if train.answers is not None:
            self.tokens, each = self.tokens + len(train.answers.ids), each + train.answers.lengths
        lengths = sorted(int(n) for n in each)
        self.longest_row = lengths[-1] if lengths else 0
        self.median_row = lengths[len(lengths) // 2] if lengths else 0
        self.sha256 = train.sha256()

    def drop(self, file: str, row: int, reason: str) -> None:
        """List a row that is not used, with the reason."""
        self.dropped.append({"file": file, "row": row, "reason": reason})

    def gate(self) -> None:
        """Refuse to train on no rows or on no targets. Raises UserError."""
        if not self.rows_train:
            raise UserError(
                "no row is left to train on",
                field="data.dataset",
                found=f"{self.rows_read} rows read, {self.rows_eval} held out, {len(self.dropped)} dropped"
                + (f" ({self.dropped[0]['reason']})" if self.dropped else ""),
                fix="lower data.val_size, or raise data.max_length",
            )
        if not self.supervised_tokens:
            raise UserError(
                "no token would be learned, so the loss would be 0 and the model unchanged",
                field="data.loss_on",
                found=f"{self.rows_train} rows, 0 supervised tokens",
                fix="whet data check --show 3 shows what is learned",
            )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as data.json stores them."""
        return asdict(self)
