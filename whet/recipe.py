"""Parse recipes, here and nowhere else: YAML 1.2 and `key=value` in, one frozen `Recipe` out.

`spelling.text` reads the text, `spelling.aliases` rewrites other tools' names, and here the tree becomes a `Recipe`. An
unknown key is an error with its line and the nearest name; all that is wrong is said at once (`spelling.problems`).
`auto` (or null) leaves a decision to whet; the decided value is written back through `resolve`, so a run directory
holds no `auto`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from whet.base.config import config, field_docs, setting
from whet.base.errors import UserError
from whet.base.secrets import hide, holds_secret
from whet.data.config import Data
from whet.engine.config import Base, Model
from whet.methods.all import Method
from whet.methods.bridge import Bridge
from whet.methods.bridged import BRIDGED
from whet.methods.lora import Lora
from whet.sections import SECTION_CLASSES, SECTIONS
from whet.settings import Eval, Train
from whet.spelling.aliases import Said, canonical_tree
from whet.spelling.problems import complaints, raise_all
from whet.spelling.text import override, read_file, read_yaml, written
from whet.spelling.translations import method_name
from whet.spelling.without_effect import without_effect

METHOD_PATHS = ("method", "method.name")
NAMES = ("model.path", "model.tokenizer", "output_dir")
# They change the records and checkpoints of a run, and not its weights; metrics.jsonl may have fewer lines.
ON_THE_WAY = ("train.report_to", "train.logging_steps", "train.save_total_limit")


@config
class Recipe:
    """A whole run."""

    model: Model = dataclasses.field(default_factory=Model, metadata={"doc": "Which model."})
    base: Base = dataclasses.field(default_factory=Base, metadata={"doc": "How its frozen weights are stored."})
    method: Annotated[Method, Field(discriminator="name")] = dataclasses.field(
        default_factory=Lora, metadata={"doc": "What is trained."}
    )
    data: Data = dataclasses.field(default_factory=Data, metadata={"doc": "What it learns from."})
    train: Train = dataclasses.field(default_factory=Train, metadata={"doc": "How it learns."})
    eval: Eval = dataclasses.field(default_factory=Eval, metadata={"doc": "How it is judged."})
    output_dir: str | None = setting(None, "The run directory; auto = runs/NAME-OF-THE-RECIPE.")


@dataclass(frozen=True)
class Parsed:
    """A recipe with the origin of each setting. origins: dotted path -> `recipe` or `command line`; notes: aliases.

    file: where the recipe was read from."""

    recipe: Recipe
    origins: dict[str, str]
    notes: list[str]
    file: str | None = None


def parse(source: str | Path | None, overrides: Sequence[str] = ()) -> Parsed:
    """Read a recipe file (None = defaults) and lay `key=value` overrides over it. Raises UserError."""
    tree: dict[str, Any] = {}
    lines: dict[str, int] = {}
    file = None
    if source is not None:
        file = str(source)
        tree, lines = read_yaml(read_file(Path(source)), file)
    said = Said(file, lines)
    pairs = [override(text) for text in overrides]
    bridged = _named_method(tree, pairs) in BRIDGED
    tree = canonical_tree(tree, said, bridged)
    origins = dict.fromkeys(_leaves(tree), "recipe")
    for path, value in pairs:
        one = canonical_tree(_nested(path, value), said.of_override(), bridged)
        origins |= dict.fromkeys(_leaves(one), "command line")
        if path in ("columns", "data.columns") and isinstance(tree.get("data"), dict):
            tree["data"].pop("columns", None)  # a whole mapping replaces the one below; one name is laid over it
        tree = _merged(tree, one)
    if file is not None and tree.get("output_dir") is None:
        tree["output_dir"] = f"runs/{Path(file).stem}"
    overridden = [path for path, origin in origins.items() if origin == "command line"]
    if (tree.get("method") or {}).get("name") in BRIDGED:
        origins = _gathered(tree, origins)
    recipe = _validated(tree, said, overridden)
    return Parsed(recipe, origins, [*said.notes, *without_effect(tree, origins)], file)


def from_tree(tree: Mapping[str, Any]) -> Recipe:
    """A recipe from a plain nested dict, as `to_tree` made it."""
    return _validated(dict(tree), Said(None, {}), [])


def to_tree(recipe: Recipe) -> dict[str, Any]:
    """Nested dict of every setting."""
    return dataclasses.asdict(recipe)


def to_yaml(recipe: Recipe) -> str:
    """YAML 1.2 text that parses to an equal recipe."""
    return written(to_tree(recipe))


def fingerprint(recipe: Recipe) -> str:
    """The sha256 of all settings that decide the trained weights: not of paths, logs, checkpoints and evaluation."""
    tree = {name: part for name, part in to_tree(recipe).items() if name not in ("output_dir", "eval")}
    del tree["data"]["padding_free"]  # a layout: the same loss either way
    for path in ON_THE_WAY:
        del tree[path.partition(".")[0]][path.partition(".")[2]]
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def resolve(recipe: Recipe, decided: Mapping[str, Any]) -> Recipe:
    """The recipe with the values that whet decided, by dotted path."""
    tree = to_tree(recipe)
    for path, value in decided.items():
        tree = _merged(tree, _nested(path, value))
    return from_tree(tree)


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe, with the description of every field."""
    schema = _adapter().json_schema()
    classes = {cls.__name__: cls for cls in (Recipe, *chain.from_iterable(SECTION_CLASSES.values()))}
    for name, part in [("Recipe", schema), *schema.get("$defs", {}).items()]:
        for field, doc in field_docs(classes[name]).items():
            if field in part.get("properties", {}):
                part["properties"][field] = _as_written(name, field, part["properties"][field]) | {"description": doc}
    return schema


