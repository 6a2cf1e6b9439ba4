"""What happens to a row that is longer than `max_length`: always by a declared policy, always counted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from whet.data.tokenise import Tokens


@dataclass(frozen=True, slots=True)
class Fitted:
    """The row as it is used (None: dropped) and how many tokens were lost."""

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
        short = Tokens(tokens.ids[:max_length], tokens.learned[:max_length], tokens.prompts, False)
        return Fitted(short, excess) if short.learned[1:].any() else Fitted(None, len(tokens.ids))
    assert policy == "truncate_prompt", policy
    kept = np.ones(len(tokens.ids), dtype=bool)
    left = excess
    for start, end in tokens.prompts:
        cut = min(left, end - start)
        kept[start : start + cut] = False
        left -= cut
    if left:
        return Fitted(None, len(tokens.ids))
    return Fitted(Tokens(tokens.ids[kept], tokens.learned[kept], [], tokens.closed), excess)
