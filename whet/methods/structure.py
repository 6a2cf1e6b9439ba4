"""What of a transformer is what, found in its structure: its layers, what ends a sublayer, names that patterns choose.

A list of names per family would be wrong for the next family. What is used instead holds for all: layers are the
outermost lists of modules; attention says so in its class; the last linear layer of a sublayer that gives hidden states
is its projection back into the residual. Gives up: mixtures of experts, whose feed-forward ends in no linear layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import combinations
from typing import TYPE_CHECKING

from whet.base.errors import UserError, nearest
from whet.engine.task import head_names

if TYPE_CHECKING:
    from torch import nn


def layer_stacks(network: nn.Module) -> list[list[tuple[str, nn.Module]]]:
    """The layers by name, in order: one stack for a decoder or an encoder, two for a model that has both."""
    return [stack for stack in _stacks(network, "") if all(_has_parameters(layer) for _, layer in stack)]


def _stacks(module: nn.Module, prefix: str) -> Iterator[list[tuple[str, nn.Module]]]:
    from torch import nn

    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList) and len(child):
            yield [(f"{prefix}{name}.{index}", layer) for index, layer in enumerate(child)]
        else:
            yield from _stacks(child, f"{prefix}{name}.")


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def new_head(network: nn.Module) -> list[str]:
    """Names of the parameters of a new head, which is trained whatever the method is; none for tasks that write."""
    heads = tuple(f"{name}." for name in head_names(network))
    return [name for name, _ in network.named_parameters() if name.startswith(heads)] if heads else []


def chosen_names(names: Sequence[str], wanted: str | Iterable[str], field: str) -> list[str]:
    """Those of `names` that `wanted` chooses: a regular expression for whole names, or a list of patterns.

    A pattern (* and ? as in file names) is held against every run of a name's parts: `mlp`, `layers.1`, `*.bias`.
    Raises UserError for what chooses nothing.
    """
    if isinstance(wanted, str):
        try:
            found = [name for name in names if re.fullmatch(wanted, name)]
        except re.error as error:
            raise UserError(
                f"this is no regular expression: {error}", field=field, found=wanted,
                expected="a regular expression, or a list of names", fix=f"write {field}: [name, ...]",
            ) from error  # fmt: skip
        if not found:
            raise _nothing(names, wanted, field)
        return found
    chosen: set[str] = set()
    for pattern in wanted:
        found = [name for name in names if any(fnmatchcase(run, pattern) for run in _runs(name))]
        if not found:
            raise _nothing(names, pattern, field)
        chosen |= set(found)
    return [name for name in names if name in chosen]


def _runs(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:end]) for start, end in combinations(range(len(parts) + 1), 2)]


def _nothing(names: Sequence[str], wanted: str, field: str) -> UserError:
    parts = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
    near = nearest(wanted, parts)
    return UserError(
        "nothing in the model has this name", field=field, found=wanted, expected=", ".join(parts),
        fix=f"write {near}" if near else "choose one of the expected names",
    )  # fmt: skip


def residual_ends(network: nn.Module, hidden_size: int) -> tuple[list[str], list[str]]:
    """(after attention, after feed-forward): names of the modules whose output is added to the residual, in order.

    The projection back to `hidden_size`; where dropout and norm stand beside it in a block of its own (BERT), the
    dropout, which comes last before the addition. Raises UserError where a layer has no such projection.
    """
    attention: list[str] = []
    forward: list[str] = []
    for stack in layer_stacks(network):
        for prefix, layer in stack:
            blocks = list(_attentions(layer, prefix))
            inside = {name for _, block in blocks for name in _linears(*block)}
            rest = [name for name in _linears(prefix, layer) if name not in inside]
            ends = [_last(network, _linears(*block), hidden_size) for _, block in blocks]
            last = _last(network, rest, hidden_size)
            if last is None or not ends or None in ends:
                raise UserError(
                    "a layer of the model has no projection back into the residual that an adapter could follow",
                    field="method.name", found=f"{type(layer).__name__} at {prefix}",
                    expected="layers of attention and a feed-forward of linear layers", fix="method.name=lora",
                )  # fmt: skip
            attention += [end for end in ends if end is not None]
            forward.append(last)
    return attention, forward


def _attentions(module: nn.Module, prefix: str) -> Iterator[tuple[str, tuple[str, nn.Module]]]:
    """Outermost modules that are attention by their class and compute something."""
    for name, child in module.named_children():
        full = f"{prefix}.{name}"
        if "attention" in type(child).__name__.lower() and _linears(full, child):
            yield full, (full, child)
        else:
            yield from _attentions(child, full)


def _linears(prefix: str, module: nn.Module) -> list[str]:
    from whet.engine.weights.linear import is_linear

    found = [name for name, child in module.named_modules() if is_linear(child)]
    return [f"{prefix}.{name}" if name else prefix for name in found]


def _last(network: nn.Module, linears: list[str], hidden_size: int) -> str | None:
    """The last of `linears` that gives hidden states, or the dropout that follows it in a block of its own."""
    from torch import nn

    ends = [name for name in linears if _width(network.get_submodule(name)) == hidden_size]
    if not ends:
        return None
    parent_name, _, _ = ends[-1].rpartition(".")
    children = dict(network.get_submodule(parent_name).named_children())
    drops = [name for name, child in children.items() if isinstance(child, nn.Dropout)]
    norms = [child for child in children.values() if isinstance(child, nn.LayerNorm)]
    return f"{parent_name}.{drops[0]}" if len(children) == 3 and len(drops) == len(norms) == 1 else ends[-1]


def _width(linear: nn.Module) -> int:
    found = getattr(linear, "out_features", None)
    return int(found if found is not None else linear.nf)  # type: ignore[arg-type]
