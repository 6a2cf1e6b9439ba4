"""The parts of a checkpoint that a text model leaves where they are: vision, audio, heads for several tokens ahead.

transformers opens the text part of a checkpoint for pictures as a class of its own, and ignores the rest silently.
What is ignored is told here from the names in the files, without reading a tensor: of each name the first part that is
no mere wrapper (`model`, `language_model`) is a component, and a component that the loaded class has nothing of is left
out. Asked only of models whose config has more than a text part. Gives up: checkpoints of the hub, whose files are not
here before the model is loaded.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from whet.engine.config import Model
from whet.engine.load.load import load_config, locate

WRAPPERS = ("model", "language_model", "text_model")
INDEX = "model.safetensors.index.json"


def bare(name: str) -> str:
    """A tensor's name without the wrappers in front, which differ between the classes of one model."""
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in WRAPPERS:
        parts = parts[1:]
    return ".".join(parts)


def tensors_of(directory: Path) -> dict[str, str]:
    """Name of each tensor of a checkpoint to the file that holds it, from headers alone."""
    from safetensors import safe_open

    found: dict[str, str] = {}
    if (directory / INDEX).is_file():
        return dict(json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"])
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(str(file), "pt") as opened:
            found |= dict.fromkeys(opened.keys(), file.name)
    return found


def left_out(model: Model, network: Any) -> dict[str, int]:
    """Component to number of its tensors, of what the checkpoint has and the class of `network` does not."""
    config = load_config(model)
    if model.path.endswith(".json"):
        return {}
    place = Path(locate(model.path))
    if model.from_config or not place.is_dir() or not _has_other_parts(config):
        return {}
    known = _components(name for name, _ in network.named_parameters(remove_duplicate=False))
    found = Counter(bare(name).partition(".")[0] for name in tensors_of(place))
    return {component: count for component, count in found.items() if component not in known}


def left_out_notice(model: Model, network: Any) -> str | None:
    """The sentence for a person before text alone is trained of a model that has more, or None."""
    parts = left_out(model, network)
    if not parts:
        return None
    named = ", ".join(f"{name} ({count} tensors)" for name, count in sorted(parts.items()))
    owner = (load_config(model).architectures or ["the whole model"])[0]
    kind = type(network).__name__
    return (
        f"not loaded and not trained: {named}; what is trained is the text part, {kind}, whose names the adapter has. "
        f"{owner} is served by the merged model: whet merge carries these parts over"
    )


def _has_other_parts(config: Any) -> bool:
    return config.get_text_config() is not config


def _components(names: Iterable[str]) -> set[str]:
    return {bare(name).partition(".")[0] for name in names} | {"lm_head"}
