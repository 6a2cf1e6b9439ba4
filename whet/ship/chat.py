"""A conversation in the terminal with a run or a model, streamed as it is written.

An encoder-decoder answers one text at a time: it was trained on pairs, and what was said before is no part of them.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whet import runs
from whet.base.errors import UserError
from whet.data.example import Message
from whet.data.labels import encode_texts
from whet.data.template.goldens import FILE as CONTRACT
from whet.data.template.goldens import check_contract
from whet.data.template.template import use_template
from whet.data.template.tokenise import Tokeniser
from whet.engine.answer.generate import stream
from whet.engine.answer.sequence import answer_sources
from whet.engine.config import Base, Model
from whet.engine.load.load import load_model, load_tokenizer
from whet.engine.load.open import answering, open_trained
from whet.ship.adapters import CONFIG, Adapters, adapter_directory, home


@dataclass(frozen=True)
class Chat:
    """A model that answers, with the tokeniser it was trained with."""

    network: Any
    tokeniser: Tokeniser
    max_new_tokens: int = 256
    adapters: Adapters | None = None

    def use(self, name: str) -> None:
        """Answer with the adapter `name` from now on, or as the base. Raises UserError."""
        if self.adapters is None:
            raise UserError("no adapters were loaded by name", fix="whet chat RUN --adapter NAME=OTHER_RUN")
        self.adapters.use(None if name == "base" else name)

    def reply(self, messages: list[Message], streamer: Any = None) -> str:
        """The greedy answer to a conversation, less what the template writes itself; pieces go to `streamer`."""
        prompt = self.tokeniser.prompt(messages)
        options = {"stop_ids": self.tokeniser.stop_ids(), "max_new_tokens": self.max_new_tokens}
        with contextlib.nullcontext() if self.adapters is None else self.adapters.using(self.adapters.in_use):
            ids = stream(self.network, prompt, streamer=streamer, **options)
        text = self.tokeniser.tokenizer.decode(ids, skip_special_tokens=False)
        return self.tokeniser.answered(messages, text)  # type: ignore[arg-type]


@dataclass(frozen=True)
class OneTurn:
    """An encoder-decoder that answers the last message alone."""

    network: Any
    tokeniser: Tokeniser
    max_length: int | None
    max_new_tokens: int = 256

    def reply(self, messages: list[Message], streamer: Any = None) -> str:
        """The greedy answer to the last message, below the system's if there is one; pieces go to `streamer`."""
        tokenizer = self.tokeniser.tokenizer
        asked = [message for message in messages[:-1] if message.role == "system"] + messages[-1:]
        source = encode_texts(
            tokenizer, ["\n\n".join(message.content for message in asked)], max_length=self.max_length
        )
        (ids,) = answer_sources(
            self.network, source, max_new_tokens=self.max_new_tokens, batch_size=1, streamer=streamer
        )
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)  # type: ignore[return-value]


def open_chat(target: str, *, max_new_tokens: int = 256, beside: Mapping[str, str] | None = None) -> Chat | OneTurn:
    """A chat with a run directory, an adapter or model directory, a hub name or a built-in model.

    beside: runs or adapters by name, loaded too and switched to by `Chat.use`; the target's own is called by its
    folder. Raises UserError, also for a run with labels, which has nothing to say.
    """
    if beside or (Path(target) / CONFIG).is_file():
        return _switching(target, beside or {}, max_new_tokens)
    if (Path(target) / "recipe.yaml").is_file():
        run = runs.open_run(target)
        recipe = run.recipe
        if run.task.labelled:
            raise UserError(
                f"the run was trained for {run.task.name.replace('_', '-')}: it labels texts and does not write",
                file=str(run.path), expected="a run that was trained on conversations or text",
                fix=f"whet predict {run.path}",
            )  # fmt: skip
        if run.task.name == "seq2seq":
            opened = open_trained(recipe.model, recipe.base, run.trained, recipe.method, run.task)
            tokeniser = Tokeniser(load_tokenizer(recipe.model), chat=False)
            return OneTurn(opened.answering, tokeniser, recipe.data.max_length, max_new_tokens)
        tokenizer = load_tokenizer(recipe.model)
        use_template(tokenizer, recipe.model.chat_template)
        tokeniser = Tokeniser(tokenizer, chat=True)
        check_contract(tokeniser, run.trained / CONTRACT)
        opened = open_trained(recipe.model, recipe.base, run.trained, recipe.method)
        return Chat(opened.answering, tokeniser, max_new_tokens)
    model = Model(path=target)
    tokeniser = Tokeniser(load_tokenizer(model), chat=True)
    return Chat(load_model(model, answering(model, Base())), tokeniser, max_new_tokens)


def _switching(target: str, beside: Mapping[str, str], max_new_tokens: int) -> Chat:
    """A chat with several adapters of one base, the one of `target` (if it has one) in use."""
    place = Path(target)
    own = place if (place / CONFIG).is_file() or (place / "recipe.yaml").is_file() else None
    model, base = (Model(path=target), Base()) if own is None else home(own)
    tokenizer = load_tokenizer(model)
    if own is not None and (own / "recipe.yaml").is_file():
        use_template(tokenizer, runs.open_run(own).recipe.model.chat_template)
    tokeniser = Tokeniser(tokenizer, chat=True)
    named = ({place.name: str(own)} if own is not None else {}) | dict(beside)
    for path in named.values():
        check_contract(tokeniser, adapter_directory(path) / CONTRACT)
    adapters = Adapters(load_model(model, answering(model, base)))
    for name, path in named.items():
        adapters.load(name, path)
    if own is not None:
        adapters.use(place.name)
    return Chat(adapters.network, tokeniser, max_new_tokens, adapters)


def talk(chat: Chat | OneTurn, first: str | None, system: str | None, *, quiet: bool) -> list[dict[str, str]]:
    """Answer `first`, or read lines until they end, streaming to stdout unless `quiet`; returns the conversation."""
    from transformers import TextStreamer

    messages = [Message("system", system)] if system else []
    options = {"skip_prompt": True, "skip_special_tokens": True}
    streamer = None if quiet else TextStreamer(chat.tokeniser.tokenizer, **options)  # type: ignore[arg-type]
    for text in [first] if first is not None else _lines():
        if text.startswith("/use ") and isinstance(chat, Chat) and chat.adapters is not None:
            chat.use(text.removeprefix("/use ").strip())
            continue
        messages.append(Message("user", text))
        messages.append(Message("assistant", chat.reply(messages, streamer)))
    return [{"role": message.role, "content": message.content} for message in messages]


def _lines() -> Iterator[str]:
    """Lines typed by a person, or piped in; empty ones are passed over."""
    person = sys.stdin.isatty()
    if person:
        sys.stderr.write("Type a message; an empty line or Ctrl-D ends the conversation.\n")
    while True:
        if person:
            sys.stderr.write("\n> ")
            sys.stderr.flush()
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise UserError("the message is not UTF-8", fix="set the terminal to UTF-8") from error
        if not line or (person and not line.strip()):
            return
        if line.strip():
            yield line.rstrip("\n")
