"""What a run has saved, opened before the run is called finished: what evaluation, chat and merging will need of it.

Opened as they open it (the tokenizer of the recipe, the contract beside the adapter, PEFT's config and names), but on a
network without memory, so no second copy of the base is needed; the numbers are compared with those that were trained.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from whet.base.errors import UserError
from whet.data.template.goldens import FILE as CONTRACT
from whet.data.template.goldens import check_contract
from whet.data.template.row_tokenizer import RowTokenizer
from whet.engine.load.load import empty_model, load_config
from whet.runs import chat_tokenizer
from whet.training.setup import Ready


def check_saved(ready: Ready, model: Any, directory: Path) -> None:
    """Raise UserError unless what lies in `directory` can be opened and is what was trained. Nothing of the run is lost
    then: its checkpoints are there, and the same command saves again."""
    recipe, task = ready.recipe, ready.plan.task
    try:
        if task.name == "causal" and ready.prepared.row_tokenizer.template is not None:
            check_contract(RowTokenizer(chat_tokenizer(recipe.model), chat=True), directory / CONTRACT)
        if recipe.method.can.whole_model:
            load_config(replace(recipe.model, path=str(directory)))
        recipe.method.check_saved(model, directory, empty_model(recipe.model, "fp32", task), task)
    except UserError as error:
        raise replace(
            error, problem=f"what was saved could not be opened again: {error.problem}", file=str(ready.run.trained),
            fix=f"{error.fix}; the checkpoints of {ready.run.path} are intact" if error.fix else error.fix,
        ) from error  # fmt: skip
