"""Parameters of the network itself: train some of them, save their values, put them back.

What is saved is the value of each trained parameter in fp32 (a sum with a difference would round), or, where few of
its numbers changed, their places and differences. `method.json` beside it names the method, its settings and the base:
hashes of a few tensors, rounded to bf16 so that the base may be opened in another type, without which a change meant
for one model would silently spoil another. Parameters of a base kept in bf16 are trained as fp32 masters, cast at each
use through `torch.nn.utils.parametrize` on the instance: bf16 would lose small updates. Gives up: an answering model
keeps the base values of what was changed, so that it can be switched back to the bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import re
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from whet.base.errors import UserError
from whet.base.files import read_json, write_json
from whet.engine.load.headers import check_trained_tensors
from whet.engine.weights.linear import FrozenLinear

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from transformers import PreTrainedModel

    from whet.methods.method import Method

TENSORS, ABOUT = "trained.safetensors", "method.json"
PLACES, DIFFERENCES = ".places", ".differences"
SAMPLES, SAMPLE_NUMBERS = 8, 4096


class Cast(nn.Module):
    """A master weight in the type that the base computes in."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, master: torch.Tensor) -> torch.Tensor:
        return master.to(self.dtype)


@dataclasses.dataclass
class Change:
    """Numbers of a parameter and what they are when they are not what they are now: base or trained.

    places: int64 [n] in the flattened parameter, or None for all of it.
    """

    parameter: nn.Parameter
    places: torch.Tensor | None
    other: torch.Tensor

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange them in place, to the bit."""
        flat = self.parameter.data.view(-1)
        if self.places is None:
            now = flat.clone()
            flat.copy_(self.other)
        else:
            now = flat[self.places]
            flat[self.places] = self.other
        self.other = now


_changes: weakref.WeakKeyDictionary[nn.Module, list[Change]] = weakref.WeakKeyDictionary()


def holders(network: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """id of each parameter to the modules that hold it, and under which name; more than one where it is tied."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            found.setdefault(id(parameter), []).append((module, name))
    return found


def train_only(network: PreTrainedModel, names: Iterable[str]) -> PreTrainedModel:
    """Freeze all but the named parameters; what is not fp32 gets an fp32 master. Returns the same network."""
    network.requires_grad_(False)
    parameters, places = dict(network.named_parameters()), holders(network)
    for name in names:
        parameter = parameters[name]
        if parameter.dtype == torch.float32:
            parameter.requires_grad_(True)
            continue
        master = nn.Parameter(parameter.detach().float())
        for module, leaf in places[id(parameter)]:
            setattr(module, leaf, master)
            parametrize.register_parametrization(module, leaf, Cast(parameter.dtype), unsafe=True)
    return network


def plain_name(name: str) -> str:
    """The name that a parameter has in the plain model: without parametrizations and wrappers."""
    return re.sub(r"\.parametrizations\.(\w+)\.original$", r".\1", name).replace(".base_layer.", ".")


def trained_values(model: nn.Module) -> dict[str, torch.Tensor]:
    """Plain name to value of every trainable parameter, fp32; tied ones once."""
    return {plain_name(name): p.detach() for name, p in model.named_parameters() if p.requires_grad}


def write(method: Method, model: nn.Module, tensors: dict[str, torch.Tensor], directory: Path) -> None:
    """trained.safetensors with `tensors`, and method.json: method, settings, shapes, and hashes of the base."""
    from safetensors.torch import save_file

    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, directory / TENSORS)
    about = {
        "method": method.name, "settings": dataclasses.asdict(method),  # type: ignore[call-overload]
        "shapes": {name: list(tensor.shape) for name, tensor in tensors.items()}, "base": _identity(model),
    }  # fmt: skip
    write_json(directory / ABOUT, about)