def _as_written(owner: str, field: str, schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a field with the other forms that a file may use: `auto` for null, and the short form of a
    section."""
    if {"type": "null"} in (choices := schema.get("anyOf", [])):
        return schema | {"anyOf": [*choices, {"const": "auto"}]}
    if owner == "Recipe" and field in SECTIONS:
        short = [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]
        allowed = {"data": short, "model": short[:1], "method": short[:1]}.get(field, [])
        default = {name: schema.pop(name) for name in ("default", "description") if name in schema}
        return {"anyOf": [schema, *allowed, {"type": "null"}], **default}
    return schema


def _nested(path: str, value: Any) -> dict[str, Any]:
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`below` with the settings of `above` over them, section by section; another method drops the settings of the one
    below."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        nested = isinstance(value, dict) and isinstance(old, dict)
        if nested and key == "method" and value.get("name") not in (None, (old or {}).get("name") or "lora"):
            nested = False
        result[key] = _merged(old, value) if nested else value  # type: ignore[arg-type]
    return result


def _named_method(tree: Mapping[str, Any], overrides: Sequence[tuple[str, Any]]) -> Any:
    """The method that the recipe will have, by any of the names of the setting."""
    said = [tree.get("peft_type"), tree.get("method"), *(value for path, value in overrides if path in METHOD_PATHS)]
    named = [one.get("name") if isinstance(one, dict) else one for one in said]
    return next((method_name(str(one)) for one in reversed(named) if one), None)


def _gathered(tree: dict[str, Any], origins: Mapping[str, str]) -> dict[str, str]:
    """Move options that stand beside the name of a bridged method under `options`; returns the origins by new path."""
    section = tree["method"]
    beside = {key: section.pop(key) for key in list(section) if key not in field_docs(Bridge)}
    section["options"] = (section.get("options") or {}) | beside
    moved = {f"method.{key}": f"method.options.{key}" for key in beside}
    return {moved.get(path, path): origin for path, origin in origins.items()}


def _leaves(tree: dict[str, Any], prefix: str = "") -> list[str]:
    paths: list[str] = []
    for key, value in tree.items():
        path = f"{prefix}{key}"
        paths += _leaves(value, path + ".") if isinstance(value, dict) and key != "columns" else [path]
    return paths


@cache
def _adapter() -> TypeAdapter[Recipe]:
    # Made when first needed and once: pydantic takes 40 ms for it.
    return TypeAdapter(Recipe)


def _validated(tree: dict[str, Any], said: Said, overridden: Sequence[str]) -> Recipe:
    """The recipe of a tree. Raises all that is wrong with it, and what was found wrong before."""
    file, lines, problems = said.file, said.lines, said.problems
    for path in NAMES:
        section, _, name = path.rpartition(".")
        owner = tree.get(section) if section else tree
        if isinstance(owner, dict) and owner.get(name) == "":
            where = {} if path in overridden else {"file": file, "row": lines.get(path)}
            problems.append(UserError(
                "the name is empty", field=path, found="''", expected="a name, or auto", fix="remove it", **where,
            ))  # fmt: skip
    secrets = list(_secrets(tree, said, overridden))
    problems += secrets
    if isinstance(tree.get("method"), dict):
        tree = tree | {"method": {"name": "lora"} | tree["method"]}
    recipe: Recipe | None = None
    try:
        recipe = _adapter().validate_json(json.dumps(tree), strict=True)
    except UserError as error:  # of an option of a bridged method
        path = error.field or ""
        if file is not None and path not in overridden:
            error = dataclasses.replace(error, file=file, row=lines.get(path, lines.get("method")))
        problems.append(error)
    except ValidationError as error:
        told = {one.field for one in secrets}
        problems += (one for one in complaints(error.errors(), file, lines, overridden) if one.field not in told)
    raise_all(problems)
    assert recipe is not None
    return recipe


def _secrets(tree: dict[str, Any], said: Said, overridden: Sequence[str]) -> Iterator[UserError]:
    """A refusal of each setting with a key or a password in it, which would be written into the run directory."""
    for path, value in _texts(tree, ""):
        if not (holds_secret(value) or holds_secret(path)):
            continue
        where = {} if path in overridden else {"file": said.file, "row": said.lines.get(path)}
        yield UserError(
            "a recipe holds no secrets, since a run directory keeps it", field=hide(path), found=hide(value),
            fix="take it out, set it in the environment (HF_TOKEN), and replace a key that others may have seen",
            **where,
        )  # fmt: skip


def _texts(node: Any, path: str) -> Iterator[tuple[str, str]]:
    """All texts in a tree with the paths to them, and keys as texts without content."""
    if isinstance(node, str):
        yield path, node
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        here = f"{path}.{key}" if path else str(key)
        yield here, ""
        yield from _texts(value, here)
