"""Layers that share an input as one product: found by running, with PEFT's gradients, in PEFT's files, owned by a
module that nothing else needs to know of."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from nets import apart, clear, gradients, groups_of, loss_of, made
from sampled import sampled
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from whet.base.errors import UserError
from whet.engine.compute.dropout import keyed_dropout
from whet.engine.layers import decoder_layers
from whet.engine.memory.checkpointing import checkpoint_layers
from whet.engine.weights.linear import FrozenLinear, count_parameters, dense_weight
from whet.methods.layers import group as group_module
from whet.methods.layers.fuse import fuse
from whet.methods.layers.group import Groups, LoraGroup
from whet.methods.layers.lora_layer import LoraLinear
from whet.methods.layers.member import GroupMember
from whet.methods.layers.state import load_trained_state, saved_state, trained_state

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


def fused_of(model: Any, **options: Any) -> Groups:
    return fuse(model, compute=torch.float32, **options)


def names_of(model: Any) -> list[tuple[str, ...]]:
    fused_of(model)
    return [group.members for group in groups_of(model)]


def measured(model: Any, tokens: torch.Tensor | None = None) -> tuple[float, Any]:
    clear(model)
    loss = loss_of(model, nets.ids() if tokens is None else tokens)
    loss.backward()
    return loss.item(), gradients(model)


def assert_like_peft(build: Callable[..., Any]) -> None:
    loss, expected = measured(build(plain=True))
    model = build()
    fused_of(model)
    found, ours = measured(model)
    assert abs(found - loss) <= EXACT * loss
    assert apart(ours, expected) <= EXACT


@pytest.mark.parametrize(("kind", "expected"), EXPECTED.items())
def test_groups_are_found_and_their_gradients_are_pefts(kind: str, expected: list[tuple[str, ...]]) -> None:
    model = made(kind)
    names = trained_state(model).keys()
    assert sorted(names_of(model)) == sorted(expected * 2)
    assert trained_state(model).keys() == names
    inside = {id(p) for group in groups_of(model) for p in (group.a, group.b)}
    assert not expected or inside == {id(p) for p in nets.trained(model)}
    shared = {group.copy.a.untyped_storage().data_ptr() for group in groups_of(model) if group.copy is not None}
    assert len(shared) == len({group.shape for group in groups_of(model)}) <= 4, "one tensor for all groups of a shape"
    assert_like_peft(lambda **options: made(kind, **options))


@pytest.mark.parametrize("storage", STORAGES)
def test_the_module_tree_tells_all_and_holds_nothing_twice(storage: str) -> None:
    """A group is a child of its block and owns everything; the members own nothing, and PEFT's layers are gone."""
    model = made("Qwen2", storage)
    old = [weakref.ref(m) for m in model.modules() if isinstance(m, LoraLinear | FrozenLinear)]
    counted = sum(p.numel() * p.element_size() for p in model.parameters())
    numbers = count_parameters(model)
    fused_of(model)
    modules = dict(model.named_modules())
    block = modules["base_model.model.model.layers.0.self_attn"]
    assert {"q_proj", "k_proj", "v_proj", "o_proj", "lora_q_proj_k_proj_v_proj", "lora_o_proj"} == {
        name for name, _ in block.named_children()
    }
    members = [module for module in modules.values() if isinstance(module, GroupMember)]
    assert len(members) == 14
    assert not any([*member.parameters(), *member.buffers()] for member in members)
    alive = [module for ref in old if (module := ref()) is not None]
    assert all(any(module is one for one in modules.values()) for module in alive), "a layer outlives its group"
    assert not any(isinstance(module, LoraLinear) for module in modules.values())
    bias = sum(group.bias.nbytes for group in groups_of(model) if group.bias is not None)
    assert bias
    assert sum(p.numel() * p.element_size() for p in model.parameters()) == counted
    assert count_parameters(model) == numbers


