"""What Python gives in place of files: rows, and a model that is loaded already, written where a recipe can name them.

A run has to be able to go on tomorrow, and to know its data and its base by content; so what is given is written once,
beside the run directory, under a name that holds the hash of its content. The same call finds the same names and
continues the run. Gives up: the disk space of a copy.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from whet.base.errors import UserError
from whet.base.files import hidden_beside, sync, whole_directory

_ROWS = "a list of dicts, a datasets.Dataset, a pandas DataFrame or a pyarrow Table"
DATASETS = ("dataset", "eval_dataset", "test_dataset", "replay_dataset", "added_dataset", "benchmarks")


def settings_of(tree: Mapping[str, Any]) -> list[str]:
    """A recipe as nested dict or dotted paths, as settings in the words of the command line.

    Rows and models in it are written to files and named instead. Raises UserError for what cannot be written.
    """
    return [f"{path}={_text(path, value)}" for path, value in _named(tree).items()]


def _text(path: str, value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain_value)
    except (TypeError, ValueError) as error:
        raise UserError(
            "a setting is text, a finite number, true, false, a list or a mapping", field=path,
            found=type(value).__name__, fix="write a plain value",
        ) from error  # fmt: skip


def _plain_value(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return _plain(value)


def _named(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with rows and models written to files."""
    tree = {name: dict(part) if isinstance(part, Mapping) else part for name, part in tree.items()}
    beside = str(tree.get("output_dir") or "runs/run")
    model, tokenizer = _taken(tree, "model", "path"), _taken(tree, "model", "tokenizer") or tree.pop("tokenizer", None)
    if is_model(model):
        _put(tree, "model", "path", str(write_model(model, tokenizer, Path(beside))))
    else:
        for name, value in (("path", model), ("tokenizer", tokenizer)):
            if value is not None:
                _put(tree, "model", name, value)
    for name in DATASETS:
        value = _taken(tree, "data", name)
        if value is None:
            continue
        rows = rows_of(value, f"data.{name}")
        _put(tree, "data", name, value if rows is None else str(write_rows(rows, Path(beside), f"data.{name}")))
    return tree


def _taken(tree: dict[str, Any], section: str, name: str) -> Any:
    """A setting, removed from wherever it stands: dotted, in its section, or the section itself for its first one."""
    inside = tree.get(section)
    if isinstance(inside, dict):
        value = inside.pop(name, None)
        return tree.pop(f"{section}.{name}", value)
    if inside is not None and name in ("path", "dataset"):
        return tree.pop(section)
    return tree.pop(f"{section}.{name}", None)


def _put(tree: dict[str, Any], section: str, name: str, value: Any) -> None:
    if isinstance(tree.get(section), dict):
        tree[section][name] = value
    else:
        tree[f"{section}.{name}"] = value


def _library(value: Any) -> str:
    return type(value).__module__.partition(".")[0]


def rows_of(value: Any, field: str) -> Iterable[Mapping[str, Any]] | None:
    """The rows that `value` holds; None where it names files. Raises UserError for what is neither."""
    library = _library(value)
    if isinstance(value, str | Path):
        return None
    if isinstance(value, list | tuple):
        if value and all(isinstance(one, str | Path) for one in value):
            return None
        return value
    if library == "datasets" and isinstance(value, Mapping):
        raise UserError(
            "a data set of several splits", field=field, found=", ".join(map(str, value)), expected="one split",
            fix=f'{field}=dataset["{next(iter(value), "train")}"]',
        )  # fmt: skip
    if library == "datasets":
        return _of_dataset(value)
    if library == "pandas" and hasattr(value, "to_dict"):
        return value.to_dict(orient="records")
    if library == "pyarrow" and hasattr(value, "to_pylist"):
        return value.to_pylist()
    raise UserError("no rows", field=field, found=type(value).__name__, expected=_ROWS, fix=f"give {_ROWS}")


def files_of_rows(value: Any, beside: Path) -> list[str]:
    """The files that `value` names, or one that its rows are written to. Raises UserError."""
    rows = rows_of(value, "data")
    if rows is not None:
        return [str(write_rows(rows, beside, "data"))]
    return [str(value)] if isinstance(value, str | Path) else [str(one) for one in value]


