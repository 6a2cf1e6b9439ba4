"""whet: fine-tune a language model on your own data, fast, and prove that it worked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

# Three verbs share their name with a room. The (empty) rooms are imported first, because importing one later would
# put it in the place of the verb.
import whet.evaluate
import whet.methods
import whet.train  # noqa: F401

if TYPE_CHECKING:
    from whet.api import augment, chat, check, compose, doctor, init, judge, merge, plan, predict, quickstart
    from whet.base.errors import UserError
    from whet.recipe import Recipe
    from whet.runs import Run

__version__ = "0.1.0"
__all__ = [
    "Recipe",
    "Run",
    "UserError",
    "augment",
    "chat",
    "check",
    "compose",
    "doctor",
    "evaluate",
    "init",
    "judge",
    "merge",
    "methods",
    "plan",
    "predict",
    "quickstart",
    "train",
]
_ELSEWHERE = {"Recipe": "whet.recipe", "Run": "whet.runs", "UserError": "whet.base.errors"}


def train(recipe: str | Path | None = None, /, **overrides: Any) -> Run:  # type: ignore[no-redef]
    """Train what a recipe says; see `whet.api.train`."""
    from whet import api

    return api.train(recipe, **overrides)


def evaluate(run: str | Path, *, max_rows: int | None = None) -> dict[str, Any]:  # type: ignore[no-redef]
    """Score base and tuned model of a run; see `whet.api.evaluate`."""
    from whet import api

    return api.evaluate(run, max_rows=max_rows)


def methods() -> list[dict[str, Any]]:  # type: ignore[no-redef]
    """The capability matrix; see `whet.api.methods`."""
    from whet import api

    return api.methods()


def __getattr__(name: str) -> Any:
    # Imported when first used, so that `import whet` costs nothing and `whet --help` loads no torch.
    if name not in __all__:
        raise AttributeError(f"module 'whet' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_ELSEWHERE.get(name, "whet.api")), name)
