"""AdamW whose moments take a byte each: the algorithm of bitsandbytes' AdamW8bit, as one launch without the host.

Dettmers et al., 2021 (arXiv:2110.02861): blocks of 256 numbers have a scale of their own, and the codes are a table of
floating values whose exponent takes more or fewer of the bits. The update uses the moments before they are rounded.
Tensors of fewer than 4,096 numbers keep float32 moments. State has bitsandbytes' names and shapes, so a checkpoint of
one is continued with the other.

bitsandbytes launches one kernel a tensor, waits for each, and hands step and rate over as numbers of the host, so a
CUDA graph cannot hold its update. Here step, rate and verdict are tensors on the device, and on a GPU one kernel does
all tensors (`engine.memory.adam_8bit_triton`); plain torch does the same elsewhere and is its twin in tests. Gives up:
paging to host memory, which bitsandbytes' paged form has.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, log
from typing import Any

import torch
from torch.nn.functional import pad

BLOCK = 256  # numbers that share a scale
SMALLEST = 4096  # tensors of fewer numbers keep float32 moments
EXPONENTS = 7
MOST_CAPTURES = 15  # graphs that hold an update: one for each form of batch, and one for several micro-batches
FLOAT = torch.float32


@dataclass(frozen=True)
class Codes:
    """values: float32 [256], ascending; middles: float32 [255] between them."""

    values: torch.Tensor
    middles: torch.Tensor

    def nearest(self, x: torch.Tensor) -> torch.Tensor:
        """Index of the value nearest to each of x, the lower one where two are as near; int64, of x's shape."""
        return torch.searchsorted(self.middles, x)


