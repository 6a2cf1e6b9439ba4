"""Save prepared rows as files of plain numbers and one JSON object, and load them: the content of a cache entry."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from whet.data.batch.columns import mapped
from whet.data.batch.ledger import Ledger
from whet.data.batch.rows import Rows
from whet.data.batch.store import opened
from whet.engine.task import Task

EXAMPLES = "examples.jsonl"
ROWS, SELECTIONS = ("train", "evaluation", "test"), ("train_examples", "held_out", "test_examples")


def save(prepared: Any, folder: Path) -> dict[str, Any]:
    """Write the arrays of `prepared` (a `Prepared`) that are not in files of `folder` yet; returns the JSON part."""
    arrays: dict[str, Any] = {}

    def write(name: str, value: Any) -> None:
        if isinstance(value, Rows):
            for field in fields(Rows):
                write(f"{name}.{field.name}", getattr(value, field.name))
        elif value is not None:
            path = folder / name
            if not (isinstance(value, np.memmap) and Path(str(value.filename)) == path):
                np.ascontiguousarray(value).tofile(path)
            arrays[name] = [str(value.dtype), list(value.shape)]

    for name in ROWS:
        write(name, getattr(prepared, name))
    for name in SELECTIONS:
        for part, value in getattr(prepared, name).arrays().items():
            write(f"{name}.{part}", value)
    for number, examples in enumerate(prepared.benchmarks.values()):
        for part, value in examples.arrays().items():
            write(f"benchmark{number}.{part}", value)
    if prepared.bins is not None:
        write("bins.rows", np.concatenate([np.zeros(0, np.int64), *(np.asarray(unit) for unit in prepared.bins)]))
        write("bins.sizes", np.array([len(unit) for unit in prepared.bins], np.int64))
    return {
        "arrays": arrays, "ledger": prepared.ledger.as_dict(), "max_length": prepared.max_length,
        "decided": {name: list(pair) for name, pair in prepared.decided.items()}, "task": asdict(prepared.task),
        "benchmarks": list(prepared.benchmarks),
    }  # fmt: skip


def load(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """The fields of the `Prepared` that was saved, but for its row tokenizer."""

    def get(name: str) -> np.ndarray | None:
        if name not in facts["arrays"]:
            return None
        kind, shape = facts["arrays"][name]
        return mapped(folder / name, np.dtype(kind), tuple(shape))

    def rows(name: str) -> Rows | None:
        if f"{name}.ids" not in facts["arrays"]:
            return None
        values = {field.name: get(f"{name}.{field.name}") for field in fields(Rows) if field.name != "answers"}
        return Rows(**values, answers=rows(f"{name}.answers"))  # type: ignore[arg-type]

    def examples(name: str) -> Any:
        parts = {part: get(f"{name}.{part}") for part in ("places", "sizes", "ids")}
        return opened(folder / EXAMPLES, parts)  # type: ignore[arg-type]

    flat, sizes = get("bins.rows"), get("bins.sizes")
    bins = None if flat is None or sizes is None else [
        part.tolist() for part in np.split(np.asarray(flat), np.cumsum(sizes)[:-1])
    ]  # fmt: skip
    task = facts["task"]
    return {name: rows(name) for name in ROWS} | {name: examples(name) for name in SELECTIONS} | {
        "bins": bins, "max_length": facts["max_length"], "ledger": Ledger(**facts["ledger"]),
        "decided": {name: tuple(pair) for name, pair in facts["decided"].items()},
        "task": Task(task["name"], tuple(task["labels"])),
        "benchmarks": {name: examples(f"benchmark{number}") for number, name in enumerate(facts["benchmarks"])},
    }  # fmt: skip
