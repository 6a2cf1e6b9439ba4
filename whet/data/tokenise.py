"""Text becomes token ids with a mark on each that is learned: one path for training, evaluation, chat and serving.

A conversation is tokenised as a whole, and spans are carried over through the tokenizer's offsets. In two cases the
text is cut first: at the edges of an answer when a token would reach across them (the model starts its answer at a
token boundary when it generates, so it must when it learns), and around content that spells a special token, which has
to become plain subwords and not a turn marker. All else stays in one piece, so that a prompt has the ids it had when
the model learned to answer it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from whet.base.errors import UserError
from whet.data.example import Example, Message
from whet.data.template import Rendered, Template, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DOCUMENT_END = "<|endoftext|>"


@dataclass(frozen=True, slots=True)
class Tokens:
    """One row. ids: token ids, int32 [T]; learned: True where the token is a target, bool [T].

    prompts: token spans of contents that are not learned, oldest first; closed: learned spans end with an end of turn.
    """

    ids: np.ndarray
    learned: np.ndarray
    prompts: list[tuple[int, int]]
    closed: bool


class Tokeniser:
    """A tokenizer with its chat template (absent for raw text)."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, chat: bool) -> None:
        from tokenizers import Tokenizer

        self.tokenizer = tokenizer
        self.backend = tokenizer.backend_tokenizer
        self.template = Template(tokenizer) if chat else None
        self.plain = Tokenizer.from_str(self.backend.to_str())
        self.plain.encode_special_tokens = True
        specials = self.template.specials if self.template else list(tokenizer.all_special_tokens)
        self._special = re.compile("|".join(re.escape(token) for token in specials) or r"(?!)")

    @cached_property
    def document_end(self) -> int:
        """The token that closes a document. Raises UserError for a tokenizer that has none, as those of encoders."""
        return _document_end(self.tokenizer)

    def conversations(self, rows: Sequence[Sequence[Message]], loss_on: str) -> list[Tokens]:
        """Each conversation as tokens, learning what `loss_on` says (assistant, last_assistant, all)."""
        assert self.template is not None
        rendered = self.template.render(rows)
        encodings = self.backend.encode_batch([r.text for r in rendered], add_special_tokens=False)
        result = []
        for messages, row, encoding in zip(rows, rendered, encodings, strict=True):
            learned = _learned_turns(row.turns, loss_on)
            spelled = any(self._special.search(message.content) for message in messages)
            if spelled:
                _check_places(row, messages)
            tokens = None if spelled else _by_offsets(row, learned, encoding, loss_on)
            result.append(tokens or self._by_pieces(row, learned, loss_on, spelled))
        return result

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids after which the model answers: the same path as in training."""
        assert self.template is not None
        text = self.template.text(messages, prompt=True)
        if not any(self._special.search(message.content) for message in messages):
            return self.backend.encode(text, add_special_tokens=False).ids
        answered = [*messages, Message("assistant", "x")]
        whole = self.template.render([answered])[0]
        _check_places(whole, answered)
        head = [turn for turn in whole.turns if turn.start <= len(text)]
        return self._pieces(Rendered(text, tuple(head)), set())[0]

    def answered(self, question: Sequence[Message], reply: str) -> str:
        """A reply to `question` without what the model wrote before it because the template does (`Template.lead`)."""
        assert self.template is not None
        return reply.removeprefix(self.template.lead(question))

    def longest_reply(self, examples: Sequence[Example]) -> int:
        """Tokens of the longest answer, with what the model writes before it (`Template.lead`)."""
        assert self.template is not None
        replies = [self.template.lead(example.question) + example.answer for example in examples]
        return max(len(found.ids) for found in self.backend.encode_batch_fast(replies, add_special_tokens=False))

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

    def _by_pieces(self, row: Rendered, learned: set[int], loss_on: str, spelled: bool) -> Tokens:
        """The row cut at the edges of its answers and of contents that spell a special token."""
        ids, marks, prompts = self._pieces(row, learned)
        if spelled and self.tokenizer.decode(ids, clean_up_tokenization_spaces=False) != row.text:
            raise UserError(
                "a message spells one of the model's special tokens, and this tokenizer cannot write it as plain text",
                field="messages",
                found=str(self._special.findall(row.text)[:3]),
                fix="remove the marker from the data",
            )
        learns_all = loss_on == "all"
        closed = all(row.turns[index].stop > row.turns[index].end for index in learned)
        learned_marks = np.ones(len(ids), dtype=bool) if learns_all else np.array(marks, dtype=bool)
        return Tokens(np.array(ids, dtype=np.int32), learned_marks, prompts, closed)

    def _pieces(self, row: Rendered, learned: set[int]) -> tuple[list[int], list[bool], list[tuple[int, int]]]:
        ids: list[int] = []
        edges: list[tuple[int, int]] = []

        def add(start: int, end: int, backend: Any) -> None:
            if start < end:
                piece = backend.encode(row.text[start:end], add_special_tokens=False)
                ids.extend(piece.ids)
                edges.extend((start + first, start + last) for first, last in piece.offsets)

        position = 0
        for index, turn in enumerate(row.turns):
            spelled = self._special.search(row.text, turn.content, turn.end)
            if spelled or index in learned:
                add(position, turn.start, self.backend)
                cut = turn.content if spelled else turn.start
                add(turn.start, cut, self.backend)
                add(cut, turn.end, self.plain if spelled else self.backend)
                position = turn.end
        add(position, len(row.text), self.backend)
        marks = [False] * len(ids)
        prompts = []
        for index, turn in enumerate(row.turns):
            if index in learned:
                inside = [place for place, edge in enumerate(edges) if turn.start <= edge[0] < turn.stop]
                for place in inside:
                    marks[place] = True
                continue
            inside = [p for p, (first, last) in enumerate(edges) if turn.content <= first and last <= turn.end]
            prompts += [(inside[0], inside[-1] + 1)] if inside else []
        return ids, marks, prompts


def _check_places(row: Rendered, messages: Sequence[Message]) -> None:
    """Refuse text whose special tokens cannot be told from the template's, because not every content was placed."""
    if len(row.turns) != len(messages):
        raise UserError(
            "a message spells one of the model's special tokens, and the chat template rewrites the conversation, so "
            "the two could not be told apart",
            field="messages",
            found=f"{len(row.turns)} of {len(messages)} contents found in the text",
            expected="contents that are rendered as they are",
            fix="remove the marker from the data",
        )


