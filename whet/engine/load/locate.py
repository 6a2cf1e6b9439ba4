"""Where a model lies: a local directory, the built-in one, or a hub name. Imports no library."""

from __future__ import annotations

from pathlib import Path

from whet.base.errors import UserError, nearest

BUILTIN = {"builtin:tiny": Path(__file__).parents[2] / "builtin" / "tiny"}


def locate(path: str, field: str = "model.path") -> str:
    """What transformers should open: a directory for local and built-in models, the name for the hub.

    field: the setting that says so. Raises UserError for an unknown built-in name and a path that is no directory of
    a model.
    """
    if path.startswith("builtin:"):
        if path not in BUILTIN:
            raise UserError(
                "there is no such built-in model",
                field=field,
                found=path,
                expected=", ".join(BUILTIN),
                fix=f"write {nearest(path, BUILTIN) or 'builtin:tiny'}",
            )
        return str(BUILTIN[path])
    here = Path(path).expanduser()
    if here.is_dir():
        own = ("tokenizer.json", "tokenizer_config.json") if field == "model.tokenizer" else ()
        if not any((here / name).is_file() for name in ("config.json", *own)):
            if (here / "adapter_config.json").is_file():
                raise UserError(
                    "this is an adapter, not a model", file=str(here), field=field, expected="a directory of a model",
                    fix=f"model.adapter={here} trains it further; whet chat, eval and merge take the folder as it is",
                )  # fmt: skip
            raise UserError(
                "the directory holds no config.json, so it is no model",
                file=str(here),
                field=field,
                expected="config.json, model.safetensors and tokenizer files",
                fix="give the directory that save_pretrained wrote",
            )
        return str(here.resolve())
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or "\\" in path
    if looks_local or (here.exists() and here.suffix != ".json"):
        raise UserError(
            "this is no model directory",
            field=field,
            found=path,
            expected="a directory with config.json, a hub name like Qwen/Qwen3-0.6B, or builtin:tiny",
            fix=_neighbour(here),
        )
    return path


def _neighbour(path: Path) -> str:
    names = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    near = nearest(path.name, names)
    return f"did you mean {path.parent / near}?" if near else "check the path"
