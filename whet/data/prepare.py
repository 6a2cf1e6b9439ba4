"""Prepare rows of tokens from files, in one order: read, recognise, standardise, split, tokenise, fit, count.

Everything here is deterministic and needs no torch: `whet data check` shows the same rows that `whet train` uses.
Texts wait in a file between reading and tokenising (store.py), tokens go to files as well (row_builder.py), and rows
that took long are taken from the cache at the next start (cache.py); so memory does not grow with the data.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whet.base.errors import UserError
from whet.data.batch.ledger import Ledger
from whet.data.batch.length import choose_length, longest_allowed
from whet.data.batch.pack import best_fit
from whet.data.batch.padded import padded_rows, task_for
from whet.data.batch.row_builder import RowSettings, build_rows
from whet.data.batch.rows import Rows
from whet.data.batch.saved import EXAMPLES, load, save
from whet.data.cache import cached, name_of
from whet.data.collect import Sides, collect, fingerprints
from whet.data.config import Data
from whet.data.example import Example
from whet.data.labels import check_known
from whet.data.template.row_tokenizer import RowTokenizer
from whet.engine.task import CAUSAL, Task, TaskName

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Prepared:
    """Rows ready for batches. train, evaluation, test: their tokens; train_examples, held_out, test_examples: the
    examples that they were built from.

    bins: packed rows as lists of row indices, or None when each row stands alone; decided: dotted path of each setting
    that was auto -> (value, reason); task: the task with its classes; benchmarks: examples of tests by name, which are
    only compared.
    """

    train: Rows
    evaluation: Rows
    test: Rows
    train_examples: Sequence[Example]
    held_out: Sequence[Example]
    test_examples: Sequence[Example]
    bins: list[list[int]] | None
    max_length: int
    ledger: Ledger
    row_tokenizer: RowTokenizer
    decided: dict[str, tuple[object, str]]
    task: Task = CAUSAL
    benchmarks: Mapping[str, Sequence[Example]] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelInput:
    """The input that the model takes. readable: the most tokens of a row (None: unknown).

    task: the task in the recipe, None: the one that the rows fit, and `unlabelled` if they have no label.
    """

    tokenizer: PreTrainedTokenizerFast
    readable: int | None
    task: TaskName | None
    unlabelled: TaskName


def prepare(
    data: Data, tokenizer: PreTrainedTokenizerFast, readable: int | None, task: TaskName | None = None,
    unlabelled: TaskName = "causal",
) -> Prepared:  # fmt: skip
    """Read and tokenise the rows that `data` names, for a model that reads at most `readable` tokens (None: unknown).

    task: the task in the recipe, None: the one that the rows fit, and `unlabelled` if they have no label. Raises
    UserError for bad files, rows and settings, before any model is loaded.
    """
    model = ModelInput(tokenizer, readable, task, unlabelled)
    files = fingerprints(data)
    parts = {"files": files, "data": asdict(data), "reader": [readable, task, unlabelled]}

    def opened(folder: Path, facts: dict[str, Any]) -> Prepared:
        fields = load(folder, facts)
        return Prepared(**fields, row_tokenizer=RowTokenizer(tokenizer, chat=facts["chat"]))

    def saved(prepared: Prepared, folder: Path) -> dict[str, Any]:
        return save(prepared, folder) | {"chat": prepared.row_tokenizer.template is not None}

    name = name_of(parts | {"tokenizer": _identity(tokenizer)})
    return cached(name, lambda folder: _prepare_anew(data, model, folder, files), saved, opened)


@contextmanager
def scored_rows(data: Data, tokenizer: PreTrainedTokenizerFast, readable: int | None, task: Task) -> Iterator[Prepared]:
    """The rows of `data.dataset` as held-out ones of a trained `task`; nothing is learned, split or cached.

    Raises UserError for rows that are not for the task, and for a label that it does not have.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        ledger = Ledger(files=fingerprints(data))
        sides = collect(data, Path(folder) / EXAMPLES, ledger)
        sides = replace(sides, train=sides.train[:0], evaluation=sides.train, test=sides.train[:0])
        decided: dict[str, tuple[object, str]] = {}
        unlabelled = task.name if not task.labelled else CAUSAL.name
        if not (task.labelled and sides.kind.name == "classification"):  # else the labels are compared below
            task_for(sides.kind.name, sides.evaluation, (), task.name, unlabelled, {})
        model = ModelInput(tokenizer, readable, task.name, unlabelled)
        if task.name == "causal":
            yield _conversations(data, model, sides, Path(folder), ledger, decided)
            return
        if task.labelled:
            check_known(task, sides.evaluation)
        every = (sides.train, sides.evaluation, sides.test)
        rows, longest = padded_rows(data, tokenizer, task, every, readable, ledger, decided)
        row_tokenizer = RowTokenizer(tokenizer, chat=False)
        yield Prepared(*rows, *every, None, longest, ledger, row_tokenizer, decided, task)