def _of_dataset(dataset: Any) -> Iterator[dict[str, Any]]:
    """The rows of a datasets.Dataset, with the names of its classes instead of their numbers."""
    features = getattr(dataset, "features", None) or {}
    names = {name: feature for name, feature in features.items() if hasattr(feature, "int2str")}
    for row in dataset:
        numbers = {name: row[name] for name in names if isinstance(row.get(name), int) and row[name] >= 0}
        yield row | {name: names[name].int2str(number) for name, number in numbers.items()}


def write_rows(rows: Iterable[Mapping[str, Any]], beside: Path, field: str) -> Path:
    """Write rows as JSON lines to `beside`.rows/HASH.jsonl. Raises UserError with row and column."""
    folder = beside.with_name(f"{beside.name}.rows")
    folder.mkdir(parents=True, exist_ok=True)
    digest, count = hashlib.sha256(), 0
    unfinished = hidden_beside(folder / field)
    try:
        with unfinished.open("wb") as file:
            for count, row in enumerate(rows, 1):
                line = (json.dumps(_plain_row(row, count, field), ensure_ascii=False) + "\n").encode()
                digest.update(line)
                file.write(line)
            file.flush()
            os.fsync(file.fileno())
        if not count:
            raise UserError("there are no rows", field=field, found="nothing", expected=_ROWS, fix="give one at least")
        place = folder / f"{digest.hexdigest()[:16]}.jsonl"
        unfinished.replace(place)
        sync(folder)
        return place
    finally:
        unfinished.unlink(missing_ok=True)


def _plain_row(row: Any, number: int, field: str) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        raise UserError(
            "a row is a dict", row=number, field=field, found=f"{row!r} ({type(row).__name__})",
            expected='{"prompt": "...", "completion": "..."}', fix="give dicts alone",
        )  # fmt: skip
    plain = {}
    for name, value in row.items():
        try:
            value = _plain(value)
        except TypeError as error:
            raise UserError(
                "a value that is no text, number, list or dict", row=number, field=f"{field}.{name}",
                found=type(value).__name__, fix="remove the column, or turn it into text",
            ) from error  # fmt: skip
        if value is not None:
            plain[str(name)] = value
    return plain


def _plain(value: Any) -> Any:
    """A value as JSON has it: numbers and arrays of numpy as Python's, a missing value (NaN, NaT) as None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if type(value).__name__ in ("NAType", "NaTType"):
        return None
    raise TypeError(type(value).__name__)


def is_model(value: Any) -> bool:
    """True for a loaded model of transformers, or PEFT's around one."""
    return hasattr(value, "save_pretrained") and hasattr(value, "parameters")


def write_model(model: Any, tokenizer: Any, beside: Path) -> Path:
    """Write a loaded model and its tokenizer to `beside`.base-HASH. Raises UserError."""
    if hasattr(model, "peft_config"):
        raise UserError(
            "the model has an adapter already", field="model", found=type(model).__name__, expected="a plain model",
            fix="model.merge_and_unload() gives one",
        )  # fmt: skip
    if not hasattr(tokenizer, "save_pretrained"):
        raise UserError(
            "a loaded model comes with its tokenizer", field="tokenizer", found=type(tokenizer).__name__,
            expected="a tokenizer of transformers", fix="whet.train(model=model, tokenizer=tokenizer, ...)",
        )  # fmt: skip
    place = beside.with_name(f"{beside.name}.base-{_digest(model, tokenizer)}")
    if not (place / "config.json").is_file():
        place.parent.mkdir(parents=True, exist_ok=True)
        with whole_directory(place) as folder:
            model.save_pretrained(str(folder))
            tokenizer.save_pretrained(str(folder))
    return place


def _digest(model: Any, tokenizer: Any) -> str:
    """The content of weights, config and tokenizer in 12 hex digits."""
    import torch

    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    digest.update(str(tokenizer.chat_template).encode())
    return digest.hexdigest()[:12]
