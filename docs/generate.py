"""Writes docs/recipe.md from the JSON schema and the alias table, and the capability matrix into docs/methods.md.

`python docs/generate.py`; a test compares both files with what this would write.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from whet.methods.all import METHODS, capability_rows
from whet.planning.rules import RULES
from whet.recipe import SECTIONS, json_schema
from whet.spelling import aliases

PAGE = Path(__file__).with_name("recipe.md")
METHODS_PAGE = Path(__file__).with_name("methods.md")
MATRIX = re.compile(r"(?s)(<!-- capability-matrix -->\n).*?(<!-- /capability-matrix -->)")
# Names whose value is translated too; each is shown by what the alias table makes of this value.
TRANSLATED: tuple[tuple[str, Any], ...] = (
    ("method.name", "qlora"), ("load_in_4bit", True), ("q_lora", True), ("quantization_bit", 4), ("quant_bits", 4),
    ("bnb_4bit_quant_type", "nf4"), ("bf16", True), ("bf16", False), ("train_on_inputs", True),
    ("train_on_inputs", False), ("train_on_prompt", True), ("assistant_only_loss", True),
    ("completion_only_loss", True), ("mask_prompt", True), ("lora_target_linear", True),
    ("method.target_modules", "q_proj,v_proj"), ("method.target_modules", "all"),
)  # fmt: skip
HEAD = """\
# Recipe reference

Written by `python docs/generate.py` from the JSON schema (`whet schema`): change the code, not this page. A recipe is
YAML 1.2, one mapping of sections; `section.key=value` on the command line is laid over it. `auto`, an empty value or a
missing line leaves the decision to whet; the run directory says what was decided (`recipe.yaml`) and why
(`origins.json`). `model: X`, `method: X` and `data: X` are short for `model.path`, `method.name` and `data.dataset`.
"""
METHODS_HEAD = "\n## Methods\n\nWhat each can do, and which one to take: [methods.md](methods.md).\n"
RULES_HEAD = """
## What excludes each other

Refused in this order, which is that of `whet/planning/rules.py`, and before any model is loaded; the last three need
the model's head or the layout that was chosen.

"""
ALIASES_HEAD = """
## Names of other tools

These names are accepted, alone or inside a section, rewritten and reported at the start of a run. A setting that is
said twice with two values is an error. `trust_remote_code` and secrets (`hf_token`, `api_key`, ...) are refused.

"""
WORDS = {"string": "text", "boolean": "`true` or `false`", "number": "number", "integer": "whole number"}
LIMITS = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))


def page() -> str:
    """The whole text of docs/recipe.md."""
    schema = json_schema()
    parts = [HEAD]
    for section in SECTIONS:
        parts.append(f"\n## {section}\n\n{schema['properties'][section]['description']}\n")
        if section != "method":
            parts.append("\n" + field_table(schema["$defs"][section.capitalize()]["properties"]))
            continue
        for cls in dict.fromkeys(METHODS.values()):
            names = " | ".join(name for name, owner in METHODS.items() if owner is cls)
            parts.append(f"\n### method.name: {names}\n\n{(cls.__doc__ or '').strip()}\n\n")
            parts.append(field_table(schema["$defs"][cls.__name__]["properties"]))
    alone = {name: part for name, part in schema["properties"].items() if name not in SECTIONS}
    parts += ["\n## Outside the sections\n\n", field_table(alone), METHODS_HEAD, ALIASES_HEAD]
    parts[-1:-1] = [RULES_HEAD, table(("field", "refused, because", "one fix"), list(dict.fromkeys(exclusions())))]
    parts += [table(("setting", "also accepted"), sorted(other_names())), "\nTranslated together with their value:\n\n"]
    return "".join([*parts, table(("written", "read as"), list(translated()))])


def methods_page(written: str) -> str:
    """docs/methods.md as `written`, with the capability matrix as it is now."""
    rows = capability_rows()
    head = [name.replace("_", " ") for name in rows[0]]
    matrix = table(head, [[cell(value) for value in row.values()] for row in rows])
    return MATRIX.sub(lambda found: found[1] + matrix + found[2], written)


def field_table(fields: Mapping[str, Any]) -> str:
    rows = [(f"`{name}`", type_of(part), default(part), part["description"]) for name, part in fields.items()]
    return table(("field", "type", "default", "meaning"), rows)


def type_of(part: Mapping[str, Any]) -> str:
    """A schema in words: choices as they are written, limits beside the type."""
    if "anyOf" in part:
        return " or ".join(type_of(choice) for choice in part["anyOf"] if choice != {"type": "null"})
    if "const" in part or "enum" in part:
        return " or ".join(f"`{value}`" for value in part.get("enum", [part.get("const")]))
    if part["type"] == "array":
        return f"list of {type_of(part['items'])}"
    limits = ", ".join(f"{sign} {part[name]:g}" for name, sign in LIMITS if name in part)
    return f"{WORDS.get(part['type'], 'mapping')} {limits}".strip()


def default(part: Mapping[str, Any]) -> str:
    value = part.get("default", {"object": {}, "array": []}.get(part.get("type", "")))
    return "auto" if value is None else f"`{value if isinstance(value, str) else json.dumps(value)}`"


def cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def other_names() -> Iterator[tuple[str, str]]:
    """Each setting, and each value of two settings, with its other names."""
    pairs = [(ours, other) for other, ours in (aliases.NAMES | aliases.LOCAL).items()]
    pairs += [(f"train.optim: {ours}", other) for other, ours in aliases.OPTIMISERS.items()]
    pairs += [(f"train.lr_scheduler_type: {ours}", other) for other, ours in aliases.SCHEDULES.items()]
    for name in dict.fromkeys(ours for ours, _ in pairs):
        others = [f"`{other}`" for ours, other in pairs if ours == name and other not in (ours, ours.partition(".")[2])]
        if others:
            yield f"`{name}`", ", ".join(others)


def exclusions() -> Iterator[tuple[str, str, str]]:
    """Each rule about settings that exclude each other; what a text names is shown by its path."""
    for rule in RULES:
        problem, fix = (re.sub(r"{([a-z_.]+)[^}]*}", r"`\1`", text) if isinstance(text, str) else "as it says"
                        for text in (rule.problem, rule.fix))  # fmt: skip
        yield f"`{rule.field}`", problem, fix


def translated() -> Iterator[tuple[str, str]]:
    for name, value in TRANSLATED:
        found = aliases.canonical(name, value, None, None)
        written = value if isinstance(value, str) else json.dumps(value)
        yield f"`{name}: {written}`", ", ".join(f"`{path}: {'auto' if v is None else cell(v)}`" for path, v, _ in found)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = (head, ["---"] * len(head), *rows)
    return "".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |\n" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    METHODS_PAGE.write_text(methods_page(METHODS_PAGE.read_text(encoding="utf-8")), encoding="utf-8")
