"""Read the headers of weights before a model is built: a damaged or foreign file is named at once, not after minutes.

A safetensors file says in its first bytes which tensors it holds, of which type and shape, and where. Here that is
held against the size of the file, against itself, and against the model that the config describes. Names that
transformers changes while it reads are left to its loader, which refuses what is missing as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from whet.base.errors import UserError
from whet.base.private import ignored_extras
from whet.engine.config import Model
from whet.engine.load.identity import INDEX, folder_of, weight_files
from whet.engine.task import CAUSAL, Task, head_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LONGEST_HEADER = 100 << 20  # bytes; safetensors' own limit
BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
TRAINABLE = ("F64", "F32", "F16", "BF16")
INDICES = ("I64", "I32")
_FETCH = "the file is damaged or was not copied whole; fetch it again"


class Stored(NamedTuple):
    """A tensor as a header describes it."""

    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, Stored]:
    """Name to type and shape of every tensor in a safetensors file. UserError where the file is not whole or sound."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = int.from_bytes(first, "little")
        if first == b"version ":
            raise _damaged(path, "a pointer of git-lfs", "git lfs pull fetches the weights")
        if len(first) < 8 or length > min(size - 8, LONGEST_HEADER):
            raise _damaged(path, f"{size} bytes, and a header of {length}" if len(first) == 8 else f"{size} bytes")
        text = file.read(length)
    try:
        entries = dict(json.loads(text, object_pairs_hook=_without_doubles))
        entries.pop("__metadata__", None)
        spans = {name: _span(entry) for name, entry in entries.items()}
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"its header is none: {error}") from error
    at = 0
    for name, (begin, end, _) in sorted(spans.items(), key=lambda item: item[1][:2]):
        if begin != at:
            raise _damaged(path, f"{name} begins at byte {begin}, not at {at}")
        at = end
    if at != size - 8 - length:
        raise _damaged(path, f"{size - 8 - length} bytes of weights, but the header describes {at}")
    return {name: stored for name, (_, _, stored) in spans.items()}


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} stands there twice")
    return found


def _span(entry: Any) -> tuple[int, int, Stored]:
    dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"sizes that are none: {shape}, {begin} to {end}")
    if dtype in BYTES and end - begin != prod(shape) * BYTES[dtype]:
        raise ValueError(f"{dtype} {list(shape)} in {end - begin} bytes")
    return begin, end, Stored(str(dtype), shape)


def _damaged(path: Path, found: str, fix: str = _FETCH) -> UserError:
    return UserError(
        "the weights are damaged", file=str(path), found=found, expected="a whole safetensors file", fix=fix
    )


def check_checkpoint(model: Model, task: Task = CAUSAL, *, plain: bool = True) -> None:
    """Hold the files of a model's weights against its config. UserError for the first fault; reads headers only.

    plain: no format of quantised weights. A model of the hub that is not on this machine yet is left to the loader.
    """
    folder = folder_of(model.path, model.revision)
    if folder is None or model.from_config or model.path.endswith(".json"):
        return
    names = weight_files(folder)
    if not names and list(folder.glob("*.bin")):
        raise UserError(
            "the weights are pickles, which may run any program when they are opened", file=str(folder),
            field="model.path", found=sorted(path.name for path in folder.glob("*.bin"))[0],
            expected="model.safetensors", fix="save it once with transformers' save_pretrained, where you trust it",
        )  # fmt: skip
    states = [(name, (folder / name).stat()) for name in (*names, "config.json") if (folder / name).is_file()]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(names)} files of weights are missing", file=str(folder), found=missing[0],
            expected=f"every file that {INDEX} names", fix="fetch the model again, whole",
        )  # fmt: skip
    key = tuple((name, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns) for name, state in states)
    _check_once(folder, key, replace(model, new_tokens=[]).path, model.revision, task, plain)


@lru_cache(maxsize=64)
def _check_once(folder: Path, state: Any, path: str, revision: str | None, task: Task, plain: bool) -> None:
    """The check of files that are in a `state`: a model is opened many times, and its files read once."""
    from whet.engine.load.load import empty_model

    headers = [read_header(folder / name) for name, *_ in state if name.endswith(".safetensors")]
    stored = {name: tensor for header in headers for name, tensor in header.items()}
    network = empty_model(Model(path=path, revision=revision), task=task)
    if plain and stored:
        _check_tensors(folder, network, stored)


