"""The folder of an adapter as a run: composed, copied, or trained by anybody with PEFT, and asked like any run.

What a run directory says of itself is read off the adapter's own files: base and method from PEFT's config, the task
from it too, labels from the head. Tokenizer and chat template are those that lie in the folder, where they give other
ids than the base's: they are what the adapter was trained with. What cannot be read off is where its rows are, so
whoever wants to compare answers names a file of rows; a merge without one is compared on the built-in ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from whet.adapters.files import CONFIG, WEIGHTS, adapter_directory
from whet.adapters.loaded import base_of
from whet.base.errors import UserError
from whet.data.config import Data
from whet.data.template.named import use_template
from whet.engine.config import Model
from whet.engine.load.load import load_config, load_tokenizer
from whet.engine.task import Task, TaskName
from whet.methods.from_peft import method_settings, read_config
from whet.recipe import Recipe, from_tree, to_tree
from whet.runs import Run, task_in

_TASKS: dict[str, TaskName] = {"CAUSAL_LM": "causal", "SEQ_2_SEQ_LM": "seq2seq", "SEQ_CLS": "classification"}
_TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class AdapterFolder(Run):
    """An adapter that stands alone; `path` is its folder. said: what a person should know before it answers."""

    said: tuple[str, ...] = ()

    @property
    def has_recipe(self) -> bool:
        """No: nothing here is whet's own."""
        return False

    @property
    def adapter(self) -> Path:
        """The folder itself."""
        return self.path

    @property
    def trained(self) -> Path:
        """The folder itself."""
        return self.path

    @property
    def task(self) -> Task:
        """The task, with the labels in the order of the head's outputs."""
        return _task(self.path, self.recipe.model)


def with_rows(run: Run, dataset: str | None) -> Run:
    """An adapter without a run, to be compared on the rows of a file. Raises UserError for a run, which has its own."""
    if dataset is None:
        return run
    if not isinstance(run, AdapterFolder):
        raise UserError(
            "a run is compared on its own held-out rows", file=str(run.path), field="--data", found=dataset,
            expected="the folder of an adapter that stands alone", fix="leave --data out",
        )  # fmt: skip
    return replace(run, recipe=replace(run.recipe, data=Data(dataset=dataset, val_size=0)))


def open_folder(place: str | Path) -> AdapterFolder:
    """The adapter in a folder, whoever trained it. Raises UserError."""
    directory = adapter_directory(place)
    model, base = base_of(directory)
    model, said = own_tokenizer(replace(model, task=_task(directory, model).name), directory)
    tree = to_tree(Recipe(model=model, base=base, data=Data(val_size=0), output_dir=str(directory)))
    try:
        recipe = from_tree(tree | {"method": method_settings(directory)})
    except UserError as error:
        raise replace(error, file=str(directory / CONFIG)) from error
    return AdapterFolder(directory, recipe, said)


def own_tokenizer(model: Model, directory: Path) -> tuple[Model, tuple[str, ...]]:
    """`model` with the tokenizer and chat template in an adapter's folder, where they give other ids; and what to say.

    An adapter that whet trained with new tokens names them, and they are added to the base's tokenizer as in training.
    """
    if not (directory / "tokenizer.json").is_file():
        template = directory / _TEMPLATE
        if not template.is_file() or _template_of(model) == template.read_text(encoding="utf-8"):
            return model, ()
        return replace(model, chat_template=str(template)), (f"the chat template is that of {directory}",)
    own = replace(model, tokenizer=str(directory), new_tokens=[], chat_template=None)
    differing = _differences(model, own)
    if not differing:
        return model, ()
    if model.new_tokens:
        template = {"chat_template": str(directory / _TEMPLATE)} if (directory / _TEMPLATE).is_file() else {}
        return replace(model, **template), ()
    return own, (f"{' and '.join(differing)} of {directory}, which the base does not have, are used",)


def _differences(base: Model, own: Model) -> list[str]:
    """The parts of the tokenizer in an adapter's folder that are not as the base's."""
    theirs = load_tokenizer(own)
    try:
        ours = load_tokenizer(base)
        use_template(ours, base.chat_template)
    except UserError:  # a base without a tokenizer
        return ["the tokenizer"]
    if theirs.backend_tokenizer.to_str() == ours.backend_tokenizer.to_str():
        different = []
    else:
        added = len(theirs.get_vocab().keys() - ours.get_vocab().keys())
        different = [f"the tokenizer with {added} more tokens" if added else "the tokenizer"]
    if theirs.chat_template and theirs.chat_template != ours.chat_template:
        different.append("the chat template")
    return different


def _template_of(model: Model) -> object:
    tokenizer = load_tokenizer(model)
    use_template(tokenizer, model.chat_template)
    return tokenizer.chat_template


def _task(directory: Path, model: Model) -> Task:
    """The task of an adapter: as whet wrote it beside, else as PEFT's config and the saved head say."""
    if known := task_in(directory):
        return known
    kind = read_config(directory).get("task_type")
    if kind is not None and kind not in _TASKS:
        raise UserError(
            "the adapter was trained for a task that whet does not have", file=str(directory / CONFIG),
            field="task_type", found=str(kind), expected=", ".join(_TASKS), fix="use it with PEFT itself",
        )  # fmt: skip
    name = _TASKS[kind or "CAUSAL_LM"]
    if name != "classification":
        return Task(name)
    count = _outputs(directory)
    if count == 1:
        return Task("regression")
    named: dict[Any, Any] = dict(load_config(model).id2label or {})
    names = [str(named.get(index, f"LABEL_{index}")) for index in range(count)]
    return Task(name, tuple(names if len(named) == count else [f"LABEL_{index}" for index in range(count)]))


def _outputs(directory: Path) -> int:
    """How many outputs the saved head has: the fewest rows of a matrix that is no part of an update."""
    from safetensors import safe_open

    with safe_open(str(directory / WEIGHTS), "np") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 - not a mapping
    rows = [
        shape[0] for key, shape in shapes.items() if key.endswith(".weight") and len(shape) == 2 and "lora_" not in key
    ]
    if not rows:
        raise UserError(
            "the adapter was trained for labels and has no head for them", file=str(directory / WEIGHTS),
            expected="a saved head, as modules_to_save of PEFT's config names it", fix="save it with its head",
        )  # fmt: skip
    return int(min(rows))
