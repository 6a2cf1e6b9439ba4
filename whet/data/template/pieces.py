"""A text encoded in pieces, some of them with nothing taken for a special token.

Joining the ids of pieces must spell the text that was cut. Byte-level tokenizers do that by themselves; those that put
a space before every text (Llama 2, Mistral, Phi-3) would add one at every cut. Such a piece is therefore encoded behind
a line feed, whose own tokens are left out again: a line feed is a token of its own there and joins with nothing.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from whet.base.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BEFORE = "\n"
_SPACE = re.compile(r"\s+")


class Pieces:
    """Encodes with `backend` (a tokenizers.Tokenizer), and plain text with a copy that knows no special token."""

    def __init__(self, backend: Any, tokenizer: PreTrainedTokenizerFast) -> None:
        from tokenizers import Tokenizer

        self.backend = backend
        self.tokenizer = tokenizer
        self.plain = Tokenizer.from_str(backend.to_str())
        self.plain.encode_special_tokens = True
        self._special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}

    def encode(
        self, text: str, cuts: Iterable[int], plain: Iterable[tuple[int, int]]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of `text` cut at `cuts` (0 and its length among them), and the span of each token in the text.

        plain: the parts in which special tokens are ordinary text; their edges are cuts. Raises UserError where the
        tokenizer cannot write such a part.
        """
        ids: list[int] = []
        edges: list[tuple[int, int]] = []
        ordered = sorted(cuts)
        plain_cuts = {cut for first, last in plain for cut in ordered if first <= cut < last}
        for start, end in pairwise(ordered):
            after_special = not ids or ids[-1] in self._special
            is_plain = start in plain_cuts
            piece_ids, spans = self._piece(text[start:end], self.plain if is_plain else self.backend, after_special)
            if is_plain:
                self._check(text[start:end], piece_ids)
            ids += piece_ids
            edges += [(start + first, start + last) for first, last in spans]
        return ids, edges

    def _piece(self, text: str, backend: Any, starts: bool) -> tuple[list[int], list[tuple[int, int]]]:
        if starts or not self._adds_space:
            encoding = backend.encode(text, add_special_tokens=False)
            return encoding.ids, encoding.offsets
        encoding = backend.encode(BEFORE + text, add_special_tokens=False)
        own = [index for index, (_, last) in enumerate(encoding.offsets) if last > len(BEFORE)]
        first = own[0] if own else len(encoding.ids)
        return encoding.ids[first:], [(max(0, a - len(BEFORE)), b - len(BEFORE)) for a, b in encoding.offsets[first:]]

    @cached_property
    def _adds_space(self) -> bool:
        alone = self.plain.encode("a", add_special_tokens=False).ids
        return alone != self.plain.encode(BEFORE + "a", add_special_tokens=False).ids[-len(alone) :]

    def _check(self, text: str, ids: list[int]) -> None:
        """Refuse a piece that became a special token all the same, or does not spell its text."""
        spelt = str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        if not self._special.isdisjoint(ids) or _bare(spelt) != _bare(text):
            raise UserError(
                "a message spells one of the model's special tokens, and this tokenizer cannot write it as plain text",
                field="messages",
                found=text,
                fix="remove the marker from the data",
            )


def _bare(text: str) -> str:
    return _SPACE.sub("", unicodedata.normalize("NFC", text))
