"""Optimiser and head in host memory on a GPU: copies beside the work change nothing, and the memory is free."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import pytest
import tiny
import torch
from test_launch import apart

from whet.data.batch.batches import Cut, Order
from whet.data.batch.text_batches import TextBatches
from whet.engine.compute.attention import fastest_attention
from whet.engine.compute.compile import compile_layers
from whet.engine.compute.head import Head, find_head
from whet.engine.memory import host_adam
from whet.engine.memory.host_adam import HostAdamW, HostLink, shorten_weights
from whet.engine.memory.host_tables import HostTensors
from whet.methods.layers.fuse import fuse
from whet.recipe import Parsed
from whet.runs import Run
from whet.settings import Train
from whet.training.captured import side_stream
from whet.training.checkpoint import trainable
from whet.training.objective.objective import Arithmetic
from whet.training.objective.text import TextObjective
from whet.training.optim import build_optimiser
from whet.training.run import Loop, train
from whet.training.step import train_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
CUDA = torch.device("cuda")
SIZES = {
    "hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    "num_hidden_layers": 4, "tie_word_embeddings": False,
}  # fmt: skip
STEPS = 4
Make = Callable[..., Parsed]


class Full:
    """A model trained whole under autocast; epsilon is large, so that noise stays as small as it is."""

    def __init__(self, *, hosted: bool, compiled: bool = False) -> None:
        net = nets.network("Llama", device="cuda", **SIZES).eval()
        masters = shorten_weights(net, CUDA, torch.bfloat16) if hosted else None
        self.model = net.train()
        arithmetic = Arithmetic(CUDA, torch.bfloat16, autocast=True)
        self.objective = TextObjective(arithmetic, head=find_head(net, autocast=torch.bfloat16))
        assert self.objective.head is not None
        if compiled:
            compile_layers(net)
        settings = Train(weight_decay=0.1, adam_epsilon=0.01, learning_rate=0.02)
        self.optimiser = build_optimiser(settings, list(net.parameters()), masters=masters)
        rows = nets.rows_of([70, 300, 170, 230, 120, 280, 400, 90])
        self.batches = TextBatches(rows, flat=True, order=Order(1), cut=Cut(2, 2))

    def run(self) -> list[tuple[float, float]]:
        found = []
        for step in range(STEPS):
            done = train_step(
                self.model, self.optimiser, self.batches.step(step), self.objective, max_grad_norm=0.5, step=step + 1
            )
            found.append((done.loss, done.grad_norm))
        return found

    def weights(self) -> torch.Tensor:
        torch.cuda.synchronize()
        return torch.cat([t.flatten().cpu() for t in trainable(self.model, self.optimiser).values()])


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_steps_with_the_optimiser_on_the_host_are_the_same(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(host_adam, "BUCKET_BYTES", 4 << 20)
    monkeypatch.setattr(host_adam, "HostLink", lambda device, _: HostLink(device, 1 << 18, ring=4))
    with fastest_attention(CUDA), side_stream(CUDA):
        plain = Full(hosted=False)
        start = plain.weights()
        expected = plain.run()
        hosted = Full(hosted=True, compiled=compiled)
        assert torch.equal(hosted.weights(), start)
        found = hosted.run()
        assert isinstance(hosted.optimiser, HostAdamW)
        for (loss, norm), (right, right_norm) in zip(found, expected, strict=True):
            assert abs(loss - right) < 3e-3 * right
            assert abs(norm - right_norm) < 0.03 * right_norm
        assert nets.relative(hosted.weights() - start, plain.weights() - start) < (0.1 if compiled else 0.05)
        exact = hosted.optimiser.exact_weights
        assert len(exact) == 7 * 4
        assert all(torch.equal(p.cpu(), master.to(torch.bfloat16)) for p, master in exact.items())
        assert all(p.grad is None for p in hosted.model.parameters())
        assert hosted.optimiser.link.pool.made == 4
        assert {t.device.type for state in hosted.optimiser.state.values() for t in state.values()} == {"cpu"}


def test_the_device_keeps_the_weights_alone() -> None:
    with fastest_attention(CUDA), side_stream(CUDA):
        torch.cuda.empty_cache()
        torch._C._cuda_clearCublasWorkspaces()
        before = torch.cuda.memory_allocated()
        hosted = Full(hosted=True)
        hosted.run()
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()
        held = torch.cuda.memory_allocated() - before
        linears = sum(p.numel() for p in hosted.model.parameters() if p.dtype == torch.bfloat16)
        rest = sum(p.numel() for p in hosted.model.parameters()) - linears
        assert linears > 10 * rest
        assert held < 2 * linears + 4 * rest + (8 << 20)


def test_a_ferry_carries_whole_tensors_while_the_device_is_busy() -> None:
    link = HostLink(CUDA, 1 << 16, ring=3)
    tensors = [torch.randn(100_003, device=CUDA).to(kind) for kind in (torch.float32, torch.bfloat16)]
    for tensor in tensors:
        sums = torch.zeros(tensor.numel())
        for add in (False, True, True):
            torch.cuda._sleep(2_000_000)
            late = tensor * 2
            link.to_host(late, sums, add=add)
            del late
            torch.empty_like(tensor).fill_(float("nan"))  # takes the memory that was let go, were it let go too early
        link.wait_on_host()
        assert torch.equal(sums, tensor.float().cpu() * 6)
        back = torch.full_like(tensor, float("nan"))
        torch.cuda._sleep(2_000_000)
        held = back * 0  # reads what was there before
        link.to_device(sums, back)
        link.wait_on_device()
        assert torch.equal((back * 1).cpu(), sums.to(tensor.dtype))
        assert bool(held.isnan().all())


def _head(*, away: bool, fp8: bool) -> tuple[Any, Head]:
    net = nets.network("Llama", dtype=torch.bfloat16, device="cuda", **SIZES).eval()
    head = find_head(net)
    assert head is not None
    model = nets.adapted(net)
    fused = fuse(model, compute=torch.bfloat16)
    if fp8:
        head = head.in_fp8(net, both_orders=False)
    before = torch.cuda.memory_allocated()
    if away:
        head = head.on_host(net)
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() < before
    fused.refresh()
    return model, head


@pytest.mark.parametrize("fp8", [False, True])
def test_a_head_on_the_host_changes_no_bit(fp8: bool) -> None:
    tokens = nets.ids(2, 200).cuda()
    places, targets = torch.arange(399, device=CUDA), tokens.flatten()[1:]
    results = []
    for away in (False, True):
        model, head = _head(away=away, fp8=fp8)
        losses = []
        with fastest_attention(CUDA), side_stream(CUDA):
            for _ in range(3):
                loss = head.losses({"input_ids": tokens, "use_cache": False}, places, targets).sum()
                loss.backward()
                losses.append(loss.item())
        results.append((losses, {name: g.clone() for name, g in nets.gradients(model).items()}))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(g, results[1][1][name]) for name, g in results[0][1].items())


def test_a_head_that_is_not_waited_for_would_be_seen() -> None:
    travelling = HostTensors([torch.randn(64 << 20)], CUDA)
    (there,) = travelling.arrive()
    assert torch.equal(there.cpu(), travelling.tensors[0])
    there.zero_()
    del there  # its memory is taken again
    travelling.call()
    assert travelling._coming is not None
    early = travelling._coming[0].clone()
    (there,) = travelling.arrive()
    assert torch.equal(there.cpu(), travelling.tensors[0])
    assert not torch.equal(early.cpu(), travelling.tensors[0])


@pytest.mark.parametrize(
    "more",
    [{"train__offload_optimizer": True}, {"method.name": "full", "train__offload_optimizer": True},
     {"base__offload_head": True}],
    ids=str,
)  # fmt: skip
def test_a_run_is_the_same_run(more: dict[str, Any], model_dir: Path, data_file: Path, tmp_path: Path) -> None:
    def recipe(name: str, **changes: Any) -> Parsed:
        usual = {"base__device": "cuda", "base__compute": "bf16", "train__max_steps": 6, "train__learning_rate": 1e-3,
                 "train__adam_epsilon": 0.01, "train__per_device_train_batch_size": 4,
                 "data__val_size": 4, "train__eval_steps": 3}  # fmt: skip
        return tiny.recipe(model_dir, data_file, tmp_path / name, **(usual | changes))

    method = {name: value for name, value in more.items() if name == "method.name"}
    plain, found = train(recipe("plain", **method)), train(recipe("away", **more))
    facts = found.read("layout.json") or {}
    assert (plain.read("layout.json") or {})["cuda_graphs"]
    assert not facts["cuda_graphs"]
    assert facts["offload_optimizer"] == ("train__offload_optimizer" in more)
    assert apart_in_training(plain, found) < 0.03


def apart_in_training(one: Run, other: Run) -> float:
    """Largest relative difference of the losses of two runs."""
    lines = ([json.loads(line) for line in run.metrics.read_text().splitlines()] for run in (one, other))
    pairs = zip(*lines, strict=True)
    return max(abs(a[name] - b[name]) / abs(b[name]) for a, b in pairs for name in ("loss", "eval_loss") if name in a)


def test_memory_that_runs_out_on_a_gpu_is_found_early(
    model_dir: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real allocator says no above a number of tokens: a hook asks for more than there is."""
    begin = Loop.fit
    seen: list[int] = []

    def greedy(module: Any, args: Any) -> None:
        if module.training and torch.is_grad_enabled():
            seen.append(args[0].numel())
            if args[0].numel() > 256:
                torch.empty(1 << 50, dtype=torch.uint8, device="cuda")

    def fit(self: Loop) -> None:
        self.launcher.arranged.network.get_input_embeddings().register_forward_pre_hook(greedy)  # type: ignore[operator,union-attr]
        begin(self)

    settings: dict[str, Any] = {
        "base__device": "cuda", "train__max_steps": 4, "train__per_device_train_batch_size": 6,
        "train__cuda_graphs": False, "train__fit_micro_batches": False, "train__learning_rate": 1e-3,
    }  # fmt: skip
    expected = train(tiny.recipe(model_dir, data_file, tmp_path / "plain", **settings))
    monkeypatch.setattr(Loop, "fit", fit)
    found = train(tiny.recipe(model_dir, data_file, tmp_path / "cut", **settings))
    assert max(seen) > 256
    assert (found.read("layout.json") or {})["out_of_memory"]
    assert apart(found, expected) < 1e-2
