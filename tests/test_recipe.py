"""Text becomes a recipe: YAML 1.2, overrides, peers' names, round trip, schema."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from whet.base.errors import UserError
from whet.methods.all import METHODS
from whet.recipe import (
    ON_THE_WAY,
    Parsed,
    Recipe,
    fingerprint,
    from_tree,
    json_schema,
    parse,
    resolve,
    to_tree,
    to_yaml,
)
from whet.runs import Run, start

ROOT = Path(__file__).parents[1]
RECIPES = [*sorted((ROOT / "recipes").glob("*.yaml")), *sorted((ROOT / "recipes" / "builtin").glob("*.yaml"))]


def read(text: str, tmp_path: Path, *overrides: str) -> Parsed:
    path = tmp_path / "tickets.yaml"
    path.write_text(text, encoding="utf-8")
    return parse(path, overrides)


def value(recipe: Recipe, path: str) -> Any:
    found: Any = recipe
    for name in path.split("."):
        found = found[name] if isinstance(found, Mapping) else getattr(found, name)
    return found


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, item in tree.items():
        nested = isinstance(item, dict) and key != "columns"
        found |= flat(item, f"{prefix}{key}.") if nested else {prefix + key: item}
    return found


SCALARS = [
    ("train.learning_rate", "1e-4", 0.0001), ("train.learning_rate", "1E-4", 0.0001),
    ("train.learning_rate", "1.e-4", 0.0001), ("train.learning_rate", ".5", 0.5), ("train.learning_rate", "2", 2.0),
    ("train.seed", "010", 10), ("train.seed", "0o10", 8), ("train.seed", "0x10", 16), ("train.seed", "+3", 3),
    ("train.max_steps", "auto", None), ("train.max_steps", "null", None), ("train.max_steps", "~", None),
    ("train.max_steps", "", None), ("train.max_steps", "'auto'", None),
    ("train.gradient_checkpointing", "true", True), ("train.gradient_checkpointing", "False", False),
    ("train.gradient_checkpointing", "&same true", True), ("train.gradient_checkpointing", "!!bool true", True),
    *(("model.path", word, word) for word in ("yes", "on", "no", "off", "y", "12:30:45", "AUTO", "1.2.3")),
    ("model.path", "'1e-4'", "1e-4"), ("model.path", '"true"', "true"), ("model.path", "a # b", "a"),
    ("model.path", "a#b", "a#b"), ("model.path", "한국/모델", "한국/모델"), ("model.path", ">-\n    a\n    b", "a b"),
    ("method.target_modules", "[q_proj, v_proj]", ["q_proj", "v_proj"]),
    ("data.columns", "{prompt: question}", {"prompt": "question"}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "text", "meant"), SCALARS)
def test_yaml_1_2_in_a_file(path: str, text: str, meant: object, tmp_path: Path) -> None:
    section, _, name = path.partition(".")
    found = value(read(f"{section}:\n  {name}: {text}\n", tmp_path).recipe, path)
    assert found == meant
    assert type(found) is type(meant)


@pytest.mark.parametrize(("path", "text", "meant"), SCALARS)
def test_the_command_line_reads_values_as_a_file_does(path: str, text: str, meant: object) -> None:
    assert value(parse(None, [f"{path}={text}"]).recipe, path) == meant


def test_a_byte_order_mark_an_anchor_and_a_merge_are_read(tmp_path: Path) -> None:
    text = "\ufefftrain: &usual\n  seed: 3\n  max_steps: 5\n"
    assert read(text, tmp_path).recipe.train.seed == 3
    with pytest.raises(UserError, match="field usual"):
        read("usual: &u {seed: 3}\ntrain:\n  <<: *u\n", tmp_path)
    text = "train: {<<: {seed: 4, max_steps: 6}, max_steps: 7}\n"
    assert (read(text, tmp_path).recipe.train.seed, read(text, tmp_path).recipe.train.max_steps) == (4, 7)


@pytest.mark.parametrize("text", ["", "\n", "# nothing yet\n", "---\n", "{}\n", "null\n", "---\n...\n"])
def test_an_empty_recipe_is_refused_at_once(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the recipe says nothing") as caught:
        read(text, tmp_path)
    assert "whet init" in caught.value.fix


@pytest.mark.parametrize("section", ["model", "base", "method", "data", "train", "eval", "output_dir"])
def test_an_empty_section_is_one_left_out(section: str, tmp_path: Path) -> None:
    for text in (f"{section}:\n", f"{section}: auto\n", f"# {section} later\n{section}:\n  # r: 8\n"):
        assert read(text, tmp_path).recipe == parse(None, ["output_dir=runs/tickets"]).recipe


def test_overrides_win_the_last_of_them_most(tmp_path: Path) -> None:
    text = "train:\n  seed: 1\n  max_steps: 2\n"
    parsed = read(text, tmp_path, "train.seed=3", "train.seed=4", "data.columns.prompt=q", "data.columns.completion=a")
    assert (parsed.recipe.train.seed, parsed.recipe.train.max_steps) == (4, 2)
    assert parsed.recipe.data.columns == {"prompt": "q", "completion": "a"}, "one name does not drop the other"
    assert parsed.origins["train.seed"] == "command line"
    assert parsed.origins["train.max_steps"] == "recipe"
    assert "train.optim" not in parsed.origins
    assert read(text, tmp_path, "train.max_steps=auto").recipe.train.max_steps is None
    assert read("data:\n  columns: {prompt: q}\n", tmp_path, "data.columns={text: t}").recipe.data.columns == {
        "text": "t"
    }


def test_the_run_directory_is_named_after_the_recipe(tmp_path: Path) -> None:
    assert read("train: {}", tmp_path).recipe.output_dir == "runs/tickets"
    assert read("output_dir: here", tmp_path).recipe.output_dir == "here"
    for override in ("output_dir=auto", "output_dir="):
        assert read("output_dir: here", tmp_path, override).recipe.output_dir == "runs/tickets"
    assert parse(None).recipe.output_dir is None


def test_another_method_drops_the_settings_of_the_one_below(tmp_path: Path) -> None:
    text = "method:\n  name: lora\n  r: 8\n  lora_dropout: 0.1\n"
    for override in ("method=full", "method.name=full", "method={name: full}", "finetuning_type=full"):
        assert to_tree(read(text, tmp_path, override).recipe)["method"] == {"name": "full", "save_dtype": "bf16"}
    assert value(read(text, tmp_path, "method=lora").recipe, "method.r") == 8, "the same method keeps them"
    assert value(read("method: {r: 8}", tmp_path, "method=lora").recipe, "method.r") == 8
    full = read("method: {name: full, save_dtype: fp32}", tmp_path, "method=lora", "method.r=4").recipe
    assert (full.method.name, value(full, "method.r")) == ("lora", 4)
    with pytest.raises(UserError, match="method full has no such setting"):
        read("lora_r: 8\nfinetuning_type: full\n", tmp_path)


def test_a_recipe_is_frozen_all_the_way_down() -> None:
    recipe = parse(None).recipe
    parts = [recipe, *(getattr(recipe, field.name) for field in dataclasses.fields(recipe))]
    parts += [METHODS["full"]()]
    for part in (part for part in parts if dataclasses.is_dataclass(part)):
        for field in dataclasses.fields(part):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(part, field.name, None)


ODD = [
    "", " ", "a b", " a", "a ", "null", "~", "yes", "True", "1", "1e-4", "1_000", "0x1F", "0o7", "-", "- a", "a: b",
    "#", "a #b", "'", '"', "\\", "a\nb", "a\n", "\n", "\t", "한국어", "🙂", "\u2028", "\ufeff", "*a", "&a",
    "!a", "%a", "@a", "`a`", "|", ">", "{a}", "[a", "=", "<<", "2026-11-21", "12:30", "?", "? a", "...", "---",
    "a" * 200, "word " * 60, "C:\\data\\a.jsonl", "\x07", ".nan", "Auto", "é\u0301",
]  # fmt: skip


def odd_tree(chance: random.Random) -> dict[str, Any]:
    def text() -> str:
        return chance.choice(ODD)

    def real() -> float:
        return chance.choice([1e-05, 3.0, 1e22, 0.1 + 0.2, 5e-324, 123456789.123456, 1e-4]) * chance.choice([1, 3])

    return {
        "model": {"path": text() or "a", "tokenizer": chance.choice([None, "b"]), "revision": text()},
        "method": {
            "name": "lora",
            "target_modules": chance.choice([text(), [text(), text()], []]),
            "lora_alpha": real(),
        },
        "data": {"dataset": [text() for _ in range(3)], "columns": {text(): text(), text(): text()}},
        "train": {"learning_rate": real(), "seed": chance.randrange(2**40), "optim": chance.choice(["adamw", "sgd"])},
        "eval": {"metrics": chance.choice([None, [], [f"{text()}_accuracy", "chrf"]])},
        "output_dir": chance.choice([None, text() or "c"]),
    }


def test_what_is_written_is_read_back_equal(tmp_path: Path) -> None:
    chance = random.Random(0)
    for _ in range(60):
        recipe = from_tree(odd_tree(chance))
        text = to_yaml(recipe)
        again = read(text, tmp_path).recipe
        if recipe.output_dir is None:
            again = dataclasses.replace(again, output_dir=None)
        assert again == recipe, text
        assert from_tree(to_tree(recipe)) == recipe
        assert to_yaml(again) == text


def test_resolve_writes_down_what_was_decided() -> None:
    recipe = resolve(parse(None).recipe, {"train.max_steps": 7, "method.lora_alpha": 32.0, "data.packing": False})
    assert (recipe.train.max_steps, value(recipe, "method.lora_alpha"), recipe.data.packing) == (7, 32.0, False)


def candidates(schema: dict[str, Any], root: dict[str, Any]) -> list[Any]:
    """Values that fit this schema, several where there is a choice."""
    if "anyOf" in schema:
        return [found for choice in schema["anyOf"] for found in candidates(choice, root) if found != "auto"]
    if "enum" in schema or "const" in schema:
        return schema.get("enum", [schema.get("const")])
    if schema["type"] == "array":
        return [[item] for item in candidates(schema["items"], root)]
    low = schema.get("minimum", 0)
    return {
        "boolean": [False, True], "integer": [low + 1, low + 2], "number": [0.25, 0.5], "string": ["x", "y"],
        "object": [{"x": "y"}], "null": [],
    }[schema["type"]]  # fmt: skip


def test_what_is_logged_and_kept_does_not_make_another_run(tmp_path: Path) -> None:
    def begin(*overrides: str) -> Run:
        return start(parse(None, [f"output_dir={tmp_path / 'run'}", *overrides]).recipe, {}, {}, {})

    first = begin()
    written = (first.path / "recipe.yaml").read_bytes()
    again = begin(
        "train.logging_steps=5", "train.save_total_limit=1", "train.report_to=[tensorboard]", "eval.max_rows=3"
    )
    assert again.path == first.path
    assert (first.path / "recipe.yaml").read_bytes() == written
    with pytest.raises(UserError, match="another recipe") as caught:
        begin("train.logging_steps=5", "data.padding_free=false", "train.seed=5")
    assert caught.value.field == "train.seed"


def test_the_fingerprint_covers_every_setting_that_decides_the_weights() -> None:
    base, schema = parse(None).recipe, json_schema()
    owners = {"method": "Lora"} | {name: name.title() for name in ("model", "base", "data", "train", "eval")}
    seen = {fingerprint(base), fingerprint(parse(None, ["method=full"]).recipe)}
    count = len(seen)
    for path, old in flat(to_tree(base)).items():
        section, _, name = path.rpartition(".")
        owner = schema["$defs"][owners[section]] if section else schema
        if path == "method.name":
            continue
        changed = resolve(base, {path: next(c for c in candidates(owner["properties"][name], schema) if c != old)})
        assert changed != base, path
        ignored = path in ("output_dir", "data.padding_free", *ON_THE_WAY) or path.startswith("eval.")
        assert (fingerprint(changed) == fingerprint(base)) == ignored, path
        seen.add(fingerprint(changed))
        count += not ignored
    assert len(seen) == count > 40, "no two changes look alike"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_that_come_with_whet_parse_and_fit_the_schema(path: Path) -> None:
    parsed = parse(path)
    assert parsed.notes == [], "they use our own names"
    assert from_tree(to_tree(parsed.recipe)) == parsed.recipe
    written = YAML(typ="safe", pure=True).load(path)
    assert misfits(json_schema(), written, json_schema()) == []


def misfits(schema: dict[str, Any], found: Any, root: dict[str, Any], at: str = "") -> list[str]:
    """Where `found` does not fit a JSON schema; of the keywords, those that ours uses."""
    if "$ref" in schema:
        return misfits(root["$defs"][schema["$ref"].rpartition("/")[2]], found, root, at)
    for word in ("anyOf", "oneOf"):
        if word in schema:
            tried = [misfits(choice, found, root, at) for choice in schema[word]]
            return [] if [] in tried else max(tried, key=lambda errors: len(errors[0]))
    kinds = {"string": str, "integer": int, "number": int | float, "boolean": bool, "null": type(None), "object": dict,
             "array": list}  # fmt: skip
    kind = schema.get("type")
    if kind and (not isinstance(found, kinds[kind]) or (isinstance(found, bool) and kind != "boolean")):
        return [f"{at}: no {kind}"]
    if found not in schema.get("enum", [found]) or found != schema.get("const", found):
        return [f"{at}: no such choice"]
    if isinstance(found, dict):
        return object_misfits(schema, found, root, at)
    if isinstance(found, list):
        return [e for index, item in enumerate(found) for e in misfits(schema["items"], item, root, f"{at}[{index}]")]
    if kind not in ("integer", "number"):
        return []
    closed = schema.get("minimum", found) <= found <= schema.get("maximum", found)
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    opened = (above is None or found > above) and (below is None or found < below)
    return [] if closed and opened else [f"{at}: out of range"]


def object_misfits(schema: dict[str, Any], found: dict[str, Any], root: dict[str, Any], at: str) -> list[str]:
    known, more = schema.get("properties", {}), schema.get("additionalProperties", True)
    errors = []
    for key, item in found.items():
        part = known.get(key, more)
        if part is False:
            errors.append(f"{at}.{key}: unknown")
        elif part is not True:
            errors += misfits(part, item, root, f"{at}.{key}")
    return errors


def test_the_schema_describes_every_setting_and_refuses_what_a_recipe_may_not_hold() -> None:
    schema = json_schema()
    described = {f"{name}.{field}": part["description"] for name, owner in schema["$defs"].items()
                 for field, part in owner["properties"].items()}  # fmt: skip
    described |= {field: part["description"] for field, part in schema["properties"].items()}
    assert all(text.endswith(".") and len(text) > 10 for text in described.values())
    names = {path.rpartition(".")[2] for path in described}
    both = (flat(to_tree(parse(None, [f"method={name}"]).recipe)) for name in METHODS)
    assert {path.rpartition(".")[2] for paths in both for path in paths} <= names
    good = (
        {},
        {"model": "m", "method": "full"},
        {"train": {"max_steps": "auto"}},
        {"data": ["a", "b"]},
        {"train": None},
    )
    assert [misfits(schema, tree, schema) for tree in good] == [[]] * len(good)
    bad = ({"x": 1}, {"train": {"x": 1}}, {"train": {"seed": "1"}}, {"train": {"seed": -1}}, {"train": "fast"},
           {"train": {"optim": "lion"}}, {"method": {"name": "full", "r": 8}}, {"method": {"lora_dropout": 1}},
           {"train": {"seed": True}}, {"data": {"dataset": [1]}}, {"train": {"seed": "auto"}})  # fmt: skip
    assert all(misfits(schema, tree, schema) for tree in bad)