def _identity(tokenizer: PreTrainedTokenizerFast) -> list[Any]:
    """All parts of a tokenizer that decide which tokens come out."""
    state = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    ends = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    return [state, tokenizer.chat_template, tokenizer.all_special_tokens, ends, type(tokenizer).__name__]


def _prepare_anew(data: Data, model: ModelInput, folder: Path, files: list[dict[str, Any]]) -> Prepared:
    ledger = Ledger(files=files)
    decided: dict[str, tuple[object, str]] = {}
    sides = collect(data, folder / EXAMPLES, ledger)
    others = [*sides.evaluation, *sides.test] if sides.kind.name == "classification" else []
    task = task_for(sides.kind.name, sides.train, others, model.task, model.unlabelled, decided)
    ledger.task = task.name
    if task.name != "causal":
        all_sides = (sides.train, sides.evaluation, sides.test)
        rows, longest = padded_rows(data, model.tokenizer, task, all_sides, model.readable, ledger, decided)
        row_tokenizer = RowTokenizer(model.tokenizer, chat=False)
        return Prepared(
            rows[0], rows[1], rows[2], *all_sides, None, longest, ledger, row_tokenizer, decided, task, sides.benchmarks
        )  # fmt: skip
    return _conversations(data, model, sides, folder, ledger, decided)


def _conversations(
    data: Data, model: ModelInput, sides: Sides, folder: Path, ledger: Ledger, decided: dict[str, tuple[object, str]]
) -> Prepared:
    """Rows of the task causal: conversations or raw text."""
    chat = sides.kind.name != "text"
    policy = _policy(data, chat, decided)
    limit = longest_allowed(data.max_length, model.readable)
    settings = RowSettings(chat, str(policy["loss_on"]), str(policy["over_length"]), limit)
    named = {"train": sides.train, "evaluation": sides.evaluation, "test": sides.test}
    built = [
        build_rows(examples, model.tokenizer, settings, folder, name, ledger, data.num_proc)
        for name, examples in named.items()
    ]
    train, held, test = (rows for rows, _ in built)
    max_length = choose_length(data.max_length, max(8, *(longest for _, longest in built)), model.readable, decided)
    ledger.policy = {**policy, "max_length": max_length}
    bins = best_fit(train.lengths.tolist(), max_length) if policy["packing"] and len(train) else None
    ledger.count(train, held, test, "assistant" if chat else "text")
    if bins is not None:
        ledger.packed_rows, ledger.packing_fill = len(bins), len(train.ids) / (len(bins) * max_length)
    row_tokenizer = RowTokenizer(model.tokenizer, chat)
    return Prepared(
        train, held, test, sides.train, sides.evaluation, sides.test, bins, max_length, ledger, row_tokenizer, decided,
        benchmarks=sides.benchmarks,
    )  # fmt: skip


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
    if policy["packing"] and data.order != "random":
        raise UserError(
            "packed rows are all of one length", field="data.order", found=data.order, expected="random",
            fix="data.packing=false, or remove data.order",
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
