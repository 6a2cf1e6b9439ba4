"""Build the rows of tasks whose batches are padded: texts with labels, and sources with the answers to them.

A row does not depend on its neighbours: no packing, no documents that share a row. A text that is too long is cut by
default, because its label stays; an answer that is cut still ends with the end token, or the model would learn to go on
for ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from whet.base.errors import UserError
from whet.data.batch.ledger import Ledger
from whet.data.batch.length import choose_length, too_long
from whet.data.batch.rows import Rows
from whet.data.config import Data
from whet.data.example import Example
from whet.data.labels import contradictions, encode_texts, encode_typed, indices, label_counts, task_of
from whet.data.template.row_tokenizer import end_token
from whet.engine.task import LABELLED, Task, TaskName

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Decided = dict[str, tuple[object, str]]
Selections = tuple[Sequence[Example], ...]


def task_for(
    format: str, train: Sequence[Example], held_out: Sequence[Example], wanted: TaskName | None,
    unlabelled: TaskName, decided: Decided,
) -> Task:  # fmt: skip
    """The task of rows of `format`. wanted: the task in the recipe, if any; unlabelled: the task of rows without
    labels. Raises UserError for rows that do not fit the wanted task."""
    has_labels = format == "classification"
    if wanted is None and unlabelled in LABELLED and not has_labels:
        raise UserError(
            "the model is an encoder, which cannot be trained for the task causal: it learns labels",
            field="data.dataset", found=f"rows of the format {format}", expected="classification: text and label",
            fix="data.columns.text=FIELD data.columns.label=FIELD say where they are, or give a decoder",
        )  # fmt: skip
    if wanted is not None and (wanted in LABELLED) != has_labels:
        labelled, plain = "classification: text and label", "messages, alpaca or prompt_completion"
        raise UserError(
            f"these rows are not for the task {wanted}", field="model.task", found=f"rows of the format {format}",
            expected=plain if has_labels else labelled,
            fix="data.format=text learns the text alone, data.columns gives the label as a completion" if has_labels
            else "data.columns.text=FIELD data.columns.label=FIELD say where they are",
        )  # fmt: skip
    if not has_labels:
        name = wanted or unlabelled
        if name == "seq2seq" and format == "text":
            raise UserError(
                "raw text has no answer to learn", field="data.format", found="text",
                expected="messages, alpaca or prompt_completion", fix="give rows with prompt and completion",
            )  # fmt: skip
        if wanted is None:
            why = "the model is an encoder-decoder" if name == "seq2seq" else "the rows have no label"
            decided["model.task"] = (name, why)
        return Task(name)
    task, why = task_of(train, held_out, wanted)
    if wanted is None:
        decided["model.task"] = (task.name, why)
    return task


def padded_rows(
    data: Data, tokenizer: PreTrainedTokenizerFast, task: Task, sides: Selections, readable: int | None, ledger: Ledger,
    decided: Decided,
) -> tuple[list[Rows], int]:  # fmt: skip
    """(rows of each of `sides`: to learn from, held out, for a test; longest row in tokens). Raises UserError."""
    policy = _policy(data, task, decided)
    make = _Labelled if task.labelled else _Pairs
    built = [make(tokenizer, examples, ledger) for examples in sides]
    longest = max((side.longest for side in built), default=8)
    max_length = choose_length(data.max_length, longest, readable, decided)
    ledger.policy = {"over_length": policy, "max_length": max_length}
    train, held, test = (side.rows(task, max_length, policy) for side in built)
    ledger.count(train, held, test, "label" if task.labelled else "answer")
    if task.labelled:
        ledger.contradictory_rows = contradictions([example for side in sides for example in side])
        assert train.labels is not None
        assert held.labels is not None
        ledger.labels = label_counts(task, train.labels)
        ledger.labels_held_out = label_counts(task, held.labels)
    return [train, held, test], max_length


def _policy(data: Data, task: Task, decided: Decided) -> str:
    """The policy for rows that are too long; refuses settings that cannot take effect. Raises UserError."""
    for name in ("packing", "padding_free"):
        if getattr(data, name):
            raise UserError(
                f"rows of the task {task.name} are padded, each by itself", field=f"data.{name}", found="true",
                expected="false or auto", fix="remove the line",
            )  # fmt: skip
        if getattr(data, name) is None:
            decided[f"data.{name}"] = (False, f"rows of the task {task.name} are padded")
    if data.order != "random":
        raise UserError(
            f"rows of the task {task.name} come in random order", field="data.order", found=data.order,
            expected="random", fix="remove the line",
        )  # fmt: skip
    if data.loss_on is not None:
        raise UserError(
            "there are no turns to choose from: the label or the answer is learned", field="data.loss_on",
            found=data.loss_on, expected="auto", fix="remove the line",
        )  # fmt: skip
    allowed = ("error", "drop", "truncate") if task.labelled else ("error", "drop", "truncate", "truncate_prompt")
    if data.over_length is not None and data.over_length not in allowed:
        raise UserError(
            f"this cannot be done to rows of the task {task.name}", field="data.over_length", found=data.over_length,
            expected=", ".join(allowed), fix=f"data.over_length={allowed[-1]}",
        )  # fmt: skip
    if data.over_length is None:
        usual = ("truncate", "a cut text keeps its label") if task.labelled else ("drop", "usual for answers")
        decided["data.over_length"] = usual
        return usual[0]
    return data.over_length


class _Side:
    """Examples with their token ids, to learn from or held out. longest: tokens of the longest text."""

    longest: int

    def __init__(self, tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example], ledger: Ledger) -> None:
        self.tokenizer, self.examples, self.ledger = tokenizer, examples, ledger

    def rows(self, task: Task, limit: int, policy: str) -> Rows:
        """The rows of all examples of at most `limit` tokens, and of the others as `policy` fits them."""
        raise NotImplementedError

    def _too_long(self, example: Example, tokens: int, limit: int, policy: str) -> bool:
        """Count an example that is too long; returns True if it is to be cut. Raises UserError under the policy
        `error`."""
        self.ledger.rows_over_length += 1
        if policy == "error":
            raise too_long(example.file, example.row, tokens, limit)
        if policy != "drop":
            self.ledger.tokens_lost += tokens - limit
            return True
        self.ledger.tokens_lost += tokens
        self.ledger.drop(example.file, example.row, f"{tokens} tokens, over {limit}")
        return False


class _Labelled(_Side):
    """Texts, perhaps in pairs, with labels."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example], ledger: Ledger) -> None:
        super().__init__(tokenizer, examples, ledger)
        nothing = (np.zeros(0, np.int32), np.zeros(0, np.int8))
        self.encoded: list[tuple[np.ndarray, np.ndarray]] = [nothing] * len(examples)
        for paired in (False, True):  # a file may have both
            chosen = [index for index, example in enumerate(examples) if (example.text_pair is not None) == paired]
            for index, row in zip(chosen, self._encoded([examples[index] for index in chosen]), strict=True):
                self.encoded[index] = row
        self.longest = max((len(ids) for ids, _ in self.encoded), default=8)

    def _encoded(self, examples: Sequence[Example], limit: int | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
        """Token ids and types of examples that all have a pair, or none has one."""
        texts = [example.text or "" for example in examples]
        paired = bool(examples) and examples[0].text_pair is not None
        pairs = [example.text_pair or "" for example in examples] if paired else None
        return encode_typed(self.tokenizer, texts, pairs, limit)

    def rows(self, task: Task, limit: int, policy: str) -> Rows:
        """The rows of the texts, with their labels as indices or values."""
        parts: list[tuple[int, np.ndarray, np.ndarray]] = []
        for source, (example, (ids, types)) in enumerate(zip(self.examples, self.encoded, strict=True)):
            if not len(ids):
                self.ledger.rows_without_target += 1
                self.ledger.drop(example.file, example.row, "a text without a token")
            elif len(ids) <= limit:
                parts.append((source, ids, types))
            elif self._too_long(example, len(ids), limit, policy):
                ((ids, types),) = self._encoded([example], limit)
                parts.append((source, ids, types))
        rows = Rows.whole([(source, ids) for source, ids, _ in parts], learned=False)
        types = np.concatenate([types for _, _, types in parts]) if parts else np.zeros(0, np.int8)
        labels = indices(task, self.examples)[rows.sources]
        return replace(rows, labels=labels, types=types if types.any() else None)


class _Pairs(_Side):
    """Sources, which an encoder reads, and the answers that a decoder writes."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example], ledger: Ledger) -> None:
        super().__init__(tokenizer, examples, ledger)
        self.sources = encode_texts(tokenizer, [source_text(example) for example in examples])
        self.targets = _targets(tokenizer, [example.answer for example in examples])
        self.longest = max((len(ids) for ids in (*self.sources, *self.targets)), default=8)

    def rows(self, task: Task, limit: int, policy: str) -> Rows:
        """Rows, each source and answer of at most `limit` tokens; truncate_prompt cuts the source, truncate both."""
        parts: list[tuple[int, np.ndarray, np.ndarray]] = []
        rows = zip(self.examples, self.sources, self.targets, strict=True)
        for source, (example, ids, answer) in enumerate(rows):
            longest = max(len(ids), len(answer))
            if longest <= limit:
                parts.append((source, ids, answer))
                continue
            cut = "drop" if policy == "truncate_prompt" and len(answer) > limit else policy
            if self._too_long(example, longest, limit, cut):
                (ids,) = encode_texts(self.tokenizer, [source_text(example)], max_length=limit)
                (answer,) = _targets(self.tokenizer, [example.answer], limit)
                parts.append((source, ids, answer))
        answers = Rows.whole([(source, answer) for source, _, answer in parts], learned=True)
        return replace(Rows.whole([(source, ids) for source, ids, _ in parts], learned=False), answers=answers)


def source_text(example: Example) -> str:
    """The encoder's input for a conversation of one turn: the system message, a blank line, the question.

    Raises UserError for a longer conversation.
    """
    question = example.question
    if sum(message.role == "user" for message in question) != 1 or len(question) > 2:
        raise UserError(
            "an encoder-decoder model reads one text and writes one answer", file=example.file, row=example.row,
            field="messages", found=f"{len(question) + 1} turns", expected="one question and its answer",
            fix="split the conversation into rows of one turn, or train a decoder",
        )  # fmt: skip
    return "\n\n".join(message.content for message in question)


def _targets(
    tokenizer: PreTrainedTokenizerFast, answers: Sequence[str], max_length: int | None = None
) -> list[np.ndarray]:
    """Token ids of answers, each closed by the end token, without which the model would never learn to stop."""
    end, targets = end_token(tokenizer), []
    for ids in encode_texts(tokenizer, answers):
        closed = ids if len(ids) and ids[-1] == end else np.append(ids, np.int32(end))
        if max_length is not None and len(closed) > max_length:
            closed = np.append(closed[: max_length - 1], np.int32(end))
        targets.append(closed)
    return targets
