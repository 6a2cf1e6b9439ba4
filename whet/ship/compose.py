"""Adapters on disk: composed into a new one, renamed, deleted."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from whet.adapters.files import CONFIG, NOTE, WEIGHTS, adapter_directory
from whet.adapters.loaded import Adapters, How, base_of, check_adapter
from whet.base.console import say
from whet.base.content import digest_of, files_in
from whet.base.errors import UserError
from whet.base.files import read_json, remove_whole, sweep
from whet.base.outputs import output_directory, output_path
from whet.data.template.goldens import OTHER_TEMPLATES
from whet.engine.load.identity import SEAL, base_identity, check_base, check_sealed
from whet.engine.load.locate import locate
from whet.inputs import inputs_of_adapter
from whet.opening import open_plain


def compose_on_disk(
    out: str | Path, parts: Sequence[str | Path], *, weights: Sequence[float] | None = None, how: How = "cat",
    rank: int | None = None, density: float = 0.5,
) -> Path:  # fmt: skip
    """Load the base of the first part, compose the parts and write the result to the new directory `out`.

    Where `out` holds the same composition already it is left as it is.
    What stands beside the first adapter (tokenizer, template contract) is copied. Raises UserError, also when the parts
    were trained on different bases.
    """
    folders = [adapter_directory(part) for part in parts]
    recorded = [check_adapter(folder) for folder in folders]
    asked = {
        "parts": [str(part) for part in parts], "weights": list(weights or [1.0] * len(parts)), "how": how,
        "rank": rank, "density": density,
        "made_of": [digest_of(files_in(folder, [CONFIG, WEIGHTS])) for folder in folders],
    }  # fmt: skip
    if os.path.lexists(output_path(out)):
        return _composed_before(output_path(out), asked)
    bases = [base_of(part) for part in parts]
    for folder, (model, _) in zip(folders[1:], bases[1:], strict=True):
        if locate(model.path) != locate(bases[0][0].path):
            raise UserError(
                "the adapters were trained on different models", file=str(folder), found=model.path,
                expected=bases[0][0].path, fix="compose adapters of one base",
            )  # fmt: skip
    model, base = bases[0]
    for one in recorded:
        check_base(model, one)
    for folder, (named, _) in zip(folders, bases, strict=True):
        output_directory(out, inputs_of_adapter(folder, named.path))
    adapters = Adapters(open_plain(model, base).network)
    names = [str(index) for index in range(len(parts))]
    for name, folder in zip(names, folders, strict=True):
        adapters.load(name, folder)
    adapters.compose("out", names, weights, how=how, rank=rank, density=density)
    note = asked | {"base": {name: value for name, value in asdict(model).items() if value is not None}}
    beside = [
        file for file in folders[0].iterdir()
        if file.name == OTHER_TEMPLATES or (file.is_file() and _is_of_tokenizer(file) and file.name != SEAL)
    ]  # fmt: skip
    return adapters.write("out", out, note, beside=beside, base=recorded[0] or base_identity(model))


def _composed_before(out: Path, asked: dict[str, Any]) -> Path:
    """The directory `out` where the same was composed before. Raises UserError where anything else stands there."""
    try:
        found = read_json(out / NOTE)
        same = all(found[name] == value for name, value in asked.items())
    except (OSError, ValueError, LookupError, TypeError):
        same = False
    if not same:
        raise UserError("the output is in the way", file=str(out), fix="give a new directory")
    check_sealed(out)
    say(f"{out} holds this composition already: nothing to do")
    return out


def rename_on_disk(target: str | Path, new: str | Path) -> Path:
    """Rename the directory of an adapter (not the adapter/ of a run: that belongs to its run). Raises UserError."""
    directory, out = adapter_directory(target), output_path(new)
    _check_stands_alone(directory)
    if os.path.lexists(out):
        raise UserError("the new name is in the way", file=str(out), fix="give another one")
    out.parent.mkdir(parents=True, exist_ok=True)
    return directory.rename(out)


def delete_on_disk(target: str | Path) -> Path:
    """Remove the directory of an adapter: it loses its name first, so no part of an adapter is ever seen.

    What a killed call has left of it is removed as well. Raises UserError when other files lie in it, or it belongs to
    a run.
    """
    place = Path(target).absolute()
    sweep(place.parent, place.name)
    directory = adapter_directory(target)
    _check_stands_alone(directory)
    known = {CONFIG, WEIGHTS, NOTE, OTHER_TEMPLATES, "README.md", "results"}
    others = sorted(path.name for path in directory.iterdir() if path.name not in known and not _is_of_tokenizer(path))
    if others:
        raise UserError(
            "other files lie beside the adapter, so it is left alone", file=str(directory),
            found=", ".join(others[:5]), fix="remove the folder by hand",
        )  # fmt: skip
    remove_whole(directory.absolute())
    return directory


def _check_stands_alone(directory: Path) -> None:
    run = directory.resolve().parent
    if directory.resolve().name == "adapter" and (run / "recipe.yaml").is_file():
        raise UserError(
            "this adapter belongs to its run", file=str(directory), fix=f"move or remove the whole run {run}"
        )


def _is_of_tokenizer(path: Path) -> bool:
    return path.name.startswith(("tokenizer", "special_tokens", "chat_template", "whet_")) or path.suffix == ".jinja"
