"""A chat with a run or a model: opened once, asked any number of times.

A chat is opened once, as a file is: its model and its session stay for any number of conversations until it is closed.
An encoder-decoder answers one text at a time: it was trained on pairs, and what was said before is no part of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whet.adapters.files import CONFIG
from whet.adapters.folder import open_folder
from whet.adapters.loaded import Adapters
from whet.base.errors import UserError
from whet.data.example import Message
from whet.data.labels import encode_texts
from whet.engine.answer.session import TextSession, text_session
from whet.opening import Answerer, open_adapters, open_answerer, open_model_for_chat, tell
from whet.runs import Run, is_adapter_alone, open_run


@dataclass(frozen=True)
class Chat:
    """A model that answers, in a session that lasts until the chat is closed."""

    answerer: Answerer
    session: TextSession
    max_new_tokens: int = 256

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Put the model back as it was loaded; no more replies."""
        self.session.close()

    @property
    def adapters(self) -> Adapters | None:
        """The adapters that can be switched between, if they were loaded by name."""
        return self.answerer.adapters

    def use(self, name: str) -> None:
        """Answer with the adapter `name` from now on, or as the base. Raises UserError."""
        if self.adapters is None:
            raise UserError("no adapters were loaded by name", fix="whet chat RUN --adapter NAME=OTHER_RUN")
        self.session.release()
        self.adapters.use(None if name == "base" else name)

    def reply(self, messages: list[Message], streamer: Any = None) -> str:
        """The greedy answer to a conversation, less what the template writes itself; pieces go to `streamer`.

        An encoder-decoder answers the last message alone, below the system's if there is one.
        """
        row_tokenizer, options = (
            self.answerer.row_tokenizer,
            {"max_new_tokens": self.max_new_tokens, "streamer": streamer},
        )
        if self.answerer.opened.task.name == "seq2seq":
            ids = self.session.stream(self._source(messages), **options)
            text = row_tokenizer.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        else:
            ids = self.session.stream(row_tokenizer.prompt(messages), stop_ids=row_tokenizer.stop_ids(), **options)
            text = row_tokenizer.answered(messages, row_tokenizer.tokenizer.decode(ids, skip_special_tokens=False))  # type: ignore[arg-type]
        tell(self.session)
        return text  # type: ignore[return-value]

    def _source(self, messages: list[Message]) -> Any:
        """Token ids of the text that an encoder-decoder reads."""
        asked = [message for message in messages[:-1] if message.role == "system"] + messages[-1:]
        text = "\n\n".join(message.content for message in asked)
        run = self.answerer.run
        max_length = None if run is None else run.recipe.data.max_length
        return encode_texts(self.answerer.row_tokenizer.tokenizer, [text], max_length=max_length)[0]


def open_chat(target: str, *, max_new_tokens: int = 256, beside: Mapping[str, str] | None = None) -> Chat:
    """A chat with a run directory, an adapter or model directory, a hub name or a built-in model.

    beside: runs or adapters by name, loaded too and switched to by `Chat.use`; the target's own is called by its
    folder. Raises UserError, also for a run with labels, which has nothing to say.
    """
    alone = None if beside or not is_adapter_alone(target) else _check_writes(open_folder(target))
    # Only an adapter inside of the layers can be switched by name: virtual tokens stand in front of each row.
    if alone is not None and (alone.task.name != "causal" or not alone.recipe.method.can.inside):
        answerer = open_answerer(alone)
    elif beside or (Path(target) / CONFIG).is_file():
        answerer = open_adapters(target, beside or {})
    elif (Path(target) / "recipe.yaml").is_file():
        answerer = open_answerer(_check_writes(open_run(target)))
    else:
        answerer = open_model_for_chat(target)
    return Chat(answerer, text_session(answerer.opened), max_new_tokens)


def _check_writes(run: Run) -> Run:
    """`run`; UserError when it has labels."""
    if run.task.labelled:
        raise UserError(
            f"the run was trained for {run.task.name.replace('_', '-')}: it labels texts and does not write",
            file=str(run.path), expected="a run that was trained on conversations or text",
            fix=f"whet predict {run.path}",
        )  # fmt: skip
    return run
