"""Say which settings of a recipe do nothing, because another setting decides what they would.

Two settings that contradict each other are refused (`planning.rules`); here are those where one simply wins, as in
other tools, whose recipes have both. What depends on the rows is in `planning.idle`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whet.base.config import field_docs
from whet.sections import SECTION_CLASSES

Settings = Callable[[str], Any]


@dataclass(frozen=True)
class Idle:
    """field: the setting that does nothing where `when` holds, given all settings; because: the reason, for people."""

    field: str
    when: Callable[[Settings], object]
    because: str


def _nothing_apart(of: Settings) -> bool:
    """True if no row is held out and there is no benchmark to compare with."""
    named = any(of(f"data.{name}") for name in ("eval_dataset", "test_dataset", "benchmarks", "test_size"))
    return of("data.val_size") == 0 and not named


def _on_this_machine(of: Settings) -> bool:
    path = str(of("model.path") or "builtin:tiny")
    return path.startswith("builtin:") or Path(path).expanduser().is_dir()


IDLE = (
    Idle("model.revision", _on_this_machine, "a model on this machine has no revisions"),
    Idle("train.num_train_epochs", lambda of: of("train.max_steps"), "train.max_steps says how long training is"),
    Idle("train.warmup_ratio", lambda of: of("train.warmup_steps") is not None, "train.warmup_steps says how long"),
    Idle("data.replay", lambda of: not of("data.replay_dataset"), "data.replay_dataset names no rows to mix in"),
    Idle("data.leakage", lambda of: of("data.leakage") != "keep" and _nothing_apart(of),
         "no row is held out to compare with"),
    Idle("train.load_best_model_at_end", lambda of: of("train.load_best_model_at_end") and of("data.val_size") == 0
         and not of("data.eval_dataset"), "no row is held out to choose by"),
)  # fmt: skip


def without_effect(tree: Mapping[str, Any], given: Collection[str]) -> list[str]:
    """A sentence for each setting that was given and does nothing. given: their dotted paths.

    Nothing is said of a section that was written out whole, as in a run directory: there no field was chosen.
    """
    whole = [name for name, (cls, *_) in SECTION_CLASSES.items() if {*field_docs(cls)} <= {*(tree.get(name) or ())}]

    def of(path: str) -> Any:
        section, _, name = path.partition(".")
        part = tree.get(section)
        return part.get(name) if isinstance(part, dict) else None

    return [
        f"{idle.field}={_shown(of(idle.field))}: without effect, {idle.because}"
        for idle in IDLE
        if idle.field in given
        and idle.field.partition(".")[0] not in whole
        and of(idle.field) is not None
        and idle.when(of)
    ]


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
