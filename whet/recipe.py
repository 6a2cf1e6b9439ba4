"""Parse recipes, here and nowhere else: YAML 1.2 and `key=value` in, one frozen `Recipe` out.

YAML 1.2 makes `1e-4` a number and a repeated key an error. An unknown key is an error with its line and the nearest
name; a peer's name for a setting is accepted and reported. `auto` (or null) leaves a decision to whet; the decided
value is written back through `resolve`, so a run directory holds no `auto`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from whet.aliases import canonical_tree
from whet.base.config import config, field_docs, setting
from whet.base.errors import UserError, nearest
from whet.data.config import Data
from whet.engine.config import Base, Model
from whet.methods.all import METHODS, Method
from whet.methods.bridge import Bridge
from whet.methods.bridged import BRIDGED, LEFT_OUT
from whet.methods.lora import Lora
from whet.sections import SECTION_CLASSES, SECTIONS
from whet.settings import Eval, Train

METHOD_PATHS = ("method", "method.name")
MOST_VALUES = 10_000
NAMES = ("model.path", "model.tokenizer", "output_dir")
# They change the records and checkpoints of a run, and not its weights; metrics.jsonl may have fewer lines.
ON_THE_WAY = ("train.report_to", "train.logging_steps", "train.save_total_limit")
KINDS = (bool, int, float, str)


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
        tree, lines = _read_yaml(_read_text(Path(source)), file)
    notes: list[str] = []
    bridged = _named_method(tree, overrides) in BRIDGED
    tree = canonical_tree(tree, notes, file, lines, bridged)
    origins = dict.fromkeys(_leaves(tree), "recipe")
    for override in overrides:
        path, value = _override(override)
        one = canonical_tree(_nested(path, value), notes, None, {}, bridged)
        origins |= dict.fromkeys(_leaves(one), "command line")
        if path in ("columns", "data.columns") and isinstance(tree.get("data"), dict):
            tree["data"].pop("columns", None)  # a whole mapping replaces the one below; one name is laid over it
        tree = _merged(tree, one)
    if file is not None and tree.get("output_dir") is None:
        tree["output_dir"] = f"runs/{Path(file).stem}"
    overridden = [path for path, origin in origins.items() if origin == "command line"]
    if (tree.get("method") or {}).get("name") in BRIDGED:
        origins = _gathered(tree, origins)
    return Parsed(_validated(tree, file, lines, overridden), origins, notes, file)


def from_tree(tree: Mapping[str, Any]) -> Recipe:
    """A recipe from a plain nested dict, as `to_tree` made it."""
    return _validated(dict(tree), None, {}, [])


def to_tree(recipe: Recipe) -> dict[str, Any]:
    """Nested dict of every setting."""
    return dataclasses.asdict(recipe)


def to_yaml(recipe: Recipe) -> str:
    """YAML 1.2 text that parses to an equal recipe."""
    out = io.StringIO()
    _yaml().dump(to_tree(recipe), out)
    return out.getvalue()


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


def _read_text(path: Path) -> str:
    if not path.is_file():
        near = nearest(path.name, [p.name for p in path.parent.glob("*.y*ml") if p.is_file()])
        raise UserError(
            "there is no such recipe", file=str(path),
            fix=f"did you mean {path.parent / near}?" if near else "whet init lora > recipe.yaml writes one",
        )  # fmt: skip
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"the recipe is not UTF-8: byte {error.start}", file=str(path), fix="save it as UTF-8"
        ) from error


def _yaml():
    from ruamel.yaml import YAML

    reader = YAML(typ="rt", pure=True)
    reader.default_flow_style = False
    return reader


def _read_yaml(text: str, file: str) -> tuple[dict[str, Any], dict[str, int]]:
    """(the recipe as a plain nested dict, the line of each dotted path)."""
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    lines: dict[str, int] = {}
    try:
        loaded = _yaml().load(text)
        if isinstance(loaded, Mapping):
            return _plain(loaded, "", lines, file), lines
    except RecursionError as error:
        raise UserError("nested too deeply", file=file, fix="sections and their settings, nothing deeper") from error
    except ValueError as error:  # a date that does not exist, a number of thousands of digits
        raise UserError(f"a value cannot be read: {error}", file=file, fix="put it in quotes") from error
    except MarkedYAMLError as error:
        mark = error.problem_mark
        problem = " ".join((error.problem or str(error)).split())
        raise UserError(
            f"not valid YAML: {problem}",
            file=file,
            row=mark.line + 1 if mark is not None else None,
            fix="each setting once, `key: value`, sections indented by two spaces",
        ) from error
    except YAMLError as error:
        raise UserError(
            f"not valid YAML: {str(error).splitlines()[0]}", file=file, fix="save it as plain text"
        ) from error
    if loaded is None:
        return {}, {}
    raise UserError(
        "a recipe is a mapping of sections",
        file=file,
        found="a list" if isinstance(loaded, list) else f"{loaded!r} ({type(loaded).__name__})",
        expected="model:, method:, data:, train: ...",
        fix="whet init lora prints one to start from",
    )


def _plain(node: Any, path: str, lines: dict[str, int], file: str | None) -> Any:
    """ruamel's containers and scalars as plain Python, noting lines; tags such as !!python are refused."""
    from ruamel.yaml.scalarbool import ScalarBoolean

    tagged = isinstance(node, Mapping | list) and getattr(getattr(node, "tag", None), "value", None)
    if isinstance(node, Mapping | list) and not tagged:
        positions = getattr(getattr(node, "lc", None), "data", None) or {}
        plain: dict[Any, Any] = {}
        for key, value in node.items() if isinstance(node, Mapping) else enumerate(node):
            here = f"{path}.{key}" if path else str(key)
            lines[here] = positions[key][0] + 1 if key in positions else lines.get(path, 1)  # merged in by `<<`
            if len(lines) > MOST_VALUES:  # aliases of aliases grow without end
                raise UserError(
                    f"the recipe holds over {MOST_VALUES} values", file=file, fix="write them without aliases"
                )
            plain[str(key)] = _plain(value, here, lines, file)
        return plain if isinstance(node, Mapping) else list(plain.values())
    if node is None:
        return None
    kind = bool if isinstance(node, ScalarBoolean) else next((k for k in KINDS if isinstance(node, k)), None)
    if kind is None or (kind is float and not math.isfinite(node)):  # type: ignore[arg-type]
        raise UserError(
            "a setting is text, a finite number, true, false, a list or a mapping",
            file=file,
            row=lines.get(path),
            field=path,
            found=f"the tag {tagged}" if tagged else str(node) if kind else type(node).__name__,
            fix="write a finite number" if kind else "remove the tag, or put the value in quotes",
        )
    return None if node == "auto" else kind(node)  # type: ignore[arg-type]


