"""Fit rows that are longer than `max_length`: always by a declared policy, always counted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from whet.base.errors import UserError
from whet.data.template.row_tokenizer import Tokens

LONGEST_BY_DEFAULT = 4096


def longest_allowed(wanted: int | None, readable: int | None) -> int:
    """The most tokens that a row may have, before any row is tokenised. Raises UserError for more than the model can
    read."""
    if wanted is None:
        return max(8, min(readable or LONGEST_BY_DEFAULT, LONGEST_BY_DEFAULT))
    if readable is not None and wanted > readable:
        raise UserError(
            "the model cannot read rows of this length", field="data.max_length", found=str(wanted),
            expected=f"at most {readable} tokens", fix=f"data.max_length={readable}",
        )  # fmt: skip
    return wanted


def too_long(file: str, row: int, tokens: int, limit: int) -> UserError:
    """The error for a row of more than `limit` tokens under the policy `error`."""
    return UserError(
        "the row is longer than data.max_length", file=file, row=row, field="data.over_length",
        found=f"{tokens} tokens", expected=f"at most {limit}",
        fix=f"data.max_length={tokens}, or data.over_length=drop",
    )  # fmt: skip


def choose_length(
    wanted: int | None, longest: int, readable: int | None, decided: dict[str, tuple[object, str]]
) -> int:
    """The longest row in tokens: `wanted`, else the `longest` there is, as far as the model can read.

    Raises UserError for more than the model can read.
    """
    limit = longest_allowed(wanted, readable)
    if wanted is not None:
        return wanted
    chosen = max(8, min(longest, limit))
    why = "the longest row" if chosen == longest else f"the longest row has {longest} tokens, limited to {limit}"
    decided["data.max_length"] = (chosen, why)
    return chosen


@dataclass(frozen=True, slots=True)
class Fitted:
    """A row after `fit`. tokens: the row, None if it is dropped; lost: tokens that were cut off."""

    tokens: Tokens | None
    lost: int


def fit(tokens: Tokens, max_length: int, policy: str) -> Fitted:
    """Apply `policy` (drop, truncate, truncate_prompt) to a row longer than `max_length` tokens.

    A row that has nothing left to learn, or whose answer alone is too long for `truncate_prompt`, is dropped.
    """
    excess = len(tokens.ids) - max_length
    assert excess > 0
    if policy == "drop":
        return Fitted(None, len(tokens.ids))
    if policy == "truncate":
        short = _selected(tokens, np.arange(len(tokens.ids)) < max_length, tokens.prompts, False)
        return Fitted(short, excess) if short.learned[1:].any() else Fitted(None, len(tokens.ids))
    assert policy == "truncate_prompt", policy
    keep = np.ones(len(tokens.ids), dtype=bool)
    left = excess
    for start, end in tokens.prompts:
        cut = min(left, end - start)
        keep[start : start + cut] = False
        left -= cut
    if left:
        return Fitted(None, len(tokens.ids))
    return Fitted(_selected(tokens, keep, [], tokens.closed), excess)


def _selected(tokens: Tokens, keep: np.ndarray, prompts: list[tuple[int, int]], closed: bool) -> Tokens:
    weights = None if tokens.weights is None else tokens.weights[keep]
    return Tokens(tokens.ids[keep], tokens.learned[keep], prompts, closed, weights, tokens.dropped)
