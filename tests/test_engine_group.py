"""Layers that share an input as one product: found by running, with PEFT's gradients, in PEFT's files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from nets import apart, clear, gradients, loss_of, made
from torch import nn
from torch.nn.functional import dropout

from whet.engine.layers import decoder_layers
from whet.engine.memory.checkpointing import checkpoint_layers
from whet.engine.weights.linear import dense_weight
from whet.methods.layers.group import Fused, fuse

QKV, MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
USUAL = [QKV, ("o_proj",), MLP, ("down_proj",)]
EXPECTED: dict[str, list[tuple[str, ...]]] = {
    "Llama": USUAL,
    "Qwen2": USUAL,
    "Qwen3": USUAL,
    "Mistral": USUAL,
    "Gemma2": USUAL,
    "Phi3": [("qkv_proj",), ("o_proj",), ("gate_up_proj",), ("down_proj",)],
    "GPT2": [],  # its Conv1D layers are PEFT's own
}
STORAGES = ["dense", "nf4", "fp8", "int8"]
EXACT = 1e-5


def fused_of(model: Any, **options: Any) -> Fused:
    return fuse(model, compute=torch.float32, **options)


def names_of(model: Any, fused: Fused) -> list[tuple[str, ...]]:
    names = {module: name.rsplit(".", 1)[-1] for name, module in model.named_modules()}
    return [tuple(names[layer] for layer in group.layers) for group in fused.groups]


def measured(model: Any, fused: Fused | None = None, tokens: torch.Tensor | None = None) -> tuple[float, Any]:
    clear(model, fused)
    loss = loss_of(model, nets.ids() if tokens is None else tokens)
    loss.backward()
    return loss.item(), gradients(model, fused)


def assert_like_peft(build: Callable[..., Any]) -> None:
    loss, expected = measured(build(plain=True))
    model = build()
    found, ours = measured(model, fused_of(model))
    assert abs(found - loss) <= EXACT * loss
    assert apart(ours, expected) <= EXACT


@pytest.mark.parametrize(("kind", "expected"), EXPECTED.items())
def test_groups_are_found_and_their_gradients_are_pefts(kind: str, expected: list[tuple[str, ...]]) -> None:
    model = made(kind)
    fused = fused_of(model)
    assert sorted(names_of(model, fused)) == sorted(expected * 2)
    assert len(fused.rest) == (0 if expected else len(nets.lora_parameters(model)))
    assert {len(bank.master) for bank in fused.banks} <= {2, 4}  # one row for each layer, or two shapes alike
    assert_like_peft(lambda **options: made(kind, **options))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("lora", [{"lora_alpha": 3}, {"lora_alpha": 3, "use_rslora": True, "r": 5}])
def test_gradients_over_every_storage_and_scale(storage: str, lora: dict[str, Any]) -> None:
    scales = {group.scale for group in fused_of(made("Llama", storage, **lora)).groups}
    assert scales == {3 / 5**0.5 if lora.get("use_rslora") else 3 / 4}
    assert_like_peft(lambda **options: made("Llama", storage, double_quant=False, **lora, **options))


@pytest.mark.parametrize("storage", ["dense", "nf4", "fp8"])
def test_biases_go_with_their_layers(storage: str) -> None:
    assert_like_peft(lambda **options: made("Qwen2", storage, **options))
    model = made("Qwen2", storage)
    fused = fused_of(model)
    firsts = [names[0] for names in names_of(model, fused)]
    biased = {first: group.bias is not None for first, group in zip(firsts, fused.groups, strict=True)}
    assert biased == {"q_proj": True, "o_proj": False, "gate_proj": False, "down_proj": False}


def test_a_layer_without_bias_beside_one_with_it() -> None:
    assert_like_toy(Toy(biases=(True, False, True)))


@pytest.mark.parametrize("storage", ["dense", "nf4"])
def test_dropout_gives_the_gradients_of_its_mask(storage: str) -> None:
    """The layers of a group share one mask, which PEFT's do not, so the reference is written by hand."""
    model = made("Llama", storage, lora_dropout=0.4, lora_alpha=6)
    group = fused_of(model).groups[0]
    x = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(5), requires_grad=True)
    pull = torch.randn(2, 7, sum(group.sizes), generator=torch.Generator().manual_seed(6))
    torch.manual_seed(7)
    output = group.product(x)
    (output * pull).sum().backward()
    torch.manual_seed(7)
    mask = dropout(torch.ones(14, 64), 0.4).view(2, 7, 64).double()
    assert mask.unique().numel() == 2
    wide = x.detach().double().requires_grad_()
    parts, matrices = [], []
    for layer in group.layers:
        a, b = (getattr(layer, w)["default"].weight.detach().double().requires_grad_() for w in ("lora_A", "lora_B"))
        frozen = dense_weight(layer.base_layer, torch.float32).double()
        parts.append(wide @ frozen.t() + 1.5 * ((wide * mask) @ a.t()) @ b.t())
        matrices.append((a, b))
    expected = torch.cat(parts, -1)
    (expected * pull).sum().backward()
    assert nets.relative(output, expected) <= EXACT
    assert nets.relative(x.grad, wide.grad) <= EXACT  # type: ignore[arg-type]
    flat = torch.cat([m.grad.flatten() for m in [a for a, _ in matrices] + [b for _, b in matrices]])  # type: ignore[union-attr]
    assert nets.relative(group.leaf.grad, flat) <= EXACT  # type: ignore[arg-type]