@functools.cache
def dynamic_codes(device: torch.device, *, signed: bool) -> Codes:
    """The 256 values of a moment's codes between -1 (0 if not signed) and 1, denser towards 0."""
    values = [0.0, 1.0]
    for exponent in range(EXPONENTS):
        edges = torch.linspace(0.1, 1, 2 ** (exponent + (not signed)) + 1, dtype=torch.float32)
        positive = (10 ** (exponent - EXPONENTS + 1) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += positive + [-value for value in positive if signed]
    ordered = torch.tensor(sorted(values), dtype=torch.float32)
    return Codes(ordered.to(device), ((ordered[:-1] + ordered[1:]) * 0.5).to(device))


@dataclass(frozen=True)
class Sizes:
    """Numbers of an update for P parameters, float32 [P]: the corrections for the first steps are in step and epsilon,
    as in Kingma & Ba, section 2; shrink: what weight decay leaves of a weight."""

    step: torch.Tensor
    epsilon: torch.Tensor
    shrink: torch.Tensor


@dataclass(frozen=True)
class Verdict:
    """grad_scale: what gradients are divided by; skip: not 0 where nothing is to change. Scalars, or None."""

    grad_scale: torch.Tensor | None = None
    skip: torch.Tensor | None = None

    def put(self, old: torch.Tensor, new: torch.Tensor) -> None:
        """Write `new` into `old`, unless the step is skipped."""
        old.copy_(new if self.skip is None else torch.where(self.skip > 0, old, new.to(old.dtype)))


def update(
    p: torch.Tensor, state: Mapping[str, torch.Tensor], sizes: Sequence[torch.Tensor], betas: tuple[float, float],
    verdict: Verdict,
) -> None:  # fmt: skip
    """Update weights p by p.grad in plain torch. sizes: step, epsilon and shrink of this parameter."""
    step, epsilon, shrink = sizes
    assert p.grad is not None
    grad = p.grad if verdict.grad_scale is None else p.grad / verdict.grad_scale
    m, v = _moments(p, state)
    m, v = m * betas[0] + (1 - betas[0]) * grad, v * betas[1] + (1 - betas[1]) * grad * grad
    verdict.put(p, (p - step * (m / (v.sqrt() + epsilon))) * shrink)
    if "absmax1" not in state:
        verdict.put(state["state1"], m)
        verdict.put(state["state2"], v)
        return
    for name, value in (("1", m), ("2", v)):
        blocks = _blocks(value)
        largest = blocks.abs().amax(dim=1)
        code = _coded(blocks / torch.where(largest > 0, largest, 1.0)[:, None], signed=name == "1")
        verdict.put(state[f"state{name}"], code.view(-1)[: p.numel()].view_as(p).to(torch.uint8))
        verdict.put(state[f"absmax{name}"], largest)


def _moments(p: torch.Tensor, state: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """Both moments of p in float32."""
    if "absmax1" not in state:
        return [state["state1"], state["state2"]]
    found = []
    for name in "12":
        values = dynamic_codes(p.device, signed=name == "1").values[state[f"state{name}"].long()]
        found.append((_blocks(values) * state[f"absmax{name}"][:, None]).view(-1)[: p.numel()].view_as(p))
    return found


def _coded(x: torch.Tensor, *, signed: bool) -> torch.Tensor:
    """The codes of x, between -1 and 1. A moment keeps its sign, however small it is."""
    codes = dynamic_codes(x.device, signed=signed)
    code = codes.nearest(x)
    if signed:
        positive = codes.values[code] >= 0
        code = code + ((x > 0) & ~positive).long() - ((x < 0) & positive).long()
    return code


def _blocks(x: torch.Tensor) -> torch.Tensor:
    """x as [blocks, 256], the last one filled up with zeros."""
    flat = x.reshape(-1)
    return pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with moments of 8 bits; the whole update can be captured in a CUDA graph.

    Parameters are float32, on one device; every group's `lr` is a float32 scalar tensor there. As torch's fused
    optimisers it divides gradients by `grad_scale` and leaves everything as it is where `found_inf` is not 0, both None
    or scalar tensors.
    """

    def __init__(
        self, groups: Any, lr: torch.Tensor, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})
        self.betas, self.eps = betas, eps
        self.grad_scale: torch.Tensor | None = None
        self.found_inf: torch.Tensor | None = None
        self.parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        device = self.parameters[0].device
        places = [index for index, group in enumerate(self.param_groups) for _ in group["params"]]
        self._group_of = torch.tensor(places, device=device)
        self._decay = torch.tensor([float(group["weight_decay"]) for group in self.param_groups], device=device)
        self._steps = torch.zeros(len(places), device=device)
        for parameter, step in zip(self.parameters, self._steps.unbind(), strict=True):
            self.state[parameter] = {"step": step} | _zero_moments(parameter)
        self._addresses = Addresses(self.parameters)
        self._launch: Any = None
        if device.type == "cuda":
            from whet.engine.memory.adam_8bit_triton import Launch

            self._launch = Launch(self.parameters, [self.state[p] for p in self.parameters])

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of all parameters that have a gradient."""
        assert closure is None, "the loss is not computed again"
        verdict = Verdict(self.grad_scale, self.found_inf)
        addresses = self._addresses.now()
        sizes = self._count(addresses != 0, verdict)
        if self._launch is not None:
            self._launch.run(addresses, sizes, self.betas, verdict)
            return
        each = zip(self.parameters, zip(sizes.step, sizes.epsilon, sizes.shrink, strict=True), strict=True)
        for parameter, its_sizes in each:
            if parameter.grad is not None:
                update(parameter, self.state[parameter], its_sizes, self.betas, verdict)

    def _count(self, learns: torch.Tensor, verdict: Verdict) -> Sizes:
        """Count the step of the parameters that learn; the sizes of the update. learns: bool [P]."""
        self._steps += learns if verdict.skip is None else learns & (verdict.skip == 0)
        rates = torch.stack([group["lr"] for group in self.param_groups])
        steps = self._steps.clamp_min(1.0)
        first, second = -torch.expm1(steps * _log(self.betas[0])), (-torch.expm1(steps * _log(self.betas[1]))).sqrt()
        rate, decay = rates[self._group_of], self._decay[self._group_of]
        return Sizes(rate * second / first, self.eps * second, 1 - rate * decay)

    def state_dict(self) -> dict[str, Any]:
        """bitsandbytes' form: a step is a number of the host, and codes have their tables beside them."""
        found = super().state_dict()
        return found | {"state": {index: _written(entries) for index, entries in found["state"].items()}}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy a state into the memory of this one, which captured steps read. Takes bitsandbytes' nested form too."""
        for index, parameter in enumerate(self.parameters):
            entries = state_dict["state"].get(index)
            if entries is None:
                continue
            nested = [value for value in entries.values() if isinstance(value, dict)]
            flat = {name: value for part in (entries, *nested) for name, value in part.items()}
            for name, tensor in self.state[parameter].items():
                tensor.copy_(torch.as_tensor(flat[name]).view(tensor.shape))


def _log(beta: float) -> float:
    return log(beta) if beta > 0 else -inf


def _zero_moments(parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    if parameter.numel() < SMALLEST:
        return {name: torch.zeros_like(parameter, dtype=torch.float32) for name in ("state1", "state2")}
    found, blocks = {}, -(-parameter.numel() // BLOCK)
    for name in "12":
        found[f"state{name}"] = torch.zeros_like(parameter, dtype=torch.uint8)
        found[f"absmax{name}"] = torch.zeros(blocks, device=parameter.device)
    return found


def _written(entries: dict[str, Any]) -> dict[str, Any]:
    entries = entries | {"step": int(entries["step"])}
    if "absmax1" not in entries:
        return entries
    device = entries["absmax1"].device
    return entries | {f"qmap{1 if signed else 2}": dynamic_codes(device, signed=signed).values
                      for signed in (True, False)}  # fmt: skip


class Addresses:
    """Where the gradients of P parameters lie, as int64 [P] on their device; 0: there is none.

    A captured copy reads the same pinned memory in every replay, so each capture gets a row of its own, and all rows
    are there before: nothing can be pinned while a graph is captured.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self.parameters, self.device = parameters, parameters[0].device
        self.rows = torch.zeros(1 + MOST_CAPTURES, len(parameters), dtype=torch.int64)
        if self.device.type == "cuda":
            self.rows = self.rows.pin_memory()
        self.captures = 0

    def now(self) -> torch.Tensor:
        """Those of the gradients that are there now, each of them contiguous and float32 from here on."""
        for parameter in self.parameters:
            if parameter.grad is not None and not (parameter.grad.is_contiguous() and parameter.grad.dtype == FLOAT):
                parameter.grad = parameter.grad.to(FLOAT).contiguous()
        found = [0 if parameter.grad is None else parameter.grad.data_ptr() for parameter in self.parameters]
        row = self.rows[0]
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self.captures += 1
            row = self.rows[self.captures]
        elif self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # the last copy may still be on its way
        row.copy_(torch.tensor(found, dtype=torch.int64))
        return row.to(self.device, non_blocking=True)
