"""The commands of a conversation in the terminal: lines that begin with a slash are for whet and not for the model.

A wrong one is said and changes nothing; a line that shall begin with a slash for the model begins with two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from whet.base.errors import UserError, nearest
from whet.data.example import Message
from whet.ship.chat import Chat


@dataclass
class Talk:
    """A conversation with a chat. ended: no more is read."""

    chat: Chat
    messages: list[Message] = field(default_factory=list)
    ended: bool = False

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages = [message for message in self.messages if message.role == "system"]


def obey(talk: Talk, line: str) -> str:
    """Carry a command out; returns what to tell the person. Raises UserError, and nothing has changed then."""
    name, _, rest = line.removeprefix("/").partition(" ")
    if name not in COMMANDS:
        near = nearest(name, COMMANDS)
        raise UserError(
            f"there is no command /{name}", f"/{near}" if near else "/help lists them; // begins a message with a slash"
        )
    return COMMANDS[name].carry_out(talk, rest.strip())


def _help(talk: Talk, rest: str) -> str:
    return "\n".join(f"  /{command.form:20} {command.what}" for command in COMMANDS.values())


def _reset(talk: Talk, rest: str) -> str:
    talk.reset()
    return "a new conversation"


def _undo(talk: Talk, rest: str) -> str:
    last = max((index for index, one in enumerate(talk.messages) if one.role == "user"), default=None)
    if last is None:
        raise UserError("nothing was said yet", "say something first")
    del talk.messages[last:]
    return "the last message and its answer are forgotten"


def _system(talk: Talk, rest: str) -> str:
    talk.messages = [Message("system", rest)] if rest else []
    return "a new conversation " + ("with this system message" if rest else "without a system message")


def _use(talk: Talk, rest: str) -> str:
    if not rest:
        raise UserError("which adapter?", "/adapters lists them", expected="/use NAME, or /use base")
    talk.chat.use(rest)
    return f"answers come from {rest}"


def _adapters(talk: Talk, rest: str) -> str:
    adapters = talk.chat.adapters
    if adapters is None:
        raise UserError("no adapters were loaded by name", "whet chat RUN --adapter NAME=OTHER_RUN")
    names = [*adapters.names, "base"]
    in_use = adapters.in_use or "base"
    return "\n".join(f"  {name}{' (in use)' if name == in_use else ''}" for name in names)


def _longest(talk: Talk, rest: str) -> str:
    if not rest.isdecimal() or int(rest) < 1:
        raise UserError("not a number of tokens", "/max 512", found=rest or "nothing", expected="/max N")
    talk.chat = replace(talk.chat, max_new_tokens=int(rest))
    return f"answers have at most {int(rest):,} tokens"


def _quit(talk: Talk, rest: str) -> str:
    talk.ended = True
    return ""


@dataclass(frozen=True)
class Command:
    """A command: how it is written, what it does in words, and the doing."""

    form: str
    what: str
    carry_out: Callable[[Talk, str], str]


COMMANDS = {
    "help": Command("help", "this list", _help),
    "reset": Command("reset", "a new conversation with the same system message", _reset),
    "undo": Command("undo", "forget the last message and its answer", _undo),
    "system": Command("system TEXT", "a new conversation with this system message; without a text, with none", _system),
    "use": Command("use NAME", "answer with this adapter, or with base", _use),
    "adapters": Command("adapters", "the adapters that are loaded", _adapters),
    "max": Command("max N", "longest answer in tokens", _longest),
    "quit": Command("quit", "end the conversation", _quit),
}
