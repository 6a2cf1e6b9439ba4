"""Choose the files of a directory or a hub data set that hold its rows, by configuration and split.

The rules are those of the hub: a README.md whose head lists `configs`, else files named data/SPLIT-00000-of-00001.*,
else directories or files whose names hold a word for a split, else everything is `train`. Two rules differ, because
rows would be left out without notice: among several splits one must be chosen, and files that belong to no split while
others do are refused unless a split is chosen. Names come from a listing and patterns are only compared with it, so a
README cannot point outside.
Source: the hub's pages "File names and splits" and "Data files configuration".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Any

from whet.base.errors import UserError, nearest

METADATA = frozenset(
    ("README.md", "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
)
CONVERTED = "refs/convert/parquet"
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SHARD = re.compile(r"data/(.+?)-[0-9]{5}-of-[0-9]{5}[^/]*\.[^/]*")

Splits = dict[str, list[str]]


def choose(names: Sequence[str], card: dict[str, Any], config: str | None, split: str | None, where: str) -> list[str]:
    """The names that `config` and `split` (None: the only one) stand for, sorted.

    names: paths of data files below `where`, with /; card: the head of README.md as a mapping, may be empty.
    """
    if card.get("configs"):
        entry = _config(card["configs"], config, where)
        splits, rest = _listed(entry, names, f"{where}/README.md"), []
    else:
        if config is not None:
            raise UserError("there are no configurations here", "remove its name", where, found=config)
        splits = splits_of(names)
        rest = sorted(set(names).difference(*splits.values()))
    return _split(splits, rest, split, where)


def converted(names: Sequence[str], config: str | None, split: str | None, where: str) -> list[str]:
    """Choose among the hub's own Parquet copies, which lie in CONFIG/SPLIT/0000.parquet; as `choose`."""
    configs = sorted({name.partition("/")[0] for name in names if name.count("/") >= 2})
    chosen = _one("configuration", configs, config, where, "#{}/SPLIT")
    below = [name for name in names if name.startswith(f"{chosen}/")]
    splits: Splits = {}
    for name in below:
        splits.setdefault(name.split("/")[1], []).append(name)
    return _split(splits, [], split, where)


def splits_of(names: Sequence[str]) -> Splits:
    """Split -> names, as the names alone tell; files that fit no split are in none, unless all of them do not."""
    shards: Splits = {}
    for name in names:
        if match := _SHARD.fullmatch(name):
            shards.setdefault(match[1], []).append(name)
    if shards:
        return {split: sorted(fitting) for split, fitting in shards.items()}
    for part in (lambda name: name.split("/")[:-1], lambda name: name.split("/")[-1:]):
        splits: Splits = {}
        for name in names:
            fitting = [split for split, words in _WORDS.items() if any(_has_word(p, words) for p in part(name))]
            for split in fitting:
                splits.setdefault(split, []).append(name)
        if splits:
            return {split: sorted(splits[split]) for split in _WORDS if split in splits}
    return {"train": sorted(names)}


def _has_word(part: str, words: Iterable[str]) -> bool:
    return any(word in words for word in re.split(r"[-._ 0-9]+", part))


def _config(configs: Any, wanted: str | None, where: str) -> dict[str, Any]:
    """The wanted entry of `configs`, else the one that is marked or named default, else the only one."""
    card = f"{where}/README.md"
    if not isinstance(configs, list) or not all(isinstance(entry, dict) for entry in configs):
        raise UserError("configs is not a list of mappings", "correct the head of README.md", card, field="configs")
    named = {str(entry.get("config_name", "default")): entry for entry in configs}
    marked = [name for name, entry in named.items() if entry.get("default") is True or name == "default"]
    chosen = marked[0] if wanted is None and marked else _one("configuration", list(named), wanted, where, "#{}/SPLIT")
    return named[chosen]


def _listed(entry: dict[str, Any], names: Sequence[str], card: str) -> Splits:
    """Split -> names for the patterns of one configuration."""
    folder = str(entry.get("data_dir") or "").strip("/")
    inside = [name for name in names if not folder or name.startswith(f"{folder}/")]
    given = entry.get("data_files")
    if given is None:
        return splits_of(inside)
    if isinstance(given, list) and given and all(isinstance(item, dict) for item in given):
        given = {str(item.get("split", "train")): item.get("path", []) for item in given}
    patterns = given if isinstance(given, dict) else {"train": given}
    splits: Splits = {}
    for split, wanted in patterns.items():
        for pattern in [wanted] if isinstance(wanted, str) else wanted:
            test = _matcher(f"{folder}/{pattern}" if folder else str(pattern))
            matches = sorted(name for name in names if test.fullmatch(name))
            if not matches:
                fix = "correct the pattern, or add the files"
                raise UserError("no file fits a pattern", fix, card, field=f"configs.data_files.{split}", found=pattern)
            splits.setdefault(str(split), []).extend(matches)
    return {split: list(dict.fromkeys(matches)) for split, matches in splits.items()}


def _split(splits: Splits, rest: list[str], wanted: str | None, where: str) -> list[str]:
    if wanted is None and rest and len(splits) == 1 and splits[next(iter(splits))]:
        split, first = next((split, names[0]) for split, names in splits.items())
        raise UserError(
            "some files here belong to a split by their names and others to none", found=f"{first} and {rest[0]}",
            file=where, fix=f"write {where}#{split} for {first} alone, or name the files",
        )  # fmt: skip
    return splits[_one("split", list(splits), wanted, where, "#{}")]


def _one(what: str, choices: list[str], wanted: str | None, where: str, form: str) -> str:
    """The wanted choice, or the only one. Raises UserError."""
    if wanted in choices:
        return str(wanted)
    if wanted is None and len(choices) == 1:
        return choices[0]
    fix = f"write {where}{form.format(nearest(wanted or '', choices) or (choices or ['NAME'])[0])}"
    problem = f"there is no such {what}" if wanted is not None else f"there are several {what}s, and none is chosen"
    raise UserError(problem, fix, where, found=wanted or ", ".join(choices), expected=" or ".join(choices) or None)


def _matcher(pattern: str) -> re.Pattern[str]:
    """A pattern for a glob over paths: * and ? stay inside one name, ** crosses directories."""
    expression, at = "", 0
    pattern = str(PurePosixPath(pattern))
    while at < len(pattern):
        if pattern.startswith("**/", at):
            expression, at = expression + "(?:.*/)?", at + 3
        elif pattern.startswith("**", at):
            expression, at = expression + ".*", at + 2
        elif pattern[at] == "*":
            expression, at = expression + "[^/]*", at + 1
        elif pattern[at] == "?":
            expression, at = expression + "[^/]", at + 1
        elif pattern[at] == "[" and (end := pattern.find("]", at + 2)) > 0:
            inside = pattern[at + 1 : end].replace("\\", "\\\\")
            expression, at = expression + (f"[^{inside[1:]}]" if inside[0] in "!^" else f"[{inside}]"), end + 1
        else:
            expression, at = expression + re.escape(pattern[at]), at + 1
    try:
        return re.compile(expression)
    except re.error:  # such as the range [z-a], which fits nothing
        return re.compile(re.escape(pattern))
