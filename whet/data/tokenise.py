"""Text becomes token ids with a mark on each that is learned: one path for training, evaluation, chat and serving.

A conversation is tokenised as a whole, and spans are carried over through the tokenizer's offsets. Two cases are
tokenised piece by piece instead: a token that would reach across the edge of an answer (the model starts its answer at
a token boundary when it generates, so it must when it learns), and content that spells a special token, which has to
become plain subwords and not a turn marker.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from whet.base.errors import UserError
from whet.data.example import Message
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
        self.document_end = _document_end(tokenizer)

    def conversations(self, rows: Sequence[Sequence[Message]], loss_on: str) -> list[Tokens]:
        """Each conversation as tokens, learning what `loss_on` says (assistant, last_assistant, all)."""
        assert self.template is not None
        rendered = self.template.render(rows)
        encodings = self.backend.encode_batch([r.text for r in rendered], add_special_tokens=False)
        result = []
        for messages, row, encoding in zip(rows, rendered, encodings, strict=True):
            learned = _learned_turns(row.turns, loss_on)
            spelled = any(self._special.search(message.content) for message in messages)
            tokens = None if spelled else _by_offsets(row, learned, encoding, loss_on)
            result.append(tokens or self._by_pieces(row, learned, loss_on, spelled))
        return result

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids after which the model answers: the same path as in training."""
        assert self.template is not None
        text = self.template.text(messages, prompt=True)
        if not any(self._special.search(message.content) for message in messages):
            return self.backend.encode(text, add_special_tokens=False).ids
        whole = self.template.render([[*messages, Message("assistant", "")]])[0]
        head = [turn for turn in whole.turns if turn.start <= len(text)]
        return self._pieces(Rendered(text, tuple(head)), set())[0]

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
        """The row cut at the edges of its turns, every piece tokenised by itself."""
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
        marks: list[bool] = []
        prompts: list[tuple[int, int]] = []

        def add(start: int, end: int, mark: bool, content: bool) -> None:
            backend = self.plain if content and self._special.search(row.text, start, end) else self.backend
            piece = backend.encode(row.text[start:end], add_special_tokens=False).ids
            if content and not mark:
                prompts.append((len(ids), len(ids) + len(piece)))
            ids.extend(piece)
            marks.extend([mark] * len(piece))

        position = 0
        for index, turn in enumerate(row.turns):
            mark = index in learned
            add(position, turn.start, False, False)
            add(turn.start, turn.end, mark, True)
            add(turn.end, turn.stop, mark, False)
            position = turn.stop
        add(position, len(row.text), False, False)
        return ids, marks, prompts


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
        edges = (turn.start, turn.stop if mark else turn.end)
        first, last = (_token_at(encoding, edge, len(row.text), count) for edge in edges)
        if mark:
            clean = all(
                t == count or encoding.token_to_chars(t)[0] == e for t, e in zip((first, last), edges, strict=True)
            )
            if not clean:
                return None
            marks[first:last] = True
            closed = closed and turn.stop > turn.end
        else:
            prompts.append((first, last))
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
