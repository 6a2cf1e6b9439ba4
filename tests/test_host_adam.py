"""The optimiser on the host: the same weights, moments and losses to the bit, and each way to get it wrong is seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from test_resume import killed_before
from tiny import final_bytes

from whet.base.errors import UserError
from whet.data.batch.batches import Batches
from whet.engine.compute.head import find_head
from whet.engine.device import Placement
from whet.engine.memory import host_adam
from whet.engine.memory.host_adam import HostAdamW, HostLink, halve, halves
from whet.methods.layers.group import fuse, set_rate_ratio
from whet.methods.lora import Lora
from whet.recipe import Parsed
from whet.settings import Train
from whet.training import arrange
from whet.training.checkpoint import trainable
from whet.training.loss import Forward
from whet.training.optim import build_optimiser, set_rate
from whet.training.run import train
from whet.training.setup import get_ready
from whet.training.step import NotFinite, train_step

Make = Callable[..., Parsed]
CPU = torch.device("cpu")
STEPS = 4
CHUNK = 1 << 10  # several chunks for each matrix


class Trained:
    """Some steps of two micro-batches with clipping, decay on matrices only and rates that fall."""

    def __init__(self, kind: str, *, hosted: bool, full: bool, compute: torch.dtype = torch.float32) -> None:
        net = nets.network(kind, tie_word_embeddings=False)
        self.model = net.eval() if full else nets.adapted(net)
        fused, masters = None, {} if hosted else None
        if not full:
            for name, parameter in self.model.named_parameters():
                if "lora_B" in name:
                    set_rate_ratio(parameter, 16.0)
            fused = fuse(self.model, compute=compute)
        elif hosted and compute != torch.float32:
            masters = halve(net, CPU, compute)
        autocast = compute if compute != torch.float32 else None
        head = find_head(net, autocast=autocast)
        assert head is not None
        self.model.train()
        self.forward = Forward(CPU, compute, autocast is not None, head, None if fused is None else fused.refresh)
        trained = [p for p in self.model.parameters() if p.requires_grad] if fused is None else fused.leaves
        flat = [p for p in trained if p.ndim < 2]
        matrices, vectors = (trained, []) if fused else ([p for p in trained if p.ndim > 1], flat)
        self.settings = Train(weight_decay=0.1)
        self.optimiser = build_optimiser(self.settings, matrices, vectors, 0.01, masters=masters)
        rows = nets.rows_of([9, 30, 17, 23, 12, 28, 40, 7])
        self.batches = Batches(rows, None, size=2, accumulate=2, flat=True, seed=1)
        self.losses: list[tuple[float, float]] = []

    def step(self, index: int) -> None:
        set_rate(self.optimiser, 0.01 / (index + 1))
        done = train_step(
            self.model, self.optimiser, self.batches.step(index), self.forward, max_grad_norm=0.5, step=index + 1
        )
        self.losses.append((done.loss, done.grad_norm))

    def run(self) -> Trained:
        torch.manual_seed(4)
        for index in range(STEPS):
            self.step(index)
        return self

    def weights(self) -> list[torch.Tensor]:
        return [tensor.clone() for tensor in trainable(self.model, self.optimiser).values()]

    def moments(self) -> list[torch.Tensor]:
        state = self.optimiser.state_dict()["state"]
        return [state[index][name] for index in sorted(state) for name in sorted(state[index])]


def same(one: Trained, other: Trained) -> bool:
    def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
        return len(first) == len(second) and all(map(torch.equal, first, second))

    if one.losses != other.losses:
        return False
    return equal(one.weights(), other.weights()) and equal(one.moments(), other.moments())


CASES = [
    ("Llama", False, torch.float32), ("Llama", True, torch.float32), ("Llama", True, torch.bfloat16),
    ("Qwen3", True, torch.bfloat16), ("Gemma2", True, torch.bfloat16), ("GPT2", True, torch.bfloat16),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_adam, "BUCKET_BYTES", 1 << 14)
    monkeypatch.setattr(host_adam, "HostLink", lambda device, _: HostLink(device, CHUNK, ring=3))


@pytest.mark.parametrize(("kind", "full", "compute"), CASES, ids=str)
def test_steps_are_the_same_to_the_bit(kind: str, full: bool, compute: torch.dtype) -> None:
    plain, hosted = (Trained(kind, hosted=one, full=full, compute=compute).run() for one in (False, True))
    assert isinstance(hosted.optimiser, HostAdamW)
    assert same(plain, hosted)
    assert len({loss for loss, _ in plain.losses}) == STEPS
    assert all(norm > 0.5 for _, norm in plain.losses), "nothing was clipped"
    assert all(p.grad is None for p in hosted.model.parameters())
    linears = hosted.optimiser.exact
    assert bool(linears) == (compute == torch.bfloat16)
    assert all(p.dtype == compute for p in linears)
    assert all(torch.equal(p, master.to(compute)) for p, master in linears.items())
    assert hosted.optimiser.ferry.pool.made == 3


def _drop_one(patch: pytest.MonkeyPatch) -> None:
    leave, seen = HostAdamW._leave, []

    def forget(self: HostAdamW, pair: Any, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            seen.append(pair)
            if len(seen) == 5:
                parameter.grad = None
        leave(self, pair, parameter)

    patch.setattr(HostAdamW, "_leave", forget)


def _no_piece(patch: pytest.MonkeyPatch) -> None:
    pieces = HostLink._pieces
    patch.setattr(HostLink, "_pieces", lambda self, *args: list(pieces(self, *args))[:-1] or list(pieces(self, *args)))


def _too_early(patch: pytest.MonkeyPatch) -> None:
    """A chunk is used again before the host has taken what is in it."""
    take = HostLink._chunk

    def same_one(self: HostLink) -> torch.Tensor:
        return self._under_way[-1].chunk if self._under_way else take(self)

    patch.setattr(HostLink, "_chunk", same_one)


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a gradient is left out": _drop_one,
    "part of a tensor stays behind": _no_piece,
    "a chunk is used again too early": _too_early,
    "micro-batches are not added up": lambda patch: patch.setattr(
        host_adam, "_put", lambda staged, target, add: target.copy_(staged)
    ),
    "gradients of the step before are kept": lambda patch: patch.setattr(
        host_adam, "_put", lambda staged, target, add: target.add_(staged)
    ),
    "the weights stay as they were": lambda patch: patch.setattr(HostLink, "send", lambda self, tensor, into: None),
    "nobody waits for the gradients": lambda patch: patch.setattr(HostLink, "drain", lambda self: None),
    "the masters are made of the rounded weights": lambda patch: patch.setattr(
        host_adam, "_master",
        lambda parameter, known: torch.nn.Parameter(parameter.detach().float().clone()),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_would_be_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Trained("Llama", hosted=False, full=True, compute=torch.bfloat16).run()
    FAULTS[fault](monkeypatch)
    try:
        found = Trained("Llama", hosted=True, full=True, compute=torch.bfloat16).run()
    except NotFinite:  # memory that nobody has written to may hold anything
        return
    assert not same(plain, found)


def test_a_gradient_that_no_hook_saw_counts() -> None:
    plain, hosted = (Trained("Llama", hosted=one, full=False) for one in (False, True))
    assert isinstance(hosted.optimiser, HostAdamW)
    for hook in hosted.optimiser._hooks:
        hook.remove()
    assert same(plain.run(), hosted.run())


def test_a_step_that_comes_to_nothing_leaves_nothing_behind() -> None:
    """A loss that is not finite, then a step that breaks off in its second micro-batch, then ordinary ones."""
    plain, hosted = (Trained("Llama", hosted=one, full=True) for one in (False, True))
    right = hosted.forward.loss
    calls: list[int] = []

    class Broken:
        device, prepare = CPU, None

        def __init__(self, kind: str) -> None:
            self.kind = kind

        def loss(self, model: Any, batch: Any) -> torch.Tensor:
            calls.append(1)
            if self.kind == "raises" and len(calls) % 2 == 0:
                raise RuntimeError("broken off")
            return right(model, batch) * (float("nan") if self.kind == "nan" else 1.0)

    for kind, error in (("nan", NotFinite), ("raises", RuntimeError)):
        calls.clear()
        with pytest.raises(error):
            train_step(hosted.model, hosted.optimiser, hosted.batches.step(0), Broken(kind), max_grad_norm=0.5, step=1)  # type: ignore[arg-type]
    assert same(plain.run(), hosted.run())


SHORT: dict[str, Any] = {
    "method.name": "full", "train__max_steps": 6, "train__save_steps": 2, "train__eval_steps": 3, "data__val_size": 4,
    "train__per_device_train_batch_size": 2, "train__gradient_accumulation_steps": 2, "train__weight_decay": 0.01,
    "base__compute": "bf16", "train__learning_rate": 0.01,
}  # fmt: skip
ADAPTER: dict[str, Any] = SHORT | {
    "method.name": "lora", "base__compute": "fp32", "method__lora_dropout": 0.1,
}  # fmt: skip


def files(run: Path) -> dict[str, bytes]:
    """Everything that must not depend on where the optimiser is, nor on interruptions."""
    if (run / "adapter").is_dir():
        return final_bytes(run)
    last = max((run / "checkpoints").glob("step-*"), key=lambda path: int(path.name.split("-")[1]))
    names = ("model.safetensors", "optimizer.safetensors", "random.safetensors")
    found = {name: (last / name).read_bytes() for name in names}
    (model,) = (path for path in run.rglob("model.safetensors") if last.parent not in path.parents)
    return found | {"model": model.read_bytes(), "metrics": (run / "metrics.jsonl").read_bytes()}


@pytest.mark.parametrize("settings", [SHORT, ADAPTER], ids=["full", "lora"])
def test_a_run_ends_with_the_same_bytes_also_when_it_was_cut_off(settings: dict[str, Any], recipe: Make) -> None:
    hosted = settings | {"train__offload_optimizer": True}
    expected = files(train(recipe("plain", **settings)).path)
    assert files(train(recipe("hosted", **hosted)).path) == expected
    killed_before(recipe("cut", **hosted), 5)
    assert files(train(recipe("cut", **hosted)).path) == expected


@pytest.mark.parametrize("fault", ["agree", "exact"])
def test_what_a_resume_forgets_is_seen(fault: str, recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    hosted = SHORT | {"train__offload_optimizer": True}
    expected = files(train(recipe("whole", **hosted)).path)
    if fault == "exact":
        monkeypatch.setattr(HostAdamW, "exact", {})
    killed_before(recipe("cut", **hosted), 5)
    if fault == "agree":
        monkeypatch.setattr(HostAdamW, "agree", lambda self: None)
    assert files(train(recipe("cut", **hosted)).path) != expected


def test_only_a_model_trained_whole_is_halved() -> None:
    net = nets.network("Llama", tie_word_embeddings=True)
    assert halves(net)
    assert not halves(nets.adapted(nets.network("Llama")))
    masters = halve(net, CPU, torch.bfloat16)
    short = {name for name, p in net.named_parameters() if p.dtype == torch.bfloat16}
    assert len(short) == len(masters) == 14
    assert all("proj" in name for name in short), "embedding, head and norms are read in float32"
    layer = net.get_decoder().layers[0].mlp
    shared = nets.network("Llama")
    shared.get_decoder().layers[1].mlp.up_proj.weight = shared.get_decoder().layers[0].mlp.up_proj.weight
    assert len(halve(shared, CPU, torch.bfloat16)) == 12
    assert layer.up_proj.weight in masters


def test_methods_with_padded_rows_train_on_the_host_too(recipe: Make) -> None:
    settings = {"method.name": "prompt", "method__num_virtual_tokens": 4, "train__max_steps": 3}
    expected = files(train(recipe("plain", **settings)).path)
    run = train(recipe("hosted", train__offload_optimizer=True, **settings))
    assert files(run.path) == expected
    assert (run.read("arrangement.json") or {})["offload_optimizer"]


def test_auto_goes_to_the_host_only_when_nothing_else_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nets.adapted(nets.network("Llama")).base_model.model
    batches = Batches(nets.rows_of([64] * 8), None, size=2, accumulate=1, flat=True, seed=1)
    least = arrange.least_bytes(net, batches, 4)
    assert least > 0
    gpu = Placement(torch.device("cuda"), "bf16", torch.bfloat16, False, {})

    def chosen(free: float, **train: Any) -> bool:
        monkeypatch.setattr(arrange, "_free_bytes", lambda *_, on_host: 2 * least if on_host else free)
        found, masters = arrange._with_optimiser(Train(**train), gpu, net, batches, ([], None), 4)
        assert found == (2 * least if masters is not None else free)
        return masters is not None

    assert not chosen(least)
    assert chosen(least - 1)
    assert chosen(least, offload_optimizer=True)
    assert not chosen(0, offload_optimizer=False)
    assert not chosen(0, optim="sgd")
    assert not chosen(0, cuda_graphs=True)


def test_a_method_that_reads_gradients_is_refused(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lora, "begin", lambda *_: None)
    with pytest.raises(UserError, match="gradients on the device"):
        get_ready(recipe(train__offload_optimizer=True))
