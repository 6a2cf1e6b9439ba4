"""Short rows before long ones in the first epoch: an order that depends on the seed and the epoch alone.

The rows of an epoch are cut by length into ten parts of equal size, which come shortest first; within a part the order
is the random one, and from the second epoch on all is random. Short sequences first make early training stabler (Li,
Zhang and He 2022, arXiv:2108.06084), and easy examples in shuffled parts do as well as a strict order or better (Zhang
et al. 2018, arXiv:1811.00739; Platanios et al. 2019, arXiv:1903.09848), while a strict order would put equal rows into
one batch. Off by default: gains in fine-tuning are small and depend on the data. Gives up: in one epoch the model sees
no long row before the end, so where length goes with the label or the kind of task, it learns them one after another.
"""

from __future__ import annotations

import numpy as np

PARTS = 10


def short_first(order: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The units of `order`, int64 [U], parts of like length after one another. lengths: tokens of each unit, [U]."""
    ranks = np.empty(len(order), np.int64)
    ranks[np.argsort(lengths[order], kind="stable")] = np.arange(len(order))
    return order[np.argsort(ranks * PARTS // max(1, len(order)), kind="stable")]
