"""The check that every token id of a run has a row in the model's embedding, before any weight is loaded.

A tokenizer may know more tokens than the model: another one was given, tokens were added to it alone, or a template
names one. On a GPU such an id ends a run somewhere with a device assertion, or reads foreign memory.
"""

from __future__ import annotations

from typing import Any

from whet.base.errors import UserError
from whet.data.batch.rows import Rows
from whet.data.prepare import Prepared


def check_ids(prepared: Prepared, rows: int) -> None:
    """Raise UserError for an id in the rows, or one that ends an answer, without one of the `rows` of the embedding.

    rows: 0 where the model has no table of tokens.
    """
    if not rows:
        return
    tokenizer: Any = prepared.row_tokenizer.tokenizer
    for what, side in (
        ("to learn from", prepared.train),
        ("held out", prepared.evaluation),
        ("for a test", prepared.test),
    ):
        for table in (side, side.answers):
            largest = 0 if table is None or not len(table.ids) else int(table.ids.max())
            if table is not None and largest >= rows:
                row = _first_with(table, largest)
                raise _without_row(tokenizer, largest, rows, f"rows {what}, the first of them {row}")
    if prepared.task.name == "causal":
        largest = max(prepared.row_tokenizer.stop_ids(), default=0)
        if largest >= rows:
            raise _without_row(tokenizer, largest, rows, "the end of an answer")


def _first_with(table: Rows, token: int) -> int:
    """The number, from 1 on, of the first row that has a token."""
    place = int((table.ids == token).argmax())
    return int(table.starts.searchsorted(place, side="right"))


def _without_row(tokenizer: Any, token: int, rows: int, where: str) -> UserError:
    text = tokenizer.convert_ids_to_tokens(token)
    return UserError(
        "a token has no row in the model's embedding", field="model.tokenizer",
        found=f"{text!r}, id {token}, in {where}", expected=f"ids below {rows}, the rows of the embedding",
        fix=f"give the model's own tokenizer, or model.new_tokens=[{text}] where the token is not in it yet",
    )  # fmt: skip
