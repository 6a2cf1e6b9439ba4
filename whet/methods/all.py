"""The one list of methods. A new method is one file and one name here; PEFT's are rows of `methods.bridged`."""

from __future__ import annotations

from typing import get_args, get_type_hints

from whet.methods.adalora import AdaLora
from whet.methods.bitfit import BitFit
from whet.methods.bottleneck import Bottleneck
from whet.methods.bridge import Bridge
from whet.methods.bridged import BRIDGED
from whet.methods.capability import ALL_TASKS
from whet.methods.diff_pruning import DiffPruning
from whet.methods.freeze import Freeze, Head
from whet.methods.full import Full
from whet.methods.lora import Lora

Method = Lora | Full | Freeze | Head | BitFit | DiffPruning | Bottleneck | AdaLora | Bridge

METHODS: dict[str, type[Method]] = {
    name: cls for cls in get_args(Method) for name in get_args(get_type_hints(cls)["name"])
}


def capability_rows() -> list[dict[str, object]]:
    """The capability matrix, one dict a method, as `whet methods` prints it."""
    rows: list[dict[str, object]] = []
    for name, cls in METHODS.items():
        can = cls(name=name).can  # type: ignore[arg-type]
        what = BRIDGED[name].what if name in BRIDGED else (cls.__doc__ or "").strip()
        rows.append({
            "method": name, "what": what, "storages": list(can.storages),
            "tasks": "all" if can.tasks == ALL_TASKS else list(can.tasks),
            "mergeable": can.mergeable, "peft_format": can.peft_format, "vllm_unmerged": can.vllm,
            "composable": can.composable, "compiles": can.compiles and can.inside, "learning_rate": can.learning_rate,
        })  # fmt: skip
    return rows
