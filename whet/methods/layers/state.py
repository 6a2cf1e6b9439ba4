"""What is trained, under the names that PEFT has for it: for files, whichever way layers are grouped or sharded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from whet.methods.layers.group import LoraGroup

Exact = Mapping[nn.Parameter, torch.Tensor]


def trained_state(model: nn.Module, exact: Exact | None = None) -> dict[str, torch.Tensor]:
    """Name to tensor of everything that is trained; tied parameters once. A group gives each layer's A [r, K] and
    B [N, r], with PEFT's names, as views of its own.

    exact: what to give in place of some parameters. Sharded parameters are given whole, so every rank must call.
    """
    grouped = {id(parameter) for _, group in _groups(model) for parameter in (group.a, group.b)}
    state = {
        name: _whole((exact or {}).get(parameter, parameter)) for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in grouped
    }  # fmt: skip
    for path, group in _groups(model):
        for names, parameter, parts in _matrices(path, group):
            state |= zip(names, _whole(parameter).split(parts), strict=True)
    return state


@torch.no_grad()
def load_trained_state(model: nn.Module, tensors: Mapping[str, torch.Tensor], exact: Exact | None = None) -> None:
    """Write what `trained_state` gave into the parameters of `model`, or into what `exact` has in place of them.

    Copies that were made of them (`Groups.refresh`) are not brought up to date.
    """
    waiting = dict(tensors)
    grouped: set[int] = set()
    for path, group in _groups(model):
        for names, parameter, _ in _matrices(path, group):
            _write(parameter, torch.cat([waiting.pop(name) for name in names]))
            grouped.add(id(parameter))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in grouped:
            _write((exact or {}).get(parameter, parameter), waiting.pop(name))
    assert not waiting, sorted(waiting)[:5]


def saved_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of `model` as PEFT would have it without groups, but for the frozen weights that are in one."""
    inside = tuple(f"{path}." for path, _ in _groups(model))
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(inside)}
    return state | trained_state(model)


def _groups(model: nn.Module) -> Iterator[tuple[str, LoraGroup]]:
    for name, module in model.named_modules():
        if isinstance(module, LoraGroup):
            yield name, module


def _matrices(path: str, group: LoraGroup) -> Iterator[tuple[list[str], nn.Parameter, list[int]]]:
    """A and B of a group: the names of their parts, the parameter, and the parts' heights."""
    block = path[: path.rfind(".") + 1]
    heights = {"lora_A": [group.shape.r] * len(group.members), "lora_B": list(group.shape.sizes)}
    for matrix, parameter in (("lora_A", group.a), ("lora_B", group.b)):
        names = [f"{block}{member}.{matrix}.{group.adapter}.weight" for member in group.members]
        yield names, parameter, heights[matrix]


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    sharded: Any = tensor.detach()
    return sharded.full_tensor() if hasattr(sharded, "full_tensor") else sharded


def _write(target: torch.Tensor, values: torch.Tensor) -> None:
    """Copy `values` into `target`, which may be a part of it on each rank."""
    assert target.shape == values.shape, (target.shape, values.shape)
    if hasattr(target, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = target
        here = values.to(sharded.device)
        values = distribute_tensor(here, sharded.device_mesh, sharded.placements, src_data_rank=None)
    target.copy_(values)
