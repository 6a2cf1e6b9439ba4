"""Build rows of tokens from examples: render, tokenise, fit to a length, append to columns on disk.

A chunk of examples is all that is held at a time. What a chunk becomes depends on nothing but the chunk, so chunks may
go to several processes; they come back in order, and the rows are the same whatever the number of processes. A limit
in tokens is known before the first row: a row is over it or not whatever the longest row turns out to be.
Processes are forks where that is safe, which start at once. Gives up: elsewhere a process needs about three seconds
before it helps, and a script that asks for some must keep its work below `if __name__ == "__main__"`, as Python's own
processes demand; so there they are started only when they are asked for.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from whet.base.console import Progress
from whet.base.errors import UserError
from whet.data.batch.columns import Column
from whet.data.batch.ledger import Ledger
from whet.data.batch.length import fit, too_long
from whet.data.batch.rows import Rows
from whet.data.batch.store import Examples
from whet.data.example import Example, from_values, plain_turns
from whet.data.template.literal_ids import KnownRow
from whet.data.template.row_tokenizer import RowTokenizer, Tokens, marked
from whet.data.template.skeleton import Skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHUNK = 500
ROWS_FOR_A_PROCESS = 20_000


@dataclass(frozen=True)
class RowSettings:
    """The settings that rows are built by. limit: longest row in tokens; policy: what happens to a longer one."""

    chat: bool
    loss_on: str
    policy: str
    limit: int


@dataclass
class BuiltRows:
    """The rows of a chunk of examples. sizes, owners: tokens of each row, and the index of its example, int64 [R].

    open_turns: rows that do not teach the end of the turn; over_length: rows longer than the limit; lost: tokens cut
    off; without_target: rows with nothing to learn; longest: tokens of the longest row before it was fitted. drops:
    examples that are not used, with the reason; not_rendered: rows that have a field which the template leaves out, by
    its name; problem: the error that stopped the chunk.
    """

    ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    learned: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    sizes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    owners: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    open_turns: int = 0
    over_length: int = 0
    lost: int = 0
    without_target: int = 0
    longest: int = 0
    drops: list[tuple[int, str]] = field(default_factory=list)
    weights: np.ndarray | None = None
    not_rendered: Counter[str] = field(default_factory=Counter)
    problem: UserError | None = None


class _RowBuffer:
    """The rows of a chunk as they come: ids, the spans of learned tokens, and arrays where rows have weights."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.learned: list[tuple[int, int]] = []
        self.sizes: list[int] = []
        self.owners: list[int] = []
        self.weights: list[tuple[int, np.ndarray]] = []

    def add(self, owner: int, ids: list[int], learned: Iterable[tuple[int, int]]) -> None:
        start = len(self.ids)
        self.ids += ids
        self.learned += [(start + first, start + last) for first, last in learned]
        self.sizes.append(len(ids))
        self.owners.append(owner)

    def add_tokens(self, owner: int, row: Tokens) -> None:
        edges = np.flatnonzero(np.diff(row.learned, prepend=False, append=False)).tolist()
        if row.weights is not None:
            self.weights.append((len(self.ids), row.weights))
        self.add(owner, row.ids.tolist(), zip(edges[::2], edges[1::2], strict=True))

    def write_to(self, built: BuiltRows) -> None:
        """Set the arrays of `built`."""
        built.ids, built.sizes = np.array(self.ids, np.int32), np.array(self.sizes, np.int64)
        built.owners, built.learned = np.array(self.owners, np.int64), np.zeros(len(self.ids), bool)
        for first, last in self.learned:
            built.learned[first:last] = True
        if self.weights:
            built.weights = built.learned.astype(np.float32)
            for start, weights in self.weights:
                built.weights[start : start + len(weights)] = weights
        built.learned[np.cumsum(built.sizes) - built.sizes] = False  # nothing predicts the first token of a row


