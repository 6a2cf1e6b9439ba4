"""Examples become rows of tokens: rendered, tokenised, fitted to a length, appended to columns on disk.

A chunk of examples is all that is held at a time. What a chunk becomes depends on nothing but the chunk, so chunks may
go to several processes; they come back in order, and the rows are the same whatever the number of processes. A limit
in tokens is known before the first row: a row is over it or not whatever the longest row turns out to be.
Processes are forks where that is safe, which start at once. Gives up: elsewhere a process needs about three seconds
before it helps, and a script that asks for some must keep its work below `if __name__ == "__main__"`, as Python's own
processes demand; so there they are made only when they are asked for.
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
from whet.data.template.between import Known
from whet.data.template.tokenise import Tokeniser, Tokens, marked

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHUNK = 500
ROWS_FOR_A_PROCESS = 20_000


@dataclass(frozen=True)
class Laying:
    """How rows are made. limit: longest row in tokens; policy: what happens to a longer one."""

    chat: bool
    loss_on: str
    policy: str
    limit: int


@dataclass
class Laid:
    """The rows of a chunk. sizes, owners: tokens of each row and which example of the chunk it is, int64 [R].

    drops: examples that are not used, with the reason; not_rendered: rows that have a field which the template leaves
    out, by its name.
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


class _Gathered:
    """The rows of a chunk as they come: ids, the places of what is learned, and arrays where rows have weights."""

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

    def into(self, laid: Laid) -> None:
        """As arrays."""
        laid.ids, laid.sizes = np.array(self.ids, np.int32), np.array(self.sizes, np.int64)
        laid.owners, laid.learned = np.array(self.owners, np.int64), np.zeros(len(self.ids), bool)
        for first, last in self.learned:
            laid.learned[first:last] = True
        if self.weights:
            laid.weights = laid.learned.astype(np.float32)
            for start, weights in self.weights:
                laid.weights[start : start + len(weights)] = weights
        laid.learned[np.cumsum(laid.sizes) - laid.sizes] = False  # nothing predicts the first token of a row


class Layer:
    """Makes rows of examples with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, laying: Laying) -> None:
        self.tokeniser, self.laying = Tokeniser(tokenizer, laying.chat), laying

    def lay(self, lines: list[str]) -> Laid:
        """The rows of a chunk of examples in JSON; one that is refused stops it and stands in `problem` with its place.

        Where a row's tokens are known from its contents alone, it never becomes an object.
        """
        laid, rows, values = Laid(), _Gathered(), [json.loads(line) for line in lines]
        try:
            known = self.tokeniser.known([plain_turns(value) for value in values])
            others = {at: from_values(values[at]) for at, found in enumerate(known) if found is None}
            tokens = iter(self._tokens(list(others.values())))
            for owner, found in enumerate(known):
                if found is not None and self._added(owner, found, laid, rows):
                    continue
                example = others.get(owner) or from_values(values[owner])
                row = next(tokens) if found is None else marked(found, example, self.laying.loss_on)
                for fitted in self._fitted(owner, example, row, laid):
                    rows.add_tokens(owner, fitted)
        except UserError as problem:
            laid.problem = problem
            return laid
        rows.into(laid)
        return laid

    def _added(self, owner: int, known: Known, laid: Laid, rows: _Gathered) -> bool:
        """Whether the row could be added as it is: it has something to learn, and is not too long."""
        placed = known.placed()
        count = len(placed.ids)
        answers, closed = known.between.learned(self.laying.loss_on)
        learned = [(0, count)] if self.laying.loss_on == "all" else [placed.turns[index] for index in answers]
        if count > self.laying.limit or not any(last > max(first, 1) for first, last in learned):
            return False
        rows.add(owner, placed.ids, learned)
        laid.longest = max(laid.longest, count)
        laid.open_turns += not closed
        return True

    def _tokens(self, examples: list[Example]) -> list[Tokens]:
        if self.tokeniser.template is None:
            return self.tokeniser.texts([example.text or "" for example in examples])
        try:
            return self.tokeniser.conversations(examples, self.laying.loss_on)
        except UserError:
            for example in examples:
                self._locate(example)
            raise

    def _locate(self, example: Example) -> None:
        """Raise again what this row alone is refused for, now with its place."""
        try:
            self.tokeniser.conversations([example], self.laying.loss_on)
        except UserError as error:
            error.file, error.row = example.file, example.row
            raise

    def _fitted(self, owner: int, example: Example, row: Tokens, laid: Laid) -> Iterator[Tokens]:
        limit, policy, count = self.laying.limit, self.laying.policy, len(row.ids)
        laid.longest = max(laid.longest, count)
        laid.not_rendered.update({name for _, name in row.dropped})
        if count <= limit:
            if not row.learned[1:].any():
                laid.without_target += 1
                laid.drops.append((owner, "nothing to learn"))
                return
            laid.open_turns += not row.closed
            yield row
            return
        laid.over_length += 1
        if policy == "split":
            yield from self._split(row, laid)
            return
        if policy == "error":
            raise too_long(example.file, example.row, count, limit)
        fitted = fit(row, limit, policy)
        laid.lost += fitted.lost
        if fitted.tokens is None:
            laid.drops.append((owner, f"{count} tokens, over {limit}"))
            return
        laid.open_turns += not fitted.tokens.closed
        yield fitted.tokens

    def _split(self, row: Tokens, laid: Laid) -> Iterator[Tokens]:
        for start in range(0, len(row.ids), self.laying.limit):
            part = slice(start, start + self.laying.limit)
            if len(row.ids) - start == 1:  # nothing predicts it, and it predicts nothing
                laid.lost += 1
            else:
                yield Tokens(row.ids[part], row.learned[part], [], True)


def lay_rows(
    examples: Examples, tokenizer: PreTrainedTokenizerFast, laying: Laying, folder: Path, name: str, ledger: Ledger,
    processes: int | None = None,
) -> tuple[Rows, int]:  # fmt: skip
    """(rows of all `examples`, tokens of the longest before fitting), in files of `folder` that begin with `name`.

    processes: how many make rows; None: as many as pay. Raises UserError for the first row, in order, that is refused.
    """
    ids, learned = Column(folder / f"{name}.ids", np.int32), Column(folder / f"{name}.learned", np.bool_)
    weights = _Weights(folder / f"{name}.weights")
    sizes, sources, longest, start = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0, 0
    progress = Progress("tokenising", len(examples), patience_seconds=2)
    with _laid(examples, tokenizer, laying, processes or usual_processes(len(examples))) as chunks, progress as bar:
        for number, laid in chunks:
            if laid.problem is not None:
                raise laid.problem
            weights.extend(laid.weights, ids.length, len(laid.ids))
            ids.extend(laid.ids)
            learned.extend(laid.learned)
            sizes.append(laid.sizes)
            sources.append(laid.owners + start)
            longest = max(longest, laid.longest)
            _note(laid, examples, start, ledger)
            start += number
            bar.advance("rows", number)
    starts = np.concatenate([[0], np.cumsum(np.concatenate(sizes))]).astype(np.int64)
    rows = Rows(ids.finish(), learned.finish(), starts, np.concatenate(sources), weights=weights.finish())
    return rows, longest


class _Weights:
    """A column that is begun when the first row has weights."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.column: Column | None = None

    def extend(self, found: np.ndarray | None, before: int, count: int) -> None:
        """Append the weights of `count` tokens, 1 for all where there are none; `before`: tokens that came earlier."""
        if self.column is None:
            if found is None:
                return
            self.column = Column(self.path, np.float32)
            while before:
                part = min(before, 1 << 20)
                self.column.extend(np.ones(part, np.float32))
                before -= part
        self.column.extend(np.ones(count, np.float32) if found is None else found)

    def finish(self) -> np.ndarray | None:
        return None if self.column is None else self.column.finish()


