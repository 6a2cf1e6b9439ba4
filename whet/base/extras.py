"""Import optional packages when they are first needed; if one is missing, name the extra that installs it."""

from __future__ import annotations

import importlib
from types import ModuleType

from whet.base.errors import UserError

EXTRAS = {
    "backports": "data",
    "bitsandbytes": "gpu",
    "pyarrow": "data",
    "rouge_score": "eval",
    "sacrebleu": "eval",
    "tensorboard": "trackers",
}


def require(module: str, needed_for: str) -> ModuleType:
    """Import `module`. Raises UserError that names the extra which installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as missing:
        package = module.partition(".")[0]
        raise UserError(
            f"{needed_for} needs the package {package}, which is not installed",
            fix=f"pip install 'whet[{EXTRAS[package]}]'",
        ) from missing
