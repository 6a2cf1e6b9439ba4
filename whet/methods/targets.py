"""Which linear layers LoRA goes on, found in the model's own structure.

The families name their projections differently (`q_proj`, `c_attn`, `query_key_value`, `SelfAttention.q`, `Wqkv`), so a
table of names is always one family behind. What they share is how they are built: transformers calls every attention
block *Attention, and layers stand in a ModuleList. `attention` is every linear layer below such a block, `mlp` every
other one of a layer that has attention. Names are handed to PEFT as the shortest endings that fit no other module, so
that the saved config stays readable. The kinds stay in the part that reads text, and leave out what PEFT does not adapt
in a family, since fused kernels read such weights past their layer; both are said. Gives up: attention under a class of
another name counts as `mlp`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from whet.base.errors import UserError, nearest
from whet.base.private import peft_forbids
from whet.methods.experts import expert_parameters

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

KINDS = ("all-linear", "attention", "mlp")
TEXT_INPUTS = ("input_ids", "inputs_embeds")  # what transformers calls the main input of models that read text


@dataclass(frozen=True)
class LeftAlone:
    """The linear layers that `all-linear` and its like leave out. beside: how many lie outside of the part that reads
    text, which rows of text never reach; forbidden: names of those that PEFT refuses to adapt in this family; shared:
    of those whose weight is another layer's too."""

    beside: int
    forbidden: tuple[str, ...]
    shared: tuple[str, ...] = ()

    @property
    def notices(self) -> list[str]:
        """What to tell a person."""
        found = []
        if self.beside:
            found.append(f"{self.beside} linear layers beside the text part (pictures, sound) are left as they are")
        if self.forbidden:
            names = ", ".join(self.forbidden)
            found.append(f"left as they are, because PEFT does not adapt them in this family: {names}")
        if self.shared:
            names = ", ".join(self.shared)
            found.append(f"left as they are, because layers share their weights, and each would get its own: {names}")
        return found


def left_alone_notices(network: Any) -> list[str]:
    """What to tell a person of the layers that were left out for `network`."""
    left = getattr(network, "left_alone", None)
    return [] if left is None else left.notices


def find_targets(
    network: PreTrainedModel, wanted: str | Sequence[str], *, exclude: str | Sequence[str] = (),
    layers: Collection[int] | None = None,
) -> list[str]:  # fmt: skip
    """Full names of the linear layers that `wanted` (a kind, names or a regular expression) means.

    exclude: names or a regular expression; layers: indices of the layers to stay in, None for all. A new head is never
    among them, for it is trained whole. Raises UserError when something asked for is not there.
    """
    from whet.engine.weights.linear import linear_names

    names = linear_names(network)
    if wanted in KINDS:
        inside = within_text(network, names)
        shared = shared_names(network)
        allowed = [name for name in inside if name not in shared and not peft_forbids(network.config, name)]
        forbidden = set(inside) - set(allowed) - shared
        network.left_alone = LeftAlone(  # type: ignore[assignment]
            len(names) - len(inside), _leaves(forbidden), _leaves(shared & set(inside))
        )
        found = _kind(network, allowed, str(wanted))
    else:
        found = _matching(names, wanted, "target_modules", KINDS)
    if exclude:
        dropped = set(_matching(names, exclude, "exclude_modules"))
        found = [name for name in found if name not in dropped]
    if layers is not None:
        known = {index for name in names if (index := layer_index(name)) is not None}
        if missing := sorted(set(layers) - known):
            raise UserError(
                "the model has no such layer", field="method.layers_to_transform", found=str(missing[0]),
                expected=f"0 to {max(known)}" if known else "a model of layers",
                fix=f"method.layers_to_transform=[{max(known)}]" if known else "method.layers_to_transform=auto",
            )  # fmt: skip
        found = [name for name in found if layer_index(name) in layers]
    if not found:
        if wanted == "mlp" and (experts := expert_parameters(network)):
            raise UserError(
                "the feed-forward part of this model is made of experts, which are no linear layers",
                field="method.target_modules", found="mlp", expected="all-linear or attention, and target_parameters",
                fix=f"method.target_modules=attention method.target_parameters=[{','.join(experts)}]",
            )  # fmt: skip
        raise UserError(
            "no layer is left to train", field="method.target_modules", found=_shown(wanted),
            expected="layers that are not excluded", fix="use target_modules: all-linear, or exclude less",
        )  # fmt: skip
    return found


def shared_names(network: Any) -> set[str]:
    """Names of the modules whose weight is another one's too: the output head, and blocks that a family runs again
    (Zamba). An adapter on each would be two weights, where a plain model has one."""
    tied = getattr(network, "all_tied_weights_keys", None) or {}
    return {name.removesuffix(".weight") for name in (*tied, *tied.values())}