class RowBuilder:
    """Builds rows of tokens from examples with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, settings: RowSettings) -> None:
        self.row_tokenizer, self.settings = RowTokenizer(tokenizer, settings.chat), settings

    def build(self, lines: list[str]) -> BuiltRows:
        """The rows of a chunk of examples in JSON; one that is refused stops it: `problem` says which and why.

        A row whose tokens are known from its contents alone never becomes an object. Each row is asked for its skeleton
        once, here.
        """
        built, buffer, values = BuiltRows(), _RowBuffer(), [json.loads(line) for line in lines]
        turns = [plain_turns(value) for value in values]
        try:
            skeletons = self.row_tokenizer.skeletons(turns)
            known = self.row_tokenizer.known(turns, skeletons)
            others = {owner: from_values(values[owner]) for owner, row in enumerate(known) if row is None}
            tokens = iter(self._tokens(list(others.values()), [skeletons[owner] for owner in others]))
            for owner, (row, plain) in enumerate(zip(known, turns, strict=True)):
                usual = plain is not None and not plain.own_mask
                if row is not None and usual and self._added(owner, row, built, buffer):
                    continue
                example = others.get(owner) or from_values(values[owner])
                unfitted = next(tokens) if row is None else marked(row, example, self.settings.loss_on)
                for fitted in self._fitted(owner, example, unfitted, built):
                    buffer.add_tokens(owner, fitted)
        except UserError as problem:
            built.problem = problem
            return built
        buffer.write_to(built)
        return built

    def _added(self, owner: int, row: KnownRow, built: BuiltRows, buffer: _RowBuffer) -> bool:
        """Add the row if it can stay as it is (something to learn, not too long); returns True if it was added."""
        spans = row.spans()
        count = len(spans.ids)
        answers, closed = row.literals.answers(self.settings.loss_on)
        learned = [(0, count)] if self.settings.loss_on == "all" else [spans.turns[index] for index in answers]
        if count > self.settings.limit or not any(last > max(first, 1) for first, last in learned):
            return False
        buffer.add(owner, spans.ids, learned)
        built.longest = max(built.longest, count)
        built.open_turns += not closed
        return True

    def _tokens(self, examples: list[Example], skeletons: list[Skeleton | None]) -> list[Tokens]:
        if self.row_tokenizer.template is None:
            return self.row_tokenizer.texts([example.text or "" for example in examples])
        try:
            return self.row_tokenizer.rendered(examples, skeletons, self.settings.loss_on)
        except UserError as error:
            if error.row is None:
                for example in examples:
                    self._locate(example)
            raise

    def _locate(self, example: Example) -> None:
        """Raise again what this row alone is refused for, now with its file and row."""
        try:
            self.row_tokenizer.conversations([example], self.settings.loss_on)
        except UserError as error:
            error.file, error.row = example.file, example.row
            raise

    def _fitted(self, owner: int, example: Example, row: Tokens, built: BuiltRows) -> Iterator[Tokens]:
        limit, policy, count = self.settings.limit, self.settings.policy, len(row.ids)
        built.longest = max(built.longest, count)
        built.not_rendered.update({name for _, name in row.dropped})
        if count <= limit:
            if not row.learned[1:].any():
                built.without_target += 1
                built.drops.append((owner, "nothing to learn"))
                return
            built.open_turns += not row.closed
            yield row
            return
        built.over_length += 1
        if policy == "split":
            yield from self._split(row, built)
            return
        if policy == "error":
            raise too_long(example.file, example.row, count, limit)
        fitted = fit(row, limit, policy)
        built.lost += fitted.lost
        if fitted.tokens is None:
            built.drops.append((owner, f"{count} tokens, over {limit}"))
            return
        built.open_turns += not fitted.tokens.closed
        yield fitted.tokens

    def _split(self, row: Tokens, built: BuiltRows) -> Iterator[Tokens]:
        for start in range(0, len(row.ids), self.settings.limit):
            part = slice(start, start + self.settings.limit)
            if len(row.ids) - start == 1:  # nothing predicts it, and it predicts nothing
                built.lost += 1
            else:
                yield Tokens(row.ids[part], row.learned[part], [], True)


def build_rows(
    examples: Examples, tokenizer: PreTrainedTokenizerFast, settings: RowSettings, folder: Path, name: str,
    ledger: Ledger, processes: int | None = None,
) -> tuple[Rows, int]:  # fmt: skip
    """Build the rows of all `examples` in files of `folder` that begin with `name`: (rows, tokens of the longest one
    before fitting).

    processes: how many build rows; None: as many as pay. Raises UserError for the first row, in order, that is refused.
    """
    ids, learned = Column(folder / f"{name}.ids", np.int32), Column(folder / f"{name}.learned", np.bool_)
    weights = _Weights(folder / f"{name}.weights")
    sizes, sources, longest, start = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0, 0
    progress = Progress("tokenising", len(examples), patience_seconds=2)
    with _built(examples, tokenizer, settings, processes or usual_processes(len(examples))) as chunks, progress as bar:
        for number, built in chunks:
            if built.problem is not None:
                raise built.problem
            weights.extend(built.weights, ids.length, len(built.ids))
            ids.extend(built.ids)
            learned.extend(built.learned)
            sizes.append(built.sizes)
            sources.append(built.owners + start)
            longest = max(longest, built.longest)
            _count(built, examples, start, ledger)
            start += number
            bar.advance("rows", number)
    starts = np.concatenate([[0], np.cumsum(np.concatenate(sizes))]).astype(np.int64)
    rows = Rows(ids.finish(), learned.finish(), starts, np.concatenate(sources), weights=weights.finish())
    return rows, longest


class _Weights:
    """The column of weights, begun when the first row has some."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.column: Column | None = None

    def extend(self, weights: np.ndarray | None, before: int, count: int) -> None:
        """Append the weights of `count` tokens, 1 for all where there are none; `before`: tokens that came earlier."""
        if self.column is None:
            if weights is None:
                return
            self.column = Column(self.path, np.float32)
            while before:
                part = min(before, 1 << 20)
                self.column.extend(np.ones(part, np.float32))
                before -= part
        self.column.extend(np.ones(count, np.float32) if weights is None else weights)

    def finish(self) -> np.ndarray | None:
        return None if self.column is None else self.column.finish()


