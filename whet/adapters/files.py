"""Descriptions of the adapters and finished runs on a disk, from their files alone: no torch, no model.

A folder is a run that has ended (whatever its method), or an adapter that stands alone. What whet's own methods and
whole models leave has no PEFT config, so a run is described by its recipe, and its scores by `results/`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from whet.base.errors import UserError
from whet.engine.load.headers import adapter_weights
from whet.runs import Run, open_run

CONFIG, WEIGHTS, NOTE = "adapter_config.json", "adapter_model.safetensors", "whet_composed.json"
SHOWN_SCORES = ("accuracy", "exact_match", "spearman", "macro_f1", "rmse", "perplexity")  # the first that there is


@dataclass(frozen=True)
class Described:
    """An adapter on disk, or the model that a run trained whole.

    kind: the method; task: what it was trained for; base: the model that it belongs to; rank: of plain LoRA;
    parameters, bytes: numbers in its files and their size; scores: what `whet eval` measured, by name.
    """

    name: str
    path: Path
    kind: str
    task: str | None
    base: str | None
    rank: int | None
    parameters: int
    bytes: int
    scores: Mapping[str, float] = field(default_factory=dict)


def adapter_directory(target: str | Path) -> Path:
    """The adapter that a run directory or an adapter directory holds. Raises UserError."""
    directory = Path(target)
    for candidate in (directory, directory / "adapter"):
        if (candidate / CONFIG).is_file():
            return candidate
    raise UserError(
        "there is no adapter here", file=str(directory), expected=f"a run of whet train, or a folder with {CONFIG}",
        fix="give runs/NAME, or its adapter/ folder",
    )  # fmt: skip


def describe(target: str | Path) -> Described:
    """The facts about an adapter, read from its files without loading a model. Raises UserError."""
    directory = adapter_directory(target)
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(directory, error) from error
    adapter_weights(directory)
    numbers, size = _numbers(directory, (WEIGHTS,))
    name = directory.parent.name if directory.name == "adapter" else directory.name
    return Described(
        name, directory, str(config.get("peft_type", "?")).lower(), config.get("task_type"),
        config.get("base_model_name_or_path"), config.get("r"), numbers, size,
    )  # fmt: skip


def find(folder: str | Path) -> list[Described]:
    """The finished runs and the adapters in `folder` and one or two levels below it, by path."""
    top = Path(folder)
    if not top.is_dir():
        raise UserError("there is no such folder", file=str(top), fix="give a folder of runs or adapters")
    runs = {file.parent for pattern in ("", "*/", "*/*/") for file in top.glob(f"{pattern}recipe.yaml")}
    alone = {file.parent for pattern in ("", "*/", "*/*/") for file in top.glob(pattern + CONFIG)}
    found = [described for run in runs if (described := _of_run(open_run(run))) is not None]
    found += [describe(place) for place in alone if place.parent not in runs or place.name != "adapter"]
    return sorted(found, key=lambda one: str(one.path))


def _of_run(run: Run) -> Described | None:
    """The facts about a run, or None while it has not ended."""
    if not run.trained.is_dir():
        return None
    numbers, size = _numbers(run.trained, sorted(file.name for file in run.trained.glob("*.safetensors")))
    method = run.recipe.method
    rank = getattr(method, "r", None)
    return Described(
        run.path.name, run.trained, method.name, run.task.peft_type, run.recipe.model.path, rank, numbers, size,
        _scores(run),
    )  # fmt: skip


def _scores(run: Run) -> dict[str, float]:
    """The metrics of the tuned model that `whet eval` wrote, none where it did not run."""
    result = run.read("results/evaluation.json") or {}
    metrics = (result.get("tuned") or {}).get("metrics") or {}
    return {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}


def head_score(scores: Mapping[str, float]) -> str:
    """The first score that a person asks for, as text; nothing where none was measured."""
    name = next((name for name in SHOWN_SCORES if name in scores), next(iter(scores), None))
    return "" if name is None else f"{name} {scores[name]:.3g}"


def _numbers(directory: Path, names: Sequence[str]) -> tuple[int, int]:
    """(numbers, bytes) in files of tensors, from their headers. Raises UserError."""
    from safetensors import SafetensorError, safe_open

    total = size = 0
    for name in names:
        try:
            with safe_open(str(directory / name), "np") as file:
                total += sum(prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
            size += (directory / name).stat().st_size
        except (OSError, SafetensorError) as error:
            raise _unreadable(directory, error) from error
    return total, size


def _unreadable(directory: Path, error: Any) -> UserError:
    return UserError(
        f"the adapter cannot be read: {error}", file=str(directory), expected=f"{CONFIG} and {WEIGHTS}",
        fix="copy it again, whole",
    )  # fmt: skip
