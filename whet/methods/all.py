"""The one list of methods. A new method is one file and one name here."""

from __future__ import annotations

from typing import get_args

from whet.methods.full import Full
from whet.methods.lora import Lora

Method = Lora | Full

METHODS: dict[str, type[Lora] | type[Full]] = {cls.name: cls for cls in get_args(Method)}


def capability_rows() -> list[dict[str, object]]:
    """The capability matrix, one dict a method, as `whet methods` prints it."""
    return [
        {
            "method": name,
            "what": (cls.__doc__ or "").strip(),
            "storages": list(cls.capability.storages),
            "mergeable": cls.capability.mergeable,
            "peft_format": cls.capability.peft_format,
            "vllm_unmerged": cls.capability.vllm,
            "learning_rate": cls.capability.learning_rate,
        }
        for name, cls in METHODS.items()
    ]