def test_nothing_is_dropped_in_evaluation() -> None:
    model = made("Llama", lora_dropout=0.5).eval()
    plain = made("Llama", lora_dropout=0.5, plain=True).eval()
    fused_of(model)
    assert abs(loss_of(model, nets.ids()).item() - loss_of(plain, nets.ids()).item()) < 1e-3


def test_pefts_matrices_are_views_of_the_bank(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from whet.methods.lora import Lora
    from whet.training.checkpoint import trainable

    model = made("Llama")
    fused = fused_of(model)
    with torch.no_grad():
        for leaf in fused.leaves:
            leaf.mul_(1.25)
    Lora(r=4).save(model, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    untouched = nets.lora_parameters(made("Llama"))
    assert len(saved) == len(untouched)
    for name, tensor in untouched.items():
        assert torch.equal(saved[name.replace(".default", "")], tensor * 1.25)
    kept = {name: 0.5 * tensor for name, tensor in trainable(model).items()}
    before = loss_of(model, nets.ids()).item()
    with torch.no_grad():  # as a checkpoint is loaded
        for name, tensor in trainable(model).items():
            tensor.copy_(kept[name])
    fused.refresh()
    loaded = made("Llama", plain=True)
    with torch.no_grad():
        for name, tensor in nets.lora_parameters(loaded).items():
            tensor.copy_(kept[name])
    assert abs(loss_of(model, nets.ids()).item() - loss_of(loaded, nets.ids()).item()) <= EXACT * before


def assert_copies_are_fresh(model: Any) -> None:
    """The fused output is that of PEFT's own path with the matrices that PEFT's layers show."""
    plain = made("Llama", plain=True)
    with torch.no_grad():
        for name, tensor in nets.lora_parameters(plain).items():
            tensor.copy_(nets.lora_parameters(model)[name])
        ours, expected = loss_of(model, nets.ids()).item(), loss_of(plain, nets.ids()).item()
    assert abs(ours - expected) <= EXACT * expected, "the copies are stale"


@pytest.mark.parametrize("forgotten", [False, True])
def test_a_forgotten_refresh_would_be_seen(forgotten: bool) -> None:
    model = made("Llama")
    fused = fused_of(model)
    optimiser = torch.optim.SGD(fused.leaves, lr=0.01)
    loss_of(model, nets.ids()).backward()
    optimiser.step()
    if not forgotten:
        fused.refresh()
        assert_copies_are_fresh(model)
        return
    with pytest.raises(AssertionError, match="stale"):
        assert_copies_are_fresh(model)


def test_different_ranks_or_scales_share_no_group() -> None:
    model = made("Llama", rank_pattern={"q_proj": 8}, alpha_pattern={"up_proj": 16})
    found = names_of(model, fused_of(model))
    one = [("q_proj",), ("k_proj", "v_proj"), ("o_proj",), ("gate_proj",), ("up_proj",), ("down_proj",)]
    assert sorted(found) == sorted(one * 2)
    assert_like_peft(
        lambda **options: made("Llama", rank_pattern={"q_proj": 8}, alpha_pattern={"up_proj": 16}, **options)
    )


def test_a_layer_that_is_not_adapted_stays_out_of_the_group() -> None:
    model = made("Llama", target_modules=["q_proj", "v_proj"])
    assert names_of(model, fused_of(model)) == [("q_proj", "v_proj")] * 2
    assert_like_peft(lambda **options: made("Llama", target_modules=["q_proj", "v_proj"], **options))


class Toy(nn.Module):
    """Three projections of one input; `shift` gives the second another input than it had when it was looked at."""

    def __init__(self, biases: tuple[bool, ...] = (False,) * 3, twice: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(nets.VOCABULARY, 32)
        self.q, self.k, self.v = (nn.Linear(32, 16, bias=bias) for bias in biases)
        self.shift, self.twice = 0.0, twice

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        x = self.table(input_ids)
        other = x if not self.shift else x + self.shift
        first = self.q(x) + self.q(x) if self.twice else self.q(x)
        return first * self.k(other) + self.v(x).tanh()


def assert_like_toy(toy: Toy, shift: float = 0.0) -> Fused:
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora.layer import Linear

    from whet.methods.layers.lora_layer import LoraLinear

    weights, results = toy.state_dict(), []
    fused: Fused | None = None
    for kind in (Linear, LoraLinear):
        copy = Toy(tuple(m.bias is not None for m in (toy.q, toy.k, toy.v)), toy.twice)
        copy.load_state_dict(weights)
        settings = LoraConfig(r=4, lora_alpha=6, target_modules=["q", "k", "v"])
        settings._register_custom_module({nn.Linear: kind})
        torch.manual_seed(1)
        model = inject_adapter_in_model(settings, copy)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, generator=torch.Generator().manual_seed(ord(name[0])))
        fused = fused_of(model) if kind is LoraLinear else None
        copy.shift = shift
        output = model(nets.ids())
        output.square().sum().backward()
        results.append((output.detach(), gradients(model, fused)))
    assert nets.relative(results[1][0], results[0][0]) <= EXACT
    assert apart(results[1][1], results[0][1]) <= EXACT
    assert fused is not None
    return fused


def test_a_layer_that_gets_another_input_later_is_still_right() -> None:
    fused = assert_like_toy(Toy(), shift=0.7)
    assert [len(group.layers) for group in fused.groups] == [3]


def test_a_layer_that_is_called_twice_is_in_a_group_once() -> None:
    fused = assert_like_toy(Toy(twice=True))
    assert sum(len(group.layers) for group in fused.groups) == 3


@pytest.mark.parametrize("again", [False, True])
def test_micro_batches_add_up(again: bool) -> None:
    """also with layers that run again in the backward pass."""
    model = made("Llama")
    fused = fused_of(model)
    tokens = nets.ids(4)
    _, together = measured(model, fused, tokens)
    if again:
        checkpoint_layers(model.get_base_model())
    clear(model, fused)
    for part in tokens.split(1):
        loss_of(model, part).backward()
    assert apart(gradients(model, fused), together) <= EXACT


def test_recomputed_layers_draw_the_same_mask() -> None:
    found = []
    for again in (False, True):
        model = made("Llama", lora_dropout=0.3)
        fused = fused_of(model)
        if again:
            checkpoint_layers(model.get_base_model())
        torch.manual_seed(11)
        found.append(measured(model, fused)[1])
    assert apart(*found) <= EXACT


def compiled_graphs(model: Any) -> int:
    import torch._dynamo as dynamo

    dynamo.reset()
    dynamo.utils.counters.clear()
    for layer in decoder_layers(model.get_base_model()):
        layer.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    loss_of(model, nets.ids()).backward()
    return dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("storage", "fp8"),
    [("dense", False), ("nf4", False), ("fp8", False), ("int8", False), ("nf4", True), ("fp8", True), ("int8", True)],
)
def test_compiled_whole_it_equals_eager(storage: str, fp8: bool) -> None:
    model = made("Llama", storage)
    fused = fused_of(model, fp8=fp8)
    loss, expected = measured(model, fused)
    clear(model, fused)
    compiled_graphs(model)
    ours = gradients(model, fused)
    assert abs(loss_of(model, nets.ids()).item() - loss) <= EXACT * loss
    assert apart(ours, expected) <= EXACT


@pytest.mark.parametrize("kind", ["Qwen3", "Gemma2"])
def test_compilations_do_not_grow_with_depth(kind: str) -> None:
    counts = []
    for depth in (3, 6):
        model = nets.adapted(nets.network(kind, num_hidden_layers=depth))
        fused_of(model)
        counts.append(compiled_graphs(model))
    assert counts[0] == counts[1] <= 3  # the first layer's input has no gradient; Gemma 2 has layers of two kinds
