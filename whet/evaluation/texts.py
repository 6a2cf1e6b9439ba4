"""Written answers of base and tuned to the same prompts: asked for, scored side by side, and kept on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from whet.base.console import Progress
from whet.base.files import write_text
from whet.data.example import Example
from whet.engine.answer.session import TextSession, text_session
from whet.evaluation.compare import paired
from whet.evaluation.likelihood import Losses
from whet.evaluation.metrics import Scores, exact_match
from whet.evaluation.rows import Chosen
from whet.opening import Answerer, base_anew, tell

Write = Callable[[TextSession, Callable[[int], None]], list[str]]  # texts by a session; calls with how many are done
SHORT_ANSWER_WORDS = 5  # up to which an answer is right or wrong as a whole


@dataclass(frozen=True)
class Answers:
    """Texts of "base" and "tuned" to the same questions."""

    sides: dict[str, list[str]]


def base_and_tuned(answerer: Answerer, rows: int, write: Write) -> tuple[list[str], list[str]]:
    """Texts of the base and of the tuned model, each for `rows` prompts.

    One session with what was trained on and then off, or the base loaded anew where nothing can be switched off.
    """

    def texts_of(session: TextSession, title: str) -> list[str]:
        def done(count: int) -> None:
            bar.advance(title, count)
            tell(session)

        texts = write(session, done)
        tell(session)
        return texts

    with Progress("answering", 2 * rows) as bar, text_session(answerer.opened) as session:
        tuned = texts_of(session, "tuned")
        if answerer.opened.wrapped is not None:
            with session.base():
                return texts_of(session, "base"), tuned
        session.release()
        with base_anew(answerer) as plain, text_session(plain) as base:
            return texts_of(base, "base"), tuned


def asked(answerer: Answerer, examples: Sequence[Example], write: Write) -> Answers:
    """What base and tuned write to the questions of `examples`."""
    base, tuned = base_and_tuned(answerer, len(examples), write)
    return Answers({"base": base, "tuned": tuned})


@dataclass(frozen=True)
class Compared:
    """What an evaluation of written answers compares. scores: of "base" and "tuned"; losses: of the same rows, if they
    were measured; names: metrics that were asked for, None for all; grouped: values of rows to those of independent
    ones."""

    scores: dict[str, Scores]
    losses: Losses | None
    names: Sequence[str] | None = None
    grouped: Callable[[Sequence[float]], Sequence[float]] = list

    def side(self, side: str) -> dict[str, float]:
        """All metrics of one side; those of the loss first."""
        measured = {} if self.losses is None else self.losses.scores()[side].metrics
        kept = {name: value for name, value in measured.items() if self.names is None or name in self.names}
        return kept | self.scores[side].metrics

    def differences(self) -> dict[str, Any]:
        """The paired difference of each metric that is a mean of rows."""
        base, tuned = self.scores["base"], self.scores["tuned"]
        found = {}
        if self.losses is not None and "loss" in self.side("tuned"):
            measured = self.losses.scores()
            found["loss"] = asdict(paired(measured["base"].rows["loss"], measured["tuned"].rows["loss"]))
        shared = [name for name in tuned.rows if name in base.rows]
        return found | {
            name: asdict(paired(self.grouped(base.rows[name]), self.grouped(tuned.rows[name]))) for name in shared
        }


def comparison(compared: Compared, references: Sequence[str], limit: int) -> dict[str, Any]:
    """The evaluation: metrics and paired differences, and which metric says most. limit: longest answer in tokens."""
    tuned = compared.side("tuned")
    return {
        "rows": len(references),
        "decoding": f"greedy, at most {limit} new tokens",
        "head": head_metric(tuned, references),
        "base": {"metrics": compared.side("base")},
        "tuned": {"metrics": tuned},
        "difference": compared.differences(),
        "skipped": compared.scores["tuned"].skipped,
    }


def head_metric(metrics: Mapping[str, float], references: Sequence[str]) -> str:
    """The metric to look at first: of fields the accuracy, of answers that can be exactly right exact match, of free
    text the loss."""
    field = next((name for name in metrics if name.endswith("_accuracy")), None)
    if field is not None:
        return field
    words = sum(len(text.split()) for text in references) / len(references)
    closed = words <= SHORT_ANSWER_WORDS or len(set(references)) <= len(references) / 2
    if closed and "exact_match" in metrics:
        return "exact_match"
    return "loss" if "loss" in metrics else next(iter(metrics))


def write_answers(chosen: Chosen, examples: Sequence[Example], references: list[str], answers: Answers) -> None:
    """Write predictions.jsonl, every answer beside its reference, and mismatches.jsonl, those that are not exact."""
    lines, wrong = [], []
    base, tuned = answers.sides["base"], answers.sides["tuned"]
    flags = exact_match(tuned, references)
    for example, reference, before, after, flag in zip(examples, references, base, tuned, flags, strict=True):
        row = {"id": example.id, "prompt": prompt_of(example), "reference": reference, "base": before, "tuned": after}
        lines.append(json.dumps(row | {"exact": bool(flag)}, ensure_ascii=False) + "\n")
        wrong += [] if flag else [lines[-1]]
    write_text(chosen.path("predictions"), "".join(lines))
    write_text(chosen.path("mismatches"), "".join(wrong))


def prompt_of(example: Example) -> Any:
    """The text of the one message that is asked, or the messages with their roles; both can be predicted again."""
    asked = example.question
    if len(asked) == 1 and asked[0].role == "user":
        return asked[0].content
    return [{"role": message.role, "content": message.content} for message in asked]
