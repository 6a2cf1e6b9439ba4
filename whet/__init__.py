"""whet: fine-tune a language model on your own data, fast, and prove that it worked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from whet.api import (
        augment,
        capabilities,
        chat,
        check,
        compose,
        doctor,
        evaluate,
        init,
        judge,
        merge,
        open,
        plan,
        predict,
        quickstart,
        train,
    )
    from whet.base.errors import UserError
    from whet.recipe import Recipe
    from whet.runs import Run

__version__ = "0.1.0"
__all__ = [
    "Recipe",
    "Run",
    "UserError",
    "augment",
    "capabilities",
    "chat",
    "check",
    "compose",
    "doctor",
    "evaluate",
    "init",
    "judge",
    "merge",
    "open",
    "plan",
    "predict",
    "quickstart",
    "train",
]
_ELSEWHERE = {"Recipe": "whet.recipe", "Run": "whet.runs", "UserError": "whet.base.errors"}


def __getattr__(name: str) -> Any:
    # Imported when first used, so that `import whet` costs nothing and `whet --help` loads no torch.
    if name not in __all__:
        raise AttributeError(f"module 'whet' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_ELSEWHERE.get(name, "whet.api")), name)
