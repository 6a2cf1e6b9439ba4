"""The token ids of a skeleton's literals, computed once: then only contents have to be tokenised.

That is exact where the ids of a whole text are those of its parts, one after the other:

- An added token cuts the text before anything else is done with it. Nothing of a content is a part of one where the
  content holds no character that an added token begins with, and no token could begin in the words before it.
- So what stands between two added tokens is tokenised by itself, whatever is around it. A content with an added token
  behind it, and one right before it, is therefore by itself.
- With words in front ("user" and a line feed), the pre-tokenizer has to cut between the two. The patterns in `_CUTTING`
  let no piece go on from a line feed to a character that is not white space; what they do with the line feed depends on
  nothing but that such a character follows. Byte-level BPE works on each piece alone, and NFC joins nothing to a line
  feed.

Any other tokenizer, template or content is tokenised as a whole. The tests compare both ways.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from whet.data.template.skeleton import Skeleton
from whet.data.template.spans import Turn

_SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Of GPT-2 (in ByteLevel itself), of Qwen 2 and 3, of Llama 3, and of Qwen 3.5.
_CUTTING = frozenset((
    _WORDS + r"\p{N}" + _REST, _WORDS + r"\p{N}{1,3}" + _REST,
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
))  # fmt: skip
_PROBES = ("a", "1", "!", "한")  # one of each kind of character that a pattern tells apart


class TokenSpans(NamedTuple):
    """The tokens of a whole row. ids: token ids. turns: of each turn its tokens, (0, 0) where it has none; contents:
    those of its content.

    The tokens of an answer are all that a model writes; those of another turn are the whole tokens of its content.
    """

    ids: list[int]
    turns: list[tuple[int, int]]
    contents: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class LiteralIds:
    """The token ids of a skeleton's literals. order: its turns, all at offset 0. ids: of the words before each content,
    and of the last.

    edges: how many tokens before and behind its content each turn begins and ends.
    """

    order: list[Turn]
    ids: tuple[list[int], ...]
    edges: tuple[tuple[int, int], ...]

    def answers(self, loss_on: str) -> tuple[list[int], bool]:
        """(the answers that `loss_on` chooses in a row without a mask of its own, True if all of them are closed)."""
        answers = [turn.index for turn in self.order if turn.role == "assistant"]
        answers = answers[-1:] if loss_on == "last_assistant" else answers
        return answers, all(self.order[index].closed for index in answers)

    def filled(self, contents: Sequence[Sequence[int]]) -> TokenSpans:
        """The row whose contents have these ids."""
        ids: list[int] = []
        turns, spans = [], []
        for words, content, (ahead, behind) in zip(self.ids, contents, self.edges, strict=False):
            ids += words
            start = len(ids)
            ids += content
            end = len(ids)
            spans.append((start, end))
            turns.append((start - ahead, end + behind))
        ids += self.ids[-1]
        return TokenSpans(ids, turns, spans)


class KnownRow(NamedTuple):
    """A row of plain turns whose tokens are known without rendering it. contents: the token ids of each."""

    literals: LiteralIds
    contents: list[list[int]]

    def spans(self) -> TokenSpans:
        """All its tokens, and the spans of its turns."""
        return self.literals.filled(self.contents)


class Cuts:
    """The rule by which texts of one tokenizer may be cut and tokenised in parts. possible: False if they never may.

    whole: tokenises a filled skeleton as a whole, None where a token reaches across the edge of an answer.
    """

    def __init__(
        self, backend: Any, specials: Sequence[str], whole: Callable[[Skeleton, list[str]], TokenSpans | None]
    ) -> None:
        self._backend, self._whole = backend, whole
        self._added = sorted({token.content for token in backend.get_added_tokens_decoder().values()}, key=len)[::-1]
        self._added_token = re.compile("|".join(map(re.escape, self._added)) or r"(?!)")
        starts = {token[0] for token in (*self._added, *specials) if token}
        self._start = re.compile(f"[{''.join(map(re.escape, sorted(starts)))}]" if starts else r"(?!)")
        self.possible, self._at_lines = _cuts_at(backend)
        self._ends_inside_token = lru_cache(maxsize=4096)(self._look_at_end)
        self._known: dict[Skeleton, LiteralIds | None] = {}

    def literal_ids(self, skeleton: Skeleton) -> LiteralIds | None:
        """The ids of the skeleton's literals, None where they depend on the contents."""
        if skeleton not in self._known:
            apart = self.possible and self._contents_stand_apart(skeleton)
            self._known[skeleton] = self._tried(skeleton) if apart else None
        return self._known[skeleton]

    def spells_no_token(self, content: str) -> bool:
        """True if no added token can be written with a part of this content."""
        return self._start.search(content) is None

    def _contents_stand_apart(self, skeleton: Skeleton) -> bool:
        """True if every content of the skeleton has an edge of pieces on both sides."""
        last = len(skeleton.literals) - 1
        for number, literal in enumerate(skeleton.literals):
            tokens = [match.span() for match in self._added_token.finditer(literal)]
            if number and not (tokens and tokens[0][0] == 0) and (literal or number < last):
                return False
            words = literal[tokens[-1][1] if tokens else 0 :]
            cut = not words or (self._at_lines and words.endswith("\n"))
            if number < last and (self._ends_inside_token(words) or not cut):
                return False
        return True

    def _look_at_end(self, words: str) -> bool:
        """True if words end with the beginning of an added token."""
        return any(words.endswith(token[:size]) for token in self._added for size in range(1, len(token)))

    def _tried(self, skeleton: Skeleton) -> LiteralIds | None:
        """The ids of the literals in one trial for each kind of character, which have to be the same."""
        trials: list[tuple[Any, Any]] = []
        for probe in _PROBES:
            row = self._whole(skeleton, [probe] * len(skeleton.turns))
            alone = self._backend.encode(probe, add_special_tokens=False).ids
            if row is None or any(row.ids[first:last] != alone for first, last in row.contents):
                return None
            edges = [0, *(edge for span in row.contents for edge in span), len(row.ids)]
            ids = tuple(row.ids[first:last] for first, last in zip(edges[::2], edges[1::2], strict=True))
            pairs = zip(row.turns, row.contents, strict=True)
            trials.append((ids, tuple((content[0] - turn[0], turn[1] - content[1]) for turn, content in pairs)))
        same = all(other == trials[0] for other in trials)
        return LiteralIds(skeleton.unplaced_turns(), *trials[0]) if same else None


