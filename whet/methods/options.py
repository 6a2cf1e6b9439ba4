"""The options of a bridged method: which there are, and whether a value fits, by the fields of PEFT's own config.

Read off the installed PEFT, so nothing here repeats its defaults or names. PEFT is imported when a recipe gives an
option of such a method, and not before.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from whet.base.errors import UserError, nearest
from whet.methods.bridged import BRIDGED, BridgedName

# Fields of PEFT's configs that are no options here, and who decides them instead.
REFUSED = {
    "peft_type": "method.name decides it", "task_type": "the model and the data decide it",
    "auto_mapping": "PEFT writes it", "peft_version": "PEFT writes it", "revision": "model.revision decides it",
    "base_model_name_or_path": "model.path decides it", "inference_mode": "whet trains, and then answers",
    "tokenizer_name_or_path": "the model's own tokenizer reads the text",
    "tokenizer_kwargs": "the model's own tokenizer reads the text",
    "prompt_tuning_init_state_dict_path": "whet reads no pickles",
    "use_asa": "it changes what is trained between steps", "use_dynamic_rank": "it needs the data of a run",
    "megatron_config": "whet does not run Megatron", "megatron_core": "whet does not run Megatron",
    "progressbar": "whet shows its own",
}  # fmt: skip


def config_class(name: BridgedName) -> Any:
    """PEFT's config of a method. Raises UserError where the installed PEFT does not have it."""
    import peft

    found = {kind.value: cls for kind, cls in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}.get(BRIDGED[name].peft)
    if found is None:
        raise UserError(
            "the installed PEFT does not have this method", field="method.name", found=f"{name}, PEFT "
            f"{peft.__version__}", expected="a newer PEFT", fix="pip install -U peft",
        )  # fmt: skip
    return found


def known_options(name: BridgedName) -> list[str]:
    """The options of a method, in PEFT's order."""
    return [field.name for field in dataclasses.fields(config_class(name)) if field.name not in REFUSED]


def check_options(name: BridgedName, options: Mapping[str, Any]) -> None:
    """Raise UserError for a name that is no option of the method, or a value of another type."""
    known = known_options(name)
    hints = typing.get_type_hints(config_class(name))
    for option, value in options.items():
        field = f"method.{option}"
        if option in REFUSED:
            raise UserError(
                f"{option} is not for the recipe to say: {REFUSED[option]}", field=field, found=str(value),
                expected=", ".join(known), fix="remove it",
            )  # fmt: skip
        if option not in known:
            near = nearest(option, known)
            raise UserError(
                f"{name} has no such option", field=field, found=option, expected=", ".join(known),
                fix=f"write {near}" if near else "remove it",
            )  # fmt: skip
        if not fits(value, hints[option]):
            raise UserError(
                "the value does not fit", field=field, found=f"{value!r} ({type(value).__name__})",
                expected=_shown(hints[option]), fix=f"give {option} as PEFT's config of {name} has it",
            )  # fmt: skip


def fits(value: Any, hint: Any) -> bool:
    """Whether a value from YAML is one of `hint`: numbers, text, lists, mappings, choices and unions of them."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in inside)
    if origin is typing.Literal:
        return any(value == one and type(value) is type(one) for one in inside)
    if origin in (list, tuple, set) or hint in (list, tuple, set):
        of = next((one for one in inside if one is not Ellipsis), Any)
        return isinstance(value, list) and all(fits(one, of) for one in value)
    if origin is dict or hint is dict:
        of = inside[1] if len(inside) == 2 else Any
        return isinstance(value, dict) and all(fits(one, of) for one in value.values())
    if hint in (None, type(None)):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(hint, type) and isinstance(value, hint)


def _shown(hint: Any) -> str:
    """A type as a reader of recipes knows it."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_shown(one) for one in inside))
    if origin is typing.Literal:
        return ", ".join(map(str, inside))
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "auto"}
    if origin is list or hint is list:
        return "a list"
    if origin is dict or hint is dict:
        return "a mapping"
    return names.get(hint, "a choice of PEFT's")
