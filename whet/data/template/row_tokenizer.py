"""Conversations and texts as rows of token ids and a loss mask: one path for training, evaluation, chat and serving.

A conversation is tokenised as a whole, and spans are carried over through the tokenizer's offsets. In two cases the
text is cut first: at the edges of an answer when a token would reach across them (the model starts its answer at a
token boundary when it generates, so it must when it learns), and around content that spells a special token, which has
to become plain subwords and not a turn marker. All else stays in one piece, so that a prompt has the ids it had when
the model learned to answer it. Where it is sure that the ids of a whole conversation are those of its contents with the
template's own between them, only the contents are tokenised (`template.literal_ids`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from whet.base.errors import UserError
from whet.data.example import Example, Message, PlainTurns, plain_turns_of
from whet.data.template.literal_ids import Cuts, KnownRow, LiteralIds, TokenSpans
from whet.data.template.pieces import Pieces
from whet.data.template.skeleton import Skeleton, filled
from whet.data.template.template import Chat, Rendered, Template, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DOCUMENT_END = "<|endoftext|>"


@dataclass(frozen=True, slots=True)
class Tokens:
    """One row. ids: token ids, int32 [T]; learned: True where the token is a target, bool [T].

    prompts: token spans of contents that are not learned, oldest first; closed: learned spans end with an end of turn.
    weights: factor on the loss of each token, float32 [T], 0 where it is not learned; None: 1 for all learned ones.
    dropped: (index of the message, field) of all that the template does not render (`Rendered.dropped`).
    """

    ids: np.ndarray
    learned: np.ndarray
    prompts: list[tuple[int, int]]
    closed: bool
    weights: np.ndarray | None = None
    dropped: tuple[tuple[int, str], ...] = ()


class RowTokenizer:
    """Makes rows of tokens with a Hugging Face tokenizer and its chat template (absent for raw text)."""

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
        turns = [plain_turns_of(chat) for chat in rows]
        skeletons = self.skeletons(turns)
        known = self.known(turns, skeletons)
        others = [index for index, row in enumerate(known) if row is None]
        rendered = iter(self.rendered([rows[i] for i in others], [skeletons[i] for i in others], loss_on))
        return [
            next(rendered) if row is None else marked(row, chat, loss_on) for chat, row in zip(rows, known, strict=True)
        ]

    def skeletons(self, rows: Sequence[PlainTurns | None]) -> list[Skeleton | None]:
        """The skeleton of each row, where it is sure without running the template; None for turns that are not plain.

        To be asked once for each row (`Template.skeleton`); `known` and `rendered` take the answers.
        """
        template = self.template
        return [None] * len(rows) if template is None else [template.skeleton(turns) for turns in rows]

    def known(
        self, rows: Sequence[PlainTurns | None], skeletons: Sequence[Skeleton | None]
    ) -> list[KnownRow | None]:  # fmt: skip
        """The rows whose tokens are the ids of the contents with those of the skeleton's literals between them.

        None where that is not sure (`template.literal_ids`). skeletons: of `skeletons` for these rows.
        """
        literals = [self._literal_ids(*each) for each in zip(rows, skeletons, strict=True)]
        chosen = [row.contents for row, ids in zip(rows, literals, strict=True) if row is not None and ids is not None]
        unique = list(dict.fromkeys(content for contents in chosen for content in contents))
        encodings = self.backend.encode_batch_fast(unique, add_special_tokens=False) if unique else []
        ids_of = {content: encoding.ids for content, encoding in zip(unique, encodings, strict=True)}
        return [
            None if row is None or ids is None else KnownRow(ids, [ids_of[content] for content in row.contents])
            for row, ids in zip(rows, literals, strict=True)
        ]

    def rendered(self, rows: Sequence[Chat], skeletons: Sequence[Skeleton | None], loss_on: str) -> list[Tokens]:
        """Each conversation rendered and tokenised as a whole. skeletons: of `skeletons` for these rows."""
        assert self.template is not None
        rendered = self.template.render(rows, skeletons)
        encodings = self.backend.encode_batch([row.text for row in rendered], add_special_tokens=False)
        return [
            _marked(row.turns, self._spans(row, encoding), chat, loss_on, row.dropped)
            for chat, row, encoding in zip(rows, rendered, encodings, strict=True)
        ]

    def _literal_ids(self, row: PlainTurns | None, skeleton: Skeleton | None) -> LiteralIds | None:
        if row is None or skeleton is None or not self._cuts.possible:
            return None
        for content in row.contents:
            if not self._cuts.spells_no_token(content):
                return None
        return self._cuts.literal_ids(skeleton)

    def _trial(self, skeleton: Skeleton, contents: list[str]) -> TokenSpans | None:
        row = filled(skeleton, contents)
        return self._by_offsets(row, self.backend.encode(row.text, add_special_tokens=False))

    def prompt(self, chat: Chat) -> list[int]:
        """Token ids after which the model answers: the same path as in training."""
        assert self.template is not None
        row = self.template.prompt(chat)
        return self._spans(row, self.backend.encode(row.text, add_special_tokens=False)).ids

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
            encodings = self.backend.encode_batch_fast(replies, add_special_tokens=False)
            longest = max(longest, *(len(encoding.ids) for encoding in encodings))
        return longest

    def texts(self, rows: Sequence[str]) -> list[Tokens]:
        """Raw documents, each closed by the document-end token; special tokens in the text are parsed."""
        encodings = self.backend.encode_batch_fast(list(rows), add_special_tokens=False)
        start = [self.tokenizer.bos_token_id] if _adds_bos(self.tokenizer) else []
        documents = [np.array([*start, *encoding.ids, self.document_end], dtype=np.int32) for encoding in encodings]
        return [Tokens(ids, np.ones(len(ids), dtype=bool), [], True) for ids in documents]

    def stop_ids(self) -> list[int]:
        """Ids after which generation ends: the end token, and the one that the template closes an answer with."""
        eos = self.tokenizer.eos_token_id
        stops: set[int] = {eos} if isinstance(eos, int) else set()
        if self.template is not None:
            row = self.conversations([[Message("user", "a"), Message("assistant", "b")]], "assistant")[0]
            if row.closed:
                stops.add(int(row.ids[np.flatnonzero(row.learned)[-1]]))
        return sorted(stops)

    def _spelled(self, row: Rendered) -> list[tuple[int, int]]:
        """The spans of contents that spell a special token, wholly or together with the template's words."""
        assert self.template is not None
        special = [match.span() for match in self.template.special.finditer(row.text)]
        if len(special) == row.markers:
            return []
        return [(start, end) for start, end in row.data if any(first < end and start < last for first, last in special)]

    def _header(self, text: str) -> list[int]:
        """The ids that a prompt ends with whose last words are `text`."""
        assert self.template is not None
        special = max((match.end() for match in self.template.special.finditer(text)), default=0)
        ids = self.backend.encode(text[special:], add_special_tokens=False).ids
        return ids if special else ids[1:]  # the first one depends on what is before

    def _header_differs(self, row: Rendered, turn: Turn, before: Sequence[int]) -> bool:
        """True if the tokens `before` an answer are not those that its prompt ends with.

        Some tokenizers look ahead (GPT-2 writes two line feeds as one token, but as two where a letter follows), and
        the model has to learn its answer behind the tokens that it will be given.
        """
        data_ends = [end for _, end in row.data if end <= turn.start]
        ids = self._headers(row.text[data_ends[-1] if data_ends else 0 : turn.start])
        return bool(ids) and list(before[-len(ids) :]) != ids

    def _asked_otherwise(self, row: Rendered, turn: Turn, ids: Sequence[int], edges: Sequence[tuple[int, int]]) -> bool:
        """`_header_differs` for a row that is encoded already."""
        first = next((index for index, edge in enumerate(edges) if edge[0] >= turn.start), len(ids))
        return self._header_differs(row, turn, ids[:first])

    def _spans(self, row: Rendered, encoding: Any) -> TokenSpans:
        """The tokens of a row with the spans of all its answers, learned or not: the tokens are the same either way."""
        spelled = self._spelled(row)
        return (None if spelled else self._by_offsets(row, encoding)) or self._by_pieces(row, spelled)

    def _by_offsets(self, row: Rendered, encoding: Any) -> TokenSpans | None:
        """Spans carried over to tokens, or None when a token reaches across the edge of an answer."""
        ids = encoding.ids
        count, length = len(ids), len(row.text)

        def token_at(edge: int) -> tuple[int, int]:
            """The first token that covers a character at or after `edge`, and its first character."""
            character = edge
            while character < length:
                token = encoding.char_to_token(character)
                if token is not None:
                    return token, encoding.token_to_chars(token)[0]
                character += 1
            return count, edge

        turns, contents = [], []
        for turn in row.turns:
            first, start = token_at(turn.content)
            last, _ = token_at(turn.end)
            first += start < turn.content  # that token is partly the template's
            contents.append((first, last) if first < last else (0, 0))
            if turn.role != "assistant":
                turns.append(contents[-1])
                continue
            if turn.start == turn.stop:
                return None
            first, start = token_at(turn.start)
            last, stop = token_at(turn.stop)
            if turn.end <= stop < turn.stop:  # the closing token takes the white space behind it along
                last, stop = last + 1, turn.stop
            if (start, stop) != (turn.start, turn.stop) or self._header_differs(
                row, turn, ids[max(0, first - 64) : first]
            ):
                return None
            turns.append((first, last))
        return TokenSpans(ids, turns, contents)

    def _by_pieces(self, row: Rendered, spelled: Sequence[tuple[int, int]]) -> TokenSpans:
        """The row cut around contents that spell a special token, and at the edges of answers where it has to be."""
        answers = [turn for turn in row.turns if turn.role == "assistant"]
        cuts = {0, len(row.text)} | {edge for span in spelled for edge in span}
        ids, edges = self._pieces.encode(row.text, cuts, spelled)
        more = {turn.start for turn in answers if self._asked_otherwise(row, turn, ids, edges)}
        wanted = {turn.start for turn in answers} | {turn.stop for turn in answers if turn.stop == turn.end}
        more |= {edge for edge in wanted if any(first < edge < last for first, last in edges)}
        if more:
            ids, edges = self._pieces.encode(row.text, cuts | more, spelled)
        turns, contents = [], []
        for turn in row.turns:
            inside = [i for i, (first, last) in enumerate(edges) if turn.content <= first and last <= turn.end]
            contents.append((inside[0], inside[-1] + 1) if inside else (0, 0))
            inside = [index for index, edge in enumerate(edges) if turn.start <= edge[0] < turn.stop]
            whole = (inside[0], inside[-1] + 1) if inside else (0, 0)
            turns.append(whole if turn.role == "assistant" else contents[-1])
        return TokenSpans(ids, turns, contents)


