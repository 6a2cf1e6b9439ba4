"""The files that the data settings name: their paths, their hashes, and whether one of them is named twice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from whet.base.errors import UserError, shorten
from whet.data.batch.ledger import Ledger
from whet.data.config import Data, listed
from whet.data.read.files import files_of
from whet.data.read.read import fingerprint, sha256
from whet.data.read.unpack import unreadable

PACKAGE = Path(__file__).parents[1]
BUILTIN = {
    "builtin:support_tickets": ("support_tickets", "train.jsonl"),
    "builtin:support_tickets_test": ("support_tickets", "test.jsonl"),
}
LEARNED = ("dataset", "replay_dataset", "added_dataset")
HELD_OUT = ("eval_dataset", "test_dataset")


def dataset_paths(dataset: str | Sequence[str]) -> list[str]:
    """Paths, with built-in names replaced by the paths of their files."""
    return [_builtin_file(name) if name.startswith("builtin:") else name for name in listed(dataset)]


def _builtin_file(name: str) -> str:
    if name not in BUILTIN:
        raise UserError(
            "there is no such built-in data", field="data.dataset", found=name, expected=", ".join(BUILTIN),
            fix="write builtin:support_tickets",
        )  # fmt: skip
    folder, file = BUILTIN[name]
    installed, checkout = PACKAGE / "builtin" / folder / file, PACKAGE.parent / "examples" / folder / file
    return str(installed if installed.exists() else checkout)


def check_twice(data: Data, ledger: Ledger) -> None:
    """Refuse a file that would be learned from twice, by whatever names or links; note one that is held out as well.

    Raises UserError.
    """
    first: dict[tuple[int, int], tuple[str, str]] = {}
    for setting in (*LEARNED, *HELD_OUT):
        files = [file for path in dataset_paths(getattr(data, setting) or []) for file in files_of(path)]
        for file in files:
            try:
                facts = file.path.stat()
            except OSError as error:
                raise unreadable(file.name, error) from error
            key = (facts.st_dev, facts.st_ino)
            if key not in first:
                first[key] = (setting, file.name)
                continue
            other, name = first[key]
            if setting in LEARNED or other == setting:
                raise UserError(
                    "named twice, so its rows would be used twice", file=file.name, field=f"data.{setting}",
                    found=f"the file that data.{other} names as {name}",
                    expected="each file once, also by links and patterns", fix="name it once",
                )  # fmt: skip
            ledger.notes.append(
                f"{shorten(file.name)} is learned from (data.{other}) and measured on (data.{setting}), so its scores "
                "say nothing about other rows"
            )  # fmt: skip


def check_sources(data: Data) -> None:
    """Raise UserError where a file or folder that `data` names is not there; nothing is read, the hub is not asked."""
    for dataset in (data.dataset, data.eval_dataset, data.test_dataset, data.replay_dataset, data.added_dataset,
                    data.benchmarks):  # fmt: skip
        for path in [] if dataset is None else dataset_paths(dataset):
            if not path.startswith("hub:"):
                files_of(path)
    for path in [*listed(data.blocklist), *listed(data.scores)]:
        if not Path(path).is_file():
            sha256(path)  # says why it cannot be read


def fingerprints(data: Data) -> list[dict[str, Any]]:
    """path, bytes and sha256 of every file that decides what the rows are, in order."""
    given = [data.dataset, data.eval_dataset, data.test_dataset, data.replay_dataset, data.added_dataset,
             data.benchmarks]  # fmt: skip
    paths = [path for dataset in given if dataset is not None for path in dataset_paths(dataset)]
    entries: list[dict[str, Any]] = [dict(entry) for entry in fingerprint(paths)]
    for path in [*listed(data.blocklist), *listed(data.scores)]:
        digest = sha256(path)
        entries.append({"path": path, "bytes": Path(path).stat().st_size, "sha256": digest})
    return entries
