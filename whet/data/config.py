"""The data room's own settings: where the rows are, what they mean, and what is learned from them."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge

from whet.base.config import config, setting
from whet.data.standardise import FormatName


@config
class Data:
    """Rows, template, mask, lengths, split."""

    dataset: str | list[str] = setting("builtin:support_tickets", "File, directory or glob, or a list of them.")
    eval_dataset: str | list[str] | None = setting(None, "Held-out rows; auto = `val_size` of `dataset`.")
    format: FormatName | None = setting(None, "Shape of a row; auto = recognised from the first 100 rows.")
    columns: dict[str, str] = setting({}, "Standard field to yours, e.g. `{prompt: question, completion: answer}`.")
    val_size: Annotated[float, Ge(0)] = setting(
        0.05, "Held-out share (below 1) or number of rows (1 or more), chosen by a hash of the row; 0 = none."
    )
    max_rows: Annotated[int, Ge(1)] | None = setting(None, "Use only the first so many rows; auto = all.")
    max_length: Annotated[int, Ge(8)] | None = setting(
        None, "Longest row in tokens; auto = the longest row there is, up to what the model can read and 4,096."
    )
    over_length: Literal["error", "drop", "truncate_prompt", "truncate", "split"] | None = setting(
        None, "A longer row is refused, dropped, cut or (text only) split; auto = drop for chats, split for text."
    )
    empty: Literal["error", "drop"] = setting("error", "A row with nothing to learn from is refused or dropped.")
    loss_on: Literal["assistant", "last_assistant", "all"] | None = setting(
        None, "Which tokens are learned; auto = assistant for chats, all for text."
    )
    packing: bool | None = setting(None, "Fill rows of `max_length` with several documents; auto = only for text.")
    padding_free: bool | None = setting(
        None, "Lay a batch out as one row without padding; auto = yes where the model passes the isolation check."
    )
