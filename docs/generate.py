"""Writes docs/recipe.md from the JSON schema of a recipe, the capability matrix and the alias table.

python docs/generate.py            # a test compares the file with what this would write
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from whet import aliases
from whet.methods.all import METHODS, capability_rows
from whet.recipe import SECTIONS, json_schema

PAGE = Path(__file__).with_name("recipe.md")
# Names whose value is translated too: each is shown by what the alias table makes of this value.
TRANSLATED: tuple[tuple[str, Any], ...] = (
    ("method.name", "qlora"), ("load_in_4bit", True), ("q_lora", True), ("quantization_bit", 4), ("quant_bits", 4),
    ("bnb_4bit_quant_type", "nf4"), ("bf16", True), ("bf16", False), ("train_on_inputs", True),
    ("train_on_inputs", False), ("train_on_prompt", True), ("assistant_only_loss", True),
    ("completion_only_loss", True), ("mask_prompt", True), ("lora_target_linear", True),
    ("method.target_modules", "q_proj,v_proj"), ("method.target_modules", "all"),
)  # fmt: skip
HEAD = """\
# Recipe reference

Written by `python docs/generate.py` from the JSON schema; change the code, not this page.

A recipe is YAML 1.2: one mapping of sections. Settings can also be laid over it on the command line as
`section.key=value`. `auto`, an empty value or a missing line leaves the decision to whet. What it decided and why is
in the run directory: `recipe.yaml` holds no `auto`, and `origins.json` says where each value came from. An unknown
setting is an error that names the nearest known one. `model: X`, `method: X` and `data: X` are short for `model.path`,
`method.name` and `data.dataset`. `whet schema` prints the schema for an editor.
"""
METHODS_HEAD = """
## Methods

The capability matrix, as `whet methods` prints it. A recipe that asks for a pair that is not in it is refused.
"""
ALIASES_HEAD = """
## Names of other tools

These names are accepted, alone or inside a section, rewritten and reported at the start of a run. A setting that is
said twice with two values is an error. `trust_remote_code` and secrets (`hf_token`, `api_key`, ...) are refused.
"""


def page() -> str:
    """The whole text of docs/recipe.md."""
    schema = json_schema()
    parts = [HEAD]
    for section in SECTIONS:
        described = schema["properties"][section]["description"]
        parts.append(f"\n## {section}\n\n{described}\n")
        if section == "method":
            for name, cls in METHODS.items():
                fields = schema["$defs"][cls.__name__]["properties"]
                parts.append(f"\n### method.name: {name}\n\n{(cls.__doc__ or '').strip()}\n\n{field_table(fields)}")
        else:
            parts.append("\n" + field_table(schema["$defs"][section.capitalize()]["properties"]))
    alone = {name: part for name, part in schema["properties"].items() if name not in SECTIONS}
    parts += ["\n## Outside the sections\n\n", field_table(alone), METHODS_HEAD, "\n", methods_table()]
    parts += [ALIASES_HEAD, "\n", alias_table(), "\nNames and values that are translated together:\n\n"]
    return "".join([*parts, translated_table()])


def field_table(fields: Mapping[str, Any]) -> str:
    rows = [(f"`{name}`", type_of(part), default_of(part), part["description"]) for name, part in fields.items()]
    return table(("field", "type", "default", "meaning"), rows)


def type_of(part: Mapping[str, Any]) -> str:
    """A schema in words: choices as they are written, limits beside the type."""
    if "anyOf" in part:
        return " or ".join(type_of(choice) for choice in part["anyOf"] if choice not in ({"type": "null"},))
    if "const" in part or "enum" in part:
        return " or ".join(f"`{value}`" for value in part.get("enum", [part.get("const")]))
    kind = part["type"]
    if kind == "array":
        return f"list of {type_of(part['items'])}"
    if kind == "object":
        return "mapping"
    words = {"string": "text", "boolean": "`true` or `false`", "number": "number", "integer": "whole number"}
    signs = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
    limits = [f"{sign} {part[name]:g}" for name, sign in signs if name in part]
    return " ".join([words[kind], ", ".join(limits)]).strip()


def default_of(part: Mapping[str, Any]) -> str:
    value = part.get("default", {} if part.get("type") == "object" else None)
    return "auto" if value is None else f"`{value if isinstance(value, str) else json.dumps(value)}`"


def methods_table() -> str:
    rows = [[cell(value) for value in row.values()] for row in capability_rows()]
    return table([name.replace("_", " ") for name in capability_rows()[0]], rows)


def cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def alias_table() -> str:
    """Every other name of a setting in one row, and every other name of a value."""
    names: dict[str, list[str]] = {}
    for other, ours in (aliases.NAMES | aliases.LOCAL).items():
        if other not in (ours, ours.partition(".")[2]):
            names.setdefault(ours, []).append(f"`{other}`")
    rows = [(f"`{ours}`", ", ".join(others)) for ours, others in sorted(names.items())]
    for setting, values in (("train.optim", aliases.OPTIMISERS), ("train.lr_scheduler_type", aliases.SCHEDULES)):
        rows += [(f"`{setting}: {ours}`", f"`{other}`") for other, ours in values.items()]
    return table(("setting", "also accepted"), rows)


def translated_table() -> str:
    rows = []
    for name, value in TRANSLATED:
        read = aliases.canonical(name, value, None, None)
        ours = ", ".join(f"`{path}: {'auto' if item is None else cell(item)}`" for path, item, _ in read)
        rows.append((f"`{name}: {json.dumps(value) if not isinstance(value, str) else value}`", ours))
    return table(("written", "read as"), rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |\n" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
