"""Conversations become text and character spans: what each message wrote, and where its turn ends.

Spans come from structure. A conversation is rendered twice: as it is, and with every content replaced by a mark of
its own; the text between the marks is what the template itself writes, and walking the real text along it gives the
place of every content, however often its words occur elsewhere. Templates that change contents (strip them, drop
earlier thinking) are followed where the rewriting is recognisable and refused where it is not. Nothing is ever found
by searching for a string.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whet.base.errors import UserError, nearest
from whet.data.example import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NAMED = {path.stem: path for path in sorted((Path(__file__).parent / "templates").glob("*.jinja"))}
# What Python raises inside a template that adds text to a number, divides by zero, calls itself or loops for ever.
TEMPLATE_MISTAKES = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
LARGEST = 1_000_000  # characters; published templates have under 20,000
SLOWEST_SECONDS = 10.0  # for two short messages, which take a thousandth of a second


@dataclass(frozen=True, slots=True)
class Turn:
    """Where a message stands in the text. start..end: what whoever takes the turn writes; stop: end of its last token.

    content: where the content begins, after what a model has to write in front of its answer because the generation
    prompt lacks it (an empty thinking block); elsewhere start. stop == end when no special token closes the turn.
    """

    role: str
    start: int
    content: int
    end: int
    stop: int


@dataclass(frozen=True, slots=True)
class Rendered:
    """One conversation as the model reads it, with its turns in order."""

    text: str
    turns: tuple[Turn, ...]


def use_template(tokenizer: PreTrainedTokenizerFast, name: str | None) -> None:
    """Give the tokenizer the template that the recipe names; the model's own stays when it names none.

    Raises UserError for an unknown name and for markers that the vocabulary does not have.
    """
    if name is None:
        return
    if name in NAMED:
        missing = [t for t in CHATML_TOKENS if t not in tokenizer.get_vocab()] if name == "chatml" else []
        if missing:
            raise UserError(
                f"the tokenizer has no token {missing[0]}, so ChatML turns would never end",
                field="model.chat_template",
                found=name,
                expected="a template whose markers are in the vocabulary",
                fix="model.chat_template=alpaca, which ends turns with the model's own end token",
            )
        tokenizer.chat_template = NAMED[name].read_text(encoding="utf-8")
        return
    path = Path(name).expanduser()
    if path.suffix == ".jinja" and path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            tokenizer.chat_template = file.read(LARGEST + 1)
        return
    raise UserError(
        "there is no such chat template",
        field="model.chat_template",
        found=name,
        expected=f"{', '.join(NAMED)} or a .jinja file",
        fix=f"write {nearest(name, NAMED) or 'chatml'}",
    )


class Template:
    """The tokenizer's chat template, with the spans of what it renders."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, slowest_seconds: float = SLOWEST_SECONDS) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                "the model has no chat template, so conversations cannot be rendered",
                field="model.chat_template",
                found="none",
                expected=f"{', '.join(NAMED)} or a .jinja file",
                fix="model.chat_template=alpaca (or chatml when the vocabulary has its markers)",
            )
        self.tokenizer = tokenizer
        self._check_cost(slowest_seconds)
        added = tokenizer.added_tokens_decoder.values()
        self.specials = sorted({str(t) for t in added if t.special} | set(tokenizer.all_special_tokens), key=len)
        self._literals = lru_cache(maxsize=4096)(self._find_literals)
        self._leads = lru_cache(maxsize=4096)(self._find_leads)

    def _check_cost(self, seconds: float) -> None:
        """Refuse a template that is too large, or does not end on two short messages within `seconds`.

        jinja's sandbox has no clock, and a thread cannot be stopped: the one that is stuck is left behind, and dies
        with the process. A template that loops on other messages only is not found out.
        """
        wrong: dict[str, Any] = {"field": "model.chat_template", "fix": "use model.chat_template=chatml or alpaca"}
        if len(str(self.tokenizer.chat_template)) > LARGEST:
            raise UserError("the chat template is too large", **wrong, expected=f"at most {LARGEST:,} characters")

        def render() -> None:
            with contextlib.suppress(UserError):  # it will be said of the row that it concerns
                self._render([_plain([Message("user", "a"), Message("assistant", "b")])], False)

        worker = threading.Thread(target=render, daemon=True)
        worker.start()
        worker.join(seconds)
        if worker.is_alive():
            raise UserError(
                "the chat template does not come to an end", **wrong, found=f"two messages, {seconds:g} seconds",
            )  # fmt: skip

    def text(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        """The rendered conversation; with `prompt`, followed by the header of the answer to come."""
        return self._render([_plain(messages)], prompt)[0]

    def lead(self, question: Sequence[Message]) -> str:
        """What a tuned model writes before the answer to `question`, as it learned to: "" with most templates."""
        return self._leads((*(message.role for message in question), "assistant"))[-1] or ""

    def render(self, conversations: Sequence[Sequence[Message]]) -> list[Rendered]:
        """Text and turns of each conversation. Raises UserError for one that the template cannot render exactly."""
        texts = self._render([_plain(messages) for messages in conversations], False)
        return [
            Rendered(text, self._turns(text, messages)) for text, messages in zip(texts, conversations, strict=True)
        ]

    def _render(self, conversations: list[list[dict[str, str]]], prompt: bool) -> list[str]:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(  # type: ignore[return-value]
                conversations, tokenize=False, add_generation_prompt=prompt
            )
        except (TemplateError, *TEMPLATE_MISTAKES) as error:
            if len(conversations) > 1:
                return [self._render([conversation], prompt)[0] for conversation in conversations]
            raise UserError(
                f"the chat template refuses this conversation: {error}",
                field="messages",
                found=" ".join(message["role"] for message in conversations[0]),
                expected="roles in the order that the model's template accepts",
                fix="remove the system message, or use model.chat_template=chatml",
            ) from error

    def _turns(self, text: str, messages: Sequence[Message]) -> tuple[Turn, ...]:
        literals = self._literals(tuple(message.role for message in messages))
        turns = self._walk(text, messages, literals) if literals is not None else None
        if turns is not None:
            leads = self._leads(tuple(message.role for message in messages))
            if turns[-1].role == "assistant" and leads[-1] is None:
                raise UserError(
                    "the chat template asks for an answer with other text than stands before one",
                    field="model.chat_template", found=f"prompt: …{self.text(messages[:-1], prompt=True)[-30:]!r}",
                    expected="the text before an answer, as in a whole conversation",
                    fix="mend the add_generation_prompt part of the template, or use model.chat_template=chatml",
                )  # fmt: skip
            turns = tuple(replace(t, start=t.start - len(lead or "")) for t, lead in zip(turns, leads, strict=True))
        return turns if turns is not None else self._by_prefix(text, messages)

    def _find_literals(self, roles: tuple[str, ...]) -> tuple[str, ...] | None:
        """What the template writes before, between and after the contents, or None when contents are repeated."""
        text, marks = self._marked(roles)
        literals = []
        for mark in marks:
            if text.count(mark) != 1:
                return None
            literal, _, text = text.partition(mark)
            literals.append(literal)
        return (*literals, text)

    def _marked(self, roles: tuple[str, ...]) -> tuple[str, list[str]]:
        """A conversation whose contents are marks, rendered."""
        marks = [f"qzx{index}xzq" for index in range(len(roles))]
        return self._render([[{"role": r, "content": m} for r, m in zip(roles, marks, strict=True)]], False)[0], marks

    def _find_leads(self, roles: tuple[str, ...]) -> tuple[str | None, ...]:
        """Of each turn, the text between generation prompt and content, which is learned: nothing else writes it.

        "" where there is none and for all but answers (one that opens a conversation answers nothing); None where an
        answer does not begin with the generation prompt.
        """
        text, marks = self._marked(roles)
        leads: list[str | None] = []
        for index, (role, mark) in enumerate(zip(roles, marks, strict=True)):
            if role != "assistant" or index == 0:
                leads.append("")
                continue
            before = [{"role": r, "content": m} for r, m in zip(roles[:index], marks[:index], strict=True)]
            head = self._render([before], True)[0]
            start = text.find(mark, len(head))
            leads.append(text[len(head) : start] if text.startswith(head) and start >= 0 else None)
        return tuple(leads)

    def _walk(self, text: str, messages: Sequence[Message], literals: tuple[str, ...]) -> tuple[Turn, ...] | None:
        """Turns found by following the literals through `text`, or None when the text does not follow them."""
        position = 0
        turns = []
        for message, before, after in zip(messages, literals, literals[1:], strict=False):
            if not text.startswith(before, position):
                return None
            start = position + len(before)
            forms = (message.content, message.content.rstrip(), message.content.lstrip(), message.content.strip())
            form = next(
                (f for f in forms if text.startswith(f, start) and text.startswith(after, start + len(f))), None
            )
            if form is None:
                return None
            position = start + len(form)
            turns.append(Turn(message.role, start, start, position, position + self._closing(after)))
        return tuple(turns) if len(text) == position + len(literals[-1]) else None

    def _closing(self, literal: str) -> int:
        """Characters of `literal` up to the end of the first special token in it, 0 when it has none."""
        found = [(literal.find(token), len(token)) for token in self.specials if token in literal]
        if not found:
            return 0
        start, length = min(found, key=lambda pair: (pair[0], -pair[1]))
        return start + length

    def _by_prefix(self, text: str, messages: Sequence[Message]) -> tuple[Turn, ...]:
        """Answers only, each between its own prompt and its own end: for templates that rewrite what came before."""
        turns = []
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            head = self.text(messages[:index], prompt=True)
            whole = self.text(messages[: index + 1])
            marked, marks = self._marked(tuple(message.role for message in messages[: index + 1]))
            tail = marked.rpartition(marks[-1])[2]
            end = len(whole) - len(tail)
            stop = end + self._closing(tail)
            exact = whole.startswith(head) and whole.endswith(tail) and text.startswith(whole[:stop])
            if not exact or end <= len(head):
                raise UserError(
                    "the chat template rewrites an earlier turn when the conversation goes on, so what is learned "
                    "could not be said exactly",
                    field="messages",
                    found=f"turn {index + 1} of {len(messages)}",
                    expected="a template that keeps earlier turns as they were",
                    fix="split the conversation so that each row ends with one answer",
                )
            turns.append(Turn("assistant", len(head), len(head), end, stop))
        return tuple(turns)


def contract(
    tokenizer: PreTrainedTokenizerFast, goldens: Sequence[tuple[Sequence[Message], list[int], list[int]]]
) -> str:
    """JSON saved beside an adapter: the template and conversations with their exact token ids (DESIGN section 4)."""
    record: dict[str, Any] = {
        "chat_template": tokenizer.chat_template,
        "eos_token": tokenizer.eos_token,
        "golden": [{"messages": _plain(messages), "ids": ids, "prompt": prompt} for messages, ids, prompt in goldens],
    }
    return json.dumps(record, ensure_ascii=False, indent=1)


def _plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]