def shortest_endings(network: nn.Module, names: Collection[str]) -> list[str]:
    """Dotted endings that pick exactly `names` of all modules, as PEFT matches them: equal, or after a dot."""
    taken = {ending for name, _ in network.named_modules() if name not in names for ending in _endings(name)}
    return sorted({next((e for e in _endings(name) if e not in taken), name) for name in names})


def shortest_parameter_endings(network: nn.Module, names: Collection[str]) -> list[str]:
    """Dotted endings that pick exactly these parameters of all, as PEFT matches them."""
    taken = {ending for name, _ in network.named_parameters() if name not in names for ending in _endings(name)}
    return sorted({next((e for e in _endings(name) if e not in taken and "." in e), name) for name in names})


def layer_index(name: str) -> int | None:
    """The place of a module in the list of layers that holds it: the first number of its name."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def fits(pattern: str, name: str) -> bool:
    """Whether a key of rank_pattern or alpha_pattern means this module, by PEFT's rule."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def check_expression(pattern: str, field: str) -> None:
    """Raises UserError for what is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"this is no regular expression: {error}", field=field, found=pattern,
            expected=f"{', '.join(KINDS)}, a list of layer names, or a regular expression",
            fix="use target_modules: all-linear, or a list of names",
        ) from error  # fmt: skip


def no_match(wanted: str, names: Collection[str], field: str, more: Sequence[str] = ()) -> UserError:
    """The complaint about a name that no layer has, with the nearest that there is."""
    leaves = sorted({name.rsplit(".", 1)[-1] for name in names})
    near = nearest(wanted, [*leaves, *more])
    return UserError(
        "no linear layer of the model has this name", field=f"method.{field}", found=wanted,
        expected=", ".join(leaves), fix=f"write {near}" if near else "use target_modules: all-linear",
    )  # fmt: skip


def within_text(network: PreTrainedModel, names: Sequence[str]) -> list[str]:
    """Those of `names` that lie in the part of the model that reads text; all where it reads nothing else."""
    from transformers import PreTrainedModel

    text = network.get_decoder()
    towers = [
        name for name, module in network.named_modules()
        if name and isinstance(module, PreTrainedModel) and module.main_input_name not in TEXT_INPUTS
        and module is not text
    ]  # fmt: skip
    if not towers:
        return list(names)
    prefix = next((name for name, module in network.named_modules() if module is text), "")
    if prefix and not any(tower.startswith(f"{prefix}.") for tower in towers):
        return [name for name in names if name.startswith(f"{prefix}.")]
    outside = tuple(f"{tower}." for tower in towers)
    return [name for name in names if not name.startswith(outside)]


def _leaves(names: Collection[str]) -> tuple[str, ...]:
    """The last words of `names`; places in a list are none."""
    return tuple(sorted({next(one for one in reversed(name.split(".")) if not one.isdigit()) for name in names}))


def _kind(network: PreTrainedModel, names: list[str], kind: str) -> list[str]:
    if kind == "all-linear":
        return names
    blocks = [name for name, module in network.named_modules() if "Attention" in type(module).__name__]
    inside = {name for name in names if any(name.startswith(block + ".") for block in blocks)}
    if kind == "attention":
        return [name for name in names if name in inside]
    lists = {_list_of(name) for name in inside} - {None}
    return [name for name in names if name not in inside and _list_of(name) in lists]


def _list_of(name: str) -> str | None:
    """The name of the list of layers in which a module stands."""
    parts = name.split(".")
    place = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return None if place is None else ".".join(parts[:place])


def _matching(names: list[str], wanted: str | Sequence[str], field: str, more: Sequence[str] = ()) -> list[str]:
    """The names that a regular expression, or any of several names, means."""
    if isinstance(wanted, str):
        check_expression(wanted, f"method.{field}")
        found = [name for name in names if re.fullmatch(wanted, name)]
        if not found:
            raise no_match(wanted, names, field, more)
        return found
    for one in wanted:
        if not any(name == one or name.endswith("." + one) for name in names):
            raise no_match(one, names, field)
    return [name for name in names if any(name == one or name.endswith("." + one) for one in wanted)]


def _endings(name: str) -> list[str]:
    """`c`, `b.c`, `a.b.c` for `a.b.c`."""
    parts = name.split(".")
    return [".".join(parts[place:]) for place in range(len(parts) - 1, -1, -1)]


def _shown(wanted: str | Sequence[str]) -> str:
    return wanted if isinstance(wanted, str) else ", ".join(wanted)
