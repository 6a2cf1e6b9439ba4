"""The loss mask of real rows as pieces of text, from the very arrays that training uses.

Pieces are cut where the mask changes, around every special token, and where a turn begins or ends. The text of a piece
is what its tokens add to the text before them, since some tokenizers drop a space at the beginning of what they decode.
The role of each piece follows from the template's own spans, and is given only where the decoded row is the rendered
conversation or its beginning. Gives up: the roles of rows whose prompt was cut.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

import numpy as np

from whet.data.labels import label_text
from whet.data.prepare import Prepared

CONTEXT_TOKENS = 16  # enough to know what a token adds to the text
TEMPLATE = "template"  # the role of text between the turns


def masked_row(prepared: Prepared, index: int) -> list[tuple[str, bool]]:
    """Row `index` of the training rows as (text, True if it is learned), in order; a label or an answer comes last."""
    merged: list[tuple[str, bool]] = []
    for piece in masked_pieces(prepared, index):
        if merged and merged[-1][1] == piece["learned"]:
            merged[-1] = (merged[-1][0] + piece["text"], piece["learned"])
        else:
            merged.append((piece["text"], piece["learned"]))
    if prepared.train.answers is not None or prepared.train.labels is not None:
        gap = "\n" if prepared.train.answers is not None else " "
        merged[0] = (merged[0][0] + gap, False)
    return merged


def masked_pieces(prepared: Prepared, index: int) -> list[dict[str, Any]]:
    """Row `index` of the training rows as {"text", "role", "learned", "special"}, in order.

    role: system, user, assistant, tool, "template" between turns, "text", "label", "answer", or None where it is not
    known; learned: True if the piece is a target; special: True if it is one special token. The texts together are the
    decoded row; a label or an answer comes last.
    """
    rows, tokenizer = prepared.train, prepared.row_tokenizer.tokenizer
    ids, learned = rows.row(index)
    example = prepared.train_examples[int(rows.sources[index])]
    if rows.answers is not None:
        answer, marks = rows.answers.row(index)
        roles: list[str | None] = ["answer"] * len(answer)
        return _pieces(tokenizer, ids, np.zeros(len(ids), bool), ["text"] * len(ids)) + _pieces(
            tokenizer, answer, np.ones_like(marks), roles
        )
    if rows.labels is not None:
        label = {"text": label_text(example.label), "role": "label", "learned": True, "special": False}
        return [*_pieces(tokenizer, ids, learned, ["text"] * len(ids)), label]
    return _pieces(tokenizer, ids, learned, _roles(prepared, example, ids, learned))


def masked_rows(prepared: Prepared, count: int) -> list[dict[str, Any]]:
    """`count` training rows at even distances: {"file", "row", "tokens", "learned", "pieces"}."""
    rows = []
    for index in _spread(len(prepared.train), count):
        example = prepared.train_examples[int(prepared.train.sources[index])]
        pieces = masked_pieces(prepared, index)
        ids, learned = prepared.train.row(index)
        targets = int(learned.sum())
        if prepared.train.answers is not None:
            targets = len(prepared.train.answers.row(index)[0])
        position = {"file": example.file, "row": example.row, "tokens": len(ids)}
        rows.append(position | ({} if prepared.train.labels is not None else {"learned": targets}) | {"pieces": pieces})
    return rows


def _spread(total: int, count: int) -> list[int]:
    count = min(count, total)
    return [index * total // count for index in range(count)]


def _pieces(tokenizer: Any, ids: np.ndarray, learned: np.ndarray, roles: list[str | None]) -> list[dict[str, Any]]:
    """Tokens cut where anything changes. ids, learned: [T]; roles: T of them."""
    known = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    known |= set(tokenizer.all_special_ids)
    special = np.isin(ids, sorted(known))
    edges = [
        index
        for index in range(1, len(ids))
        if special[index] or special[index - 1] or learned[index] != learned[index - 1]
        or roles[index] != roles[index - 1]
    ]  # fmt: skip
    return [
        {
            "text": _text_added(tokenizer, ids, first, last), "role": roles[first], "learned": bool(learned[first]),
            "special": bool(special[first]),
        }
        for first, last in zip([0, *edges], [*edges, len(ids)], strict=True)
        if first < last
    ]  # fmt: skip


def _text_added(tokenizer: Any, ids: np.ndarray, first: int, last: int) -> str:
    """The text that the tokens first..last add to those before them."""
    before = _decoded(tokenizer, ids[max(0, first - CONTEXT_TOKENS) : first])
    both = _decoded(tokenizer, ids[max(0, first - CONTEXT_TOKENS) : last])
    return both[len(before) :] if both.startswith(before) else _decoded(tokenizer, ids[first:last])


def _decoded(tokenizer: Any, ids: np.ndarray) -> str:
    return str(tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)) if len(ids) else ""


def _roles(prepared: Prepared, example: Any, ids: np.ndarray, learned: np.ndarray) -> list[str | None]:
    """The role of the turn that each token belongs to."""
    template, tokenizer = prepared.row_tokenizer.template, prepared.row_tokenizer.tokenizer
    if template is None or example.messages is None:
        return ["text"] * len(ids)
    rendered = template.render([example])[0]
    if not rendered.text.startswith(_decoded(tokenizer, ids)):
        only_answers = prepared.ledger.policy.get("loss_on") != "all"
        return ["assistant" if mark and only_answers else None for mark in learned]
    # If only the answers have spans, the text between them is not all the template's.
    between = TEMPLATE if len(rendered.turns) == len(example.messages) else None
    roles: list[str | None] = [between] * len(ids)
    ends = range(len(ids) + 1)
    for turn in rendered.turns:
        first, last = (
            bisect_left(ends, edge, key=lambda end: len(_decoded(tokenizer, ids[:end])))
            for edge in (turn.start, turn.stop)
        )
        roles[first:last] = [turn.role] * (min(last, len(ids)) - first)
    return roles


def print_rows(prepared: Prepared, count: int) -> None:
    """Print `count` rows spread over the data: learned text in green, the rest dim."""
    from rich.text import Text

    from whet.base.console import console

    out = console(stdout=True)
    for index in _spread(len(prepared.train), count):
        example = prepared.train_examples[int(prepared.train.sources[index])]
        out.print(f"\n{example.file} row {example.row}", style="bold", markup=False)
        text = Text()
        for part, learned in masked_row(prepared, index):
            # Without colour (a log file) the marks still show what is learned.
            marked = f"⟦{part}⟧" if learned and not out.color_system else part
            text.append(marked, "green" if learned else "dim")
        out.print(text)


def length_histogram(prepared: Prepared, bins: int = 8) -> list[dict[str, Any]]:
    """Rows by length in tokens: from, to (exclusive) and rows of each bin, one as wide as the other but the last."""
    lengths = prepared.train.lengths
    if not len(lengths):
        return []
    low, high = int(lengths.min()), int(lengths.max()) + 1
    width = -(-(high - low) // bins)
    counts = np.bincount((lengths - low) // width)
    starts = range(low, high, width)
    return [
        {"from": start, "to": min(start + width, high), "rows": int(count)}
        for start, count in zip(starts, counts, strict=True)
    ]
