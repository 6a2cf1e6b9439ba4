"""Text becomes token ids with a mark on each that is learned: one path for training, evaluation, chat and serving.

A conversation is tokenised as a whole, and spans are carried over through the tokenizer's offsets. In two cases the
text is cut first: at the edges of an answer when a token would reach across them (the model starts its answer at a
token boundary when it generates, so it must when it learns), and around content that spells a special token, which has
to become plain subwords and not a turn marker. All else stays in one piece, so that a prompt has the ids it had when
the model learned to answer it. Where it is sure that the ids of a whole conversation are those of its contents with the
template's own between them, only the contents are tokenised (`template.between`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from whet.base.errors import UserError
from whet.data.example import Example, Message
from whet.data.template.between import Between, Cuts, Known, Placed
from whet.data.template.pieces import Pieces
from whet.data.template.plan import Plan, filled
from whet.data.template.template import Chat, Rendered, Template, Turn, plain_roles

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DOCUMENT_END = "<|endoftext|>"
LossOn = Literal["assistant", "last_assistant", "completion", "all"]


@dataclass(frozen=True, slots=True)
class Tokens:
    """One row. ids: token ids, int32 [T]; learned: True where the token is a target, bool [T].

    prompts: token spans of contents that are not learned, oldest first; closed: learned spans end with an end of turn.
    weights: factor on the loss of each token, float32 [T], 0 where it is not learned; None: 1 for all learned ones.
    dropped: (index of the message, field) of what the template does not render (`Rendered.dropped`).
    """

    ids: np.ndarray
    learned: np.ndarray
    prompts: list[tuple[int, int]]
    closed: bool
    weights: np.ndarray | None = None
    dropped: tuple[tuple[int, str], ...] = ()


class Tokeniser:
    """A tokenizer with its chat template (absent for raw text)."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, chat: bool) -> None:
        self.tokenizer = tokenizer
        self.backend = tokenizer.backend_tokenizer
        self.template = Template(tokenizer) if chat else None
        self._headers = lru_cache(maxsize=4096)(self._header)

    @cached_property
    def document_end(self) -> int:
        """The token that closes a document. Raises UserError for a tokenizer that has none, as those of encoders."""
        return _document_end(self.tokenizer)

    @cached_property
    def _cuts(self) -> Cuts:
        assert self.template is not None
        return Cuts(self.backend, self.template.specials, self._trial)

    @cached_property
    def _pieces(self) -> Pieces:
        return Pieces(self.backend, self.tokenizer)

    def conversations(self, rows: Sequence[Chat], loss_on: str) -> list[Tokens]:
        """Each conversation as tokens, learning what `loss_on` says.

        assistant: all answers; last_assistant: the last one; completion: what is not the prompt in rows that tell the
        two apart (`Example.completion_from`), all answers elsewhere; all: every token. A turn of weight 0 is never
        learned. Raises UserError.
        """
        assert self.template is not None
        known = self.known([_plain(chat) for chat in rows])
        rendered = self.template.render([chat for chat, found in zip(rows, known, strict=True) if found is None])
        encodings = self.backend.encode_batch([r.text for r in rendered], add_special_tokens=False)
        whole = iter(zip(rendered, encodings, strict=True))
        result = []
        for chat, found in zip(rows, known, strict=True):
            if found is None:
                row, encoding = next(whole)
                result.append(_marked(row.turns, self._placed(row, encoding), chat, loss_on, row.dropped))
            else:
                result.append(marked(found, chat, loss_on))
        return result

    def known(self, rows: Sequence[tuple[tuple[str, ...], list[str]] | None]) -> list[Known | None]:
        """Of conversations of nothing but roles and contents, those for which it is sure that the tokens are the ids of
        the contents with known ones between them (`template.between`); None for any other."""
        between = [None if row is None else self._between(*row) for row in rows]
        chosen = [row[1] for row, words in zip(rows, between, strict=True) if row is not None and words is not None]
        unique = list(dict.fromkeys(content for contents in chosen for content in contents))
        encodings = self.backend.encode_batch_fast(unique, add_special_tokens=False) if unique else []
        ids = {content: encoding.ids for content, encoding in zip(unique, encodings, strict=True)}
        return [
            None if row is None or words is None else Known(words, [ids[content] for content in row[1]])
            for row, words in zip(rows, between, strict=True)
        ]

    def _between(self, roles: tuple[str, ...], contents: list[str]) -> Between | None:
        if self.template is None or not self._cuts.possible:
            return None
        plan = self.template.repeated(roles, contents)
        if plan is None:
            return None
        for content in contents:
            if not self._cuts.harmless(content):
                return None
        return self._cuts.between(plan)

    def _trial(self, plan: Plan, contents: list[str]) -> Placed | None:
        row = filled(plan, contents)
        return self._by_offsets(row, self.backend.encode(row.text, add_special_tokens=False))

    def prompt(self, chat: Chat) -> list[int]:
        """Token ids after which the model answers: the same path as in training."""
        assert self.template is not None
        row = self.template.prompt(chat)
        return self._placed(row, self.backend.encode(row.text, add_special_tokens=False)).ids

    def answered(self, question: Chat, reply: str) -> str:
        """A reply to `question` without what the model wrote before it because the template does (`Template.lead`)."""
        assert self.template is not None
        return reply.removeprefix(self.template.lead(question))

    def longest_reply(self, examples: Sequence[Example]) -> int:
        """Tokens of the longest last answer, with all that the model writes before it (`Template.lead`)."""
        assert self.template is not None
        longest = 0
        for start in range(0, len(examples), 1000):
            rows = self.template.render(examples[start : start + 1000])
            replies = [row.text[row.turns[-1].start : row.turns[-1].end] for row in rows]
            found = self.backend.encode_batch_fast(replies, add_special_tokens=False)
            longest = max(longest, *(len(reply.ids) for reply in found))
        return longest

    def texts(self, rows: Sequence[str]) -> list[Tokens]:
        """Raw documents, each closed by the document-end token; special tokens in the text are parsed."""
        encodings = self.backend.encode_batch_fast(list(rows), add_special_tokens=False)
        start = [self.tokenizer.bos_token_id] if _adds_bos(self.tokenizer) else []
        found = [np.array([*start, *encoding.ids, self.document_end], dtype=np.int32) for encoding in encodings]
        return [Tokens(ids, np.ones(len(ids), dtype=bool), [], True) for ids in found]

    def stop_ids(self) -> list[int]:
        """Ids after which generation ends: the end token, and the one that the template closes an answer with."""
        eos = self.tokenizer.eos_token_id
        found: set[int] = {eos} if isinstance(eos, int) else set()
        if self.template is not None:
            row = self.conversations([[Message("user", "a"), Message("assistant", "b")]], "assistant")[0]
            if row.closed:
                found.add(int(row.ids[np.flatnonzero(row.learned)[-1]]))
        return sorted(found)

    def _spelled(self, row: Rendered) -> list[tuple[int, int]]:
        """The places of contents that spell a special token, wholly or together with the template's words."""
        assert self.template is not None
        found = [match.span() for match in self.template.special.finditer(row.text)]
        if len(found) == row.markers:
            return []
        return [(start, end) for start, end in row.data if any(first < end and start < last for first, last in found)]

    def _header(self, text: str) -> list[int]:
        """The ids that a prompt ends with whose last words are `text`."""
        assert self.template is not None
        special = max((match.end() for match in self.template.special.finditer(text)), default=0)
        ids = self.backend.encode(text[special:], add_special_tokens=False).ids
        return ids if special else ids[1:]  # the first one hangs on what is before

    def _header_differs(self, row: Rendered, turn: Turn, before: Sequence[int]) -> bool:
        """Whether the tokens `before` an answer are not those that its prompt ends with.

        Some tokenizers look ahead (GPT-2 writes two line feeds as one token, but as two where a letter follows), and
        the model has to learn its answer behind the tokens that it will be given.
        """
        data_ends = [end for _, end in row.data if end <= turn.start]
        ids = self._headers(row.text[data_ends[-1] if data_ends else 0 : turn.start])
        return bool(ids) and list(before[-len(ids) :]) != ids

    def _asked_otherwise(self, row: Rendered, turn: Turn, ids: Sequence[int], edges: Sequence[tuple[int, int]]) -> bool:
        """`_header_differs` for a row that is encoded already."""
        first = next((place for place, edge in enumerate(edges) if edge[0] >= turn.start), len(ids))
        return self._header_differs(row, turn, ids[:first])

    def _placed(self, row: Rendered, encoding: Any) -> Placed:
        """The row with all its answers placed, learned or not, so that it has the same tokens either way."""
        spelled = self._spelled(row)
        return (None if spelled else self._by_offsets(row, encoding)) or self._by_pieces(row, spelled)

    def _by_offsets(self, row: Rendered, encoding: Any) -> Placed | None:
        """Spans carried over to tokens, or None when a token reaches across the edge of an answer."""
        ids = encoding.ids
        count, length = len(ids), len(row.text)

        def at(edge: int) -> tuple[int, int]:
            """The first token that covers a character at or after `edge`, and where it begins."""
            place = edge
            while place < length:
                token = encoding.char_to_token(place)
                if token is not None:
                    return token, encoding.token_to_chars(token)[0]
                place += 1
            return count, edge

        turns, contents = [], []
        for turn in row.turns:
            first, start = at(turn.content)
            last, _ = at(turn.end)
            first += start < turn.content  # that token is partly the template's
            contents.append((first, last) if first < last else (0, 0))
            if turn.role != "assistant":
                turns.append(contents[-1])
                continue
            if turn.start == turn.stop:
                return None
            first, start = at(turn.start)
            last, stop = at(turn.stop)
            if turn.end <= stop < turn.stop:  # the closing token takes the white space behind it along
                last, stop = last + 1, turn.stop
            if (start, stop) != (turn.start, turn.stop) or self._header_differs(
                row, turn, ids[max(0, first - 64) : first]
            ):
                return None
            turns.append((first, last))
        return Placed(ids, turns, contents)

    def _by_pieces(self, row: Rendered, spelled: Sequence[tuple[int, int]]) -> Placed:
        """The row cut around contents that spell a special token, and at the edges of answers where it has to be."""
        answers = [turn for turn in row.turns if turn.role == "assistant"]
        cuts = {0, len(row.text)} | {edge for place in spelled for edge in place}
        ids, edges = self._pieces.encode(row.text, cuts, spelled)
        more = {turn.start for turn in answers if self._asked_otherwise(row, turn, ids, edges)}
        wanted = {turn.start for turn in answers} | {turn.stop for turn in answers if turn.stop == turn.end}
        more |= {edge for edge in wanted if any(first < edge < last for first, last in edges)}
        if more:
            ids, edges = self._pieces.encode(row.text, cuts | more, spelled)
        turns, contents = [], []
        for turn in row.turns:
            inside = [p for p, (first, last) in enumerate(edges) if turn.content <= first and last <= turn.end]
            contents.append((inside[0], inside[-1] + 1) if inside else (0, 0))
            inside = [place for place, edge in enumerate(edges) if turn.start <= edge[0] < turn.stop]
            whole = (inside[0], inside[-1] + 1) if inside else (0, 0)
            turns.append(whole if turn.role == "assistant" else contents[-1])
        return Placed(ids, turns, contents)