def _check_tensors(folder: Path, network: PreTrainedModel, stored: Mapping[str, Stored]) -> None:
    """Shapes, types, layers that are too many or missing, doubled prefixes: of names that need no conversion."""
    from whet.engine.load.stream import refuse_misfits

    new = tuple(f"{name}." for name in head_names(network))
    wanted = {
        name: parameter for name, parameter in network.named_parameters(remove_duplicate=False)
        if not name.startswith(new)
    }  # fmt: skip
    prefix = f"{network.base_model_prefix}."
    doubled = sorted(one for one in stored if one.startswith(2 * prefix) and one.removeprefix(prefix) in wanted)
    if doubled:
        raise UserError(
            f"{len(doubled)} tensors have their prefix twice", file=str(folder), field="model.path", found=doubled[0],
            expected=doubled[0].removeprefix(prefix), fix="save the model again from where it was loaded right",
        )  # fmt: skip
    names = {one: name for name in wanted for one in _spellings(name, prefix) if one in stored}
    shapes = {names[one]: (stored[one].shape, tuple(wanted[names[one]].shape)) for one in names}
    kinds = {_kind(name) for name in names.values()}
    tied = {*network.all_tied_weights_keys, *network.all_tied_weights_keys.values()}
    absent = set(wanted) - set(names.values()) - tied
    refuse_misfits(str(folder), shapes, {name for name in absent if _kind(name) in kinds})  # type: ignore[arg-type]
    others = [one for one in names if stored[one].dtype not in TRAINABLE]
    if others:
        raise UserError(
            "weights of a plain model have a type that is no number of arithmetic", file=str(folder),
            field="model.path", found=f"{others[0]}: {stored[others[0]].dtype}", expected=", ".join(TRAINABLE),
            fix="give the model that it was made from",
        )  # fmt: skip
    extra = sorted(set(stored) - set(names) - set(network.state_dict()))
    _check_layers(folder, network, [one for one in extra if not one.startswith(new)], kinds)


def _spellings(name: str, prefix: str) -> tuple[str, ...]:
    """A weight's name in checkpoints of the model with its head, and without."""
    return (name, name.removeprefix(prefix)) if name.startswith(prefix) else (name, prefix + name)


def _check_layers(folder: Path, network: PreTrainedModel, extra: Iterable[str], kinds: set[str]) -> None:
    """Refuse tensors of layers beyond those of the config; an architecture may leave some out on purpose."""
    ignored = ignored_extras(network)
    if getattr(network.config.get_text_config(), "num_nextn_predict_layers", None):
        ignored.append(r"\.layers\.\d+\.")  # layers that guess further tokens stand behind the others
    prefix = f"{network.base_model_prefix}."
    for one in extra:
        known = any(_kind(spelt) in kinds for spelt in _spellings(one, prefix))
        if known and not any(re.search(pattern, one) for pattern in ignored):
            raise UserError(
                "the weights have layers that the config does not know", file=str(folder), field="model.path",
                found=one, expected="as many layers as config.json says",
                fix="fetch the model again: its config and its weights are of one kind",
            )  # fmt: skip


def _kind(name: str) -> str:
    """The name of a tensor whatever its layer."""
    return re.sub(r"\.\d+\.", ".*.", name)


def check_trained_tensors(path: Path, *, numbers: bool = True) -> None:
    """UserError for a file of trained tensors that is damaged, or holds a number that is none.

    numbers: every tensor has a type of arithmetic, but for the indices that some methods keep.
    """
    import torch
    from safetensors import safe_open

    stored = read_header(path)
    others = [name for name, one in stored.items() if one.dtype not in (*TRAINABLE, *INDICES)]
    if numbers and others:
        raise _damaged(path, f"{others[0]} of type {stored[others[0]].dtype}")
    with safe_open(str(path), "pt") as file:
        for name in stored:
            if stored[name].dtype in TRAINABLE and not bool(torch.isfinite(file.get_tensor(name)).all()):
                raise UserError(
                    "what was trained holds numbers that are none", file=str(path), field=name, found="NaN or infinity",
                    expected="finite numbers", fix="copy it again, whole, or train again",
                )  # fmt: skip


def adapter_weights(directory: Path) -> Path:
    """The weights of an adapter. Raises UserError where they are absent or a pickle."""
    weights = directory / "adapter_model.safetensors"
    if weights.is_file():
        return weights
    pickled = (directory / "adapter_model.bin").is_file()
    raise UserError(
        "the adapter is a pickle, which may run any program when it is opened" if pickled else
        "the weights of the adapter are missing", file=str(directory),
        found="adapter_model.bin" if pickled else "no adapter_model.safetensors", expected="adapter_model.safetensors",
        fix="save it once as safetensors, where you trust it" if pickled else "copy the adapter again, whole",
    )  # fmt: skip
