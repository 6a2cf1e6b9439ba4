"""List the data files that a path of a recipe stands for: a file, a directory, a saved data set, a glob, a hub name.

A directory stands for the data files directly in it, or below it when there are none, as the hub arranges them; the
part after a # chooses among several splits (DIR#split, DIR#config/split). A path that could be meant in two ways is
refused: rows beside text, one name in two formats, a link that leads nowhere. Hidden files and a README.md are left
out; files of unknown kinds are left out with a warning.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from whet.base.errors import UserError, nearest, shorten
from whet.data.read.hub import PREFIX, hub_files, is_data, read_card
from whet.data.read.layout import CONVERTED, METADATA, choose
from whet.data.read.record import OBJECT_PER_LINE
from whet.data.read.unpack import PACKINGS, unreadable

ROWS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
TEXT = (".txt", ".md", ".markdown")
COLUMNS = (".parquet", ".arrow", ".feather", ".ipc")
SUFFIXES = frozenset([*COLUMNS, *(kind + packing for kind in (*ROWS, *TEXT) for packing in ("", *PACKINGS))])
_EXPECTED = f"{', '.join((*ROWS, *TEXT))}, each also with {', '.join(PACKINGS)}; {', '.join(COLUMNS)}"
_PAPERS = frozenset(("readme", "license", "licence", "notice", "citation", "changelog"))

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataFile:
    """One data file. name: as it is printed and recorded; path: where its bytes lie."""

    name: str
    path: Path


def data_files(path: str) -> list[Path]:
    """The paths of the files that one path of a recipe stands for, in the order of reading."""
    return [file.path for file in files_of(path)]


def files_of(path: str) -> list[DataFile]:
    """The files of one path, sorted by name whatever the locale or the file system's order; UserError for none."""
    if not path.strip():
        raise UserError("the name of a data file is empty", "name a file, directory or glob", field="data.dataset")
    if path.startswith(PREFIX):
        files = hub_files(path, SUFFIXES, frozenset(TEXT))
        _one_kind(path, [location for _, location in files])
        return [DataFile(name, location) for name, location in files]
    location = Path(path).expanduser()
    try:
        if location.is_file():
            return [_file(path, location)]
        if location.is_dir():
            return _directory(location, None, None)
        if location.exists():
            raise UserError("not a regular file", "save the data to a file first", file=path)
        if location.is_symlink():
            raise UserError("a symbolic link that leads nowhere", "correct it", path, found=str(location.readlink()))
        folder, mark, choice = path.rpartition("#")
        if mark and (location := Path(folder).expanduser()).is_dir():
            config, _, split = choice.rpartition("/")
            return _directory(location, config or None, split or None)
        location = Path(path).expanduser()
        if glob.has_magic(path):
            names = glob.glob(str(location), recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
            entries = [entry for entry in map(Path, names) if not entry.name.startswith(".")]
            return _one_kind(path, _usable(path, sorted(entries, key=str)))
        raise _missing(path, location)
    except OSError as error:
        raise unreadable(path, error) from error


def split_suffix(path: Path) -> tuple[str, str]:
    """`a.jsonl.xz` -> (".jsonl", ".xz"); the second is empty for a plain file."""
    packing = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), packing) if packing in PACKINGS else (packing, "")


def _file(path: str, location: Path) -> DataFile:
    suffix, packing = split_suffix(location)
    if suffix + packing in SUFFIXES:
        return DataFile(str(location), location)
    if suffix in COLUMNS:
        fix = f"unpack it: {suffix} files are packed inside"
    else:
        fix = "convert it to JSONL: " + OBJECT_PER_LINE
    suffix_text = f"suffix {suffix + packing or '(none)'}"
    raise UserError("unknown kind of file", fix, file=path, found=suffix_text, expected=_EXPECTED)


def _directory(folder: Path, config: str | None, split: str | None) -> list[DataFile]:
    if (folder / "dataset_dict.json").is_file():
        splits = _saved_list(folder / "dataset_dict.json", "splits")
        return _saved(folder / choose_saved(splits, config, split, str(folder)))
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        if config or split:
            raise UserError("a saved data set without splits", f"write {folder}", str(folder), found=config or split)
        return _saved(folder)
    card = read_card(folder / "README.md")
    entries = _usable(str(folder), sorted((e for e in folder.iterdir() if not e.name.startswith(".")), key=str))
    if card.get("configs") or not entries:
        entries = _usable(str(folder), _below(folder), instead=", ".join(sorted(e.name for e in folder.iterdir())[:5]))
    elif below := [file for file in _below(folder) if file.parent != folder and is_data(file.name, SUFFIXES)]:
        here, one = shorten(folder), shorten(below[0].relative_to(folder))
        _warn(
            f"{here}: {len(below):,} data files in folders below it are left out, {one} for one; {here}/**/* names all"
        )
    names = [entry.relative_to(folder).as_posix() for entry in entries]
    chosen = choose(names, card, config, split, str(folder))
    return _one_kind(str(folder), [folder / name for name in chosen])