def _count(built: BuiltRows, examples: Examples, start: int, ledger: Ledger) -> None:
    ledger.rows_without_end_of_turn += built.open_turns
    ledger.rows_over_length += built.over_length
    ledger.rows_without_target += built.without_target
    ledger.tokens_lost += built.lost
    for field_name, count in built.not_rendered.items():
        ledger.not_rendered[field_name] = ledger.not_rendered.get(field_name, 0) + count
    for owner, reason in built.drops:
        example = examples[start + owner]
        ledger.drop(example.file, example.row, reason)


@contextmanager
def _built(
    examples: Examples, tokenizer: PreTrainedTokenizerFast, settings: RowSettings, processes: int
) -> Iterator[Iterator[tuple[int, BuiltRows]]]:
    """(examples in it, rows) of each chunk in order, built here or by other processes."""
    chunks = _chunks(examples.lines())
    if processes == 1:
        builder = RowBuilder(tokenizer, settings)
        yield ((len(chunk), builder.build(chunk)) for chunk in chunks)
        return
    forked = forks_safely()
    if forked:
        _start_worker(tokenizer, settings)
    start: Any = {} if forked else {"initializer": _start_worker, "initargs": (tokenizer, settings)}
    try:
        with ProcessPoolExecutor(processes, get_context("fork" if forked else "spawn"), **start) as pool:
            yield _in_order(pool, chunks, 2 * processes)
    except BrokenProcessPool as error:
        raise UserError(
            "a process that tokenises ended before its work", field="data.num_proc", found=str(processes),
            expected="1, or a script whose work stands below if __name__ == '__main__'", fix="data.num_proc=1",
        ) from error  # fmt: skip


def usual_processes(rows: int) -> int:
    """The number of processes that pays for so many rows; 1 where they would have to start from nothing."""
    return max(1, min(len(os.sched_getaffinity(0)), rows // ROWS_FOR_A_PROCESS)) if forks_safely() else 1


def forks_safely() -> bool:
    """A fork copies locks that other threads hold, so there must be none; and only Linux has a sound one."""
    return sys.platform == "linux" and threading.active_count() == 1


def _chunks(lines: Iterator[str]) -> Iterator[list[str]]:
    return iter(lambda: list(islice(lines, CHUNK)), [])


def _in_order(pool: ProcessPoolExecutor, chunks: Iterator[list[str]], ahead: int) -> Iterator[tuple[int, BuiltRows]]:
    """Results in the order of the chunks, with at most `ahead` under way."""
    waiting: deque[tuple[int, Future[BuiltRows]]] = deque()
    for chunk in chunks:
        waiting.append((len(chunk), pool.submit(_build_chunk, chunk)))
        if len(waiting) > ahead:
            number, future = waiting.popleft()
            yield number, future.result()
    for number, future in waiting:
        yield number, future.result()


_worker: dict[str, RowBuilder] = {}  # of a process that does nothing else


def _start_worker(tokenizer: PreTrainedTokenizerFast, settings: RowSettings) -> None:
    _worker["builder"] = RowBuilder(tokenizer, settings)


def _build_chunk(lines: list[str]) -> BuiltRows:
    return _worker["builder"].build(lines)
