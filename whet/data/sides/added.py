"""Choose the added rows (paraphrases, as a rule) that may be learned from.

They are only ever learned from: they come after the split, so none is held out. A paraphrase of a held-out question
gives its answer away as the question itself would, in words that no comparison of texts finds again. So an added row is
left out where its source is held out, where the question of its source is, exactly or nearly, and where its own
question is. A source that is no longer in the data has no side, and its paraphrases are left out too. Rows that name no
source are compared by their own question alone, which a note reports.
Gives up: a paraphrase by hand, without a source, of a held-out question.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from whet.data.batch.ledger import Ledger
from whet.data.batch.store import Examples
from whet.data.detect.duplicates import SIMILARITY
from whet.data.detect.leakage import leaks_of_first
from whet.data.detect.wording import Wording

SOURCE_HELD_OUT = "the row that it paraphrases is held out"
SOURCE_GONE = "the row that it paraphrases is not among the rows of data.dataset"
SOURCE_ASKED = "the question that it paraphrases is held out, or one much like it"
ASKED = "its question is held out, or one much like it"


def asked_too(examples: Examples, kept_apart: Mapping[str, Examples]) -> np.ndarray:
    """Rows whose question, or one much like it, stands in `kept_apart`, bool [N]."""
    asked = np.zeros(len(examples), bool)
    others = {name: Wording(side, "user") for name, side in kept_apart.items() if len(side)}
    for leak in leaks_of_first({"": Wording(examples, "user"), **others}, SIMILARITY) if len(examples) else ():
        asked[leak.into_near] = True
    return asked


def faults(
    added: Examples, sources: np.ndarray, named: np.ndarray, own: Examples, kept_apart: Mapping[str, Examples]
) -> np.ndarray:
    """The reason why each added row cannot be learned from, or "", object [N].

    sources: ids of the rows that they paraphrase, uint64 [N], where `named`, bool [N]. own: all rows of data.dataset,
    before the split; kept_apart: the held-out sides.
    """
    apart = np.concatenate([np.zeros(0, np.uint64), *(side.ids for side in kept_apart.values())])
    index = np.flatnonzero(np.isin(own.ids, sources[named]))
    together = own.take(index).joined(added)
    asked = asked_too(together, kept_apart)
    reasons = np.full(len(added), "", object)
    reasons[asked[len(index) :]] = ASKED
    reasons[named & np.isin(sources, own.ids[index[asked[: len(index)]]])] = SOURCE_ASKED
    reasons[named & ~np.isin(sources, np.concatenate([own.ids, apart]))] = SOURCE_GONE
    reasons[named & np.isin(sources, apart)] = SOURCE_HELD_OUT
    reasons[np.isin(added.ids, apart)] = ASKED
    return reasons


def admitted(
    added: Examples, sources: np.ndarray, named: np.ndarray, own: Examples, kept_apart: Mapping[str, Examples],
    ledger: Ledger,
) -> Examples:  # fmt: skip
    """The added rows that may be learned from; the others are listed in the ledger. Arguments as `faults`."""
    why = faults(added, sources, named, own, kept_apart)
    for row in np.flatnonzero(why != "").tolist():
        example = added[row]
        ledger.drop(example.file, example.row, str(why[row]))
    reasons, counts = np.unique(why[why != ""].astype(str), return_counts=True)
    notes = []
    if not named.all():
        notes.append(f"{int((~named).sum()):,} added rows do not name the row that they come from, so only their own "
                     "questions are compared with what is held out")  # fmt: skip
    if SOURCE_GONE in reasons:
        notes.append(f"{counts[list(reasons).index(SOURCE_GONE)]:,} added rows come from rows that are no longer in "
                     "data.dataset and are not learned from")  # fmt: skip
    ledger.added = {
        "rows_read": len(added), "left_out": dict(zip(reasons.tolist(), counts.tolist(), strict=True)), "notes": notes,
    }  # fmt: skip
    return added.take(why == "")