def _note(laid: Laid, examples: Examples, start: int, ledger: Ledger) -> None:
    ledger.rows_without_end_of_turn += laid.open_turns
    ledger.rows_over_length += laid.over_length
    ledger.rows_without_target += laid.without_target
    ledger.tokens_lost += laid.lost
    for field_name, count in laid.not_rendered.items():
        ledger.not_rendered[field_name] = ledger.not_rendered.get(field_name, 0) + count
    for owner, reason in laid.drops:
        example = examples[start + owner]
        ledger.drop(example.file, example.row, reason)


@contextmanager
def _laid(
    examples: Examples, tokenizer: PreTrainedTokenizerFast, laying: Laying, processes: int
) -> Iterator[Iterator[tuple[int, Laid]]]:
    """(examples in it, rows) of each chunk in order, made here or by other processes."""
    chunks = _chunks(examples.lines())
    if processes == 1:
        layer = Layer(tokenizer, laying)
        yield ((len(chunk), layer.lay(chunk)) for chunk in chunks)
        return
    forked = forks_safely()
    if forked:
        _begin(tokenizer, laying)
    start: Any = {} if forked else {"initializer": _begin, "initargs": (tokenizer, laying)}
    try:
        with ProcessPoolExecutor(processes, get_context("fork" if forked else "spawn"), **start) as pool:
            yield _in_order(pool, chunks, 2 * processes)
    except BrokenProcessPool as error:
        raise UserError(
            "a process that tokenises ended before its work", field="data.num_proc", found=str(processes),
            expected="1, or a script whose work stands below if __name__ == '__main__'", fix="data.num_proc=1",
        ) from error  # fmt: skip


def usual_processes(rows: int) -> int:
    """How many processes pay for so many rows; 1 where they would have to start from nothing."""
    return max(1, min(len(os.sched_getaffinity(0)), rows // ROWS_FOR_A_PROCESS)) if forks_safely() else 1


def forks_safely() -> bool:
    """A fork copies locks that other threads hold, so there must be none; and only Linux has a sound one."""
    return sys.platform == "linux" and threading.active_count() == 1


def _chunks(lines: Iterator[str]) -> Iterator[list[str]]:
    return iter(lambda: list(islice(lines, CHUNK)), [])


def _in_order(pool: ProcessPoolExecutor, chunks: Iterator[list[str]], ahead: int) -> Iterator[tuple[int, Laid]]:
    """Results in the order of the chunks, with at most `ahead` under way."""
    waiting: deque[tuple[int, Future[Laid]]] = deque()
    for chunk in chunks:
        waiting.append((len(chunk), pool.submit(_work, chunk)))
        if len(waiting) > ahead:
            number, future = waiting.popleft()
            yield number, future.result()
    for number, future in waiting:
        yield number, future.result()


_here: dict[str, Layer] = {}  # of a process that does nothing else


def _begin(tokenizer: PreTrainedTokenizerFast, laying: Laying) -> None:
    _here["layer"] = Layer(tokenizer, laying)


def _work(lines: list[str]) -> Laid:
    return _here["layer"].lay(lines)
