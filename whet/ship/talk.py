"""A conversation in the terminal: lines in, answers streamed to stdout, commands obeyed (`ship.commands`).

What goes wrong inside the loop is said and never ends it: a typo must not cost a conversation.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from whet.base.console import write_answer, write_error
from whet.base.errors import UserError
from whet.base.language import error_text, translated
from whet.data.example import Message
from whet.ship.chat import Chat
from whet.ship.commands import Talk, obey


def talk(chat: Chat, first: str | None, system: str | None, *, quiet: bool) -> list[dict[str, str]]:
    """Answer `first`, or read lines until they end, streaming to stdout unless `quiet`; returns the conversation."""
    from transformers import TextStreamer

    class SafeStreamer(TextStreamer):
        """transformers' streamer, whose text is safe to show."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            write_answer(text + "\n" * stream_end)

    conversation = Talk(chat, [Message("system", system)] if system else [])
    options = {"skip_prompt": True, "skip_special_tokens": True}
    streamer = None if quiet else SafeStreamer(chat.answerer.row_tokenizer.tokenizer, **options)  # type: ignore[arg-type]
    if first is not None:
        _ask(conversation, first, streamer)
    else:
        for line in _lines():
            _turn(conversation, line, streamer)
            if conversation.ended:
                break
    return [{"role": message.role, "content": message.content} for message in conversation.messages]


def _turn(conversation: Talk, line: str, streamer: Any) -> None:
    """Obey or answer one line; an error is told, and the conversation is as it was before."""
    try:
        if line.startswith("/") and not line.startswith("//"):
            if said := obey(conversation, line):
                write_error(translated(said) + "\n")
        else:
            _ask(conversation, line.removeprefix("/") if line.startswith("//") else line, streamer)
    except UserError as error:
        write_error(error_text(error) + "\n")


def _ask(conversation: Talk, text: str, streamer: Any) -> None:
    asked = [*conversation.messages, Message("user", text)]
    answer = conversation.chat.reply(asked, streamer)
    conversation.messages = [*asked, Message("assistant", answer)]


def _lines() -> Iterator[str]:
    """Lines typed by a person, or piped in; empty ones are passed over."""
    person = sys.stdin.isatty()
    if person:
        write_error(translated("Type a message; /help lists commands; Ctrl-D or /quit ends the conversation.\n"))
    while True:
        if person:
            write_error("\n> ")
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise UserError("the message is not UTF-8", fix="set the terminal to UTF-8") from error
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")