def _override(text: str) -> tuple[str, Any]:
    from ruamel.yaml.error import YAMLError

    path, equals, value = text.partition("=")
    if not equals or not path.strip():
        raise UserError(
            "not an override", found=text, expected="section.key=value", fix="for instance train.learning_rate=1e-4"
        )
    try:
        loaded = _yaml().load(value) if value.strip() else None
        return path.strip(), _plain(loaded, path.strip(), {}, None)
    except (YAMLError, RecursionError, ValueError) as error:
        raise UserError("the value is not valid YAML", field=path, found=value, fix="put it in quotes") from error


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


def _named_method(tree: Mapping[str, Any], overrides: Sequence[str]) -> Any:
    """The method that the recipe will have, by any of the names of the setting."""
    said = [tree.get("method"), *(value for path, value in map(_override, overrides) if path in METHOD_PATHS)]
    named = [one.get("name") if isinstance(one, dict) else one for one in said]
    return next((str(one) for one in reversed(named) if one), None)


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


def _validated(tree: dict[str, Any], file: str | None, lines: dict[str, int], overridden: Sequence[str]) -> Recipe:
    for path in NAMES:
        section, _, name = path.rpartition(".")
        owner = tree.get(section) if section else tree
        if isinstance(owner, dict) and owner.get(name) == "":
            where = {} if path in overridden else {"file": file, "row": lines.get(path)}
            raise UserError(
                "the name is empty", field=path, found="''", expected="a name, or auto", fix="remove it", **where,
            )  # fmt: skip
    if isinstance(tree.get("method"), dict):
        tree = tree | {"method": {"name": "lora"} | tree["method"]}
    try:
        return _adapter().validate_json(json.dumps(tree), strict=True)
    except UserError as error:  # of an option of a bridged method
        path = error.field or ""
        if file is None or path in overridden:
            raise
        raise dataclasses.replace(error, file=file, row=lines.get(path, lines.get("method"))) from error
    except ValidationError as error:
        raise _complaint(error.errors()[0], file, lines, overridden) from error


