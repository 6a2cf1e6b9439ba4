"""A merged text part put back into the checkpoint that it came from, beside the parts that were not loaded.

The base's files are the form: each of their tensors is written under its own name, merged where the text model has it
and as it was where it was left out (`engine.load.left_out`), with the base's config. So the class for pictures opens
the result, and so does the class for text. Where the two cannot be matched one to one the text model is kept as it is,
and what is left out of it is named.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from whet.base.console import say
from whet.base.files import read_json, write_json
from whet.engine.config import Model
from whet.engine.load.left_out import INDEX, bare, tensors_of
from whet.engine.load.load import locate

BESIDE = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def carry_over(model: Model, folder: Path, parts: dict[str, int], dtype: str) -> None:
    """Turn the text model in `folder` into the whole checkpoint of `model`; parts: what was left out, by component."""
    base = Path(locate(model.path))
    files, merged = tensors_of(base), tensors_of(folder)
    places = {bare(name): name for name in merged}
    text = [name for name in files if bare(name).partition(".")[0] not in parts]
    unmatched = [name for name in text if bare(name) not in places] or [
        name for name in merged if bare(name) not in {bare(one) for one in text}
    ]
    if unmatched or len(places) != len(merged):
        named = ", ".join(f"{name} ({count} tensors)" for name, count in sorted(parts.items()))
        say(f"the merged model is the text part alone, without {named}: {(unmatched or ['its names'])[0]} has no "
            "counterpart in the base", style="yellow")  # fmt: skip
        return
    beside = folder.with_name(f"{folder.name}-whole")
    beside.mkdir()
    sizes = [_write_file(base, folder, beside, name, files, places, merged) for name in sorted(set(files.values()))]
    if (base / INDEX).is_file():
        index = read_json(base / INDEX)
        write_json(beside / INDEX, index | {"metadata": {"total_size": sum(sizes)}})
    _write_config(base, beside, dtype)
    for name in ("generation_config.json", *BESIDE):
        source = folder if name == "generation_config.json" else base
        if (source / name).is_file():
            shutil.copyfile(source / name, beside / name)
    shutil.rmtree(folder)
    beside.rename(folder)
    named = ", ".join(f"{name} ({count} tensors)" for name, count in sorted(parts.items()))
    say(f"carried over from the base as it is: {named}")


def _write_file(
    base: Path, folder: Path, beside: Path, file: str, files: dict[str, str], places: dict[str, str],
    merged: dict[str, str],
) -> int:  # fmt: skip
    """One of the base's files with the merged tensors in it; returns its bytes of tensors."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    tensors = {}
    with safe_open(str(base / file), "pt") as old:
        for name in (name for name, owner in files.items() if owner == file):
            if bare(name) in places:
                new = places[bare(name)]
                with safe_open(str(folder / merged[new]), "pt") as opened:
                    tensors[name] = opened.get_tensor(new)
            else:
                tensors[name] = old.get_tensor(name)
    save_file(tensors, beside / file, metadata={"format": "pt"})
    return sum(tensor.nbytes for tensor in tensors.values())


def _write_config(base: Path, beside: Path, dtype: str) -> None:
    """The base's config; its type where it names one, that of the merged weights."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    for part in (config, config.get("text_config")):
        for name in ("dtype", "torch_dtype"):
            if isinstance(part, dict) and part.get(name) is not None:
                part[name] = dtype
    write_json(beside / "config.json", config)
