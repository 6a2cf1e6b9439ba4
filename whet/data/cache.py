"""A cache of prepared rows, each entry under a name that is a hash of everything that decides its content.

The name covers the bytes of every data file, the settings of the data, the tokenizer with its template, the versions of
the libraries and the source of this package's data room; so an entry cannot belong to another state, and nothing has to
be invalidated. Every file in an entry is hashed again when it is opened: a damaged entry is built anew. Rows that took
under KEEP_SECONDS to prepare are not cached. Gives up: the data files are read once at every start, about a second for
a gigabyte. `WHET_CACHE` names the directory, or `off`.
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

from whet.base.cache import cache_directory
from whet.base.files import read_json, write_json

KEEP_SECONDS = 2.0
LARGEST_BYTES = 20 << 30  # of all entries together; those not used for longest go first
MANIFEST, NEW = "manifest.json", ".new-"
LEFT_SECONDS = 86_400  # an entry that is unfinished for so long was left by a process that was killed
LIBRARIES = ("tokenizers", "transformers", "jinja2", "numpy")

T = TypeVar("T")


def cached(name: str, make: Callable[[Path], T], save: Callable[[T, Path], dict[str, Any]],
           load: Callable[[Path, dict[str, Any]], T], worth_seconds: float | None = None) -> T:  # fmt: skip
    """Load the entry `name`, or else make its value in a new directory and store it.

    make: gets the directory, in which it may write files already. save: writes the rest of the value there and returns
    plain values for the manifest. load: gets a directory and those plain values, and gives the value back.
    worth_seconds: what took less to make is not stored (KEEP_SECONDS).
    """
    root = _root()
    if root is not None and (facts := _facts(root / name)) is not None:
        return load(root / name, facts)
    # Files that are mapped or open stay readable without a name; where a system forbids that, they stay undeleted.
    with tempfile.TemporaryDirectory(prefix=NEW, dir=root, ignore_cleanup_errors=True) as folder:
        start = time.monotonic()
        value = make(Path(folder))
        worth = KEEP_SECONDS if worth_seconds is None else worth_seconds
        if root is not None and time.monotonic() - start >= worth:
            with contextlib.suppress(OSError):  # a full disk costs the entry and nothing else
                return load(root / name, _keep(root / name, Path(folder), save(value, Path(folder))))
        return value


def name_of(parts: dict[str, Any]) -> str:
    """The entry's name for rows that `parts` (plain values), this code and these libraries decide."""
    state = parts | {"code": _code(), "versions": {name: version(name) for name in LIBRARIES}}
    return hashlib.sha256(json.dumps(state, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _root() -> Path | None:
    """The directory of all entries, or None if nothing is to be cached."""
    place = cache_directory()
    if place is None:
        return None
    root = place / "data"
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


def _keep(entry: Path, folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Rename the finished directory to the entry; another process that was faster wins. Returns the stored facts."""
    files = {path.name: [path.stat().st_size, _sha256(path)] for path in sorted(folder.iterdir())}
    write_json(folder / MANIFEST, {"files": files, "facts": facts, "sha256": _digest(files, facts)})
    with contextlib.suppress(OSError):
        folder.rename(entry)
    stored = _facts(entry)
    if stored is None:
        raise OSError("the entry could not be stored")
    _prune(entry.parent, entry)
    return stored


def _facts(entry: Path) -> dict[str, Any] | None:
    """The plain values in the manifest of a whole and undamaged entry; a damaged one is removed."""
    if not entry.is_dir():
        return None
    try:
        manifest = read_json(entry / MANIFEST)
        if _digest(manifest["files"], manifest["facts"]) != manifest["sha256"]:
            raise ValueError("another manifest than was written")
        whole = all((entry / file).stat().st_size == size for file, (size, _) in manifest["files"].items())
        if whole and all(_sha256(entry / file) == digest for file, (_, digest) in manifest["files"].items()):
            os.utime(entry / MANIFEST)
            return manifest["facts"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    shutil.rmtree(entry, ignore_errors=True)
    return None


def _digest(files: Any, facts: Any) -> str:
    return hashlib.sha256(json.dumps([files, facts], sort_keys=True).encode()).hexdigest()


def _prune(root: Path, keep: Path) -> None:
    """Remove the entries that were not used for longest, until the rest is small enough."""
    for left in root.glob(f"{NEW}*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > LEFT_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
    entries = [(path.stat().st_mtime, path.parent) for path in root.glob(f"*/{MANIFEST}")]
    sizes = {entry: sum(file.stat().st_size for file in entry.iterdir()) for _, entry in entries}
    total = sum(sizes.values())
    for _, entry in sorted(entries, key=lambda pair: pair[0]):
        if total <= LARGEST_BYTES:
            return
        if entry != keep:
            shutil.rmtree(entry, ignore_errors=True)
            total -= sizes[entry]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
