"""Fetch data sets of the Hugging Face hub to the local cache, as files.

`hub:owner/name`, `hub:owner/name@revision`, `hub:owner/name#split`, `hub:owner/name#config/split`: after the @ a
branch, tag or commit, after the # the configuration and split. The files are stored in the hub's own cache under their
commit, so a second start needs no network, and they are read by the same readers as local files. Only data files are
fetched: no code of a data set is ever run, and a data set that is nothing but a loading script is refused.

The library `datasets` is not used to read, because it guesses: its CSV reader makes null of the text "NA" and a number
of "0012", and its errors name neither file nor row. Gives up: rows are not read while they are still being fetched.
"""

from __future__ import annotations

import glob
import logging
import re
from pathlib import Path, PurePosixPath
from typing import Any

from whet.base.errors import UserError
from whet.base.network import is_offline
from whet.data.read.layout import CONVERTED, METADATA, choose, converted

PREFIX = "hub:"
_LOG = logging.getLogger(__name__)
_SPEC = re.compile(r"hub:([^@#\s]+)(?:@([^#\s]+))?(?:#(?:(.+)/)?([^/]*))?")
_FORM = "hub:owner/name, with @revision, #split or #config/split after it"


def hub_files(spec: str, suffixes: frozenset[str], texts: frozenset[str]) -> list[tuple[str, Path]]:
    """(hub:owner/name@commit/path, local path) of every file that `spec` stands for, fetched if need be.

    suffixes: of data files; texts: of those that hold plain text, which beside rows is about them and left out. Raises
    UserError for files that the hub does not have, and offline for those that the cache does not have.
    """
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise UserError("not the name of a hub data set", f"write {_FORM}", field="data.dataset", found=spec)
    repo, revision, config, split = match[1], match[2], match[3] or None, match[4] or None
    folder, names = _fetched(spec, repo, revision, ["README.md"])
    data = sorted(name for name in names if is_data(name, suffixes) and name.rpartition("/")[2] not in METADATA)
    rows = [name for name in data if texts.isdisjoint(PurePosixPath(name.lower()).suffixes)]
    if rows and len(rows) < len(data):
        _LOG.warning(
            "%s: plain text beside rows is left out: %s", spec, ", ".join(sorted(set(data).difference(rows))[:3])
        )
    data = rows or data
    if not data:
        scripts = [name for name in names if name.endswith(".py")]
        fix = f"try hub:{repo}@{CONVERTED}" if scripts else "choose a data set with files of rows"
        problem = "a data set that is made by a script, and whet runs none" if scripts else "no data files here"
        raise UserError(problem, fix, spec, found=", ".join(names[:5]) or "no files")
    where = spec.partition("#")[0]
    if revision == CONVERTED:
        chosen = converted(data, config, split, where)
    else:
        chosen = choose(data, read_card(folder / "README.md"), config, split, where)
    folder, _ = _fetched(spec, repo, folder.name, [glob.escape(name) for name in chosen])
    return [(f"{PREFIX}{repo}@{folder.name[:12]}/{name}", folder / name) for name in chosen]


def is_data(name: str, suffixes: frozenset[str]) -> bool:
    """True if a path inside a data set ends like a file of rows and is not hidden; packings are part of `suffixes`."""
    parts = name.split("/")
    return not any(part.startswith((".", "__")) for part in parts) and parts[-1].lower().endswith(tuple(suffixes))


def read_card(path: Path) -> dict[str, Any]:
    """The head of a README.md as a mapping; empty when it has none that tells where rows are."""
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("README.md cannot be read", "save it as UTF-8", str(path), found=str(error)) from error
    if not text.startswith("---") or "configs:" not in text:
        return {}
    from huggingface_hub.repocard import metadata_load
    from yaml import YAMLError

    try:
        return metadata_load(path) or {}
    except (YAMLError, ValueError) as error:
        raise UserError("the head of README.md is not YAML", "correct it", str(path), found=str(error)) from error


def _fetched(spec: str, repo: str, revision: str | None, patterns: list[str]) -> tuple[Path, list[str]]:
    """(the folder of the commit in the cache with all files of `patterns`, the names of all files of the commit)."""
    from httpx import HTTPError
    from huggingface_hub import errors, get_cached_repo_tree, snapshot_download

    offline = is_offline()
    try:
        folder = snapshot_download(
            repo, repo_type="dataset", revision=revision, allow_patterns=patterns, local_files_only=offline
        )
        tree = get_cached_repo_tree(repo, repo_type="dataset", revision=Path(folder).name)
    except errors.HFValidationError as error:
        raise UserError("not the name of a hub data set", f"write {_FORM}", spec, found=repo) from error
    except errors.GatedRepoError as error:
        fix = f"accept its terms at https://huggingface.co/datasets/{repo}, then: hf auth login"
        raise UserError("the data set is gated", fix, spec) from error
    except errors.RepositoryNotFoundError as error:
        fix = "correct the name; for a private data set: hf auth login"
        raise UserError("the hub has no such data set", fix, spec, found=repo) from error
    except errors.RevisionNotFoundError as error:
        raise UserError("the data set has no such revision", "correct it", spec, found=revision) from error
    except (errors.LocalEntryNotFoundError, errors.CachedRepoTreeNotFoundError, errors.OfflineModeIsEnabled) as error:
        problem = "not in the local cache, or only in part" + (", and whet is offline" if offline else "")
        fix = "run once without --offline" if offline else "check the connection to the hub"
        missing = None if patterns == ["README.md"] else ", ".join(patterns[:3])
        raise UserError(problem, fix, spec, expected=missing) from error
    except (HTTPError, OSError) as error:
        raise UserError("the hub cannot be reached", "check the connection", spec, found=str(error)) from error
    return Path(folder), [file.path for file in tree]
