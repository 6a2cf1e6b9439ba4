"""Training that goes on from an adapter: a recipe takes its method, model and tokenizer from the adapter's files.

An adapter of whet's or of anybody's who used PEFT is a start like any other: its numbers are those of step 0, the
optimiser is new, and the run that comes of it saves a whole adapter on the same base. What the recipe says of the
method must agree with the adapter; what it leaves out is the adapter's. Which files were the start is kept by hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from whet.adapters.files import CONFIG
from whet.adapters.folder import own_tokenizer
from whet.adapters.loaded import base_of
from whet.base.errors import UserError
from whet.engine.config import Model
from whet.methods.from_peft import OWN, check_trainable, disagreement, method_settings
from whet.recipe import Parsed, Recipe, from_tree, to_tree
from whet.runs import Run, open_run, task_in

START = "start.json"


def with_starting_adapter(parsed: Parsed) -> Parsed:
    """The recipe with what it takes from `model.adapter`, if it names one. Raises UserError where they disagree."""
    recipe = parsed.recipe
    if recipe.model.adapter is None:
        return parsed
    directory = start_directory(recipe.model.adapter)
    check_trainable(directory)
    settings = method_settings(directory)
    tree = to_tree(recipe)
    if "method.name" in parsed.origins and recipe.method.name != settings["name"]:
        raise _other("method.name", recipe.method.name, settings["name"])
    given = _given(tree["method"], parsed.origins)
    if (found := disagreement(given, settings)) is not None:
        raise _other(f"method.{found[0]}", found[1], found[2])
    own = {name: value for name, value in given.items() if name not in settings or name == "lora_dropout"}
    model, said = _model(recipe.model, parsed.origins, directory)
    tree["model"] = to_tree(replace(recipe, model=model))["model"]
    try:
        started = from_tree(tree | {"method": own | settings | _kept(own)})
    except UserError as error:
        raise replace(error, file=str(directory)) from error
    return Parsed(started, parsed.origins, [*parsed.notes, *said])


def start_directory(target: str) -> Path:
    """The folder of the adapter that training goes on from. Raises UserError."""
    place = Path(target).expanduser()
    if (place / "recipe.yaml").is_file():
        run = open_run(place)
        _check_adapter(run)
        place = run.adapter
    if any((place / name).is_file() for name in (CONFIG, OWN)):
        return place
    raise UserError(
        "there is no adapter here to train further", file=str(place), field="model.adapter", found=target,
        expected=f"a finished run, or a folder with {CONFIG}",
        fix="a whole model is trained further with model.path" if (place / "config.json").is_file() else
        "give runs/NAME, or the folder that PEFT wrote",
    )  # fmt: skip


def start_facts(recipe: Recipe) -> dict[str, Any]:
    """The place of the adapter that a run went on from, and the hashes of its files; {} for none."""
    if recipe.model.adapter is None:
        return {}
    directory = start_directory(recipe.model.adapter)
    files = sorted(file for file in directory.iterdir() if file.suffix == ".safetensors" or file.name in (CONFIG, OWN))
    return {"adapter": str(directory), "sha256": {file.name: _sha256(file) for file in files}}


def check_same_start(run: Run) -> None:
    """Raise UserError where the adapter that an unfinished run went on from has changed since it began."""
    began = run.read(START)
    if not began or run.finished is not None:
        return
    now = start_facts(run.recipe)
    if now["sha256"] != began["sha256"]:
        changed = sorted(name for name, digest in now["sha256"].items() if began["sha256"].get(name) != digest)
        raise UserError(
            "the adapter has changed since this run went on from it", file=now["adapter"], field="model.adapter",
            found=f"another {changed[0] if changed else 'set of files'}", expected="the files of the start",
            fix="put them back, or start a new run with another output_dir",
        )  # fmt: skip


def check_labels(directory: Path, labels: tuple[str, ...]) -> None:
    """Raise UserError unless the labels of the rows are those that the adapter's head was trained for, in order."""
    known = task_in(directory)
    if known is not None and known.labels and known.labels != labels:
        raise UserError(
            "the rows have other labels than the adapter was trained for", file=str(directory), field="model.adapter",
            found=", ".join(labels), expected=", ".join(known.labels),
            fix="train on rows of the same labels, or without model.adapter",
        )  # fmt: skip


def _given(section: Mapping[str, Any], origins: Mapping[str, str]) -> dict[str, Any]:
    """The settings of the method that the recipe itself names, with their values."""
    names = {path.split(".")[1] for path in origins if path.startswith("method.")} - {"name"}
    return {name: section[name] for name in names if name in section}


def _kept(own: Mapping[str, Any]) -> dict[str, Any]:
    return {"lora_dropout": own["lora_dropout"]} if "lora_dropout" in own else {}


def _model(model: Model, origins: Mapping[str, str], directory: Path) -> tuple[Model, tuple[str, ...]]:
    """The model that the adapter belongs to, where the recipe names none, with its tokenizer, where it names none."""
    if "model.path" not in origins:
        base = _base(directory)
        kept = {name: getattr(model, name) for name in ("task", "adapter", "from_config")}
        named = {name: getattr(model, name) for name in ("revision", "tokenizer", "chat_template", "new_tokens")
                 if f"model.{name}" in origins}  # fmt: skip
        model = replace(base, **kept, **named)
    if origins.keys() & {"model.tokenizer", "model.chat_template", "model.new_tokens"}:
        return model, ()
    return own_tokenizer(model, directory)


def _base(directory: Path) -> Model:
    """The model that an adapter belongs to: its run's, or as PEFT's config says. Raises UserError."""
    if directory.name == "adapter" and (directory.parent / "recipe.yaml").is_file():
        return open_run(directory.parent).recipe.model
    if (directory / CONFIG).is_file():
        return base_of(directory)[0]
    raise UserError(
        "what lies here does not say which model it was trained on", file=str(directory), field="model.path",
        expected="the model that it was trained on", fix="model.path=…",
    )  # fmt: skip


def _check_adapter(run: Run) -> None:
    if run.recipe.method.can.whole_model:
        raise UserError(
            f"a {run.recipe.method.name} run has no adapter: it is a model", file=str(run.path), field="model.adapter",
            expected="a run that trained an adapter", fix=f"model.path={run.model}",
        )  # fmt: skip
    if not run.adapter.is_dir():
        raise UserError(
            "this run has not been trained to its end", file=str(run.path), field="model.adapter",
            expected="a finished run", fix="whet train RECIPE finishes it",
        )  # fmt: skip


def _other(field: str, found: Any, expected: Any) -> UserError:
    return UserError(
        "the adapter that is trained further has another setting", field=field, found=str(found),
        expected=f"{expected}, as the adapter has it", fix="remove the line: the method is taken from the adapter",
    )  # fmt: skip


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
