"""Know a base model and what was trained on it by content, and stop where they are others than they were.

A run records its base when it starts: config, weights and vocabulary, each file by its sha256. What was trained is
sealed: its folder says its own files and that base, so that a copy of the folder alone can be checked as well. Names
and places do not count: a model may move. Gives up: a model of the hub that is not on this machine yet is compared
only after it was fetched; the same weights cut into other files count as other ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from whet.base.content import difference, digest_of, files_in
from whet.base.errors import UserError
from whet.base.files import read_json, write_json
from whet.engine.config import Model
from whet.engine.load.load import locate

SEAL = "whet_files.json"  # in the folder of what was trained
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_NOT_THE_MODEL = ("_name_or_path", "transformers_version")  # of config.json
_VOCABULARY = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model")


def folder_of(path: str, revision: str | None = None) -> Path | None:
    """The folder on this machine that holds the model `path`; None while a model of the hub was not fetched."""
    if path.endswith(".json"):
        return Path(path).expanduser().parent
    source = Path(locate(path))
    if source.is_dir():
        return source
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(path, "config.json", revision=revision or "main")
    return Path(found).parent if isinstance(found, str) else None


def base_identity(model: Model) -> dict[str, Any] | None:
    """Config, weights and vocabulary of a model by content; None while it is not on this machine. Raises OSError."""
    folder = folder_of(model.path, model.revision)
    words = folder_of(model.tokenizer, model.revision) if model.tokenizer else folder
    if folder is None or words is None:
        return None
    name = Path(model.path).name if model.path.endswith(".json") else "config.json"
    config = read_json(folder / name)
    kept = {key: value for key, value in config.items() if key not in _NOT_THE_MODEL}
    weights = [] if model.from_config or model.path.endswith(".json") else weight_files(folder)
    if not all((folder / file).is_file() for file in weights):
        return None
    vocabulary = [file for file in _VOCABULARY if (words / file).is_file()]
    return {
        "config": {"config.json": {"sha256": digest_of(kept)}}, "weights": files_in(folder, weights),
        "vocabulary": files_in(words, vocabulary),
    }  # fmt: skip


def weight_files(folder: Path) -> list[str]:
    """The files of weights in a folder, as transformers would choose them: one, or those that the index names."""
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if not (folder / INDEX).is_file():
        return []
    try:
        return sorted({str(file) for file in read_json(folder / INDEX)["weight_map"].values()})
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise UserError(
            "the index of the weights is damaged", file=str(folder / INDEX), expected='{"weight_map": {…}}',
            fix="fetch the model again",
        ) from error  # fmt: skip


def check_base(model: Model, recorded: Any) -> None:
    """Raise UserError where the model is another one than was recorded; nothing recorded: nothing to compare."""
    now = base_identity(model) if isinstance(recorded, Mapping) else None
    if now is None:
        return
    for part, what in (("config", "config"), ("weights", "weights"), ("vocabulary", "vocabulary")):
        before, files = recorded.get(part), now[part]
        if before == files or not isinstance(before, Mapping):
            continue
        name = next(file for file in sorted({*before, *files}) if before.get(file) != files.get(file))
        old, new = ((side.get(name) or {}).get("sha256") for side in (before, files))
        raise UserError(
            f"the {what} of the base model is not the one that was trained on", file=model.path, field="model.path",
            found=f"{name}: sha256 {new[:16]}…" if new else f"no {name}",
            expected=f"sha256 {old[:16]}…" if old else f"no {name}",
            fix="put back the model that was trained on, or train again on this one",
        )  # fmt: skip


def seal(directory: Path, base: Any) -> None:
    """Write what is in the folder of what was trained, and its base, as the last thing that is written there."""
    write_json(directory / SEAL, {"format": 1, "files": files_in(directory, but=[SEAL]), "base": base})


def seal_digest(directory: Path) -> str | None:
    """What a run remembers of the seal of its own folder."""
    path = directory / SEAL
    return files_in(directory, [SEAL])[SEAL]["sha256"] if path.is_file() else None


def check_sealed(directory: Path, remembered: str | None = None) -> Any:
    """The base that what lies in `directory` was trained on, as recorded; None for a folder of another tool.

    remembered: the digest of the seal, from the run. Raises UserError where any file is not as it was written.
    """
    problem, found = None, None
    if remembered is not None and seal_digest(directory) != remembered:
        there = (directory / SEAL).is_file()
        problem = "it belongs to another run, or was changed" if there else f"{SEAL} is missing"
    elif (directory / SEAL).is_file():
        try:
            found = read_json(directory / SEAL)
            problem = difference(found["files"], directory)
        except (ValueError, LookupError, TypeError):
            problem = f"{SEAL} is damaged"
    if problem:
        raise UserError(
            "what was trained is not as it was written", file=str(directory), found=problem,
            expected="the files as training left them", fix="copy the folder again, whole; or train again",
        )  # fmt: skip
    return None if found is None else found.get("base")
