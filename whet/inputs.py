"""What a call reads, to hold its outputs against (`base.outputs`): a recipe with all that it names, a run, adapters.

Every setting of a recipe that is the path of something on this machine counts, whichever setting it is, so that a new
one cannot be forgotten here.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from whet.base.outputs import Input
from whet.recipe import Parsed, Recipe, to_tree
from whet.runs import Run

_WHAT = {"model": "the model", "data": "the data"}
_ROWS = ("dataset", "eval_dataset", "test_dataset", "replay_dataset", "added_dataset", "benchmarks", "blocklist")


def inputs_of_recipe(parsed: Parsed) -> list[Input]:
    """The recipe file, if there is one, and every path that the recipe names."""
    file = [] if parsed.file is None else [Input(Path(parsed.file), "the recipe")]
    return [*file, *_named_by(parsed.recipe)]


def inputs_of_run(run: Run) -> list[Input]:
    """The files of a run, what it trained, its checkpoints, and every path that its recipe names."""
    folders = [Input(path, "the run", closed="all") for path in (run.trained, run.checkpoints)]
    return [Input(run.path, "the run"), *folders, *_named_by(run.recipe)]


def inputs_of_adapter(directory: Path, model: str) -> list[Input]:
    """The folder of an adapter and the model that it belongs to."""
    return [Input(directory, "the adapter", closed="all"), *_inputs(model, "model")]


def _named_by(recipe: Recipe) -> list[Input]:
    tree = to_tree(recipe)
    settings = [(section, *item) for section, part in tree.items() if isinstance(part, dict) for item in part.items()]
    return [
        one for section, name, value in settings for text in _texts(value)
        for one in _inputs(text, section, closed=name in _ROWS)
    ]  # fmt: skip


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from (*_texts(key), *_texts(inner))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)


def _inputs(text: str, section: str, *, closed: bool = False) -> Iterator[Input]:
    """The inputs that a setting may mean: a path, a folder with a part after #, a glob."""
    if "\0" in text or ":" in text.partition("/")[0]:  # hub:owner/name, builtin:tiny
        return
    for name in {text, text.rpartition("#")[0]} - {""}:
        try:
            path = Path(name).expanduser()
            if path.exists() or (closed and glob.has_magic(name)):
                yield Input(path, _WHAT.get(section, "what the recipe names"), "files" if closed else "no")
        except (OSError, RuntimeError):  # no path at all, then
            continue
