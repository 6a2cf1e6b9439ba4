"""A run directory: where training, evaluation and shipping meet.

recipe.yaml        the resolved recipe, without a single auto
origins.json       where each setting came from, and why whet decided what it decided
environment.json   versions and hardware
identity.json      the base by content: config, weights, vocabulary
data.json          the ledger of rows and tokens          plan.json   predicted memory
metrics.jsonl      what training computed: a function of recipe, data and machine, byte for byte
timing.jsonl       how long it took: never twice the same, so it stands apart
checkpoints/step-N/   adapter/ (or model/)   finished.json   results/*.json   report.html
lock.json          while a process writes here: which one
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from whet.base.errors import UserError, nearest
from whet.base.files import read_json, write_json, write_text
from whet.base.lock import FILE as LOCK
from whet.base.lock import DirectoryLock
from whet.base.outputs import output_path
from whet.engine.task import CAUSAL, Task, TaskName, text_task
from whet.recipe import ON_THE_WAY, Recipe, fingerprint, parse, to_tree, to_yaml

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from whet.data.prepare import Prepared
    from whet.engine.config import Model

IDENTITY = "identity.json"  # the base by content, as it was when the run began
LABELS = "labels.json"  # beside what was trained: the task and the names of its labels


@dataclass(frozen=True)
class Run:
    """A run directory and the recipe in it."""

    path: Path
    recipe: Recipe

    @property
    def adapter(self) -> Path:
        """The directory of the trained adapter, in PEFT's format."""
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """The directory of a model that was trained by full fine-tuning, in transformers' format."""
        return self.path / "model"

    @property
    def trained(self) -> Path:
        """The adapter or the model, whichever the method writes."""
        return self.model if self.recipe.method.can.whole_model else self.adapter

    @property
    def task(self) -> Task:
        """The trained task, with the labels in the order of the head's outputs; causal before anything is trained."""
        path = self.trained / LABELS
        if not path.is_file():
            return CAUSAL
        try:
            found = read_json(path)
            task = Task(found["task"], tuple(str(name) for name in found["labels"]))
            if task.name not in get_args(TaskName):
                raise ValueError(f"no such task: {task.name}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"the names of the labels cannot be read: {error}", file=str(path),
                expected='{"task": "classification", "labels": ["a", "b"]}', fix="copy it back, or train again",
            ) from error  # fmt: skip
        return task

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def results(self) -> Path:
        return self.path / "results"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def timing(self) -> Path:
        return self.path / "timing.jsonl"

    @property
    def finished(self) -> dict[str, Any] | None:
        """How training ended, or None while it has not."""
        path = self.path / "finished.json"
        return read_json(path) if path.is_file() else None

    def read(self, name: str) -> Any | None:
        """A JSON file of the run, or None when it is not there."""
        path = self.path / name
        return read_json(path) if path.is_file() else None

    def write(self, name: str, value: Any) -> Path:
        """Store a JSON value in the run, whole or not at all."""
        write_json(self.path / name, value)
        return self.path / name

    def rewritten(self, recipe: Recipe, decided: Mapping[str, tuple[object, str]]) -> Run:
        """The same run with another recipe; decided: dotted path to (value, reason) of what differs."""
        write_text(self.path / "recipe.yaml", to_yaml(recipe))
        origins = self.read("origins.json") or {}
        for path, (value, reason) in decided.items():
            origins[path] = {"value": value, "origin": "decided", "reason": reason}
        self.write("origins.json", origins)
        return Run(self.path, recipe)

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The records of a .jsonl file of the run; an unfinished last line, and any that is no record, is left out."""
        path = self.path / name
        if not path.is_file():
            return []
        lines = path.read_bytes().split(b"\n")[:-1]
        return [value for line in lines if (value := record(line)) is not None]


def record(line: bytes) -> dict[str, Any] | None:
    """The object on a line of a log; None for anything else, which a cut or damaged file may hold."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def prepared(recipe: Recipe, *, any_model: bool = False) -> Prepared:
    """The rows of a recipe, read and tokenised as training does it; any_model: whatever its model can read.

    Raises UserError.
    """
    from whet.data.prepare import prepare
    from whet.engine.load.load import load_config, longest_input

    config, tokenizer = load_config(recipe.model), chat_tokenizer(recipe.model)
    readable = None if any_model else longest_input(config)
    return prepare(recipe.data, tokenizer, readable, recipe.model.task, text_task(config))


def rows_of(run: Run) -> Prepared:
    """The rows of a run, as `prepared`. Raises UserError where its data files are not those of its start."""
    from whet.data.read.read import check_unchanged

    found, began = prepared(run.recipe), run.read("data.json")
    if began is not None:
        check_unchanged(began.get("files", []), found.ledger.files)
    return found


