"""Which rows are scored: those held out, those kept for a test, or those of another file; and where the results go.

Each choice has files of its own in `results/`, so that a score never takes the place of another one's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from whet import runs
from whet.base.console import say
from whet.base.errors import UserError
from whet.data.config import Data
from whet.data.prepare import Prepared, scored_rows
from whet.data.read.read import fingerprint, read_files
from whet.engine.load.load import load_config, load_tokenizer, longest_input
from whet.runs import Run, chat_tokenizer

Split = Literal["eval", "test"]
HELD_OUT = "evaluation"
_PEEKED = 100  # rows whose columns are looked at


@dataclass(frozen=True)
class Chosen:
    """Rows to score, as the held-out side of `prepared`. name: of their results; title: for people."""

    prepared: Prepared
    run: Run
    name: str
    title: str

    def path(self, kind: str) -> Path:
        """The file of results: `predictions` or `mismatches`."""
        prefix = "" if self.name == HELD_OUT else f"{self.name}."
        return self.run.results / f"{prefix}{kind}.jsonl"


@contextmanager
def chosen_rows(run: Run, split: Split, files: Sequence[str]) -> Iterator[Chosen]:
    """The rows that were chosen, for as long as the block lasts. Raises UserError."""
    if files:
        if split != "eval":
            raise UserError(
                "the rows of a file are of no split", field="--split", found=split, expected="--split or --data",
                fix="remove one of them",
            )  # fmt: skip
        with _rows_of(run, files) as chosen:
            yield chosen
        return
    prepared = runs.rows_of(run)
    if split == "eval":
        yield Chosen(prepared, run, HELD_OUT, "held-out rows")
        return
    if not prepared.test_examples:
        raise UserError(
            "there are no test rows", field="data.test_size", found="0 test rows",
            expected="data.test_size above 0 when training, or data.test_dataset",
            fix="whet eval RUN --data FILE scores the rows of any file",
        )  # fmt: skip
    yield Chosen(replace(prepared, evaluation=prepared.test, held_out=prepared.test_examples), run, "test", "test rows")


@contextmanager
def _rows_of(run: Run, files: Sequence[str]) -> Iterator[Chosen]:
    """The rows of files, read and cut as those of the run were."""
    recipe, task = run.recipe, run.task
    entries = fingerprint(files)
    title = f"rows of {', '.join(Path(str(entry['path'])).name for entry in entries)}"
    stem = Path(str(entries[0]["path"])).name.partition(".")[0][:40] or "rows"
    name = f"data-{stem}-{_digest(entries)}"
    known = {entry.get("sha256") for entry in (run.read("data.json") or {}).get("files", [])}
    for entry in entries:
        if entry["sha256"] in known:
            say(f"{entry['path']} is among the files that the run was made of: the scores will flatter", style="yellow")
    kept = ("max_length", "over_length", "empty", "preference", "format", "loss_on", "num_proc")
    settings: dict[str, Any] = {field: getattr(recipe.data, field) for field in kept}
    if task.name != "causal":
        settings["loss_on"] = None
    columns = _columns(files, recipe.data.columns)
    data = Data(dataset=list(files), columns=columns, val_size=0, packing=False, **settings)
    tokenizer = chat_tokenizer(recipe.model) if task.name == "causal" else load_tokenizer(recipe.model)
    with scored_rows(data, tokenizer, longest_input(load_config(recipe.model)), task) as prepared:
        if left := len(prepared.ledger.dropped):
            say(f"{left:,} rows are left out, as in training (longer than data.max_length, or blank)", style="yellow")
        yield Chosen(prepared, run, name, title)


def _digest(entries: Sequence[Any]) -> str:
    from hashlib import sha256

    return sha256("".join(str(entry["sha256"]) for entry in entries).encode()).hexdigest()[:8]


def _columns(files: Sequence[str], columns: dict[str, str]) -> dict[str, str]:
    """The run's columns that the files have."""
    names = {name for record in islice(read_files(list(files)), _PEEKED) for name in record.value}
    return {ours: theirs for ours, theirs in columns.items() if theirs in names}