@pytest.mark.parametrize("storage", STORAGES)
def test_a_storage_that_can_be_joined_is_joined(storage: str) -> None:
    model = made("Llama", storage)
    alone = {name: m for name, m in made("Llama", storage).named_modules() if isinstance(m, LoraLinear)}
    fused_of(model, fp8=True, keep_transposed=True)
    for name, module in model.named_modules():
        if isinstance(module, LoraGroup):
            home = name.rpartition(".")[0]
            rows = [dense_weight(alone[f"{home}.{member}"].base_layer, torch.float32) for member in module.members]
            assert torch.equal(group_module.joined_weight(module.base).dense(torch.float32), torch.cat(rows))
            parts = [part for part in module.base.modules() if isinstance(part, nn.Linear | FrozenLinear)]
            assert len(parts) == (len(module.members) if storage == "nf4" else 1)
            whole = [b for b in module.buffers() if b.numel() > 256]
            assert whole == [], "what is derived of the weights would not be sharded"
    assert count_parameters(model) == count_parameters(made("Llama", storage))
    extra = {"nf4": "fp8_scale", "fp8": "turned"}.get(storage)
    assert extra is None or any(name.endswith(extra) for name, _ in model.named_parameters())


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("lora", [{"lora_alpha": 3}, {"lora_alpha": 3, "use_rslora": True, "r": 5}])
def test_gradients_over_every_storage_and_scale(storage: str, lora: dict[str, Any]) -> None:
    model = made("Llama", storage, **lora)
    fused_of(model)
    scales = {group.shape.scale for group in groups_of(model)}
    assert scales == {3 / 5**0.5 if lora.get("use_rslora") else 3 / 4}
    assert_like_peft(lambda **options: made("Llama", storage, double_quant=False, **lora, **options))


@pytest.mark.parametrize("storage", ["dense", "nf4", "fp8"])
def test_biases_go_with_their_layers(storage: str) -> None:
    assert_like_peft(lambda **options: made("Qwen2", storage, **options))
    model = made("Qwen2", storage)
    fused_of(model)
    biased = {group.members[0]: group.bias is not None for group in groups_of(model)}
    assert biased == {"q_proj": True, "o_proj": False, "gate_proj": False, "down_proj": False}


def test_a_layer_without_bias_beside_one_with_it() -> None:
    assert_like_toy(Toy(biases=(True, False, True)))


@pytest.mark.parametrize("storage", ["dense", "nf4"])
def test_dropout_gives_the_gradients_of_its_mask(storage: str) -> None:
    """The layers of a group share one mask, which PEFT's do not, so the reference is written by hand."""
    model = made("Llama", storage, lora_dropout=0.4, lora_alpha=6)
    layers = model.base_model.model.model.layers[0].self_attn
    layers = [layers.q_proj, layers.k_proj, layers.v_proj]
    twin = made("Llama", storage, lora_dropout=0.4, lora_alpha=6)
    fused_of(twin)
    group = groups_of(twin)[0]
    x = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(5), requires_grad=True)
    pull = torch.randn(2, 7, sum(group.shape.sizes), generator=torch.Generator().manual_seed(6))
    group.draws.place(7, 0)
    output = group(x)
    (output * pull).sum().backward()
    mask = keyed_dropout(torch.ones(14, 64), 0.4, group.draws, group.number).view(2, 7, 64).double()
    assert mask.unique().numel() == 2
    wide = x.detach().double().requires_grad_()
    parts, matrices = [], []
    for layer in layers:
        a, b = (getattr(layer, w)["default"].weight.detach().double().requires_grad_() for w in ("lora_A", "lora_B"))
        frozen = dense_weight(layer.base_layer, torch.float32).double()
        parts.append(wide @ frozen.t() + 1.5 * ((wide * mask) @ a.t()) @ b.t())
        matrices.append((a, b))
    expected = torch.cat(parts, -1)
    (expected * pull).sum().backward()
    assert nets.relative(output, expected) <= EXACT
    assert nets.relative(x.grad, wide.grad) <= EXACT  # type: ignore[arg-type]
    for parameter, which in ((group.a, 0), (group.b, 1)):
        exact = torch.cat([pair[which].grad for pair in matrices])  # type: ignore[misc]
        assert nets.relative(parameter.grad, exact) <= EXACT  # type: ignore[arg-type]


def test_nothing_is_dropped_in_evaluation() -> None:
    model = made("Llama", lora_dropout=0.5).eval()
    plain = made("Llama", lora_dropout=0.5, plain=True).eval()
    fused_of(model)
    assert abs(loss_of(model, nets.ids()).item() - loss_of(plain, nets.ids()).item()) < 1e-3