def _learned_turns(turns: Sequence[Turn], loss_on: str) -> set[int]:
    answers = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
    return set(answers[-1:] if loss_on == "last_assistant" else answers)


def _by_offsets(row: Rendered, learned: set[int], encoding: Any, loss_on: str) -> Tokens | None:
    """Spans carried over to tokens, or None when a token reaches across the edge of a learned one."""
    count = len(encoding.ids)
    marks = np.full(count, loss_on == "all")
    prompts = []
    closed = True
    for index, turn in enumerate(row.turns):
        if turn.start == turn.stop:
            continue
        mark = index in learned
        edges = (turn.start, turn.stop) if mark else (turn.content, turn.end)
        first, last = (_token_at(encoding, edge, len(row.text), count) for edge in edges)
        starts = [encoding.token_to_chars(t)[0] if t < count else edges[1] for t in (first, last)]
        if not mark:
            first += starts[0] < edges[0]  # that token is partly the template's
            prompts += [(first, last)] if first < last else []
            continue
        if turn.end <= starts[1] < edges[1]:  # the closing token takes the white space behind it along
            last, starts[1] = last + 1, edges[1]
        if starts != list(edges):
            return None
        marks[first:last] = True
        closed = closed and turn.stop > turn.end
    return Tokens(np.array(encoding.ids, dtype=np.int32), marks, prompts, closed)


def _token_at(encoding: Any, position: int, length: int, count: int) -> int:
    """Index of the first token that covers a character at or after `position`."""
    while position < length:
        token = encoding.char_to_token(position)
        if token is not None:
            return token
        position += 1
    return count


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