def chat_tokenizer(model: Model) -> PreTrainedTokenizerFast:
    """The tokenizer of a model with the chat template that the recipe names, if it names one. Raises UserError."""
    from whet.data.template.template import use_template
    from whet.engine.load.load import load_tokenizer

    tokenizer = load_tokenizer(model)
    use_template(tokenizer, model.chat_template)
    return tokenizer


def start(
    recipe: Recipe, origins: Mapping[str, str], decided: Mapping[str, tuple[object, str]], facts: Mapping[str, Any],
    lock: DirectoryLock | None = None,
) -> Run:  # fmt: skip
    """Create the run directory of a recipe without open settings, or recognise the one of the same recipe.

    origins: dotted path to where a setting came from; decided: to (value, reason) for what was auto. facts: JSON file
    name to content. lock: of the directory, which is taken before anything is written and held afterwards, unless the
    run is finished. Raises UserError when the directory holds another run, or another process writes in it.
    """
    run = Run(run_directory(recipe), recipe)
    _check_room(run)
    if _is_run(run):
        _check_same(run)
        if run.finished is not None:
            return run
    with contextlib.ExitStack() as stack:
        (lock or stack.enter_context(DirectoryLock(run.path))).take()
        if _is_run(run):  # it may have come meanwhile
            _check_same(run)
        else:  # first of all: it makes the directory ours, so a start that is killed here can be repeated
            write_text(run.path / "recipe.yaml", to_yaml(recipe))
        for name, value in {**facts, "origins.json": _origins(recipe, origins, decided)}.items():
            if not (run.path / name).is_file():
                run.write(name, value)
    return run


def run_directory(recipe: Recipe) -> Path:
    """The run directory that a recipe names. Raises UserError for what can be no path."""
    return output_path(recipe.output_dir or "runs/run", "output_dir")


def _is_run(run: Run) -> bool:
    return (run.path / "recipe.yaml").is_file()


def _check_room(run: Run) -> None:
    """Raise UserError where something else stands at the run directory."""
    above = next((place for place in run.path.absolute().parents if place.exists()), run.path)
    if not above.is_dir():
        raise UserError(
            f"output_dir lies below a file: {above}", file=str(run.path), field="output_dir",
            expected="directories all the way", fix=f"output_dir={above}-run",
        )  # fmt: skip
    if run.path.exists() and not run.path.is_dir():
        raise UserError(
            "output_dir is a file", file=str(run.path), field="output_dir", expected="a directory",
            fix=f"output_dir={run.path}-run",
        )  # fmt: skip
    if run.path.is_dir() and not _is_run(run) and not all(map(_is_of_start, run.path.iterdir())):
        raise UserError(
            "the output directory is not empty and holds no run of whet", file=str(run.path), field="output_dir",
            expected="a new or empty directory", fix=f"output_dir={run.path}-2",
        )  # fmt: skip


def _is_of_start(path: Path) -> bool:
    """Whether a start that was killed left this file."""
    return path.name == LOCK or path.name.startswith(".recipe.yaml.")


def open_run(path: str | Path) -> Run:
    """An existing run directory. Raises UserError when it is none."""
    place = Path(path)
    if not (place / "recipe.yaml").is_file():
        siblings = [p.name for p in place.parent.glob("*") if (p / "recipe.yaml").is_file()]
        near = nearest(place.name, siblings)
        raise UserError(
            "this is no run directory", file=str(place), expected="a directory that whet train wrote",
            fix=f"did you mean {place.parent / near}?" if near else "whet train RECIPE writes one",
        )  # fmt: skip
    return Run(place, parse(place / "recipe.yaml").recipe)


def _check_same(run: Run) -> None:
    old = parse(run.path / "recipe.yaml").recipe
    if fingerprint(old) == fingerprint(run.recipe):
        return
    before, now = _flat(to_tree(old)), _flat(to_tree(run.recipe))
    ignored = ("output_dir", "eval.", "data.padding_free", *ON_THE_WAY)
    path = next(p for p in now if before.get(p) != now[p] and not p.startswith(ignored))
    raise UserError(
        "the output directory holds a run of another recipe",
        file=str(run.path),
        field=path,
        found=str(now[path]),
        expected=f"{before.get(path)}, as in the run that is there",
        fix=f"output_dir={run.path}-2 starts a new run; the old one is left as it is",
    )


def _origins(recipe: Recipe, given: Mapping[str, str], decided: Mapping[str, tuple[object, str]]) -> dict[str, Any]:
    result = {}
    for path, value in _flat(to_tree(recipe)).items():
        origin = given.get(path, "default")
        reason = None
        if path in decided:
            origin, reason = "decided", decided[path][1]
        result[path] = {"value": value, "origin": origin, "reason": reason}
    return result


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in tree.items():
        path = prefix + key
        result |= _flat(value, path + ".") if isinstance(value, dict) and key != "columns" else {path: value}
    return result