def test_files_have_pefts_names_and_nothing_of_groups(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from whet.methods.lora import Lora

    model = made("Llama")
    groups = fused_of(model)
    with torch.no_grad():
        for parameter in nets.trained(model):
            parameter.mul_(1.25)
    Lora(r=4).save(model, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    untouched = nets.lora_parameters(made("Llama"))
    assert saved.keys() == {name.replace(".default", "") for name in untouched}
    for name, tensor in untouched.items():
        assert torch.equal(saved[name.replace(".default", "")], tensor * 1.25)
    kept = {name: 0.5 * tensor for name, tensor in trained_state(model).items()}
    assert kept.keys() == untouched.keys()
    before = loss_of(model, nets.ids()).item()
    load_trained_state(model, kept)
    groups.refresh()
    loaded, alone = made("Llama", plain=True), made("Llama")
    for other in (loaded, alone):
        load_trained_state(other, kept)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in nets.lora_parameters(loaded).items())
    for other in (loaded, alone):
        assert abs(loss_of(model, nets.ids()).item() - loss_of(other, nets.ids()).item()) <= EXACT * before


@pytest.mark.parametrize("fault", ["missing", "another", "shape"])
def test_weights_that_are_not_of_this_model_are_not_loaded(fault: str) -> None:
    model = made("Llama")
    fused_of(model)
    tensors = dict(trained_state(model))
    name = next(iter(tensors))
    if fault == "missing":
        del tensors[name]
    elif fault == "another":
        tensors["other"] = tensors[name]
    else:
        tensors[name] = tensors[name][:1]
    with pytest.raises((AssertionError, KeyError)):
        load_trained_state(model, tensors)


def assert_copies_are_fresh(model: Any) -> None:
    """The fused output is that of PEFT's own path with the matrices that go into files."""
    plain = made("Llama", plain=True)
    load_trained_state(plain, trained_state(model))
    with torch.no_grad():
        ours, expected = loss_of(model, nets.ids()).item(), loss_of(plain, nets.ids()).item()
    assert abs(ours - expected) <= EXACT * expected, "the copies are stale"


@pytest.mark.parametrize("forgotten", [False, True])
def test_a_forgotten_refresh_would_be_seen(forgotten: bool) -> None:
    model = made("Llama")
    groups = fused_of(model)
    optimiser = torch.optim.SGD(nets.trained(model), lr=0.01)
    loss_of(model, nets.ids()).backward()
    optimiser.step()
    if not forgotten:
        groups.refresh()
        assert_copies_are_fresh(model)
        return
    with pytest.raises(AssertionError, match="stale"):
        assert_copies_are_fresh(model)


def replace_parameters(model: Any, which: str) -> None:
    """As sharding does: other parameters with other numbers where A or B of each group was."""
    for group in groups_of(model):
        setattr(group, which, nn.Parameter(1.5 * getattr(group, which).detach()))


@pytest.mark.parametrize(
    ("which", "compiled"),
    sampled([(which, compiled) for which in "ab" for compiled in (False, True)], lambda case: case != ("a", True)),
)
def test_a_group_whose_parameters_were_replaced_makes_its_own_copies(which: str, compiled: bool) -> None:
    model = made("Llama", lora_alpha=3)
    twin = made("Llama", plain=True, lora_alpha=3)
    groups = fused_of(model)
    if compiled:
        compiled_graphs(model)
    replace_parameters(model, which)
    load_trained_state(twin, trained_state(model))
    expected = measured(twin)
    for refreshed in (False, True):
        if refreshed:
            groups.refresh()
            assert all(group.copy is None for group in groups_of(model))
        loss, found = measured(model)
        assert abs(loss - expected[0]) <= EXACT * loss
        assert apart(found, expected[1]) <= EXACT


def test_copies_that_are_not_checked_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoraGroup, "_copies", lambda group: (group.copy.a, group.copy.b))
    with pytest.raises(AssertionError):
        test_a_group_whose_parameters_were_replaced_makes_its_own_copies("a", compiled=False)


def test_both_ways_to_make_copies_give_the_same_bits() -> None:
    model = made("Llama", lora_alpha=3)
    fuse(model, compute=torch.bfloat16)
    for group in groups_of(model):
        shared = group.copy
        assert shared is not None
        group.copy = None
        a, b = group._copies()
        assert a.dtype == b.dtype == torch.bfloat16
        assert torch.equal(a, shared.a)
        assert torch.equal(b, shared.b)
        assert torch.equal(a, group.a.bfloat16())
        assert torch.equal(b, torch.block_diag(*(0.75 * group.b).bfloat16().split(group.shape.sizes)))


