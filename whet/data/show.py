"""The loss mask of real rows as coloured text, from the very arrays that training uses."""

from __future__ import annotations

from typing import Any

import numpy as np

from whet.data.labels import label_text
from whet.data.prepare import Prepared


def masked_row(prepared: Prepared, index: int) -> list[tuple[str, bool]]:
    """Row `index` of the training rows as (text, whether it is learned), in order; a label or an answer comes last."""
    ids, learned = prepared.train.row(index)
    edges = np.flatnonzero(np.diff(learned)) + 1
    tokenizer = prepared.tokeniser.tokenizer
    if prepared.train.answers is not None:
        answer = prepared.train.answers.row(index)[0]
        return [(f"{tokenizer.decode(ids.tolist())}\n", False), (str(tokenizer.decode(answer.tolist())), True)]
    if prepared.train.labels is not None:
        example = prepared.train_examples[int(prepared.train.sources[index])]
        return [(f"{tokenizer.decode(ids.tolist())} ", False), (label_text(example.label), True)]
    pieces = zip(np.split(ids, edges), np.split(learned, edges), strict=True)
    return [(str(tokenizer.decode(part.tolist())), bool(marks[0])) for part, marks in pieces]


def show_rows(prepared: Prepared, count: int) -> None:
    """Print `count` rows spread over the data: learned text in green, the rest dim."""
    from rich.text import Text

    from whet.base.console import console

    total = len(prepared.train)
    for place in range(min(count, total)):
        index = place * total // min(count, total)
        example = prepared.train_examples[int(prepared.train.sources[index])]
        console().print(f"\n{example.file} row {example.row}", style="bold", markup=False)
        text = Text()
        for part, learned in masked_row(prepared, index):
            # Without colour (a log file) the marks still show what is learned.
            text.append(part if console().color_system or not learned else f"⟦{part}⟧", "green" if learned else "dim")
        console().print(text)


def length_histogram(prepared: Prepared, bins: int = 8) -> list[dict[str, Any]]:
    """Rows by length in tokens: from, to (exclusive) and rows of each bin."""
    lengths = prepared.train.lengths
    if not len(lengths):
        return []
    counts, edges = np.histogram(lengths, bins=bins)
    return [
        {"from": int(np.ceil(low)), "to": int(np.ceil(high)), "rows": int(count)}
        for count, low, high in zip(counts, edges, edges[1:], strict=False)
    ]
