"""Where LoRA's matrices start. Everything here sets A and B of layers that PEFT made with B = 0.

- `pissa`: the r largest singular directions of W (Meng et al., 2024, arXiv:2404.02948); `pissa_niter_N` finds them by
  N rounds of subspace iteration. `olora`: the first r columns of its QR decomposition (Büyükakyüz, 2024,
  arXiv:2406.01775). `corda`: the r largest directions of W on the inputs it sees (Yang et al., 2024, arXiv:2406.05223).
  All three take s B A out of W, so the model starts unchanged.
- `loftq`: the r largest directions of W - Q, what quantising W lost (Li et al., 2023, arXiv:2310.08659). This is its
  first round; the later ones would change Q, and then the adapter would fit no base that anyone else quantises.
- `eva`: A spans the r largest directions of the layer's inputs (Paischer et al., 2024, arXiv:2410.07170), equal ranks.
- `orthogonal`: A and B in orthogonal subspaces, so that B A = 0 with neither zero.

PEFT's own initialisers are not called: they need a dense weight in place, and write into the adapter's config what
every later loader would then repeat on its base. Instead the start is kept beside the layer, and what is saved is the
change since then, [A; A0] and [B, -B0]: plain LoRA of twice the rank on the untouched base (PEFT's conversion, without
a second set of files). Gives up: the adapter of those three is twice as large as what was trained.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from whet.engine.weights.linear import FrozenLinear, dense_weight

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from torch import nn

    from whet.methods.method import Pass

NAME = "default"
Factors = tuple[torch.Tensor, torch.Tensor]  # A [r, K] and B [N, r]
DAMPING, MOST_ERROR = 0.01, 0.05


def layers_of(model: nn.Module) -> list[tuple[str, Any]]:
    """Name in the base model and LoRA layer of every adapted linear layer."""
    from peft.tuners.lora.layer import Linear

    inside = [(name, module) for name, module in model.named_modules() if isinstance(module, Linear)]
    return [(name.removeprefix("base_model.model."), module) for name, module in inside]


def weight_of(layer: Any) -> torch.Tensor:
    """The dense weight [N, K] of a layer's base, float32."""
    weight = dense_weight(layer.get_base_layer(), torch.float32)
    return weight.t() if layer.fan_in_fan_out else weight


@torch.no_grad()
def place(layer: Any, factors: Factors, *, take_out: bool) -> None:
    """Start the layer with these factors. take_out: subtract them from the base, and remember them for `rewrite`."""
    a, b = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
    a.copy_(factors[0])
    b.copy_(factors[1])
    if take_out:
        rest = weight_of(layer) - layer.scaling[NAME] * (b.float() @ a.float())
        base = layer.get_base_layer()
        base.weight.copy_(rest.t() if layer.fan_in_fan_out else rest)
        layer.start = (a.detach().cpu().clone(), b.detach().cpu().clone())
    if NAME in layer.lora_magnitude_vector:
        base = layer.get_base_layer()
        layer.lora_magnitude_vector[NAME].update_layer(base_layer=base, lora_A=a, lora_B=b, scaling=layer.scaling[NAME])


@torch.no_grad()
def principal(weight: torch.Tensor, r: int, rounds: int | None = None) -> Factors:
    """A, B with B A the best approximation of `weight` [N, K] of rank r.

    rounds: of subspace iteration, None for the exact decomposition.
    """
    if rounds is None:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
    else:
        left, values, right = torch.svd_lowrank(weight, r, niter=rounds)
        right = right.t()
    root = values[:r].sqrt()
    return root[:, None] * right[:r], left[:, :r] * root


@torch.no_grad()
def from_weight(layer: Any, kind: str) -> None:
    """`pissa`, `pissa_niter_N`, `olora` and `orthogonal`."""
    r, scale = layer.r[NAME], layer.scaling[NAME]
    if kind == "orthogonal":
        place(layer, _orthogonal(layer, r), take_out=False)
    elif kind == "olora":
        q, upper = torch.linalg.qr(weight_of(layer))
        place(layer, (upper[:r], q[:, :r]), take_out=True)
    else:
        rounds = int(kind.rpartition("_")[2]) if kind != "pissa" else None
        a, b = principal(weight_of(layer), r, rounds)
        place(layer, (a / math.sqrt(scale), b / math.sqrt(scale)), take_out=True)