def test_refreshing_takes_as_many_launches_for_any_depth() -> None:
    class Counter(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func.overloadpacket.__name__ in (
                "stack", "mul", "copy_", "_foreach_copy_", "cat", "add", "clone"
            )  # fmt: skip
            return func(*args, **(kwargs or {}))

    counts = []
    for depth in (2, 5):
        model = nets.adapted(nets.network("Llama", num_hidden_layers=depth))
        groups = fused_of(model)
        with Counter() as counter:
            groups.refresh()
        counts.append(counter.count)
    assert counts == [12, 12]  # one copy of all A; of four shapes, for B, a stack and a product a member


def test_a_copy_of_the_model_shares_no_copies() -> None:
    """It has parameters of its own, and nobody who would refresh copies of them."""
    model = made("Llama")
    fused_of(model)
    other = copy.deepcopy(model)
    assert all(member.group in groups_of(other) for member in other.modules() if isinstance(member, GroupMember))
    with torch.no_grad():
        for parameter in nets.trained(other):
            parameter.mul_(1.5)
    assert_copies_are_fresh(other)
    assert_copies_are_fresh(model)


@pytest.mark.parametrize("storage", STORAGES)
def test_backward_keeps_the_input_the_rank_r_product_and_what_is_there_anyway(storage: str) -> None:
    model = made("Llama", storage, lora_alpha=3)
    fused_of(model)
    group = groups_of(model)[0]
    assert group.copy is not None
    held = [*group.parameters(), *group.buffers(), group.copy.a, group.copy.b]
    known = {tensor.untyped_storage().data_ptr() for tensor in held}
    kept: list[torch.Size] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept.append(tensor.shape)
        return tensor

    x = torch.randn(5, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = group(x)
    y.sum().backward()
    assert kept == [(5, 64), (5, 12)]


@pytest.mark.parametrize("storage", STORAGES)
def test_peft_can_switch_groups_off(storage: str) -> None:
    model = made("Qwen2", storage)
    plain = made("Qwen2", storage, plain=True)
    fused_of(model)
    expected = loss_of(model, nets.ids()).item()
    with model.disable_adapter(), plain.disable_adapter():
        base = loss_of(model, nets.ids()).item()
        assert abs(base - loss_of(plain, nets.ids()).item()) <= EXACT * base
        assert abs(base - expected) > 0.005 * base
    assert loss_of(model, nets.ids()).item() == expected


def test_sharded_layers_are_refused() -> None:
    class Sharded(nn.Parameter):
        def full_tensor(self) -> None: ...

    model = made("Llama")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"]
    layer.weight = Sharded(layer.weight.detach())
    with pytest.raises(UserError, match="sharded") as refused:
        fused_of(model)
    assert refused.value.fix == "call fuse first, then fully_shard"


def test_different_ranks_or_scales_share_no_group() -> None:
    model = made("Llama", rank_pattern={"q_proj": 8}, alpha_pattern={"up_proj": 16})
    found = names_of(model)
    one = [("q_proj",), ("k_proj", "v_proj"), ("o_proj",), ("gate_proj",), ("up_proj",), ("down_proj",)]
    assert sorted(found) == sorted(one * 2)
    assert_like_peft(
        lambda **options: made("Llama", rank_pattern={"q_proj": 8}, alpha_pattern={"up_proj": 16}, **options)
    )


def test_different_ranks_of_one_scale_share_no_group() -> None:
    patterns: dict[str, Any] = {"r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 16}}
    assert sorted(names_of(made("Llama", **patterns)))[-2:] == [("q_proj",)] * 2


def test_a_member_shows_the_weight_and_the_bias_of_its_layer() -> None:
    model = made("Qwen2")
    layers = {
        name: (module.base_layer.weight.clone(), module.base_layer.bias)
        for name, module in model.named_modules() if isinstance(module, LoraLinear)
    }  # fmt: skip
    fused_of(model)
    for name, (weight, bias) in layers.items():
        member: Any = model.get_submodule(name)
        assert torch.equal(member.weight, weight)
        assert bias is None or torch.equal(member.bias, bias)


def test_nothing_waits_in_a_group_after_a_forward_pass() -> None:
    model = made("Llama")
    fused_of(model)
    model(input_ids=nets.ids(), use_cache=False)
    assert all(group.waiting.x is None and not group.waiting.outputs for group in groups_of(model))


def test_what_is_saved_names_no_group() -> None:
    model = made("Llama")
    fused_of(model)
    paths = [name for name, module in model.named_modules() if isinstance(module, LoraGroup)]
    assert paths
    assert not [name for name in saved_state(model) if name.startswith(tuple(paths))]


def test_a_layer_that_is_not_adapted_stays_out_of_the_group() -> None:
    model = made("Llama", target_modules=["q_proj", "v_proj"])
    assert names_of(model) == [("q_proj", "v_proj")] * 2
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


def assert_like_toy(toy: Toy, shift: float = 0.0) -> list[LoraGroup]:
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora.layer import Linear

    weights, results = toy.state_dict(), []
    groups: list[LoraGroup] = []
    for kind in (Linear, LoraLinear):
        twin = Toy(tuple(m.bias is not None for m in (toy.q, toy.k, toy.v)), toy.twice)
        twin.load_state_dict(weights)
        settings = LoraConfig(r=4, lora_alpha=6, target_modules=["q", "k", "v"])
        settings._register_custom_module({nn.Linear: kind})
        torch.manual_seed(1)
        model = inject_adapter_in_model(settings, twin)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, generator=torch.Generator().manual_seed(ord(name[0])))
        if kind is LoraLinear:
            fused_of(model)
            groups = groups_of(model)
        twin.shift = shift
        output = model(nets.ids())
        output.square().sum().backward()
        results.append((output.detach(), gradients(model)))
    assert nets.relative(results[1][0], results[0][0]) <= EXACT
    assert apart(results[1][1], results[0][1]) <= EXACT
    return groups


def test_a_layer_that_gets_another_input_later_is_still_right() -> None:
    assert [group.members for group in assert_like_toy(Toy(), shift=0.7)] == [("q", "k", "v")]


def test_a_layer_that_is_called_twice_is_in_a_group_once() -> None:
    assert sum(len(group.members) for group in assert_like_toy(Toy(twice=True))) == 3


def test_a_list_of_layers_gets_no_child_that_it_would_run() -> None:
    """The group of a layer in a Sequential stands in the module around it; a layer with two names is one layer."""
    from peft import LoraConfig, inject_adapter_in_model

    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(nets.VOCABULARY, 16)
            self.stack = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
            self.again = nn.ModuleList([self.stack[0]])

        def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
            return self.again[0](self.stack(self.table(input_ids)))

    settings = LoraConfig(r=4, target_modules=["stack.0", "stack.2"], init_lora_weights=False)
    settings._register_custom_module({nn.Linear: LoraLinear})
    torch.manual_seed(0)
    model = inject_adapter_in_model(settings, Stacked())
    model.again[0] = model.stack[0]
    expected = model(nets.ids())
    fused_of(model)
    assert isinstance(model.again[0], GroupMember)
    assert [name for name, _ in model.named_children()] == ["table", "stack", "again", "lora_stack_0", "lora_stack_2"]
    assert len(model.stack) == 3
    assert nets.relative(model(nets.ids()), expected) <= EXACT
    assert {name.partition(".lora_")[0] for name in trained_state(model)} == {"stack.0", "stack.2"}


@pytest.mark.parametrize("again", [False, True])
def test_micro_batches_add_up(again: bool) -> None:
    """also with layers that run again in the backward pass."""
    model = made("Llama")
    fused_of(model)
    tokens = nets.ids(4)
    _, together = measured(model, tokens)
    if again:
        checkpoint_layers(model.get_base_model())
    clear(model)
    for part in tokens.split(1):
        loss_of(model, part).backward()
    assert apart(gradients(model), together) <= EXACT


def test_recomputed_layers_draw_the_same_mask() -> None:
    found = []
    for again in (False, True):
        model = made("Llama", lora_dropout=0.3)
        fused_of(model)
        if again:
            checkpoint_layers(model.get_base_model())
        torch.manual_seed(11)
        found.append(measured(model)[1])
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
    sampled(
        [("dense", False), *((storage, fp8) for storage in ("nf4", "fp8", "int8") for fp8 in (False, True))],
        [("dense", False), ("nf4", False), ("fp8", True)],
    ),
)
def test_compiled_whole_it_equals_eager(storage: str, fp8: bool) -> None:
    model = made("Llama", storage)
    fused_of(model, fp8=fp8)
    loss, expected = measured(model)
    clear(model)
    compiled_graphs(model)
    ours = gradients(model)
    assert abs(loss_of(model, nets.ids()).item() - loss) <= EXACT * loss
    assert apart(ours, expected) <= EXACT


@pytest.mark.parametrize("kind", sampled(["Qwen3", "Gemma2"], ["Gemma2"]))
def test_compilations_do_not_grow_with_depth(kind: str) -> None:
    counts = []
    for depth in (3, 5):
        model = nets.adapted(nets.network(kind, num_hidden_layers=depth))
        fused_of(model)
        counts.append(compiled_graphs(model))
    assert counts[0] == counts[1] <= 3  # the first layer's input has no gradient; Gemma 2 has layers of two kinds