def choose_saved(splits: list[str], config: str | None, split: str | None, where: str) -> str:
    """The split of a data set that `datasets` saved."""
    shards = {f"data/{name}-00000-of-00001.arrow": name for name in splits}
    return shards[choose(list(shards), {}, config, split, where)[0]]


def _saved(folder: Path) -> list[DataFile]:
    """The files of one split as `Dataset.save_to_disk` wrote them."""
    state = folder / "state.json"
    files = [item.get("filename") if isinstance(item, dict) else None for item in _saved_list(state, "_data_files")]
    for name in files:
        if not isinstance(name, str) or "/" in name or "\\" in name or name.startswith("."):
            raise UserError("not the name of a file", "save the data set again", str(state), found=repr(name))
    return [_file(str(folder / name), folder / name) for name in files if name]


def _saved_list(path: Path, field: str) -> list[Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))[field]
    except (ValueError, KeyError, TypeError, OSError) as error:
        fix = "save the data set again with save_to_disk"
        raise UserError("not what save_to_disk writes", fix, str(path), field=field, found=repr(error)) from error
    if not isinstance(values, list) or not values:
        raise UserError("not a list of names", "save the data set again", str(path), field=field, found=repr(values))
    return values


def _below(root: Path) -> list[Path]:
    """All files under a directory but hidden ones; links to directories are not followed."""
    files: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(files, key=str)


def _usable(path: str, entries: list[Path], instead: str | None = None) -> list[Path]:
    """The data files among `entries`. instead: if given, there must be some, and the error names this if there are
    none."""
    files: list[Path] = []
    left_out: list[str] = []
    for entry in entries:
        if entry.name in METADATA or entry.is_dir():
            continue
        if not is_data(entry.name, SUFFIXES):
            if entry.stem.lower() not in _PAPERS:
                left_out.append(entry.name)
        elif not entry.is_file():
            raise UserError("not a regular file, or a link that leads nowhere", "remove or replace it", str(entry))
        else:
            files.append(entry)
    if not files and (instead is not None or glob.has_magic(path)):
        instead = instead or ", ".join(entry.name for entry in entries[:5]) or "no files"
        raise UserError("no data files here", "name a data file", file=path, found=instead, expected=_EXPECTED)
    if files and left_out:
        more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        _LOG.warning("%s: left out, no kind of data file: %s%s", shorten(path), shorten(", ".join(left_out[:3])), more)
    return files


@lru_cache(maxsize=256)  # the same place is listed more than once
def _warn(sentence: str) -> None:
    _LOG.warning("%s", sentence)


def _one_kind(path: str, files: list[Path]) -> list[DataFile]:
    """The files, all of one kind. Refuses text beside rows, which is nearly always about them, and one name in two
    formats, which are probably the same rows."""
    texts = [file for file in files if split_suffix(file)[0] in TEXT]
    if texts and len(texts) != len(files):
        rows = next(file for file in files if split_suffix(file)[0] not in TEXT)
        problem, named_both = "rows beside plain text: only one kind can be meant", f"{rows.name} and {texts[0].name}"
        raise UserError(problem, f"name the kind, such as {rows.parent}/*{rows.suffix}", path, found=named_both)
    named: dict[str, Path] = {}
    for file in files:
        bare = str(file).lower().removesuffix("".join(split_suffix(file)))
        other = named.setdefault(bare, file)
        if other is not file:
            problem = "one name in two formats, which are probably the same rows"
            fix = f"name one kind, such as {file.parent}/*{file.suffix}, or rename one"
            if path.startswith(PREFIX):
                fix = f"take the hub's own copy: {re.split('[@#]', path)[0]}@{CONVERTED}"
            raise UserError(problem, fix, path, found=f"{other.name} and {file.name}")
    return [DataFile(str(file), file) for file in files]


def _missing(path: str, location: Path) -> UserError:
    parent = location.parent
    if not parent.is_dir():
        return UserError("no such file", f"correct the path: there is no directory {parent}", file=path)
    near = nearest(location.name, sorted(p.name for p in parent.iterdir()))
    return UserError("no such file", f"did you mean {parent / near}?" if near else "correct the path", file=path)
