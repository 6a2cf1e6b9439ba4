"""Prepared rows kept between starts, under a name that is a hash of everything they were made from.

The name covers the bytes of every data file, the settings of the data, the tokenizer with its template, the versions of
the libraries and the source of this package's data room; so what is found under it cannot be of another state, and
nothing has to be invalidated. Every file in an entry is hashed again when it is opened: a damaged entry is made anew.
Entries that took under KEEP_SECONDS to make are not kept. Gives up: the data files are read once at every start, about
a second for a gigabyte. `WHET_CACHE` names the directory, or `off`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from whet.base.files import read_json, write_json

KEEP_SECONDS = 2.0
LARGEST_BYTES = 20 << 30  # of all entries together; those not used for longest go first
MANIFEST, NEW = "manifest.json", ".new-"
LEFT_SECONDS = 86_400  # what is unfinished for so long was left by a process that was killed
LIBRARIES = ("tokenizers", "transformers", "jinja2", "numpy")

T = TypeVar("T")


def cached(name: str, make: Callable[[Path], T], save: Callable[[T, Path], dict[str, Any]],
           load: Callable[[Path, dict[str, Any]], T]) -> T:  # fmt: skip
    """What stands under `name`, else what `make` makes in a directory of its own.

    save: writes the rest of it there and returns what the manifest is to hold; load: the way back.
    """
    root = _root()
    if root is not None and (found := _facts(root / name)) is not None:
        return load(root / name, found)
    # What is mapped or open stays readable without a name; where a system forbids that, its temporary files stay.
    with tempfile.TemporaryDirectory(prefix=NEW, dir=root, ignore_cleanup_errors=True) as place:
        start = time.monotonic()
        made = make(Path(place))
        if root is not None and time.monotonic() - start >= KEEP_SECONDS:
            with contextlib.suppress(OSError):  # a full disk costs the entry and nothing else
                return load(root / name, _keep(root / name, Path(place), save(made, Path(place))))
        return made


def name_of(parts: dict[str, Any]) -> str:
    """The name for rows that are made from `parts` (plain values), by this code and these libraries."""
    state = parts | {"code": _code(), "versions": {name: version(name) for name in LIBRARIES}}
    return hashlib.sha256(json.dumps(state, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _root() -> Path | None:
    """Where entries lie, or None where there are none to be."""
    chosen = os.environ.get("WHET_CACHE", "")
    if chosen.lower() in ("off", "0", "none"):
        return None
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    root = (Path(chosen) if chosen else Path(base) / "whet").expanduser() / "data"
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return None
    return root if os.access(root, os.W_OK) else None


@lru_cache(maxsize=1)
def _code() -> str:
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for path in sorted([*here.rglob("*.py"), *here.rglob("*.jinja"), here.parent / "engine" / "task.py"]):
        digest.update(path.relative_to(here.parent).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _keep(place: Path, made: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Give what was made its name; another process that was faster wins."""
    files = {path.name: [path.stat().st_size, _sha256(path)] for path in sorted(made.iterdir())}
    write_json(made / MANIFEST, {"files": files, "facts": facts, "sha256": _of(files, facts)})
    with contextlib.suppress(OSError):
        made.rename(place)
    found = _facts(place)
    if found is None:
        raise OSError("the entry could not be kept")
    _prune(place.parent, place)
    return found


def _facts(place: Path) -> dict[str, Any] | None:
    """What the manifest of a whole and undamaged entry holds; a damaged one is removed."""
    if not place.is_dir():
        return None
    try:
        manifest = read_json(place / MANIFEST)
        if _of(manifest["files"], manifest["facts"]) != manifest["sha256"]:
            raise ValueError("another manifest than was written")
        whole = all((place / file).stat().st_size == size for file, (size, _) in manifest["files"].items())
        if whole and all(_sha256(place / file) == digest for file, (_, digest) in manifest["files"].items()):
            os.utime(place / MANIFEST)
            return manifest["facts"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    shutil.rmtree(place, ignore_errors=True)
    return None


def _of(files: Any, facts: Any) -> str:
    return hashlib.sha256(json.dumps([files, facts], sort_keys=True).encode()).hexdigest()


def _prune(root: Path, keep: Path) -> None:
    """Remove the entries that were not used for longest, until the rest is small enough."""
    for left in root.glob(f"{NEW}*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > LEFT_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
    entries = [(path.stat().st_mtime, path.parent) for path in root.glob(f"*/{MANIFEST}")]
    sizes = {place: sum(file.stat().st_size for file in place.iterdir()) for _, place in entries}
    total = sum(sizes.values())
    for _, place in sorted(entries, key=lambda entry: entry[0]):
        if total <= LARGEST_BYTES:
            return
        if place != keep:
            shutil.rmtree(place, ignore_errors=True)
            total -= sizes[place]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
