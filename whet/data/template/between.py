"""The token ids of a template's own words, found once: then only contents have to be tokenised.

That is exact where the ids of a whole text are those of its parts, one after the other:

- An added token cuts the text before anything else is done with it. Nothing of a content is a part of one where the
  content holds no character that an added token begins with, and no token could begin in the words before it.
- So what stands between two added tokens is tokenised by itself, whatever is around it. A content with an added token
  behind it, and one right before it, is therefore by itself.
- With words in front ("user" and a line feed), the pre-tokenizer has to cut between the two. The patterns in `_CUTTING`
  let no piece go on from a line feed to a character that is not white space; what they do with the line feed hangs on
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

from whet.data.template.plan import Plan
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


class Placed(NamedTuple):
    """ids: of a whole row. turns: of each turn its tokens, [0, 0] where it has none; contents: those of its content.

    The tokens of an answer are all that a model writes; those of another turn are the whole tokens of its content.
    """

    ids: list[int]
    turns: list[tuple[int, int]]
    contents: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Between:
    """order: the turns of the plan, with no places. ids: of the words before each content, and of the last.

    edges: how many tokens before and behind its content each turn begins and ends.
    """

    order: list[Turn]
    ids: tuple[list[int], ...]
    edges: tuple[tuple[int, int], ...]

    def learned(self, loss_on: str) -> tuple[list[int], bool]:
        """(the answers that `loss_on` chooses in a row of nothing but contents, whether all of them are closed)."""
        answers = [turn.index for turn in self.order if turn.role == "assistant"]
        answers = answers[-1:] if loss_on == "last_assistant" else answers
        return answers, all(self.order[index].closed for index in answers)

    def placed(self, contents: Sequence[Sequence[int]]) -> Placed:
        """The row whose contents have these ids."""
        ids: list[int] = []
        turns, places = [], []
        for words, content, (ahead, behind) in zip(self.ids, contents, self.edges, strict=False):
            ids += words
            start = len(ids)
            ids += content
            end = len(ids)
            places.append((start, end))
            turns.append((start - ahead, end + behind))
        ids += self.ids[-1]
        return Placed(ids, turns, places)


class Known(NamedTuple):
    """A row of plain turns. contents: the ids of each."""

    between: Between
    contents: list[list[int]]

    def placed(self) -> Placed:
        """Its tokens, in their places."""
        return self.between.placed(self.contents)


class Cuts:
    """Where the texts of one tokenizer may be cut. possible: whether they may at all.

    whole: places a row of a plan by tokenising it as a whole, None where a token reaches across the edge of an answer.
    """

    def __init__(
        self, backend: Any, specials: Sequence[str], whole: Callable[[Plan, list[str]], Placed | None]
    ) -> None:
        self._backend, self._whole = backend, whole
        self._added = sorted({token.content for token in backend.get_added_tokens_decoder().values()}, key=len)[::-1]
        self._find = re.compile("|".join(map(re.escape, self._added)) or r"(?!)")
        starts = {token[0] for token in (*self._added, *specials) if token}
        self._start = re.compile(f"[{''.join(map(re.escape, sorted(starts)))}]" if starts else r"(?!)")
        self.possible, self._at_lines = _cuts_at(backend)
        self._begins = lru_cache(maxsize=4096)(self._begin)
        self._known: dict[Plan, Between | None] = {}

    def between(self, plan: Plan) -> Between | None:
        """The ids of the plan's words, None where they hang on the contents."""
        if plan not in self._known:
            self._known[plan] = self._found(plan) if self.possible and self._cut_apart(plan) else None
        return self._known[plan]

    def harmless(self, content: str) -> bool:
        """Whether no added token can be written with a part of this content."""
        return self._start.search(content) is None

    def _cut_apart(self, plan: Plan) -> bool:
        """Whether every content of the plan has an edge of pieces on both sides."""
        last = len(plan.literals) - 1
        for number, literal in enumerate(plan.literals):
            found = [match.span() for match in self._find.finditer(literal)]
            if number and not (found and found[0][0] == 0) and (literal or number < last):
                return False
            words = literal[found[-1][1] if found else 0 :]
            if number < last and (self._begins(words) or (words and not (self._at_lines and words.endswith("\n")))):
                return False
        return True

    def _begin(self, words: str) -> bool:
        """Whether words end with the beginning of an added token."""
        return any(words.endswith(token[:size]) for token in self._added for size in range(1, len(token)))

    def _found(self, plan: Plan) -> Between | None:
        """The ids of the words of one trial for each kind of character, which have to be the same."""
        found: list[tuple[Any, Any]] = []
        for probe in _PROBES:
            contents = [probe] * len(plan.turns)
            placed = self._whole(plan, contents)
            alone = self._backend.encode(probe, add_special_tokens=False).ids
            if placed is None or any(placed.ids[first:last] != alone for first, last in placed.contents):
                return None
            edges = [0, *(edge for place in placed.contents for edge in place), len(placed.ids)]
            ids = tuple(placed.ids[first:last] for first, last in zip(edges[::2], edges[1::2], strict=True))
            pairs = zip(placed.turns, placed.contents, strict=True)
            found.append((ids, tuple((place[0] - turn[0], turn[1] - place[1]) for turn, place in pairs)))
        return Between(plan.order(), *found[0]) if all(other == found[0] for other in found) else None


def _cuts_at(backend: Any) -> tuple[bool, bool]:
    """Whether the parts between added tokens are tokenised by themselves, and whether pieces end at a line feed."""
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
    """How a part of a tokenizer is set, as its file says it."""
    return None if part is None else json.loads(part.__getstate__())
