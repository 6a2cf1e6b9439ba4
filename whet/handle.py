"""A model that stays loaded in Python: opened once, asked any number of times, closed.

with whet.open("runs/tickets") as model:
    print(model.chat("Hello"))
    print(model.predict([{"text": "..."}, {"text": "..."}]))
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from whet.base.errors import UserError
from whet.data.example import Message
from whet.data.format.turns import read_turns
from whet.engine.answer.logits import LabelSession
from whet.opening import Answerer
from whet.runs import Run
from whet.ship.chat import Chat, open_chat
from whet.ship.predict import Predictor, Wanted, open_predictor, predict
from whet.ship.questions import Asks, given

Said = str | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Handle:
    """A loaded model with its session. run: what it was opened from, if that was a run."""

    answerer: Answerer
    session: Any
    run: Run | None = None

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the model go; no more questions."""
        self.session.close()

    def chat(self, message: Said, *, system: str | None = None, max_new_tokens: int = 256) -> str:
        """The answer to one message, or to a conversation as a list of `{"role", "content"}`. Raises UserError."""
        if isinstance(self.session, LabelSession):
            raise UserError("the run labels texts and does not write", fix="handle.predict(rows) labels them")
        return Chat(self.answerer, self.session, max_new_tokens).reply(messages_of(message, system))

    def predict(
        self, rows: str | Iterable[Any], *, top: int | None = None, max_new_tokens: int = 256
    ) -> list[dict[str, Any]]:
        """The answer to each row, as `whet.predict` gives it. Raises UserError."""
        if self.run is None:
            asks, size, longest = Asks(self.answerer.opened.task, {}), 32, None
        else:
            recipe = self.run.recipe
            asks, size, longest = Asks.of(self.run), recipe.eval.per_device_eval_batch_size, recipe.data.max_length
        predictor = Predictor(self.answerer, self.session, size, longest, Wanted(top, max_new_tokens))
        questions = given([rows] if isinstance(rows, str) else rows, asks)
        return [answer for _, answer in predict(predictor, questions)]


def open_handle(target: str, run: Run | None) -> Handle:
    """Open a run, an adapter, a model directory, a hub name or a built-in model. Raises UserError."""
    if run is not None:
        predictor = open_predictor(run)
        return Handle(predictor.answerer, predictor.session, run)
    chat = open_chat(target)
    return Handle(chat.answerer, chat.session)


def messages_of(said: Said, system: str | None) -> list[Message]:
    """The messages of a conversation that ends with a question. Raises UserError."""
    before = [Message("system", system)] if system else []
    if isinstance(said, str):
        return [*before, Message("user", said)]
    turns = [*before, *read_turns(list(said), "messages")]
    if not turns or turns[-1].role not in ("user", "tool"):
        raise UserError(
            "the conversation does not end with a question", field="messages",
            found=turns[-1].role if turns else "nothing", expected="a user's message at the end",
            fix='add {"role": "user", "content": "..."}',
        )  # fmt: skip
    return turns
