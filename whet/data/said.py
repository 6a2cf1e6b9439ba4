"""Sentences about a source that its rows alone do not show: columns that are ignored and look meant, nulls, files.

None of them stops a run; they go to the ledger, and so to `whet data check`, to the start of training and to the page.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from whet.base.errors import shorten
from whet.data.format.recognise import Format
from whet.data.format.standardise import Dropped
from whet.data.read.record import Record

MOST_CLASSES, LONGEST_NAME = 50, 60


def notes_of(source: str, kind: Format, sample: Sequence[Record], dropped: Dropped) -> Iterator[str]:
    """Sentences about one source of rows. sample: its first rows; dropped: of all of them."""
    source = shorten(source, 60)
    ignored = dict.fromkeys(name for record in sample for name in record.value if name not in kind.known)
    renamed = kind.reason.partition("; ignored:")[2]
    for name in ignored:
        values = [record.value[name] for record in sample if record.value.get(name) is not None]
        if name not in [part.strip() for part in renamed.split(",")] or not values:
            continue
        shown = shorten(name, 40)
        if all(isinstance(value, bool) for value in values):
            yield (f"{source}: the column {shown} says true or false and is ignored, so answers marked false are "
                   f"learned too; data.columns.label={shown} reads it as a judgement")  # fmt: skip
        elif kind.name == "text" and _are_classes(values):
            yield (f"{source}: the text is learned as it stands and the column {shown} is ignored; "
                   f"data.columns.label={shown} learns it as a label")  # fmt: skip
    if dropped.nulls.absent:
        yield f"{source}: {dropped.nulls.absent:,} nulls of tools' calls and definitions were read as absent fields"
    if dropped.nulls.meant:
        yield (f"{source}: {dropped.nulls.meant:,} parameters of tools are null and are learned so; columns cannot "
               "tell an absent one from a null, JSONL can")  # fmt: skip


def _are_classes(values: Sequence[object]) -> bool:
    """True if a column looks like names of classes: short, and fewer than rows."""
    names = {value for value in values if isinstance(value, str | int)}
    short = all(isinstance(value, str | int) and len(str(value)) <= LONGEST_NAME for value in values)
    return short and len(names) <= min(MOST_CLASSES, max(1, len(values) * 2 // 3)) if len(values) > 2 else short
