"""The page beside a trained adapter: what it is, what it was made of, and how to open it, from what the run knows.

PEFT writes a form in which everything is still to be filled in. Nothing here is left open: base, method, rows, steps
and losses are in the run, and the same facts stand in the files that are named.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from whet.engine.task import Task
from whet.recipe import Recipe

CARD = "README.md"


def write_card(directory: Path, recipe: Recipe, task: Task, network: Any, facts: dict[str, Any]) -> None:
    """Write README.md. network: the model that was trained; facts: label to value of what training measured."""
    (directory / CARD).write_text(card(recipe, task, network, facts), encoding="utf-8")


def card(recipe: Recipe, task: Task, network: Any, facts: dict[str, Any]) -> str:
    """The text of the page, in the form that the hub reads."""
    base, method = recipe.model.path, recipe.method
    local = base.startswith(("/", ".", "~", "builtin:")) or Path(base).exists()
    named = {
        field.name: getattr(method, field.name) for field in dataclasses.fields(method)  # type: ignore[arg-type]
        if field.name != "name" and getattr(method, field.name) not in (None, [], {}, "", False)
    }  # fmt: skip
    front = ["---", "library_name: peft" if method.can.peft_format else "library_name: whet"]
    front += [] if local else [f"base_model: {json.dumps(base)}"]
    front += ["tags:", f"- {method.name}", "- whet", "---"]
    rows = [f"| {name} | {_cell(value)} |" for name, value in facts.items()]
    rows += [f"| {name} | {_cell(value)} |" for name, value in named.items()]
    labels = [f"Labels, in the order of the outputs: {', '.join(task.labels)}.", ""] if task.labels else []
    return "\n".join([
        *front, "", f"# {Path(base).name if local else base}, trained with {method.name}", "",
        f"Learned by `whet train` on top of it for the task {task.name}; its names are those of "
        f"{type(network).__name__}.", "", *labels,
        "| | |", "| --- | --- |", f"| method | {method.name} |", *rows, "",
        "`whet chat`, `whet eval` and `whet merge` open this folder."
        + (" So does PEFT:" if method.can.peft_format else ""),
        *(_peft_lines(task, base) if method.can.peft_format else []), "",
    ])  # fmt: skip


def _peft_lines(task: Task, base: str) -> list[str]:
    kind = task.auto_class().__name__
    more = f", num_labels={max(1, len(task.labels))}" if task.labelled else ""
    return [
        "", "```python", "from peft import PeftModel", f"from transformers import {kind}", "",
        f"base = {kind}.from_pretrained({json.dumps(base)}{more})",
        'model = PeftModel.from_pretrained(base, "this folder")', "```",
    ]  # fmt: skip


def _cell(value: Any) -> str:
    text = (
        f"{value:.4g}"
        if isinstance(value, float)
        else ", ".join(map(str, value))
        if isinstance(value, list)
        else str(value)
    )
    return text.replace("|", "\\|").replace("\n", " ")
