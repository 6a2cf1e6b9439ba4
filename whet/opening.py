"""The one way to open what answers: a run, adapters on one base, or a model.

Tokenizer, chat template, row tokenizer, the check that all three give the token ids that were trained on, and only then
the model. Chat, evaluation, prediction and merging open here, so that none of them can forget a step. What is opened is
asked in a session (`engine.answer.session`). Notices of the engine are told here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whet.adapters.files import CONFIG, adapter_directory
from whet.adapters.folder import AdapterFolder, own_tokenizer
from whet.adapters.loaded import Adapters, base_of, check_adapter
from whet.base.console import say
from whet.data.template.goldens import FILE as CONTRACT
from whet.data.template.goldens import check_contract
from whet.data.template.row_tokenizer import RowTokenizer
from whet.engine.answer.session import LabelSession, TextSession
from whet.engine.config import Base, Model
from whet.engine.load.identity import check_base, check_sealed
from whet.engine.load.load import load_tokenizer
from whet.engine.load.open import Opened, answering_placement, check_trained, open_model, open_trained
from whet.engine.memory.scarce import NoRoom, let_go
from whet.engine.task import CAUSAL, Task
from whet.runs import Run, chat_tokenizer


@dataclass(frozen=True)
class Answerer:
    """A loaded model with the row tokenizer that it was trained with.

    run: what it was opened from, if that was a run; adapters: those on its base, when they were opened by name.
    """

    opened: Opened
    row_tokenizer: RowTokenizer
    run: Run | None = None
    adapters: Adapters | None = None


def open_answerer(run: Run, *, row_tokenizer: RowTokenizer | None = None, task: Task | None = None) -> Answerer:
    """Open what a run trained. row_tokenizer: of rows that were prepared before; task: as the data is read now.

    Raises UserError when the run is unfinished, or the row tokenizer is not the one that it was trained with.
    """
    check_trained(run.trained)
    for text in run.said if isinstance(run, AdapterFolder) else ():
        say(text, style="yellow")
    recipe, task = run.recipe, run.task if task is None else task
    if row_tokenizer is None and task.name == "causal":
        row_tokenizer = RowTokenizer(chat_tokenizer(recipe.model), chat=True)
    elif row_tokenizer is None:
        row_tokenizer = RowTokenizer(load_tokenizer(recipe.model), chat=False)
    if task.name == "causal":
        check_contract(row_tokenizer, run.trained / CONTRACT)
    base = check_run(run)
    opened = open_trained(recipe.model, recipe.base, run.trained, recipe.method, task)
    if not recipe.method.can.whole_model:
        check_base(recipe.model, base)  # once more: a model of the hub may have been fetched just now
    return Answerer(_told(opened), row_tokenizer, run)


def check_run(run: Run) -> Any:
    """The base that a run recorded. Raises UserError where what it trained, or its base, is not what it was."""
    base = check_sealed(run.trained, (run.finished or {}).get("trained_sha256"))
    if not run.recipe.method.can.whole_model:
        check_base(run.recipe.model, base)
    return base


def open_model_for_chat(path: str) -> Answerer:
    """A model directory, a hub name or a built-in model, as it is. Raises UserError."""
    model = Model(path=path)
    row_tokenizer = RowTokenizer(load_tokenizer(model), chat=True)
    return Answerer(open_plain(model, Base()), row_tokenizer)


def open_adapters(target: str, beside: Mapping[str, str]) -> Answerer:
    """Adapters by name on one base: that of `target`, if it has one, called by its folder and in use, and `beside`.

    target: a run, the folder of an adapter, or a model. Raises UserError, also for an adapter that was trained with
    another row tokenizer.
    """
    path = Path(target)
    own = path if (path / CONFIG).is_file() or (path / "recipe.yaml").is_file() else None
    model, base = (Model(path=target), Base()) if own is None else base_of(own)
    if own is not None:
        model, said = own_tokenizer(model, adapter_directory(own))
        for text in said:
            say(text, style="yellow")
    row_tokenizer = RowTokenizer(chat_tokenizer(model), chat=True)
    targets = ({path.name: str(own)} if own is not None else {}) | dict(beside)
    for adapter in targets.values():
        directory = adapter_directory(adapter)
        check_contract(row_tokenizer, directory / CONTRACT)
        check_base(model, check_adapter(directory))
    opened = open_plain(model, base)
    adapters = Adapters(opened.network)
    for name, adapter in targets.items():
        adapters.load(name, adapter)
    if own is not None:
        adapters.use(path.name)
    return Answerer(opened, row_tokenizer, adapters=adapters)


def open_plain(model: Model, base: Base, task: Task = CAUSAL) -> Opened:
    """A plain model where and how it answers on this machine."""
    return _told(open_model(model, answering_placement(model, base), task))


def open_base(answerer: Answerer) -> Opened:
    """The base of a run, loaded anew in the arithmetic of what it trained: for methods that nothing switches off."""
    assert answerer.run is not None, "only a run knows its base"
    opened = answerer.opened
    check_base(answerer.run.recipe.model, check_sealed(answerer.run.trained))
    return _told(open_model(answerer.run.recipe.model, opened.placement, opened.task))


@contextlib.contextmanager
def base_anew(answerer: Answerer) -> Iterator[Opened]:
    """`open_base` for the time of the block. What was trained waits in host memory meanwhile, where both do not fit."""
    tuned, home = answerer.opened.network, answerer.opened.placement.device
    base, waits = None, False
    with contextlib.suppress(NoRoom):
        base = open_base(answerer)
    if base is None:
        say("out of memory: the trained model waits in host memory while the base answers", style="yellow")
        waits = True
        tuned.to("cpu")  # type: ignore[arg-type]
        let_go()
    try:
        base = open_base(answerer) if base is None else base
        yield base
    finally:
        if waits:
            if base is not None:
                base.network.to("cpu")  # type: ignore[arg-type]
            let_go()
            tuned.to(home)  # type: ignore[arg-type]


def tell(session: TextSession | LabelSession) -> None:
    """Say the notices of a session that were not said yet."""
    for text in session.notices.take():
        say(text)


def _told(opened: Opened) -> Opened:
    """`opened`, after its notices are said."""
    for text in opened.notices:
        say(text, style="yellow")
    return opened
