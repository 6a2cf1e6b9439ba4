"""The part of a model that decides about its rows: the tokenizer, how many tokens it reads, what it learns from text.

All of that follows from a few small files beside the weights. It is remembered under their content and the versions of
the libraries, so that `whet data check` of the same model imports neither torch nor transformers the next time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from whet.base.console import quiet_libraries
from whet.data.cache import cached, name_of
from whet.data.template.remembered import RememberedTokenizer, keep
from whet.engine.load.locate import locate
from whet.engine.task import TaskName, fits_task, text_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from whet.engine.config import Model

LARGEST_BYTES = 100 << 20  # of a file that says something of rows; weights are larger, and left out by their names
WORTH_SECONDS = 0.2  # opening that took less is not remembered
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


@dataclass(frozen=True)
class RowModel:
    """readable: the most tokens of a row (None: unknown). text_task: what is learned from rows without a label. tasks:
    those that the model can be trained for."""

    tokenizer: PreTrainedTokenizerFast
    readable: int | None
    text_task: TaskName
    tasks: tuple[TaskName, ...]


def row_model(model: Model) -> RowModel:
    """The model's part in its rows, opened with transformers. Raises UserError."""
    from whet.engine.load.load import load_config, load_tokenizer, longest_input

    quiet_libraries()
    config = load_config(model)
    tasks = tuple(name for name in get_args(TaskName) if fits_task(name, config))
    return RowModel(load_tokenizer(model), longest_input(config), text_task(config), tasks)


def remembered_row_model(model: Model) -> RowModel:
    """The same, without transformers where this model was opened before. Raises UserError."""
    files = _small_files(model)
    if files is None:
        return row_model(model)

    def opened(folder: Path, kept: dict[str, Any]) -> RowModel:
        tokenizer: Any = RememberedTokenizer(folder, kept["tokenizer"], _opener(model))
        return RowModel(tokenizer, kept["readable"], kept["text_task"], tuple(kept["tasks"]))

    def saved(known: RowModel, folder: Path) -> dict[str, Any]:
        facts = {"readable": known.readable, "text_task": known.text_task, "tasks": known.tasks}
        return facts | {"tokenizer": keep(known.tokenizer, folder)}

    name = name_of({"model": asdict(model), "files": files})
    return cached(name, lambda _: row_model(model), saved, opened, worth_seconds=WORTH_SECONDS)


def _opener(model: Model) -> Callable[[], PreTrainedTokenizerFast]:
    def open_whole() -> PreTrainedTokenizerFast:
        from whet.engine.load.load import load_tokenizer

        return load_tokenizer(model)

    return open_whole


def _small_files(model: Model) -> list[list[str]] | None:
    """Name and hash of every file beside the weights that could decide about rows; None for a name on the hub."""
    places = [Path(locate(model.path))]
    if model.tokenizer:
        places.append(Path(locate(model.tokenizer, "model.tokenizer")))
    if not all(place.is_dir() for place in places):
        return None
    hashes = []
    for place in places:
        for file in sorted([*place.glob("*"), *place.glob("additional_chat_templates/*")]):
            if file.is_file() and file.suffix not in WEIGHTS and file.stat().st_size <= LARGEST_BYTES:
                with file.open("rb") as content:
                    digest = hashlib.file_digest(content, "sha256").hexdigest()
                hashes.append([file.relative_to(place).as_posix(), digest])
    return hashes