def _orthogonal(layer: Any, r: int) -> Factors:
    device = layer.lora_A[NAME].weight.device
    q = torch.linalg.qr(torch.randn(r, r))[0]
    a = q[0::2].t() @ torch.randn(r // 2, layer.in_features) / 10
    b = torch.randn(layer.out_features, r // 2) @ q[1::2] / 10
    return a.to(device), b.to(device)


@torch.no_grad()
def from_loss_of_quantising(model: nn.Module, dense: nn.Module) -> None:
    """`loftq` for every frozen layer of `model`; dense: the same network, not quantised."""
    for name, layer in layers_of(model):
        base, a = layer.get_base_layer(), layer.lora_A[NAME].weight
        if isinstance(base, FrozenLinear):
            exact: torch.Tensor = dense.get_submodule(name).weight.to(a.device, torch.float32)  # type: ignore[union-attr,operator]
            lost: torch.Tensor = exact - weight_of(layer)
            first, second = principal(lost, layer.r[NAME])
            root = math.sqrt(layer.scaling[NAME])
            place(layer, (first / root, second / root), take_out=False)


@torch.no_grad()
def from_inputs(model: nn.Module, kind: str, passes: Iterable[Pass], most_bytes: int = 4 << 30) -> None:
    """`eva` and `corda`, from what the layers read while each of `passes` runs the model once.

    most_bytes: of covariances that are held together; where more are needed the passes run again for other layers.
    """
    waiting, passes, was_training = [layer for _, layer in layers_of(model)], list(passes), model.training
    model.eval()
    while waiting:
        part, taken = [], 0
        while waiting and (not part or taken + 4 * waiting[0].in_features ** 2 <= most_bytes):
            taken += 4 * waiting[0].in_features ** 2
            part.append(waiting.pop(0))
        for layer, covariance in zip(part, _covariances(part, passes), strict=True):
            r, scale = layer.r[NAME], layer.scaling[NAME]
            if kind == "eva":
                directions = torch.linalg.eigh(covariance)[1].flip(1)[:, :r].t()
                place(layer, (directions, torch.zeros_like(layer.lora_B[NAME].weight)), take_out=False)
            else:
                place(layer, _oriented(weight_of(layer), covariance, r, scale), take_out=True)
    model.train(was_training)


def _covariances(layers: list[Any], passes: list[Pass]) -> list[torch.Tensor]:
    """X^T X of each layer's inputs X [tokens, K], float32 [K, K]."""
    sums: dict[int, torch.Tensor] = {}
    real: torch.Tensor | None = None

    def look(layer: Any, args: tuple[torch.Tensor, ...]) -> None:
        x = args[0].detach()
        padded = real is not None and x.shape[:-1] == real.shape
        rows = (x[real] if padded else x.flatten(0, -2)).float()
        with torch.autocast(rows.device.type, enabled=False):
            found = rows.t() @ rows
        sums[id(layer)] = sums[id(layer)] + found if id(layer) in sums else found

    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    try:
        for run, real in passes:  # noqa: B007  `look` reads which places are real
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return [sums[id(layer)] for layer in layers]


def _oriented(weight: torch.Tensor, covariance: torch.Tensor, r: int, scale: float) -> Factors:
    """W C = U S V^T; B = U sqrt(S), A = sqrt(S) V^T C^-1, both of the r largest; C is damped until it can be inverted.

    C has a mean diagonal of 1: its size changes no product of B and A, only how it is shared between them.
    """
    unit = covariance / covariance.diagonal().mean().clamp_min(1e-12)
    identity, damping = torch.eye(len(unit), device=unit.device), DAMPING
    while True:
        damped = unit + damping * identity
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, identity) < MOST_ERROR:
            break
        damping *= 2
    a, b = principal(weight @ damped, r)
    return a @ inverse / math.sqrt(scale), b / math.sqrt(scale)


def too_wide(model: nn.Module) -> tuple[str, int, int] | None:
    """(the first layer that is smaller than its rank, that rank, the largest rank that every layer has), or None."""
    for name, layer in layers_of(model):
        if layer.r[NAME] > min(layer.in_features, layer.out_features):
            return name, layer.r[NAME], min(min(one.in_features, one.out_features) for _, one in layers_of(model))
    return None


def rewrite(model: nn.Module, directory: Path) -> bool:
    """Make the tensors that PEFT wrote to `directory` the change since the start, where the base was changed.

    Returns whether they were: they have twice the rank then.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from safetensors.torch import load_file, save_file

    # a layer's own, or what stands in its place (`methods.layers.member`)
    starts = {
        name: start for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and (start := getattr(module, "start", None)) is not None
    }  # fmt: skip
    if not starts:
        return False
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    for name, (a, b) in starts.items():
        key = f"{name}."
        tensors[key + "lora_A.weight"] = torch.cat([tensors[key + "lora_A.weight"], a])
        tensors[key + "lora_B.weight"] = torch.cat([tensors[key + "lora_B.weight"], -b], 1).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    return True
