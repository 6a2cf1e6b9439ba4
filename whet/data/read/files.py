"""What a path of a recipe stands for: one file, a directory, a saved data set, a glob or a hub data set -> its files.

A directory stands for the data files directly in it, or below it when there are none, as the hub lays them out; the
part after a # chooses where there are several splits (DIR#split, DIR#config/split). What could be meant in two ways is
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
from pathlib import Path
from typing import Any

from whet.base.errors import UserError, nearest
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
class Source:
    """One data file. name: as it is shown and recorded; place: where its bytes lie."""

    name: str
    place: Path


def data_files(path: str) -> list[Path]:
    """Where the files lie that one path of a recipe stands for, in the order of reading."""
    return [source.place for source in sources(path)]


def sources(path: str) -> list[Source]:
    """The files of one path, sorted by name whatever the locale or the file system's order; UserError for none."""
    if not path.strip():
        raise UserError("the name of a data file is empty", "name a file, directory or glob", field="data.dataset")
    if path.startswith(PREFIX):
        found = hub_files(path, SUFFIXES, frozenset(TEXT))
        _one_kind(path, [place for _, place in found])
        return [Source(name, place) for name, place in found]
    place = Path(path).expanduser()
    try:
        if place.is_file():
            return [_file(path, place)]
        if place.is_dir():
            return _directory(place, None, None)
        if place.exists():
            raise UserError("not a regular file", "save the data to a file first", file=path)
        if place.is_symlink():
            raise UserError("a symbolic link that leads nowhere", "correct it", path, found=str(place.readlink()))
        folder, mark, choice = path.rpartition("#")
        if mark and (place := Path(folder).expanduser()).is_dir():
            config, _, split = choice.rpartition("/")
            return _directory(place, config or None, split or None)
        place = Path(path).expanduser()
        if glob.has_magic(path):
            found = glob.glob(str(place), recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
            entries = [entry for entry in map(Path, found) if not entry.name.startswith(".")]
            return _one_kind(path, _usable(path, sorted(entries, key=str)))
        raise _missing(path, place)
    except OSError as error:
        raise unreadable(path, error) from error


def split_suffix(place: Path) -> tuple[str, str]:
    """`a.jsonl.xz` -> (".jsonl", ".xz"); the second is empty for a plain file."""
    packing = place.suffix.lower()
    return (Path(place.stem).suffix.lower(), packing) if packing in PACKINGS else (packing, "")


def _file(path: str, place: Path) -> Source:
    suffix, packing = split_suffix(place)
    if suffix + packing in SUFFIXES:
        return Source(str(place), place)
    if suffix in COLUMNS:
        fix = f"unpack it: {suffix} files are packed inside"
    else:
        fix = "convert it to JSONL: " + OBJECT_PER_LINE
    found = f"suffix {suffix + packing or '(none)'}"
    raise UserError("unknown kind of file", fix, file=path, found=found, expected=_EXPECTED)


def _directory(place: Path, config: str | None, split: str | None) -> list[Source]:
    if (place / "dataset_dict.json").is_file():
        splits = _saved_list(place / "dataset_dict.json", "splits")
        return _saved(place / choose_saved(splits, config, split, str(place)))
    if (place / "state.json").is_file() and (place / "dataset_info.json").is_file():
        if config or split:
            raise UserError("a saved data set without splits", f"write {place}", str(place), found=config or split)
        return _saved(place)
    card = read_card(place / "README.md")
    entries = _usable(str(place), sorted((e for e in place.iterdir() if not e.name.startswith(".")), key=str))
    if card.get("configs") or not entries:
        entries = _usable(str(place), _below(place), found=", ".join(sorted(e.name for e in place.iterdir())[:5]))
    names = [entry.relative_to(place).as_posix() for entry in entries]
    chosen = choose(names, card, config, split, str(place))
    return _one_kind(str(place), [place / name for name in chosen])


def choose_saved(splits: list[str], config: str | None, split: str | None, where: str) -> str:
    """The split of a data set that `datasets` saved."""
    shards = {f"data/{name}-00000-of-00001.arrow": name for name in splits}
    return shards[choose(list(shards), {}, config, split, where)[0]]


def _saved(place: Path) -> list[Source]:
    """The files of one split as `Dataset.save_to_disk` wrote them."""
    state = place / "state.json"
    files = [item.get("filename") if isinstance(item, dict) else None for item in _saved_list(state, "_data_files")]
    for name in files:
        if not isinstance(name, str) or "/" in name or "\\" in name or name.startswith("."):
            raise UserError("not the name of a file", "save the data set again", str(state), found=repr(name))
    return [_file(str(place / name), place / name) for name in files if name]


def _saved_list(place: Path, field: str) -> list[Any]:
    try:
        found = json.loads(place.read_text(encoding="utf-8"))[field]
    except (ValueError, KeyError, TypeError, OSError) as error:
        fix = "save the data set again with save_to_disk"
        raise UserError("not what save_to_disk writes", fix, str(place), field=field, found=repr(error)) from error
    if not isinstance(found, list) or not found:
        raise UserError("not a list of names", "save the data set again", str(place), field=field, found=repr(found))
    return found


def _below(place: Path) -> list[Path]:
    """All files under a directory but hidden ones; links to directories are not followed."""
    found: list[Path] = []
    for folder, folders, names in os.walk(place):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(found, key=str)


def _usable(path: str, entries: list[Path], found: str | None = None) -> list[Path]:
    """The data files among `entries`. found: says that there must be some, and what was there instead."""
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
    if not files and (found is not None or glob.has_magic(path)):
        found = found or ", ".join(entry.name for entry in entries[:5]) or "no files"
        raise UserError("no data files here", "name a data file", file=path, found=found, expected=_EXPECTED)
    if files and left_out:
        more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        _LOG.warning("%s: left out, no kind of data file: %s%s", path, ", ".join(left_out[:3]), more)
    return files


def _one_kind(path: str, files: list[Path]) -> list[Source]:
    """Text beside rows is refused, being nearly always about them; so is one name in two formats: the same rows."""
    texts = [file for file in files if split_suffix(file)[0] in TEXT]
    if texts and len(texts) != len(files):
        rows = next(file for file in files if split_suffix(file)[0] not in TEXT)
        problem, found = "rows beside plain text: only one kind can be meant", f"{rows.name} and {texts[0].name}"
        raise UserError(problem, f"name the kind, such as {rows.parent}/*{rows.suffix}", path, found=found)
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
    return [Source(str(file), file) for file in files]


def _missing(path: str, place: Path) -> UserError:
    parent = place.parent
    if not parent.is_dir():
        return UserError("no such file", f"correct the path: there is no directory {parent}", file=path)
    near = nearest(place.name, sorted(p.name for p in parent.iterdir()))
    return UserError("no such file", f"did you mean {parent / near}?" if near else "correct the path", file=path)