def _learned_turns(turns: Sequence[Turn], chat: Chat, loss_on: str) -> list[bool]:
    """Of each turn whether `loss_on` chooses it."""
    answers = [turn.index for turn in turns if turn.role == "assistant"]
    if loss_on == "last_assistant":
        answers = answers[-1:]
    elif loss_on == "completion" and isinstance(chat, Example) and chat.completion_from is not None:
        answers = [index for index in answers if index >= chat.completion_from]
    return [turn.index in answers for turn in turns]


def marked(known: Known, chat: Chat, loss_on: str) -> Tokens:
    """The finished row of a conversation that is known."""
    return _marked(known.between.order, known.placed(), chat, loss_on)


def _plain(chat: Chat) -> tuple[tuple[str, ...], list[str]] | None:
    """Roles and contents of a conversation of nothing else."""
    messages, tools = (chat.messages or (), chat.tools) if isinstance(chat, Example) else (chat, None)
    roles = plain_roles(messages) if tools is None else None
    return None if roles is None else (roles, [message.content for message in messages])


def _marked(
    turns: Sequence[Turn], placed: Placed, chat: Chat, loss_on: str, dropped: tuple[tuple[int, str], ...] = ()
) -> Tokens:
    """The finished row: its marks, and the weights where a turn has one."""
    messages = chat.messages or () if isinstance(chat, Example) else chat
    marks = np.full(len(placed.ids), loss_on == "all")
    weighted = any(message.weight is not None for message in messages)
    weights = np.ones(len(placed.ids), np.float32) if weighted else None
    prompts: list[tuple[int, int]] = []
    closed = True
    learned = _learned_turns(turns, chat, loss_on)
    for turn, chosen, (first, last), content in zip(turns, learned, placed.turns, placed.contents, strict=True):
        weight = messages[turn.index].weight
        if not chosen or weight == 0:
            prompts += [content] if content[0] < content[1] else []
            if chosen:
                marks[first:last] = False
            continue
        marks[first:last] = True
        closed = closed and turn.closed
        if weights is not None and weight is not None:
            weights[first:last] = weight
    if weights is not None:
        weights = None if bool((weights[marks] == 1).all()) else weights * marks
    return Tokens(np.array(placed.ids, dtype=np.int32), marks, prompts, closed, weights, dropped)


def _document_end(tokenizer: PreTrainedTokenizerFast) -> int:
    vocabulary = tokenizer.get_vocab()
    if DOCUMENT_END in vocabulary:
        return vocabulary[DOCUMENT_END]
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no end token, so generation could never stop",
            field="model.tokenizer",
            fix="set eos_token in its tokenizer_config.json",
        )
    return int(tokenizer.eos_token_id)  # type: ignore[arg-type]


def _adds_bos(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the tokenizer itself starts a text with its begin token."""
    ids = tokenizer("a").input_ids
    return tokenizer.bos_token_id is not None and bool(ids) and ids[0] == tokenizer.bos_token_id