def _cuts_at(backend: Any) -> tuple[bool, bool]:
    """(True if the parts between added tokens are tokenised by themselves, True if pieces end at a line feed)."""
    added = backend.get_added_tokens_decoder().values()
    plain = not any(token.lstrip or token.rstrip or token.single_word or token.normalized for token in added)
    whole = backend.truncation is None and backend.padding is None and not backend.encode_special_tokens
    normalizer, steps = _state(backend.normalizer), _state(backend.pre_tokenizer) or {}
    steps = steps.get("pretokenizers", [steps])
    by_bytes = steps[-1].get("type") == "ByteLevel" and not steps[-1]["add_prefix_space"]
    bpe = type(backend.model).__name__ == "BPE" and not backend.model.dropout
    if not (plain and whole and by_bytes and bpe) or (normalizer or {"type": "NFC"}) != {"type": "NFC"}:
        return False, False
    if len(steps) == 1:
        return True, bool(steps[0]["use_regex"])
    split = {name: value for name, value in steps[0].items() if name != "pattern"} == _SPLIT
    pattern = steps[0].get("pattern", {}).get("Regex") if split else None
    return split, len(steps) == 2 and pattern in _CUTTING and not steps[1]["use_regex"]


def _state(part: Any) -> dict[str, Any] | None:
    """The settings of a part of a tokenizer, as its file says them."""
    return None if part is None else json.loads(part.__getstate__())
