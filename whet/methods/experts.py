"""The experts of a mixture: parameters of three dimensions, which are no linear layers, so that no target reaches them.

transformers keeps the matrices of all experts of a layer in one tensor [E, N, K]. "Every linear layer" leaves them out,
though they are most of the model, and a storage of few bits does too. PEFT trains a low-rank update of such a tensor by
its name (`target_parameters`). Here they are found in the model, so that what is not trained, or not packed, is said.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from whet.base.errors import UserError, nearest


def expert_parameters(network: Any) -> dict[str, int]:
    """Shortest distinct ending of each kind of expert tensor to how many numbers all of that kind have."""
    from torch import nn

    found: dict[str, int] = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and "expert" in f"{name}.{leaf} {type(module).__name__}".lower():
                ending = ".".join([part for part in f"{name}.{leaf}".split(".") if part != "base_layer"][-3:])
                found[ending] = found.get(ending, 0) + parameter.numel()
    return found


def expert_notices(experts: dict[str, int], total: int, *, trained: Collection[str], packed: bool) -> tuple[str, ...]:
    """What to say of experts that no target reaches, and of those that a storage of few bits leaves as they are."""
    left = {name: count for name, count in experts.items() if name not in trained}
    notices = []
    if left:
        names = ",".join(left)
        notices.append(
            f"experts, {_share(left, total)} of the weights, are not trained: method.target_parameters=[{names}] "
            "trains them"
        )
    if packed and experts:
        notices.append(
            f"experts, {_share(experts, total)} of the weights, are no linear layers and stay as they are: "
            "not stored in fewer bits"
        )
    return tuple(notices)


def chosen_parameters(network: Any, wanted: Sequence[str]) -> list[str]:
    """Full names of the parameters that `wanted` means: a name, or its end after a dot. Raises UserError."""
    names = [
        name for name, parameter in network.named_parameters()
        if parameter.ndim in (2, 3) and not name.endswith((".weight", ".bias"))
    ]  # fmt: skip
    for one in wanted:
        if not any(name == one or name.endswith(f".{one}") for name in names):
            endings = sorted({".".join(name.split(".")[-3:]) for name in names})
            near = nearest(one, endings)
            raise UserError(
                "the model has no such parameter that is no linear layer", field="method.target_parameters", found=one,
                expected=", ".join(endings) or "none: every weight of this model is a layer's",
                fix=f"write {near}" if near else "remove it; target_modules names linear layers",
            )  # fmt: skip
    return [name for name in names if any(name == one or name.endswith(f".{one}") for one in wanted)]


def is_trained(ending: str, wanted: Sequence[str]) -> bool:
    """Whether a recipe's `target_parameters` means the expert tensors of this ending."""
    return any(one == ending or one.endswith(f".{ending}") or ending.endswith(f".{one}") for one in wanted)


def _share(counts: dict[str, int], total: int) -> str:
    return f"{100 * sum(counts.values()) / max(1, total):.0f} %"
