"""AdamW with moments of 8 bits: against arithmetic in float64 written down again, against torch's AdamW, against
bitsandbytes on a GPU; what is skipped, saved and gone on with."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import numpy as np
import pytest
import tiny
import torch

from whet.engine.memory.adam_8bit import BLOCK, SMALLEST, AdamW8bit, dynamic_codes
from whet.recipe import Parsed
from whet.settings import Train
from whet.training import checkpoint
from whet.training.checkpoint import Identity
from whet.training.loop import Loop
from whet.training.optim import build_optimiser
from whet.training.run import train

Make = Callable[..., Parsed]
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
DEVICES = ["cpu", pytest.param("cuda", marks=ON_GPU)]
SIZES = ((70, 100), (33,), (5000,), (64, 64))  # a last block that is not full, float32 moments, one number more or less


def made(device: str = "cpu", *, decay: float = 0.1, rate: float = 0.01) -> tuple[list[torch.nn.Parameter], AdamW8bit]:
    draw = torch.Generator().manual_seed(1)
    parameters = [torch.nn.Parameter(torch.randn(size, generator=draw).to(device)) for size in SIZES]
    groups = [{"params": parameters[:2], "weight_decay": decay}, {"params": parameters[2:], "weight_decay": 0.0}]
    for group in groups:
        group["lr"] = torch.tensor(rate, device=device)
    return parameters, AdamW8bit(groups, lr=torch.tensor(rate, device=device), betas=(0.8, 0.95), eps=1e-6)


def give(parameters: list[torch.nn.Parameter], step: int, scale: float = 1.0) -> None:
    """The gradients of a step: of many sizes, some of them 0."""
    draw = torch.Generator().manual_seed(100 + step)
    for parameter in parameters:
        grad = torch.randn(parameter.shape, generator=draw) * torch.rand(parameter.shape, generator=draw) ** 4
        grad[torch.rand(parameter.shape, generator=draw) < 0.1] = 0.0
        parameter.grad = (scale * grad).to(parameter.device)


def table(signed: bool) -> list[float]:
    """The codes, from their description: seven decades, each with twice the numbers of the one below it."""
    found = [0.0, 1.0]
    for decade in range(7):
        count = 2**decade * (1 if signed else 2)
        width = 0.9 / count
        for place in range(count):
            value = (0.1 + width * (place + 0.5)) * 10.0 ** (decade - 6)
            found += [value, -value] if signed else [value]
    return sorted(found)


class Reference:
    """One tensor in float64 and plain loops over blocks."""

    def __init__(self, weights: np.ndarray, decay: float) -> None:
        self.p, self.decay, self.steps = weights.astype(np.float64), decay, 0
        self.m, self.v = np.zeros_like(self.p), np.zeros_like(self.p)

    def step(self, g: np.ndarray, rate: float, betas: tuple[float, float], eps: float) -> None:
        self.steps += 1
        self.m = betas[0] * self.m + (1 - betas[0]) * g
        self.v = betas[1] * self.v + (1 - betas[1]) * g * g
        m, v = self.m / (1 - betas[0] ** self.steps), self.v / (1 - betas[1] ** self.steps)
        self.p = (self.p - rate * m / (np.sqrt(v) + eps)) * (1 - rate * self.decay)
        if self.p.size >= SMALLEST:
            self.m, self.v = self.rounded(self.m, signed=True), self.rounded(self.v, signed=False)

    def rounded(self, x: np.ndarray, *, signed: bool) -> np.ndarray:
        flat, codes = x.reshape(-1).copy(), np.array(table(signed))
        for start in range(0, len(flat), BLOCK):
            block = flat[start : start + BLOCK]
            largest = np.abs(block).max()
            for index, value in enumerate(block / (largest or 1.0)):
                code = int(np.abs(codes - value).argmin())
                if signed and value > 0 > codes[code]:
                    code += 1
                if signed and value < 0 <= codes[code]:
                    code -= 1
                flat[start + index] = codes[code] * largest
        return flat.reshape(x.shape)


def test_the_codes_are_those_of_the_paper() -> None:
    for signed in (True, False):
        codes = dynamic_codes(torch.device("cpu"), signed=signed)
        assert codes.values.tolist() == pytest.approx(table(signed), rel=1e-6)
        assert len(set(codes.values.tolist())) == 256
        x = torch.linspace(-1 if signed else 0, 1, 9999)
        nearest = (x[:, None] - codes.values).abs().argmin(dim=1)
        assert (codes.values[codes.nearest(x)] - x).abs().max() <= (codes.values[nearest] - x).abs().max() + 1e-7


@pytest.mark.parametrize("device", DEVICES)
def test_an_update_is_that_of_float64_but_for_rounding(device: str) -> None:
    parameters, optimiser = made(device)
    references = [Reference(p.detach().cpu().numpy(), 0.1 if index < 2 else 0.0) for index, p in enumerate(parameters)]
    for step in range(4):
        give(parameters, step)
        optimiser.step()
        for parameter, reference in zip(parameters, references, strict=True):
            assert parameter.grad is not None
            reference.step(parameter.grad.cpu().double().numpy(), 0.01, (0.8, 0.95), 1e-6)
            # a moment that lies between two codes may go to the other one: one such number in hundreds
            far = np.abs(parameter.detach().cpu().numpy() - reference.p) > 1e-5
            assert far.mean() < 0.004, (step, parameter.shape)


def test_moments_take_a_byte_and_small_tensors_keep_theirs_exact() -> None:
    parameters, optimiser = made()
    give(parameters, 0)
    optimiser.step()
    kinds = [optimiser.state[p]["state1"].dtype for p in parameters]
    assert kinds == [torch.uint8, torch.float32, torch.uint8, torch.uint8]
    small = parameters[1].detach().clone()
    twin = torch.nn.Parameter(made()[0][1].detach().clone())
    plain = torch.optim.AdamW([twin], lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.0)
    twin.grad = parameters[1].grad
    plain.step()
    assert torch.allclose(small, twin.detach() * (1 - 0.01 * 0.1), atol=1e-7)


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_that_is_skipped_changes_nothing_and_is_not_counted(device: str) -> None:
    parameters, optimiser = made(device)
    twins, other = made(device)
    for step in (0, 1, 2):
        give(parameters, step)
        optimiser.found_inf = torch.tensor(float(step == 1), device=device)
        optimiser.step()
        if step != 1:
            give(twins, step)
            other.step()
    for parameter, twin in zip(parameters, twins, strict=True):
        assert torch.equal(parameter, twin)
        for name, value in optimiser.state[parameter].items():
            assert torch.equal(value, other.state[twin][name]), name


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_are_divided_by_their_scale(device: str) -> None:
    parameters, optimiser = made(device)
    twins, other = made(device)
    give(parameters, 0, scale=8.0)
    give(twins, 0)
    optimiser.grad_scale = torch.tensor(8.0, device=device)
    optimiser.step()
    other.step()
    assert all(torch.equal(one, twin) for one, twin in zip(parameters, twins, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_a_parameter_without_a_gradient_waits(device: str) -> None:
    parameters, optimiser = made(device)
    give(parameters, 0)
    parameters[2].grad = None
    before = parameters[2].detach().clone()
    optimiser.step()
    assert torch.equal(parameters[2], before)
    assert [float(optimiser.state[p]["step"]) for p in parameters] == [1, 1, 0, 1]


@pytest.mark.parametrize("nested", [False, True])
def test_a_saved_state_goes_on_where_it_was(nested: bool) -> None:
    """nested: as bitsandbytes writes it, with the tensors of 8 bits in an entry of their own."""
    parameters, optimiser = made()
    twins, other = made()
    for step in range(3):
        give(parameters, step)
        optimiser.step()
    saved = optimiser.state_dict()
    assert {"state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2", "step"} == set(saved["state"][0])
    assert saved["state"][0]["step"] == 3
    if nested:
        for entries in saved["state"].values():
            entries["quantised"] = {name: entries.pop(name) for name in list(entries) if name != "step"}
    for parameter, twin in zip(parameters, twins, strict=True):
        twin.data.copy_(parameter.data)
    places = [value.data_ptr() for p in twins for value in other.state[p].values()]
    other.load_state_dict(saved)
    assert places == [value.data_ptr() for p in twins for value in other.state[p].values()], "captured steps read there"
    for group, mine in ((parameters, optimiser), (twins, other)):
        give(group, 3)
        mine.step()
    assert all(torch.equal(one, twin) for one, twin in zip(parameters, twins, strict=True))


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit"])
def test_a_run_learns_with_it_and_goes_on_to_the_bit(optim: str, recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    usual: dict[str, Any] = {"train__optim": optim, "train__learning_rate": 0.01, "train__max_steps": 12,
                             "train__save_steps": 5, "method__r": 128, "method__lora_dropout": 0.1}  # fmt: skip
    whole = train(recipe("whole", **usual))
    losses = [line["loss"] for line in whole.lines("metrics.jsonl") if line["kind"] == "train"]
    assert losses[-1] < losses[0] - 0.1
    step = Loop._step

    def cut(loop: Any) -> None:
        if loop.state.step == 7:
            raise KeyboardInterrupt
        step(loop)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_step", cut)
        with pytest.raises(KeyboardInterrupt):
            train(recipe("part", **usual))
    part = train(recipe("part", **usual))
    assert tiny.final_bytes(part.path) == tiny.final_bytes(whole.path)


@ON_GPU
def test_the_kernel_is_its_twin_in_plain_torch() -> None:
    parameters, optimiser = made("cuda")
    twins, other = made("cuda")
    other._launch = None
    for step in range(6):
        give(parameters, step)
        give(twins, step)
        optimiser.step()
        other.step()
    for parameter, twin in zip(parameters, twins, strict=True):
        assert nets.relative(parameter, twin) < 1e-6
        for name, value in optimiser.state[parameter].items():
            if value.dtype == torch.uint8:
                off = (value.int() - other.state[twin][name].int()).abs()
                assert int(off.max()) <= 1, name
                assert float((off > 0).float().mean()) < 0.002, name
            else:
                assert torch.allclose(value, other.state[twin][name], rtol=1e-5), name


@ON_GPU
def test_it_is_bitsandbytes() -> None:
    optim = pytest.importorskip("bitsandbytes.optim")
    functional: Any = pytest.importorskip("bitsandbytes.functional")
    for signed in (True, False):
        ours = dynamic_codes(torch.device("cpu"), signed=signed).values
        assert torch.equal(ours, functional.create_dynamic_map(signed=signed).cpu())
    parameters, optimiser = made("cuda")
    twins, _ = made("cuda")
    groups = [{"params": twins[:2], "weight_decay": 0.1}, {"params": twins[2:], "weight_decay": 0.0}]
    theirs = optim.AdamW8bit(groups, lr=0.01, betas=(0.8, 0.95), eps=1e-6)
    for step in range(6):
        give(parameters, step)
        give(twins, step)
        optimiser.step()
        theirs.step()
    for parameter, twin in zip(parameters, twins, strict=True):
        assert nets.relative(parameter, twin) < 2e-5
        for name in ("state1", "state2"):
            mine, other = optimiser.state[parameter][name], theirs.state[twin][name]
            if mine.dtype == torch.uint8:
                off = (mine.int() - other.int()).abs()
                assert float((off > 0).float().mean()) < 0.005, name
    # a checkpoint of theirs is continued by ours
    loaded = made("cuda")
    loaded[1].load_state_dict(theirs.state_dict())
    for parameter, twin in zip(loaded[0], twins, strict=True):
        assert torch.equal(loaded[1].state[parameter]["state1"], theirs.state[twin]["state1"])
        assert float(loaded[1].state[parameter]["step"]) == 6


def test_rates_and_decay_are_those_of_the_settings(tmp_path: Path) -> None:
    matrix, vector = torch.nn.Parameter(torch.ones(80, 80)), torch.nn.Parameter(torch.ones(80))
    settings = Train(optim="adamw_8bit", learning_rate=0.5, weight_decay=0.1)
    optimiser: Any = build_optimiser(settings, [matrix, vector])
    matrix.grad, vector.grad = torch.zeros(80, 80), torch.zeros(80)
    optimiser.step()
    assert float(matrix[0, 0]) == pytest.approx(0.95)
    assert float(vector[0]) == 1.0
    assert math.isclose(float(optimiser.param_groups[0]["lr"]), 0.5)
    net = torch.nn.Linear(80, 80)
    mine: Any = build_optimiser(settings, list(net.parameters()))
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    mine.step()
    place = checkpoint.save(tmp_path, 1, net, mine, {}, Identity("a", "b"))
    again = torch.nn.Linear(80, 80)
    other: Any = build_optimiser(settings, list(again.parameters()))
    checkpoint.load(place, again, other)
    for one, two in zip(net.parameters(), again.parameters(), strict=True):
        for name, value in mine.state[one].items():
            assert torch.equal(value, other.state[two][name]), name
