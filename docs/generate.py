"""Writes docs/recipe.md from the JSON schema and the alias table, and the capability matrix into docs/methods.md.

The Korean twins of both too: their texts are those that the terminal shows, and what only a page says stands in
docs/generated_in_korean.json. `python docs/generate.py`; a test compares the four files with what this would write.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from whet.base.catalogue import catalogue
from whet.methods.all import METHODS, capability_rows
from whet.planning.rules import RULES
from whet.recipe import SECTIONS, json_schema
from whet.spelling import aliases

Say = Callable[[str], str]  # a text of whet or of this file in the language of a page

DOCS = Path(__file__).parent
KOREAN: dict[str, str] = json.loads((DOCS / "generated_in_korean.json").read_text(encoding="utf-8"))
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

Korean: [recipe.ko.md](recipe.ko.md).

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
ALONE_HEAD = "\n## Outside the sections\n\n"
TRANSLATED_HEAD = "\nTranslated together with their value:\n\n"
FIELD_COLUMNS = ("field", "type", "default", "meaning")
RULES_COLUMNS = ("field", "refused, because", "one fix")
ALIASES_COLUMNS = ("setting", "also accepted")
TRANSLATED_COLUMNS = ("written", "read as")
SAID = {"what", "tasks", "mergeable", "peft_format", "vllm_unmerged", "composable", "compiles"}  # columns with words
WORDS = {"string": "text", "boolean": "`true` or `false`", "number": "number", "integer": "whole number"}
LIMITS = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))


def in_english(text: str) -> str:
    return text


def in_korean(text: str) -> str:
    """The Korean of a text. Raises LookupError where a sentence has none."""
    korean = KOREAN.get(text) or catalogue().translated(text)
    if korean == text and re.search(r"[a-z] [a-z]", text):
        raise LookupError(f"no Korean for {text!r}: write it into docs/generated_in_korean.json or whet/builtin/korean")
    return korean


SAY: dict[str, Say] = {"": in_english, ".ko": in_korean}  # by what the name of a page has before its suffix


def page(say: Say = in_english) -> str:
    """The whole text of docs/recipe.md, or of its twin."""
    schema = json_schema()
    parts = [say(HEAD)]
    for section in SECTIONS:
        parts.append(f"\n## {section}\n\n{say(schema['properties'][section]['description'])}\n")
        if section != "method":
            parts.append("\n" + field_table(schema["$defs"][section.capitalize()]["properties"], say))
            continue
        for cls in dict.fromkeys(METHODS.values()):
            names = " | ".join(name for name, owner in METHODS.items() if owner is cls)
            parts.append(f"\n### method.name: {names}\n\n{say((cls.__doc__ or '').strip())}\n\n")
            parts.append(field_table(schema["$defs"][cls.__name__]["properties"], say))
    alone = {name: part for name, part in schema["properties"].items() if name not in SECTIONS}
    parts += [say(ALONE_HEAD), field_table(alone, say), say(METHODS_HEAD)]
    parts += [say(RULES_HEAD), table(RULES_COLUMNS, list(dict.fromkeys(exclusions(say))), say)]
    parts += [say(ALIASES_HEAD), table(ALIASES_COLUMNS, sorted(other_names()), say)]
    return "".join([*parts, say(TRANSLATED_HEAD), table(TRANSLATED_COLUMNS, list(translated()), say)])


def methods_page(written: str, say: Say = in_english) -> str:
    """docs/methods.md or its twin as `written`, with the capability matrix as it is now."""
    rows = capability_rows()
    head = [name.replace("_", " ") for name in rows[0]]
    cells = [[say(cell(value)) if name in SAID else cell(value) for name, value in row.items()] for row in rows]
    matrix = table(head, cells, say)
    return MATRIX.sub(lambda found: found[1] + matrix + found[2], written)


def field_table(fields: Mapping[str, Any], say: Say) -> str:
    rows = [(f"`{name}`", type_of(part, say), default(part), say(part["description"])) for name, part in fields.items()]
    return table(FIELD_COLUMNS, rows, say)


def type_of(part: Mapping[str, Any], say: Say) -> str:
    """A schema in words: choices as they are written, limits beside the type."""
    if "anyOf" in part:
        return say(" or ").join(type_of(choice, say) for choice in part["anyOf"] if choice != {"type": "null"})
    if "const" in part or "enum" in part:
        return say(" or ").join(f"`{value}`" for value in part.get("enum", [part.get("const")]))
    if part["type"] == "array":
        return say("list of {0}").replace("{0}", type_of(part["items"], say))
    limits = ", ".join(f"{sign} {part[name]:g}" for name, sign in LIMITS if name in part)
    return f"{say(WORDS.get(part['type'], 'mapping'))} {limits}".strip()


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


def exclusions(say: Say) -> Iterator[tuple[str, str, str]]:
    """Each rule about settings that exclude each other; what a text names is shown by its path."""
    for rule in RULES:
        problem, fix = (re.sub(r"{([a-z_.]+)[^}]*}", r"`\1`", text) if isinstance(text, str) else "as it says"
                        for text in (rule.problem, rule.fix))  # fmt: skip
        yield f"`{rule.field}`", say(problem), say(fix)


def translated() -> Iterator[tuple[str, str]]:
    for name, value in TRANSLATED:
        found = aliases.canonical(name, value, None, None)
        written = value if isinstance(value, str) else json.dumps(value)
        yield f"`{name}: {written}`", ", ".join(f"`{path}: {'auto' if v is None else cell(v)}`" for path, v, _ in found)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], say: Say) -> str:
    lines = ([say(name) for name in head], ["---"] * len(head), *rows)
    return "".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |\n" for line in lines)


def pages() -> Iterator[tuple[Path, str]]:
    """Each file that is written, and its text."""
    for mark, say in SAY.items():
        yield DOCS / f"recipe{mark}.md", page(say)
        methods = DOCS / f"methods{mark}.md"
        yield methods, methods_page(methods.read_text(encoding="utf-8"), say)


if __name__ == "__main__":
    for path, text in pages():
        path.write_text(text, encoding="utf-8")