def _learned_turns(turns: Sequence[Turn], chat: Chat, loss_on: str) -> list[bool]:
    """True for each turn that `loss_on` chooses."""
    answers = [turn.index for turn in turns if turn.role == "assistant"]
    if loss_on == "last_assistant":
        answers = answers[-1:]
    elif loss_on == "completion" and isinstance(chat, Example) and chat.completion_from is not None:
        answers = [index for index in answers if index >= chat.completion_from]
    return [turn.index in answers for turn in turns]


def marked(row: KnownRow, chat: Chat, loss_on: str) -> Tokens:
    """The finished row of a conversation whose tokens are known."""
    return _marked(row.literals.order, row.spans(), chat, loss_on)


def _marked(
    turns: Sequence[Turn], spans: TokenSpans, chat: Chat, loss_on: str, dropped: tuple[tuple[int, str], ...] = ()
) -> Tokens:
    """The finished row: its marks, and the weights where a turn has one."""
    messages = chat.messages or () if isinstance(chat, Example) else chat
    marks = np.full(len(spans.ids), loss_on == "all")
    weighted = any(message.weight is not None for message in messages)
    weights = np.ones(len(spans.ids), np.float32) if weighted else None
    prompts: list[tuple[int, int]] = []
    closed = True
    learned = _learned_turns(turns, chat, loss_on)
    for turn, chosen, (first, last), content in zip(turns, learned, spans.turns, spans.contents, strict=True):
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
    return Tokens(np.array(spans.ids, dtype=np.int32), marks, prompts, closed, weights, dropped)


def _document_end(tokenizer: PreTrainedTokenizerFast) -> int:
    vocabulary = tokenizer.get_vocab()
    if DOCUMENT_END in vocabulary:
        return vocabulary[DOCUMENT_END]
    return end_token(tokenizer)


def end_token(tokenizer: PreTrainedTokenizerFast) -> int:
    """The id of the tokenizer's end token. Raises UserError where it has none."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no end token, so generation could never stop", field="model.tokenizer",
            fix="set eos_token in its tokenizer_config.json",
        )  # fmt: skip
    return int(tokenizer.eos_token_id)  # type: ignore[arg-type]


def _adds_bos(tokenizer: PreTrainedTokenizerFast) -> bool:
    """True if the tokenizer itself starts a text with its begin token."""
    ids = tokenizer("a").input_ids
    return tokenizer.bos_token_id is not None and bool(ids) and ids[0] == tokenizer.bos_token_id
