"""Read data files as records that know their file and row.

Everything that can be wrong with bytes is refused on the way, with file and row: encoding, compression, syntax, and
faults that parsers commonly accept, because each of those would otherwise change the training data without notice. The
meaning of the fields is left to `format.standardise`. Every format is one function from a stream to records: `jsonl`,
`table`, `arrow`, `text`; `files` finds the files, `unpack` opens them.

Rows are streamed: one row or one batch is in memory, whatever the size of the file. A `.json` file alone is read whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import BinaryIO, TypeAlias

from whet.base.errors import UserError
from whet.data.read import arrow, jsonl, table, text
from whet.data.read.files import COLUMNS, DataFile, data_files, files_of, split_suffix
from whet.data.read.record import COPY_AGAIN, TURN_FIELDS, Record, kind_of
from whet.data.read.unpack import (
    ARROW_FILE,
    ARROW_STREAM,
    HEAD_BYTES,
    PARQUET,
    WatchedFile,
    check_head,
    damage_of,
    text_stream,
    unreadable,
)

__all__ = (
    "TURN_FIELDS",
    "Fingerprint",
    "Record",
    "check_unchanged",
    "data_files",
    "fingerprint",
    "kind_of",
    "read_files",
    "sha256",
)

Fingerprint: TypeAlias = dict[str, str | int]


def read_files(paths: Sequence[str], fingerprints: list[Fingerprint] | None = None) -> Iterator[Record]:
    """Read the records of all `paths` in order; a path is a file, a directory, a glob or hub:owner/name (see `files`).

    Paths are resolved at once, so a misspelt one is reported before the first file is read. fingerprints: gets one
    entry (path, bytes, sha256) for each file as its last row is handed out, taken from the bytes that were read.
    """
    files = _sources(paths)
    seen: set[Path] = set()
    for file in files:
        if (real := file.path.resolve()) in seen:
            raise UserError("named twice, so its rows would be trained on twice", "name it once", file=file.name)
        seen.add(real)
    return chain.from_iterable(_read_file(file, fingerprints) for file in files)


def fingerprint(paths: Sequence[str], known: Iterable[Fingerprint] = ()) -> list[Fingerprint]:
    """path, bytes and sha256 of every file of `paths`, in their order; those in `known` are not read again."""
    at_hand = {entry["path"]: entry for entry in known}
    return [at_hand.get(file.name) or _fingerprint(file) for file in _sources(paths)]


def check_unchanged(recorded: Sequence[Mapping[str, object]], now: Sequence[Mapping[str, object]]) -> None:
    """Refuse data that are not those of the start. Files that only moved are the same data.

    Raises UserError with the file and both hashes for the first file that differs, is new or is gone.
    """
    if [entry["sha256"] for entry in recorded] == [entry["sha256"] for entry in now]:
        return
    fix = "put the old file back, or start a new run"
    before, after = ({str(entry["path"]): entry for entry in side} for side in (recorded, now))
    for path, old in before.items():
        new = after.get(path)
        if new is None:
            problem, found = "the file is no longer among the data of this run", "no such file"
        elif new["sha256"] != old["sha256"]:
            problem, found = "the file changed since the start of this run", f"sha256 {new['sha256']}"
            if "bytes" in new:
                found += f", {new['bytes']} bytes"
        else:
            continue
        raise UserError(problem, fix, path, found=found, expected=f"sha256 {old['sha256']}")
    added = next((path for path in after if path not in before), None)
    if added is not None:
        found = f"sha256 {after[added]['sha256']}"
        raise UserError("the file was not among the data of this run", fix, added, found=found, expected="no such file")
    raise UserError(
        "the data files are in another order than at the start of this run", "name them in the old order",
        found=", ".join(after), expected=", ".join(before),
    )  # fmt: skip


def sha256(path: str) -> str:
    """Hex digest of the bytes of one file as they lie on disk (compressed if it is compressed)."""
    try:
        with Path(path).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(path, error) from error


def _sources(paths: Sequence[str]) -> list[DataFile]:
    files = [file for path in paths for file in files_of(path)]
    if not files:
        raise UserError("no data files were given", "name at least one file, directory or glob")
    return files


def _fingerprint(file: DataFile) -> Fingerprint:
    try:
        with WatchedFile(file.path, file.name, hashed=True) as disk:
            return disk.fingerprint()
    except OSError as error:
        raise unreadable(file.name, error) from error


def _read_file(file: DataFile, fingerprints: list[Fingerprint] | None) -> Iterator[Record]:
    """The rows of one file; a change of the file meanwhile is reported at its end, or at any other error."""
    suffix, packing = split_suffix(file.path)
    try:
        with WatchedFile(file.path, file.name, hashed=fingerprints is not None) as disk:
            try:
                yield from _rows(disk, suffix, packing)
            except UserError as error:
                if change := disk.changed():
                    raise change from error
                raise
            if change := disk.changed():
                raise change
            if fingerprints is not None:
                fingerprints.append(disk.fingerprint())
    except OSError as error:
        raise unreadable(file.name, error) from error


def _rows(disk: WatchedFile, suffix: str, packing: str) -> Iterator[Record]:
    file, kind = disk.file, packing or suffix
    damaged = arrow.damage() if suffix in COLUMNS else damage_of(packing)
    try:
        if suffix in COLUMNS:
            check_head(disk.read(HEAD_BYTES), file, _COLUMN_KINDS[suffix])
            disk.seek(0)
            records = _COLUMN_READERS[suffix](disk, file)
        else:
            records = _READERS[suffix](text_stream(disk, packing), file)
        first = next(records, None)
        if first is None:
            raise UserError("the file has no rows", "fill it, or remove it from the recipe", file=file)
        yield first
        yield from records
    except EOFError as error:
        raise UserError(f"the {kind} data is cut off", COPY_AGAIN, file=file, found="end of file") from error
    except damaged as error:
        raise UserError(f"the {kind} data is damaged", COPY_AGAIN, file=file, found=str(error)) from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise UserError(f"the {kind} data is damaged", COPY_AGAIN, file=file, found=str(error)) from error


# A new kind of file is one function and one line here, and its suffix in `files`.
_READERS: dict[str, Callable[[BinaryIO, str], Iterator[Record]]] = {
    ".jsonl": jsonl.read_jsonl,
    ".ndjson": jsonl.read_jsonl,
    ".json": jsonl.read_json,
    ".csv": table.read_csv,
    ".tsv": table.read_tsv,
    ".txt": text.read_text,
    ".md": text.read_text,
    ".markdown": text.read_text,
}
_COLUMN_READERS: dict[str, Callable[[WatchedFile, str], Iterator[Record]]] = {
    ".parquet": arrow.read_parquet,
    ".arrow": arrow.read_arrow,
    ".feather": arrow.read_arrow,
    ".ipc": arrow.read_arrow,
}
_COLUMN_KINDS = dict.fromkeys(_COLUMN_READERS, (ARROW_FILE, ARROW_STREAM)) | {".parquet": (PARQUET,)}
