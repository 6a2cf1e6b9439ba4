"""From files to rows of tokens, in one pass and one order: read, recognise, standardise, split, tokenise, fit, count.

Everything here is deterministic and needs no torch: `whet data check` shows the very rows that `whet train` uses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from whet.base.errors import UserError
from whet.data.config import Data
from whet.data.example import Example
from whet.data.ledger import Ledger
from whet.data.length import choose_length, fit
from whet.data.pack import best_fit
from whet.data.padded import padded_rows, task_for
from whet.data.read import data_files, read_files, sha256
from whet.data.rows import Rows
from whet.data.split import held_out
from whet.data.standardise import Dropped, Format, recognise, standardise
from whet.data.tokenise import Tokeniser, Tokens
from whet.engine.task import CAUSAL, Task, TaskName

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SAMPLE = 100
CHUNK = 1000
PACKAGE = Path(__file__).parents[1]
BUILTIN = {
    "builtin:support_tickets": ("support_tickets", "train.jsonl"),
    "builtin:support_tickets_test": ("support_tickets", "test.jsonl"),
}


@dataclass(frozen=True)
class Prepared:
    """Rows ready for batches. train, evaluation: tokens; held_out: the examples behind `evaluation`.

    bins: packed rows as lists of row indices, or None when each row stands alone; decided: dotted path to the value
    that was auto, with its reason; task: what is learned, with its classes.
    """

    train: Rows
    evaluation: Rows
    train_examples: list[Example]
    held_out: list[Example]
    bins: list[list[int]] | None
    max_length: int
    ledger: Ledger
    tokeniser: Tokeniser
    decided: dict[str, tuple[object, str]]
    task: Task = CAUSAL


def prepare(
    data: Data, tokenizer: PreTrainedTokenizerFast, readable: int | None, task: TaskName | None = None,
    unlabelled: TaskName = "causal",
) -> Prepared:  # fmt: skip
    """Read and tokenise what `data` names, for a model that reads at most `readable` tokens (None: unknown).

    task: what the recipe says, None: what the rows are fit for, and `unlabelled` where they have no label.
    Raises UserError for bad files, rows and settings, before any model is loaded.
    """
    ledger = Ledger()
    decided: dict[str, tuple[object, str]] = {}
    examples, evaluation, kind = _both_sides(data, ledger)
    chat = kind.name != "text"
    found = task_for(kind.name, examples, evaluation, task, unlabelled, decided)
    ledger.task = found.name
    if found.name != "causal":
        train, held, max_length = padded_rows(data, tokenizer, found, (examples, evaluation), readable, ledger, decided)
        tokeniser = Tokeniser(tokenizer, chat=False)
        return Prepared(train, held, examples, evaluation, None, max_length, ledger, tokeniser, decided, found)
    policy = _policy(data, chat, decided)
    tokeniser = Tokeniser(tokenizer, chat)
    tokens = [_tokenised(side, tokeniser, policy["loss_on"]) for side in (examples, evaluation)]
    longest = max((len(row.ids) for row in chain(*tokens)), default=8)
    max_length = choose_length(data.max_length, longest, readable, decided)
    ledger.policy = {**policy, "max_length": max_length}
    train, held = (
        _fitted(side, rows, max_length, policy["over_length"], ledger)
        for side, rows in zip((examples, evaluation), tokens, strict=True)
    )
    bins = best_fit(train.lengths.tolist(), max_length) if policy["packing"] and len(train) else None
    ledger.count(train, held, "assistant" if chat else "text")
    if bins is not None:
        ledger.packed_rows, ledger.packing_fill = len(bins), len(train.ids) / (len(bins) * max_length)
    return Prepared(train, held, examples, evaluation, bins, max_length, ledger, tokeniser, decided)


def _both_sides(data: Data, ledger: Ledger) -> tuple[list[Example], list[Example], Format]:
    """The examples to learn from, those held out, and their format."""
    examples, kind = _examples(data.dataset, data, ledger, data.max_rows)
    ledger.format, ledger.format_reason = kind.name, kind.reason
    if data.eval_dataset is not None:
        evaluation, other = _examples(data.eval_dataset, data, ledger, None)
        if "classification" in (kind.name, other.name) and kind.name != other.name:
            raise UserError(
                "the held-out rows are of another kind than those to learn from", field="data.eval_dataset",
                found=f"{other.name}: {other.reason}", expected=f"{kind.name}: {kind.reason}",
                fix="give both files the same fields",
            )  # fmt: skip
    else:
        if data.val_size >= 1 and not data.val_size.is_integer():
            raise UserError(
                "from 1 on, val_size is a number of rows", field="data.val_size", found=str(data.val_size),
                expected="a share below 1, or a whole number", fix=f"data.val_size={round(data.val_size)}",
            )  # fmt: skip
        sides = held_out([example.id for example in examples], data.val_size)
        evaluation = [example for example, out in zip(examples, sides, strict=True) if out]
        examples = [example for example, out in zip(examples, sides, strict=True) if not out]
    ledger.rows_on_both_sides = len({e.id for e in examples} & {e.id for e in evaluation})
    return examples, evaluation, kind


def dataset_paths(dataset: str | Sequence[str]) -> list[str]:
    """Paths with the built-in names replaced by where their files lie."""
    names = [dataset] if isinstance(dataset, str) else list(dataset)
    return [_builtin_file(name) if name.startswith("builtin:") else name for name in names]


def _builtin_file(name: str) -> str:
    if name not in BUILTIN:
        raise UserError(
            "there is no such built-in data", field="data.dataset", found=name, expected=", ".join(BUILTIN),
            fix="write builtin:support_tickets",
        )  # fmt: skip
    folder, file = BUILTIN[name]
    installed, checkout = PACKAGE / "builtin" / folder / file, PACKAGE.parent / "examples" / folder / file
    return str(installed if installed.exists() else checkout)


def _examples(dataset: str | list[str], data: Data, ledger: Ledger, limit: int | None) -> tuple[list[Example], Format]:
    paths = dataset_paths(dataset)
    records = read_files(paths)
    sample = list(islice(records, SAMPLE))
    if not sample:
        raise UserError("the data holds no rows", file=paths[0], fix="give a file with at least one row")
    kind = recognise(sample, data.columns, data.format)
    dropped = Dropped()
    stream: Iterable = chain(sample, records)
    found = list(islice(standardise(iter(stream), kind, data.columns, empty=data.empty, dropped=dropped), limit))
    for file, row, reason in dropped.rows:
        ledger.drop(file, row, reason)
    ledger.rows_without_target += len(dropped.rows)
    ledger.rows_read += len(found) + len(dropped.rows)
    for path in paths:
        ledger.files += [{"path": str(place), "sha256": sha256(str(place))} for place in data_files(path)]
    return found, kind


def _policy(data: Data, chat: bool, decided: dict[str, tuple[object, str]]) -> dict[str, object]:
    """The auto settings that depend on whether rows are conversations or text."""
    kind = "conversations" if chat else "raw text"
    usual = {
        "over_length": "drop" if chat else "split",
        "loss_on": "assistant" if chat else "all",
        "packing": not chat,
    }
    policy = {}
    for name, value in usual.items():
        given = getattr(data, name)
        policy[name] = value if given is None else given
        if given is None:
            decided[f"data.{name}"] = (value, f"usual for {kind}")
    if chat and policy["over_length"] == "split":
        raise UserError(
            "a conversation cannot be split", field="data.over_length", found="split",
            expected="error, drop, truncate_prompt or truncate", fix="data.over_length=drop",
        )  # fmt: skip
    if policy["packing"] and data.padding_free is False:
        raise UserError(
            "packed rows are laid out without padding", field="data.padding_free", found="false with packing",
            expected="auto", fix="data.packing=false, or remove data.padding_free",
        )  # fmt: skip
    if not chat and policy["loss_on"] != "all":
        raise UserError(
            "raw text has no turns to choose from", field="data.loss_on", found=str(policy["loss_on"]), expected="all",
            fix="remove the line",
        )  # fmt: skip
    if not chat and policy["over_length"] == "truncate_prompt":
        raise UserError(
            "raw text has no prompt to cut", field="data.over_length", found="truncate_prompt",
            expected="split, drop, truncate or error", fix="data.over_length=split",
        )  # fmt: skip
    return policy


def _tokenised(examples: list[Example], tokeniser: Tokeniser, loss_on: object) -> list[Tokens]:
    result: list[Tokens] = []
    for start in range(0, len(examples), CHUNK):
        chunk = examples[start : start + CHUNK]
        if tokeniser.template is None:
            result += tokeniser.texts([example.text or "" for example in chunk])
            continue
        try:
            result += tokeniser.conversations([example.messages or () for example in chunk], str(loss_on))
        except UserError:
            for example in chunk:
                _locate(example, tokeniser, str(loss_on))
            raise
    return result


def _locate(example: Example, tokeniser: Tokeniser, loss_on: str) -> None:
    """Raise again what this row alone is refused for, now with its place."""
    try:
        tokeniser.conversations([example.messages or ()], loss_on)
    except UserError as error:
        error.file, error.row = example.file, example.row
        raise


def _fitted(examples: list[Example], tokens: list[Tokens], limit: int, policy: object, ledger: Ledger) -> Rows:
    return Rows.gather(_fitting(examples, tokens, limit, str(policy), ledger))


def _fitting(
    examples: list[Example], tokens: list[Tokens], limit: int, policy: str, ledger: Ledger
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    for source, (example, row) in enumerate(zip(examples, tokens, strict=True)):
        if len(row.ids) <= limit:
            if not row.learned[1:].any():
                ledger.rows_without_target += 1
                ledger.drop(example.file, example.row, "nothing to learn")
                continue
            ledger.rows_without_end_of_turn += not row.closed
            yield source, row.ids, row.learned
            continue
        ledger.rows_over_length += 1
        if policy == "split":
            for start in range(0, len(row.ids), limit):
                if len(row.ids) - start == 1:  # nothing predicts it, and it predicts nothing
                    ledger.tokens_lost += 1
                else:
                    yield source, row.ids[start : start + limit], row.learned[start : start + limit]
            continue
        if policy == "error":
            raise UserError(
                "the row is longer than data.max_length", file=example.file, row=example.row, field="data.over_length",
                found=f"{len(row.ids)} tokens", expected=f"at most {limit}",
                fix=f"data.max_length={len(row.ids)}, or data.over_length=drop",
            )  # fmt: skip
        fitted = fit(row, limit, policy)
        ledger.tokens_lost += fitted.lost
        if fitted.tokens is None:
            ledger.drop(example.file, example.row, f"{len(row.ids)} tokens, over {limit}")
            continue
        ledger.rows_without_end_of_turn += not fitted.tokens.closed
        yield source, fitted.tokens.ids, fitted.tokens.learned
