"""Answers as JSON lines or as a CSV table, on stdout or in a file that is whole or absent and never an input.

A table has one row for each answer, with the text that was asked; several classes take a column each for name and
probability. Gives up in CSV: all classes of a row where no number of them is asked for.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from whet.base.errors import UserError
from whet.base.files import whole_file
from whet.base.outputs import Input, output_file
from whet.base.visible import visible, visible_json
from whet.engine.task import Task
from whet.inputs import inputs_of_run
from whet.runs import Run
from whet.ship.questions import STANDARD_INPUT, Question

SUFFIXES = (".jsonl", ".csv")


class Writer:
    """Writes answers to an open file. top: classes of a row in a table."""

    def __init__(self, file: IO[str], task: Task, *, table: bool, top: int | None) -> None:
        self.file, self.task, self.top = file, task, top
        self._table = csv.writer(file, lineterminator="\n") if table else None
        self._has_head = False

    def write(self, question: Question, answer: dict[str, Any]) -> None:
        """Write one answer."""
        if self._table is None:
            self.file.write(visible_json(json.dumps(answer, ensure_ascii=False)) + "\n")
            return
        cells = _cells(self.task, question, answer, self.top)
        if not self._has_head:
            self._table.writerow(cells)
            self._has_head = True
        shown = self.file.isatty()
        self._table.writerow([visible(cell) if shown and isinstance(cell, str) else cell for cell in cells.values()])


def _cells(task: Task, question: Question, answer: dict[str, Any], top: int | None) -> dict[str, Any]:
    """The cells of a row by the names of their columns, which are the same for every row of a run."""
    where = {} if question.file is None else {"file": question.file}
    cells = where | {"row": answer["row"]}
    if not task.labelled:
        assert question.chat is not None
        return cells | {"prompt": question.chat.question[-1].content, "text": answer["text"]}
    cells |= {"text": question.text, "text_pair": question.text_pair or ""}
    if task.name == "regression":
        return cells | {"value": answer["value"]}
    if task.name == "multi_label":
        cells["labels"] = "; ".join(answer["labels"])
    else:
        cells |= {"label": answer["label"], "probability": answer["probability"]}
    shown = list(answer["probabilities"].items())[: top or 0]
    first = 0 if task.name == "multi_label" else 1
    for number, (name, share) in enumerate(shown[first:], first + 1):
        cells |= {f"label_{number}": name, f"probability_{number}": share}
    return cells


def check_out(out: str, source: str, run: Run) -> Path:
    """The file to write. Raises UserError for an output that is an input, and for a suffix that says no format."""
    rows = [] if source == STANDARD_INPUT else [Input(Path(source).expanduser(), "the rows to answer", "files")]
    path = output_file(out, [*rows, *inputs_of_run(run), Input(run.path, "the run", "all")], "--out", _is_ours)
    suffix = Path(out).suffix
    if suffix.lower() not in SUFFIXES:
        raise UserError(
            "the suffix says no format for answers", file=out, field="--out", found=suffix or "no suffix",
            expected=" or ".join(SUFFIXES), fix=f"--out {Path(out).with_suffix('.jsonl')}",
        )  # fmt: skip
    return path


def _is_ours(line: bytes) -> bool:
    """True if the first line of a file is one of answers."""
    return line.startswith((b'{"row": ', b"row,", b"file,row,"))


@contextmanager
def writer(path: Path | None, task: Task, *, table: bool, top: int | None) -> Iterator[Writer]:
    """A writer to stdout, or to a file that appears when the block ends well. Raises OSError."""
    if path is None:
        yield Writer(sys.stdout, task, table=table, top=top)
        return
    with whole_file(path) as file:
        yield Writer(file, task, table=table or path.suffix.lower() == ".csv", top=top)
