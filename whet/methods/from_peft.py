"""The settings of a method, read off an adapter's own files: what PEFT's config says, in the words of a recipe.

For adapters that others trained, and for going on with one: whichever tool wrote `adapter_config.json`, the method that
opens it and the method that trains it further are the same classes as for whet's own runs. What whet's method has no
setting for is refused by name, since going on without it would train something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from whet.base.config import field_docs
from whet.base.errors import UserError
from whet.base.files import read_json
from whet.methods.bridged import BRIDGED, LEFT_OUT
from whet.methods.lora import Lora

CONFIG, OWN = "adapter_config.json", "method.json"
OF_TRAINING = ("name", "init_lora_weights", "loraplus_lr_ratio")  # settings of LoRA that no adapter has
LORA = tuple(name for name in field_docs(Lora) if name not in OF_TRAINING)
# Of PEFT's LoRA: what changes the arithmetic and has no setting here, with the value that means nothing is changed.
BEYOND = {
    "fan_in_fan_out": None, "lora_bias": False, "layer_replication": None, "megatron_config": None, "use_qalora": False,
    "alora_invocation_tokens": None, "arrow_config": None, "use_bdlora": None, "lora_ga_config": None,
    "velora_config": None, "kasa_config": None,
}  # fmt: skip


def read_config(directory: Path) -> dict[str, Any]:
    """PEFT's config of the adapter in `directory`. Raises UserError for what is no JSON object."""
    try:
        found = read_json(directory / CONFIG)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the adapter's config cannot be read: {error}", file=str(directory / CONFIG), expected="a JSON object",
            fix="copy the adapter again, whole",
        ) from error  # fmt: skip
    if not isinstance(found, dict) or not isinstance(found.get("peft_type"), str):
        raise UserError(
            "this is no config of an adapter", file=str(directory / CONFIG), field="peft_type",
            found=str(found.get("peft_type") if isinstance(found, dict) else type(found).__name__),
            expected="LORA, IA3, …, as PEFT writes it", fix="give a folder that PEFT's save_pretrained wrote",
        )  # fmt: skip
    return found


def method_settings(directory: Path) -> dict[str, Any]:
    """The `method` section of a recipe that trains what lies in `directory`. Raises UserError for a method that whet
    does not have."""
    if (directory / OWN).is_file() and not (directory / CONFIG).is_file():
        about = read_json(directory / OWN)
        return {**about["settings"], "name": about["method"]}
    config = read_config(directory)
    kind = config["peft_type"]
    if kind == "LORA":
        return {"name": "lora", **_lora(config)}
    if kind == "ADALORA":
        return {"name": "adalora"}
    name = next((name for name, row in BRIDGED.items() if row.peft == kind), None)
    if name is None:
        reason = LEFT_OUT.get(kind.lower(), ("whet does not have this method of PEFT", ""))[0]
        raise UserError(
            f"an adapter of this kind cannot be used: {reason}", file=str(directory / CONFIG), field="peft_type",
            found=kind, expected="a method that `whet methods` lists", fix="merge it with PEFT, and give the model",
        )  # fmt: skip
    return {"name": name, "options": _options(name, config)}


def check_trainable(directory: Path) -> None:
    """Raise UserError where training the adapter further would leave out a part of its arithmetic."""
    if not (directory / CONFIG).is_file():
        return
    config = read_config(directory)
    if config["peft_type"] == "ADALORA":
        raise UserError(
            "AdaLoRA has given each layer its rank at the end of training, and cannot go on", file=str(directory),
            found="ADALORA", expected="another method", fix="merge it, and train on the merged model",
        )  # fmt: skip
    if config["peft_type"] != "LORA":
        return
    for name, usual in BEYOND.items():
        if name != "fan_in_fan_out" and config.get(name) not in (usual, None, False):
            raise UserError(
                f"whet's LoRA has no {name}, so the adapter cannot be trained further as it is",
                file=str(directory / CONFIG), field=name, found=str(config[name]), expected=str(usual),
                fix="merge it, and train on the merged model",
            )  # fmt: skip


def disagreement(given: Mapping[str, Any], adapter: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """(setting, its value in the recipe, its value in the adapter) of the first in which they differ, or None.

    Dropout may differ: it is no part of what was trained.
    """
    for name, value in given.items():
        if name == "lora_dropout" or name not in adapter:
            continue
        if _plain(value) != _plain(adapter[name]) and value is not None:
            return name, value, adapter[name]
    return None


def _lora(config: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: config[name] for name in LORA if config.get(name) not in (None, [], {})}
    if isinstance(found.get("trainable_token_indices"), dict):  # of several tables; the input's are the setting's
        tables = list(found["trainable_token_indices"].values())
        found["trainable_token_indices"] = tables[0] if tables else []
    for name in ("target_modules", "modules_to_save", "target_parameters"):
        if isinstance(found.get(name), list):
            found[name] = sorted(found[name])
    if found.get("target_modules") in (None, []):
        found["target_modules"] = []
    if isinstance(found.get("layers_to_transform"), int):
        found["layers_to_transform"] = [found["layers_to_transform"]]
    if config.get("task_type") == "SEQ_CLS":  # whet trains the head of its task by itself
        found.pop("modules_to_save", None)
    return found


def _options(name: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """The options that differ from PEFT's own defaults."""
    import dataclasses

    from whet.methods.options import config_class, known_options

    fields = {field.name: field for field in dataclasses.fields(config_class(name))}
    found: dict[str, Any] = {}
    for option in known_options(name):
        field, value = fields[option], config.get(option)
        default = field.default if field.default is not dataclasses.MISSING else None
        if option in config and value is not None and value != default and value not in ([], {}):
            found[option] = (
                sorted(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value
            )
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple | set):
        return sorted(map(str, value))
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
