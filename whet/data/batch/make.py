"""The batches of any rows: text, texts with labels, or sources with answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from whet.data.batch.batches import Batches, Cut, Order
from whet.data.batch.padded_batches import PaddedBatches
from whet.data.batch.rows import Rows
from whet.data.batch.text_batches import TextBatches
from whet.data.config import Data


def make_batches(
    rows: Rows, data: Data, *, seed: int, cut: Cut, bins: Sequence[Sequence[int]] | None = None
) -> Batches[Any]:
    """Batches of `rows` in the order and layout of the settings. bins: groups of rows that are packed into one."""
    if rows.labels is not None or rows.answers is not None:
        return PaddedBatches(rows, order=Order(seed), cut=cut)
    order = Order(seed, short_first=data.order == "short_first")
    return TextBatches(rows, bins, flat=bool(data.padding_free), order=order, cut=cut)
