"""How nearly a merged model labels as the live adapter: largest logit difference, change of probability, equal labels.

The change of a row is that of its label that changed most, so that it does not vanish among many classes, and the
figure is the mean over rows. For values it is the mean absolute change over the spread of the live values, which have
no scale of their own. A probability can be flat everywhere, as after one step of training, and then hardly moves
whatever is wrong: so most labels must also be equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whet.data.prepare import Prepared
from whet.engine.answer.logits import Row, decisions, probabilities
from whet.engine.answer.session import label_session
from whet.engine.load.open import Opened
from whet.engine.task import Task
from whet.opening import tell

MAX_ROWS = 500
CHANGE_LIMIT = 0.02  # of a probability, or of a value in spreads of the live values
UNEQUAL_LIMIT = 0.02  # share of rows with another label; one may always differ: two classes can be equally likely
_BATCH = 32


@dataclass(frozen=True)
class LabelAgreement:
    """How near a merged model is to the live adapter. equal_labels: share of rows, None for values."""

    name: str
    dtype: str
    rows: int
    max_logit_difference: float
    mean_probability_change: float | None
    mean_value_change: float | None
    equal_labels: float | None

    @property
    def change(self) -> float:
        return next(one for one in (self.mean_probability_change, self.mean_value_change) if one is not None)

    @property
    def near(self) -> bool:
        unequal = 0 if self.equal_labels is None else round((1 - self.equal_labels) * self.rows)
        return self.change <= CHANGE_LIMIT and unequal <= max(1, UNEQUAL_LIMIT * self.rows)

    @property
    def perfect(self) -> bool:
        return self.near and self.equal_labels in (None, 1.0)

    @property
    def order(self) -> tuple[float, float]:
        """The smaller, the nearer."""
        return -self.agreement, self.change

    @property
    def agreement(self) -> float:
        """Share of rows that have the same label; of values, 1 when they are near."""
        return float(self.change <= CHANGE_LIMIT) if self.equal_labels is None else self.equal_labels

    @property
    def summary(self) -> str:
        if self.equal_labels is None:
            moved = f"values moved by {self.change:.2g} of their spread"
        else:
            moved = f"equal labels {self.equal_labels:.2%}, probabilities moved by {self.change:.2g}"
        return f"{moved}, largest logit difference {self.max_logit_difference:.2g}"

    @property
    def complaint(self) -> tuple[str, str]:
        if self.equal_labels is None:
            return f"values moved by {self.change:.3g} of their spread", f"at most {CHANGE_LIMIT}"
        found = f"{self.equal_labels:.1%} equal labels, mean probability change {self.change:.3g}"
        return found, f"at least {1 - UNEQUAL_LIMIT:.0%}, at most {CHANGE_LIMIT}"


@dataclass(frozen=True)
class LabelReference:
    """The live adapter's logits [R, C] for `rows`."""

    task: Task
    rows: list[Row]
    types: list[Row] | None
    logits: NDArray[np.float32]

    def compare(self, name: str, dtype: str, candidate: Opened, best: Any | None) -> LabelAgreement:
        """How near `candidate` is."""
        logits = _logits(candidate, self.rows, self.types)
        moved = np.abs(logits.astype(np.float64) - self.logits)
        facts = name, dtype, len(self.rows), float(moved.max())
        if self.task.name == "regression":
            spread = float(self.logits.std()) or float(np.abs(self.logits).mean()) or 1.0
            return LabelAgreement(*facts, None, float(moved.mean()) / spread, None)
        change = np.abs(probabilities(self.task, logits) - probabilities(self.task, self.logits)).max(axis=1)
        equal = decisions(self.task, logits) == decisions(self.task, self.logits)
        equal = equal if equal.ndim == 1 else equal.all(axis=1)
        return LabelAgreement(*facts, float(change.mean()), None, float(equal.mean()))

    def certificate(self, best: Any, tried: Sequence[Any]) -> dict[str, Any]:
        """The counts of what was compared, and how near the best is."""
        return {
            "task": self.task.name,
            "labels": list(self.task.labels),
            "agreement": best.agreement,
            "max_logit_difference": best.max_logit_difference,
            "change": best.change,
            "prompts": len(self.rows),
            "candidates": [asdict(candidate) for candidate in tried],
        }


def label_reference(live: Opened, prepared: Prepared) -> LabelReference:
    """The live model on held-out rows, or on those that it was trained on. UserError: an answer that is not finite."""
    source = prepared.evaluation if len(prepared.evaluation) else prepared.train
    spans = [source.span(index) for index in range(min(len(source), MAX_ROWS))]
    rows: list[Row] = [source.ids[span] for span in spans]
    types: list[Row] | None = None if source.types is None else [source.types[span] for span in spans]
    return LabelReference(live.task, rows, types, _logits(live, rows, types))


def _logits(opened: Opened, rows: Sequence[Row], types: Sequence[Row] | None) -> NDArray[np.float32]:
    with label_session(opened) as session:
        logits = session.logits(rows, types, batch_size=_BATCH)
        tell(session)
    return logits
