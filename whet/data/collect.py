"""Collect examples from files on disk and split them into sides: read, recognise, standardise, clean, hold out, mix.

One pass over the files; an example goes to the store as soon as it is standardised. Decisions that need all of them
(which rows are held out, which repeat another one, how many of each source are learned) come afterwards, from ids, and
from texts only where a setting asks for it. Whatever is left out is listed in the ledger with its reason.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path

import numpy as np

from whet.base.errors import UserError, nearest
from whet.data.batch.ledger import Ledger
from whet.data.batch.store import Examples, Store
from whet.data.config import Data, listed
from whet.data.example import Example, named
from whet.data.format.label_field import read_number
from whet.data.format.recognise import Format, recognise
from whet.data.format.standardise import Dropped, standardise
from whet.data.judge.added import source_id
from whet.data.named_files import check_twice, dataset_paths, fingerprints
from whet.data.read.read import Fingerprint, Record, check_unchanged, read_files
from whet.data.removed import Removed
from whet.data.said import notes_of
from whet.data.sides.benchmark import Asked, asked_rows
from whet.data.sides.select import Pool, check_pairs, learned, sides_of

SAMPLE = 100


@dataclass(frozen=True)
class Sides:
    """Examples to learn from, held out, and kept for a test; the format that they had.

    benchmarks: examples that are only compared, by name.
    """

    train: Examples
    evaluation: Examples
    test: Examples
    kind: Format
    benchmarks: dict[str, Examples] = field(default_factory=dict)


def collect(data: Data, path: Path, ledger: Ledger, *, numbers: bool = False) -> Sides:
    """Collect all examples that `data` names, written to the file `path`. Raises UserError for the first row that is
    refused.

    numbers: labels are values, which may be written as text.
    """
    check_pairs(data)
    check_twice(data, ledger)
    reading = _Collector(data, Store(path), ledger, numbers)
    kind = reading.read("dataset", data.max_rows)
    ledger.format, ledger.format_reason = kind.name, kind.reason
    ends = [len(reading.store)]
    for name in ("eval_dataset", "test_dataset", "replay_dataset", "added_dataset"):
        if getattr(data, name) is not None:
            _check_kind(kind, reading.read(name, None), name)
        ends.append(len(reading.store))
    spans = reading.benchmarks()
    check_unchanged(ledger.files[: len(reading.files)], reading.files)
    examples = reading.store.finish()
    starts = zip([0, *ends[:-1]], ends, strict=True)
    own, evaluation, test, general, added = (examples[start:end] for start, end in starts)
    benchmarks = {name: examples[span] for name, span in spans.items()}
    sides = sides_of(own, data, np.array(reading.groups, np.uint64) if reading.groups else None)
    evaluation = own.take(sides == 1) if data.eval_dataset is None else evaluation
    test = own.take(sides == 2) if data.test_dataset is None else test
    rows = np.flatnonzero(sides == 0)
    source = np.array(reading.sources[: len(own)], np.int64)
    named = np.array([origin is not None for origin in reading.origins], bool)
    origins = np.array([origin or 0 for origin in reading.origins], np.uint64)
    ledger.rows_on_both_sides = len(np.intersect1d(own.ids[rows], np.concatenate([evaluation.ids, test.ids])))
    pool = Pool(
        own, sides, source, reading.names, general, added, origins, named, evaluation, test, benchmarks
    )  # fmt: skip
    train = learned(pool, data, ledger)
    ledger.rows_repeated = len(train) - len(np.unique(train.ids))
    return Sides(train, evaluation, test, kind, benchmarks)


@contextmanager
def candidates(data: Data, *, paraphrase: bool) -> Iterator[Sides]:
    """The sides before anything is scored or mixed, for a judge or a writer of paraphrases; their file goes at the end.

    paraphrase: for a writer: without the rows that were added already, without those of a low score, and without rows
    whose question is held out, exactly or nearly, since their paraphrases could not be learned from. Raises UserError.
    """
    from whet.data.sides.added import asked_too

    plain = replace(data, weights={}, replay_dataset=None)
    plain = replace(plain, added_dataset=None) if paraphrase else replace(plain, scores=None, least_score=None)
    with tempfile.TemporaryDirectory() as folder:
        sides = collect(plain, Path(folder) / "examples.jsonl", Ledger(files=fingerprints(plain)))
        if paraphrase:
            apart = {"held out": sides.evaluation, "test": sides.test}
            ids = np.concatenate([side.ids for side in apart.values()])
            free = ~asked_too(sides.train, apart) & ~np.isin(sides.train.ids, ids)
            sides = replace(sides, train=sides.train.take(free))
        yield sides


class _Collector:
    """Reads files into the store. sources: the index in `names` of each example's source; groups: as data.group;
    origins: the id of the row that each added example paraphrases, if it says so."""

    def __init__(self, data: Data, store: Store, ledger: Ledger, numbers: bool) -> None:
        self.data, self.store, self.ledger, self.numbers = data, store, ledger, numbers
        self.names: list[str] = []
        self.files: list[Fingerprint] = []
        self.sources: list[int] = []
        self.groups: list[int] = []
        self.origins: list[int | None] = []
        self._origin_of: dict[tuple[str, int], int | None] = {}
        self._group_of: dict[tuple[str, int], str] = {}

    def read(self, field: str, limit: int | None) -> Format:
        """Put the examples of all sources of a setting into the store; returns their format."""
        kind, left = None, limit
        for name in listed(getattr(self.data, field)):
            source_kind = self._source(name, field, left)
            if kind is not None:
                _check_kind(kind, source_kind, field)
            kind = kind or source_kind
            left = None if limit is None else limit - len(self.store)
        if kind is None:
            raise UserError(
                "no data files were given", field=f"data.{field}", found="an empty list",
                fix="name at least one file, directory or glob",
            )  # fmt: skip
        return kind

    def _source(self, name: str, field: str, limit: int | None) -> Format:
        (path,) = dataset_paths(name)
        records = self._remembered(read_files([path], self.files), field)
        sample = list(islice(records, SAMPLE))
        if not sample:
            raise UserError("the data holds no rows", file=path, fix="give a file with at least one row")
        kind = recognise(sample, self.data.columns, self.data.format)
        dropped, before = Dropped(), len(self.store)
        stream = standardise(
            chain(sample, records), kind, self.data.columns, empty=self.data.empty, dropped=dropped,
            preference=self.data.preference, invalid=self.data.invalid,
        )  # fmt: skip
        for example in islice(self._cleaned(_with_values(stream) if self.numbers else stream), limit):
            self.store.add(example)
            self.sources.append(len(self.names))
            if field == "dataset" and self._has_groups:
                self.groups.append(_group_position(self._group_of[example.file, example.row]))
            if field == "added_dataset":
                self.origins.append(self._origin_of.pop((example.file, example.row)))
        self.names.append(name)
        for file, row, reason in (*dropped.rows, *dropped.answers, *dropped.invalid):
            self.ledger.drop(file, row, reason)
        self.ledger.notes += notes_of(name, kind, sample, dropped)
        self.ledger.rows_without_target += len(dropped.rows)
        self.ledger.rows_read += len(self.store) - before + len(dropped.rows) + len(dropped.invalid)
        return kind

    @property
    def _has_groups(self) -> bool:
        return self.data.group not in (None, "near_duplicates")

    def benchmarks(self) -> dict[str, slice]:
        """Put the questions of the benchmarks into the store; returns the rows of each of them there, by its name."""
        spans: dict[str, slice] = {}
        for name in listed(self.data.benchmarks):
            if name in spans:
                raise UserError("the benchmark is named twice", "name it once", field="data.benchmarks", found=name)
            (path,) = dataset_paths(name)
            asked = Asked()
            start = len(self.store)
            for example in asked_rows(read_files([path], self.files), path, self.data.columns, asked):
                self.store.add(example)
            spans[name] = slice(start, len(self.store))
            self.ledger.benchmarks[name] = {
                "rows": len(self.store) - start, "not_compared": asked.blank, "format": asked.reason,
                "rows_learned": 0, "dropped": 0,
            }  # fmt: skip
        return spans

    def _remembered(self, records: Iterator[Record], field: str) -> Iterator[Record]:
        """The records as they come, with the group or the origin of each remembered until its example comes."""
        if field == "added_dataset":
            for record in records:
                self._origin_of[record.file, record.row] = source_id(record)
                yield record
            return
        if not (field == "dataset" and self._has_groups):
            yield from records
            return
        for record in records:
            name = str(self.data.group)
            if name not in record.value:
                near = nearest(name, record.value)
                raise UserError(
                    "the row has no such column", file=record.file, row=record.row, field="data.group", found=name,
                    expected=f"one of {', '.join(record.value)}", fix=f"data.group={near or 'near_duplicates'}",
                )  # fmt: skip
            self._group_of[record.file, record.row] = str(record.value[name])
            yield record

    def _cleaned(self, stream: Iterable[Example]) -> Iterator[Example]:
        """The examples without blocked words and personal data, as the settings want it."""
        from whet.data.detect.blocklist import Blocked, BlockList, without_blocked
        from whet.data.detect.personal import PersonalData, without_personal_data

        def note(removed: Removed) -> None:
            if removed.reason.endswith("placeholders"):
                self.ledger.rows_redacted += 1
                return
            self.ledger.rows_read += 1
            self.ledger.drop(removed.file, removed.row, removed.reason)

        if self.data.blocklist is not None:
            words = BlockList.read(listed(self.data.blocklist))
            stream = without_blocked(stream, words, "drop", Blocked(), note)
        if self.data.personal != "keep":
            stream = without_personal_data(stream, self.data.personal, PersonalData(), note)
        return iter(stream)


def _with_values(stream: Iterable[Example]) -> Iterator[Example]:
    """The examples with labels in text read as values."""
    for example in stream:
        try:
            value = None if example.label is None else read_number(example.label)
        except UserError as error:
            error.file, error.row = example.file, example.row
            raise
        yield example if value == example.label else named(replace(example, label=value))


def _check_kind(kind: Format, other: Format, field: str) -> None:
    """Refuse sources that cannot be learned together: labels, raw text and conversations do not mix."""
    family = {"classification": "labels", "text": "text"}
    if family.get(kind.name) != family.get(other.name):
        raise UserError(
            "these rows are of another kind than those before", field=f"data.{field}",
            found=f"{other.name}: {other.reason}", expected=f"{kind.name}: {kind.reason}",
            fix="give all sources rows of one kind: labels, raw text, or conversations",
        )  # fmt: skip


def _group_position(name: str) -> int:
    """The position of a group between 0 and 2**64 (`sides.split`)."""
    from whet.data.sides.split import positions_of

    return int(positions_of([name])[0])