def _complaint(error: Any, file: str | None, lines: dict[str, int], overridden: Sequence[str]) -> UserError:
    """pydantic's first error in our shape; with file and row only if the wrong value stands in the file."""
    parts = [str(p) for p in error["loc"]]
    method = None
    if parts[:1] == ["method"] and len(parts) > 1 and parts[1] in METHODS:
        method = parts.pop(1)
    parts = [p for p in parts if not p.startswith(("list[", "str", "function-", "literal[", "constrained"))]
    path = ".".join(parts)
    where: dict[str, Any] = {"file": file, "row": lines.get(path), "field": path}
    if any(f"{other}.".startswith(f"{path}.") or f"{path}.".startswith(f"{other}.") for other in overridden):
        where |= {"file": None, "row": None}
    kind = error["type"]
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        names = {known.rpartition(".")[2]: known for known in sorted(_known_paths(method), reverse=True)}
        if method and (owner := next((name for name in METHODS if path in _known_paths(name)), None)):
            return UserError(
                f"the method {method} has no such setting", **where, found=path, expected=f"method.name: {owner}",
                fix=f"remove it, or write method.name: {owner}",
            )  # fmt: skip
        last = path.rpartition(".")[2]
        near = names.get(nearest(last, names) or "")
        return UserError(
            "there is no such setting", **where, found=path,
            expected=f"the nearest is {near}" if near else "whet init lora lists the usual ones",
            fix=f"write {near}" if near else "remove the line; docs/recipe.md lists every setting",
        )  # fmt: skip
    if kind == "union_tag_invalid":
        value = error["input"].get("name")
        if str(value) in LEFT_OUT:
            reason, instead = LEFT_OUT[str(value)]
            return UserError(
                f"whet leaves out this method of PEFT: {reason}", **{**where, "field": "method.name"},  # type: ignore[arg-type]
                found=str(value), expected="a method that `whet methods` lists", fix=f"method.name={instead}",
            )  # fmt: skip
        near = nearest(str(value), METHODS.keys() - BRIDGED.keys()) or nearest(str(value), METHODS) or "lora"
        return UserError(
            "there is no such method", **{**where, "field": "method.name"},  # type: ignore[arg-type]
            found=str(value), expected=", ".join(METHODS), fix=f"write {near}",
        )  # fmt: skip
    value = error["input"]
    if kind == "literal_error" and (near := nearest(str(value), error["ctx"]["expected"].split("'")[1::2])):
        choices = error["ctx"]["expected"]
        return UserError("there is no such choice", **where, found=str(value), expected=choices, fix=f"write {near}")
    return UserError(
        f"the value does not fit: {error['msg'].lower()}", **where,
        found=f"{value!r} ({type(value).__name__})",
        expected=error["msg"].removeprefix("Input should be ").removeprefix("a "),
        fix=_doc(path) or "whet init lora shows every section",
    )  # fmt: skip


def _known_paths(method: str | None = None) -> list[str]:
    """Dotted paths of all settings, or those with this method."""
    sections = SECTION_CLASSES | ({"method": (METHODS[method],)} if method else {})
    dotted = [
        f"{section}.{name}" for section, classes in sections.items() for cls in classes for name in field_docs(cls)
    ]
    return [*dict.fromkeys(dotted), *field_docs(Recipe)]


def _doc(path: str) -> str | None:
    section, _, name = path.partition(".")
    for cls in SECTION_CLASSES.get(section, (Recipe,)):
        if doc := field_docs(cls).get(name.partition(".")[0] or section):
            return doc
    return None
