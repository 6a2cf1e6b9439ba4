"""Checkpoints that survive being killed at any moment, and resume to the bit.

A checkpoint is written to a directory of its own beside the others, flushed, given a manifest (size and sha256 of
every file) as the last thing, and renamed. So a directory called step-N is whole, or its manifest says that it is not;
"latest" is the newest one whose manifest holds, never a pointer that could lie. An invalid one is named and passed
over, not deleted. Tensors are safetensors, the rest is JSON: nothing is ever unpickled. Weights have the names that
they have in the adapter, however layers are grouped; the optimiser's state goes by the order of its parameters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from whet.base.content import difference, files_in
from whet.base.errors import UserError
from whet.base.files import read_json, remove_whole, whole_directory, write_json
from whet.base.seed import random_state, restore_random_state
from whet.methods.layers.state import load_trained_state, trained_state
from whet.training.optim import Optimiser

MANIFEST = "manifest.json"
FILES = {"model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"}
FORMAT = 2  # of a checkpoint's files; 1 had no number, and an entry of the optimiser's for each group of layers


@dataclass(frozen=True)
class Identity:
    """What a checkpoint belongs to: hashes of the recipe and of the training rows."""

    recipe: str
    data: str


def save(
    directory: Path,
    step: int,
    model: torch.nn.Module,
    optimiser: Optimiser,
    state: dict[str, Any],
    identity: Identity,
) -> Path:
    """Write checkpoints/step-N of everything that continuing needs; returns it once it is on the disk."""
    target = directory / f"step-{step}"
    random_tensors, random_values = random_state()
    optimiser_tensors, optimiser_values = _flattened(optimiser)
    with whole_directory(target, replace=True) as beside:
        save_file(trainable(model, optimiser), beside / "model.safetensors")
        save_file(optimiser_tensors, beside / "optimizer.safetensors")
        save_file(random_tensors, beside / "random.safetensors")
        values = state | {"step": step, "random": random_values, "optimizer": optimiser_values}
        write_json(beside / "state.json", values)
        whole = {"format": FORMAT, "recipe": identity.recipe, "data": identity.data, "files": files_in(beside)}
        write_json(beside / MANIFEST, whole)
    return target


def latest(directory: Path, identity: Identity) -> tuple[Path | None, list[str]]:
    """The newest valid checkpoint, and a sentence on each newer one that is not.

    Raises UserError when the rows have changed since it was written.
    """
    complaints: list[str] = []
    for path in sorted(directory.glob("step-*"), key=_step_of, reverse=True):
        problem = damage(path)
        if problem is None:
            written = read_json(path / MANIFEST).get("data")
            if written != identity.data:
                raise UserError(
                    "the training rows have changed since this run began", file=str(path), field="data.dataset",
                    found=f"sha256 {identity.data[:16]}…", expected=f"sha256 {str(written)[:16]}…",
                    fix="put the data back, or start a new run with another output_dir",
                )  # fmt: skip
            return path, complaints
        complaints.append(f"{path.name} is not used: {problem}")
    return None, complaints


def load(path: Path, model: torch.nn.Module, optimiser: Optimiser) -> dict[str, Any]:
    """Restore weights, optimiser and every random source from a checkpoint; returns its state."""
    state = read_json(path / "state.json")
    load_weights(path, model, optimiser)
    _unflatten(optimiser, load_file(path / "optimizer.safetensors"), state["optimizer"])
    restore_random_state(load_file(path / "random.safetensors"), state["random"])
    return state


def load_weights(path: Path, model: torch.nn.Module, optimiser: Optimiser | None = None) -> None:
    """Restore the trainable weights alone. optimiser: needed where it holds weights of its own."""
    load_trained_state(
        model, load_file(path / "model.safetensors"), {} if optimiser is None else optimiser.exact_weights
    )
    if optimiser is not None:
        optimiser.follow_weights()


def prune(directory: Path, saved: int, keep: int, protected: Sequence[int]) -> None:
    """Remove all but the newest `keep` checkpoints and the protected steps; call it after step `saved` was saved.

    A later step is one that could not be resumed from: it neither counts nor goes.
    """
    ours = [path for path in directory.glob("step-*") if 0 <= _step_of(path) <= saved and path.is_dir()]
    found = sorted(ours, key=_step_of, reverse=True)
    for path in found[keep:]:
        if _step_of(path) not in protected:
            remove_whole(path)


def trainable(model: torch.nn.Module, optimiser: Optimiser | None = None) -> dict[str, torch.Tensor]:
    """Name to tensor of everything that is trained, as exact as `optimiser` has it (`methods.layers.state`)."""
    return trained_state(model, {} if optimiser is None else optimiser.exact_weights)


def _flattened(optimiser: Optimiser) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Optimiser state as tensors by 'parameter/name', and what is no tensor."""
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    seen: set[int] = set()

    def walk(prefix: str, entries: dict[str, Any]) -> None:
        for name, value in entries.items():
            if isinstance(value, dict):  # bitsandbytes groups the tensors of a quantised moment
                walk(f"{prefix}/{name}", value)
            elif isinstance(value, torch.Tensor):
                # One table of quantiles serves all 8-bit moments; a file wants each name to have its own.
                shared = value.data_ptr() in seen
                seen.add(value.data_ptr())
                tensors[f"{prefix}/{name}"] = value.clone() if shared else value.contiguous()
            else:
                values[f"{prefix}/{name}"] = value

    for index, entries in optimiser.state_dict()["state"].items():
        walk(str(index), entries)
    return tensors, values


def _unflatten(optimiser: Optimiser, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **values}.items():
        index, *groups, name = key.split("/")
        place = state.setdefault(int(index), {})
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = value
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def damage(path: Path) -> str | None:
    """Why a checkpoint cannot be trusted, or None."""
    if _step_of(path) < 0:
        return "its name is no step"
    if not (path / MANIFEST).is_file():
        return "it has no manifest"
    try:
        found = read_json(path / MANIFEST)
        files, written = found["files"], found.get("format", 1)
        if written != FORMAT:
            return f"another version of whet wrote it (format {written}; this one reads {FORMAT})"
        missing = sorted(FILES - set(files))
        return f"its manifest does not name {missing[0]}" if missing else difference(files, path)
    except (ValueError, LookupError, TypeError, AttributeError):
        return "its manifest is damaged"
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"


def _step_of(path: Path) -> int:
    found = re.fullmatch(r"step-(0|[1-9]\d{0,17})", path.name, re.ASCII)
    return int(found[1]) if found else -1