def read(method: str, network: nn.Module, directory: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, method.json) of what `method` saved for this network. Raises UserError for another method or base."""
    from safetensors.torch import load_file

    if not (directory / ABOUT).is_file() or not (directory / TENSORS).is_file():
        raise UserError(
            f"this is nothing that {method} saved", file=str(directory), expected=f"{ABOUT} and {TENSORS}",
            fix="give the adapter/ directory of a run",
        )  # fmt: skip
    check_trained_tensors(directory / TENSORS, numbers=False)
    about = read_json(directory / ABOUT)
    if about["method"] != method:
        raise UserError(
            "this was saved by another method", file=str(directory), found=about["method"], expected=method,
            fix=f"method.name={about['method']}",
        )  # fmt: skip
    known = {plain_name(name): parameter for name, parameter in network.named_parameters()}
    common = [name for name in about["base"] if name in known]
    other = [name for name in common if _fingerprint(known[name]) != about["base"][name]]
    if other or (about["base"] and not common):
        raise UserError(
            "this was trained on another base model", file=str(directory),
            found=f"another {other[0]}" if other else "a model without any of its parameters",
            expected="the model that it was trained on", fix="check model.path",
        )  # fmt: skip
    return load_file(directory / TENSORS, device=str(next(network.parameters()).device)), about


@torch.no_grad()
def put(network: nn.Module, tensors: dict[str, torch.Tensor], directory: Path) -> None:
    """Give parameters of `network` their trained values; the base ones are kept for `base_values`. UserError when some
    tensor finds no place of its shape."""
    known, changes = {plain_name(name): parameter for name, parameter in network.named_parameters()}, []
    for key, value in tensors.items():
        if key.endswith(DIFFERENCES):
            continue
        name = key.removesuffix(PLACES)
        parameter = known.get(name)
        fits = parameter is not None and (name != key or parameter.shape == value.shape)
        if parameter is None or not fits:
            raise UserError(
                "what was trained does not fit this model", file=str(directory), found=f"no place for {name}",
                expected="the model that it was trained on", fix="check model.path",
            )  # fmt: skip
        if name == key:
            change = Change(parameter, None, value.to(parameter.dtype).flatten())
        else:
            places = value.long()
            old = parameter.data.view(-1)[places].float()
            change = Change(parameter, places, (old + tensors[name + DIFFERENCES]).to(parameter.dtype))
        change.swap()
        changes.append(change)
    _changes[network] = changes


def keep_changes(network: nn.Module) -> None:
    """What `put` changed is the network's own from now on: its base values are let go."""
    _changes.pop(network)


@contextlib.contextmanager
def base_values(network: nn.Module) -> Iterator[None]:
    """Inside, what `put` changed is as it was before."""
    changes = _changes[network]
    for change in changes:
        change.swap()
    try:
        yield
    finally:
        for change in changes:
            change.swap()


def _identity(model: nn.Module) -> dict[str, str]:
    """Fingerprints of a few frozen dense parameters, matrices first: they are what every opening of the base shares."""
    packed = {
        id(p) for module in model.modules() if isinstance(module, FrozenLinear)
        for name, p in module.named_parameters(recurse=False) if name != "bias"
    }  # fmt: skip
    frozen = {
        plain_name(name): p for name, p in model.named_parameters()
        if not p.requires_grad and id(p) not in packed and p.is_floating_point()
    }  # fmt: skip
    names = sorted(frozen, key=lambda name: (frozen[name].ndim < 2, name))
    spread = names[:2] + names[2 :: max(1, (len(names) - 2) // (SAMPLES - 2))]
    return {name: _fingerprint(frozen[name]) for name in spread[:SAMPLES]}


def _fingerprint(parameter: torch.Tensor) -> str:
    """The shape, and a hash of the first numbers in bf16."""
    numbers = parameter.detach().flatten()[:SAMPLE_NUMBERS].to(torch.bfloat16).cpu().view(torch.int16).numpy()
    shape = "x".join(map(str, parameter.shape))
    return f"{shape}:{hashlib.sha256(numbers.tobytes()).hexdigest()[:32]}"
