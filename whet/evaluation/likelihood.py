"""The loss of the held-out rows under base and tuned: how surprised each model is by the very answers that are wanted.

For free text it is the number to look at first: a good answer in other words scores nothing by exact match and little
by overlap, and the loss falls all the same. It is the mean over learned tokens, as the held-out loss during training;
perplexity is its exponential. The interval comes from rows, each with its share of the whole sum, so that its mean is
the reported difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np

from whet.base.console import Progress
from whet.data.batch.rows import Rows
from whet.engine.answer.losses import LossSession, Scored, weight_of
from whet.engine.load.open import Opened
from whet.evaluation.metrics import Scores
from whet.opening import Answerer, base_anew

ROWS = 1000
MOST_TOKENS = 500_000
LOSS_METRICS = ("loss", "perplexity")


@dataclass(frozen=True)
class Losses:
    """Summed losses of the same rows under base and tuned, and the weight of each row's targets."""

    base: list[float]
    tuned: list[float]
    weights: np.ndarray

    def scores(self) -> dict[str, Scores]:
        """loss (rows: the row's share of it) and perplexity, of base and tuned."""
        share = len(self.weights) / float(self.weights.sum())
        found = {}
        for side, sums in (("base", self.base), ("tuned", self.tuned)):
            loss = math.fsum(sums) / float(self.weights.sum())
            metrics = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
            found[side] = Scores(metrics, {"loss": [value * share for value in sums]}, [])
        return found


def scored_rows(rows: Rows, indices: Sequence[int]) -> list[Scored]:
    """Rows of tokens as a loss is asked of them."""
    found = []
    for index in indices:
        span = rows.span(index)
        if rows.answers is not None:
            ids = rows.answers.ids[rows.answers.span(index)]
            found.append(Scored(ids, np.ones(len(ids), np.float32), rows.ids[span]))
            continue
        weights = rows.learned[span].astype(np.float32)
        weights = weights if rows.weights is None else weights * rows.weights[span]
        found.append(Scored(rows.ids[span], weights))
    return found


def chosen_rows(rows: Rows, limit: int | None) -> list[int]:
    """Indices of the first rows, up to a bound on their number and on their tokens."""
    totals = np.cumsum(rows.lengths)
    fit = int(np.searchsorted(totals, MOST_TOKENS, side="right"))
    return list(range(min(len(rows), limit or ROWS, max(1, fit))))


def losses_of_both(answerer: Answerer, rows: Sequence[Scored], base: Opened | None) -> Losses | None:
    """The losses of rows under base and tuned; None where no row has a target.

    base: the base loaded anew, where nothing can be switched off (None: it is loaded if it has to be).
    """
    weights = weight_of(rows)
    if not weights.sum():
        return None
    opened = answerer.opened
    with Progress("measuring", 2 * len(rows), patience_seconds=2.0) as bar:

        def done(count: int) -> None:
            bar.advance("loss", count)

        with LossSession(opened.answering, opened.base_only) as session:
            tuned = session.losses(rows, done)
            if opened.wrapped is not None:
                with session.base():
                    return Losses(session.losses(rows, done), tuned, weights)
        with (
            nullcontext(base) if base is not None else base_anew(answerer) as plain,
            LossSession(plain.answering) as session,
        ):
            return Losses(session.losses(rows, done), tuned, weights)
