"""The LoRA family: where it goes, where it starts, how fast its parts learn, what it leaves on the disk."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import nets
import peft
import pytest
import tiny
import torch
from tiny import plan
from torch import nn

from whet.base.errors import UserError
from whet.engine.config import Model
from whet.engine.device import Placement
from whet.engine.load.load import load_model
from whet.engine.task import Task
from whet.engine.weights.linear import FrozenLinear, dense_weight, linear_names
from whet.methods import initial
from whet.methods.layers.fuse import fuse
from whet.methods.layers.group import Groups
from whet.methods.layers.rates import rate_ratio, set_rate_ratio
from whet.methods.layers.state import trained_state
from whet.methods.lora import PACKED, Lora
from whet.methods.targets import find_targets, shortest_endings
from whet.recipe import parse
from whet.settings import Train
from whet.training.optim import build_optimiser, set_rate

CPU = torch.device("cpu")
IDS = torch.randint(3, 250, (2, 21), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose attention has biases that are not zero."""
    place = tmp_path_factory.mktemp("biased")
    net = nets.network("Llama", attention_bias=True)
    net.set_attn_implementation("sdpa")
    net.save_pretrained(str(place))
    return place


def opened(path: Path, storage: str = "fp32") -> Any:
    return load_model(Model(path=str(path)), Placement(CPU, storage, torch.float32, True, {}))


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits.float()


def passes(model: Any) -> list[Any]:
    return [(lambda: logits(model), None), (lambda: logits(model, IDS.flip(1)), None)]


def made(method: Lora, path: Path, storage: str = "fp32", seed: int = 0) -> Any:
    """The model that would be trained, with everything done to it before its first step."""
    torch.manual_seed(seed)
    model = method.attach(opened(path, storage))
    if method.wants_data:
        method.prepare(model, passes(model))
    return model


def learn(model: Any, steps: int = 3, rate: float = 1e-2, groups: Groups | None = None) -> None:
    """A few steps over all that is trainable."""
    optimiser = torch.optim.AdamW(nets.trained(model), lr=rate)
    for _ in range(steps):
        nets.loss_of(model, IDS).backward()
        optimiser.step()
        optimiser.zero_grad()
        if groups is not None:
            groups.refresh()


def far(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


# --- where it goes -------------------------------------------------------------------------------------------------

W: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
D = W | {"num_key_value_heads": 2}
ATTENTION, GATED = "k_proj o_proj q_proj v_proj", "down_proj gate_proj up_proj"
BERT = ("attention.output.dense key query value", "0.output.dense 1.output.dense intermediate.dense")
FAMILIES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "llama": ("causal", D, ATTENTION, GATED),
    "mistral": ("causal", D, ATTENTION, GATED),
    "qwen2": ("causal", D, ATTENTION, GATED),
    "qwen3": ("causal", D | {"head_dim": 8}, ATTENTION, GATED),
    "gemma2": ("causal", D | {"head_dim": 8}, ATTENTION, GATED),
    "gemma3_text": ("causal", D | {"head_dim": 8}, ATTENTION, GATED),
    "phi3": ("causal", D, "o_proj qkv_proj", "down_proj gate_up_proj"),
    "gpt2": ("causal", nets.GPT2 | {"bos_token_id": 1, "eos_token_id": 2}, "attn.c_proj c_attn", "c_fc mlp.c_proj"),
    "bloom": ("causal", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 256}, "dense query_key_value",
              "dense_4h_to_h dense_h_to_4h"),
    "t5": ("seq2seq", {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 256,
                       "decoder_start_token_id": 0}, "k o q v", "wi wo"),
    "bert": ("classification", W, *BERT),
    "roberta": ("classification", W, *BERT),
    "distilbert": ("classification", {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": 256},
                   "k_lin out_lin q_lin v_lin", "lin1 lin2"),
    "modernbert": ("classification", W | {"cls_token_id": 1, "sep_token_id": 2}, "Wqkv attn.Wo", "Wi mlp.Wo"),
}  # fmt: skip
COUNTS = {
    "phi3": (4, 4), "gpt2": (4, 4), "bloom": (4, 4), "t5": (24, 8), "modernbert": (4, 4), "bert": (8, 4),
    "roberta": (8, 4), "distilbert": (8, 4),
}  # fmt: skip


def family(name: str) -> tuple[Any, Task]:
    from transformers import AutoConfig

    kind, sizes, _, _ = FAMILIES[name]
    task = Task(kind, ("a", "b") if kind == "classification" else ())  # type: ignore[arg-type]
    config = AutoConfig.for_model(name, **sizes)
    for field, value in task.config_values().items():
        setattr(config, field, value)
    torch.manual_seed(0)
    return task.auto_class().from_config(config), task


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_and_mlp_are_found_in_every_family_and_train(name: str) -> None:
    net, task = family(name)
    attention, mlp = find_targets(net, "attention"), find_targets(net, "mlp")
    assert (shortest_endings(net, attention), shortest_endings(net, mlp)) == tuple(
        part.split() for part in FAMILIES[name][2:]
    )
    assert (len(attention), len(mlp)) == COUNTS.get(name, (8, 6))
    assert not set(attention) & set(mlp)
    everywhere = find_targets(net, "all-linear")
    assert set(attention) | set(mlp) <= set(everywhere) == set(linear_names(net))
    assert set(everywhere) - set(attention) - set(mlp) == ({"bert.pooler.dense"} if name == "bert" else set())
    method = Lora(r=2, target_modules="attention")
    model = method.attach(net, task).train()
    adapted = {layer for layer, _ in initial.layers_of(model)}
    assert adapted == set(attention)
    more = {"decoder_input_ids": IDS} if task.name == "seq2seq" else {}
    model(input_ids=IDS, **more).logits.float().square().sum().backward()
    trained = {layer: p for layer, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained.values())
    outside = {layer for layer in trained if "lora_" not in layer}
    assert bool(outside) == task.labelled
    assert all("modules_to_save" in layer for layer in outside)


def test_endings_pick_these_modules_and_no_others() -> None:
    net = nets.network("Llama", num_hidden_layers=11)
    wanted = [name for name in linear_names(net) if ".layers.1." in name]
    endings = shortest_endings(net, wanted)
    found = [name for name, _ in net.named_modules() if any(f".{name}".endswith(f".{ending}") for ending in endings)]
    assert sorted(found) == sorted(wanted)
    assert "layers.1.mlp.up_proj" not in endings, "they are as short as can be"


def test_layers_names_and_exclusions_are_cut_out_of_each_other(checkpoint: Path) -> None:
    net = opened(checkpoint)
    found = find_targets(net, "attention", exclude=["o_proj"], layers=[1])
    assert found == [f"model.layers.1.self_attn.{which}_proj" for which in "qkv"]
    assert find_targets(net, r".*\.1\..*_proj", exclude=r".*self_attn.*") == [
        f"model.layers.1.mlp.{which}_proj" for which in ("gate", "up", "down")
    ]
    for settings, field in (
        ({"layers_to_transform": [2]}, "layers_to_transform"), ({"exclude_modules": ["o_prj"]}, "exclude_modules"),
        ({"target_modules": "atention"}, "target_modules"), ({"rank_pattern": {"q_prj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q_prj": 2.0}}, "alpha_pattern"), ({"modules_to_save": ["lm_haed"]}, "modules_to_save"),
        ({"target_modules": "mlp", "exclude_modules": "mlp"}, "exclude_modules"),
        ({"target_modules": []}, "target_modules"), ({"target_modules": "("}, "target_modules"),
        ({"exclude_modules": ".*"}, "target_modules"), ({"trainable_token_indices": [256]}, "trainable_token_indices"),
        ({"r": 80, "init_lora_weights": "pissa"}, "r"),
    ):  # fmt: skip
        with pytest.raises(UserError) as caught:
            Lora(**settings).attach(opened(checkpoint))  # type: ignore[arg-type]
        assert caught.value.field == f"method.{field}"
        assert caught.value.fix
    assert "write attention" in str(no_target("atention", checkpoint))


def no_target(wanted: str, path: Path) -> UserError:
    with pytest.raises(UserError) as caught:
        find_targets(opened(path), wanted)
    return caught.value


def test_patterns_give_layers_their_own_rank_and_scale(checkpoint: Path) -> None:
    method = Lora(
        r=4, lora_alpha=8, rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 8}, alpha_pattern={"k_proj": 2}
    )
    layers = dict(initial.layers_of(made(method, checkpoint)))
    found = {
        name: (layers[name].r["default"], layers[name].scaling["default"])
        for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.layers.0.mlp.up_proj",
                     "model.layers.0.self_attn.k_proj")
    }  # fmt: skip
    assert list(found.values()) == [(2, 4.0), (8, 1.0), (4, 2.0), (4, 0.5)]


# --- what it leaves on the disk ------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gaussian": {"init_lora_weights": "gaussian"},
    "dora": {"use_dora": True},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "eva": {"init_lora_weights": "eva"},
    "corda": {"init_lora_weights": "corda"},
    "pissa+rslora+patterns": {
        "init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"v_proj": 5.0},
    },
    "pissa+patterns": {"init_lora_weights": "pissa", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5.0}},
    "pissa+dora": {"init_lora_weights": "pissa", "use_dora": True},
    "bias_all": {"bias": "all"},
    "bias_lora_only": {"bias": "lora_only", "target_modules": ["q_proj", "up_proj"]},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5.0}},
    "layers": {"layers_to_transform": [1], "target_modules": "mlp"},
    "head": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [5, 7]},
}  # fmt: skip


@pytest.mark.parametrize("grouped", [False, True], ids=["alone", "grouped"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_was_trained_is_what_plain_peft_loads_on_the_untouched_base_and_what_is_merged(
    variant: str, grouped: bool, checkpoint: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    method = Lora(r=4, **VARIANTS[variant])
    base, model = logits(opened(checkpoint)), made(method, checkpoint)
    assert far(logits(model.eval()), base) < 1e-5, "every start leaves the model as it is"
    groups = fuse(model.train(), compute=torch.float32) if grouped else None
    assert far(logits(model.eval()), base) < 1e-5
    learn(model.train(), groups=groups)
    trained = logits(model.eval())
    assert far(trained, base) > 1e-2
    method.save(model, tmp_path)
    ours = method.load(opened(checkpoint), tmp_path)
    assert far(logits(ours), trained) < 1e-5
    with method.base_only(ours):
        assert far(logits(ours), base) < 1e-6
    assert far(logits(ours), trained) < 1e-5
    plain = AutoModelForCausalLM.from_pretrained(str(checkpoint), dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    assert far(logits(theirs), trained) < 1e-5
    merged = method.fold(opened(checkpoint), tmp_path)
    assert far(logits(merged.eval()), trained) < 2e-5
    assert not any("lora" in name for name, _ in merged.named_parameters())


@pytest.mark.parametrize("grouped", [False, True], ids=["alone", "grouped"])
def test_a_start_that_is_not_converted_would_be_seen(grouped: bool, checkpoint: Path, tmp_path: Path) -> None:
    method = Lora(r=4, init_lora_weights="pissa")
    model = made(method, checkpoint)
    learn(model.train(), groups=fuse(model, compute=torch.float32) if grouped else None)
    trained = logits(model.eval())
    layers = [module for module in model.modules() if getattr(module, "start", None) is not None]
    assert len(layers) == 14
    for layer in layers:
        layer.start = None
    method.save(model, tmp_path)
    assert far(logits(method.load(opened(checkpoint), tmp_path)), trained) > 1e-2


def test_the_same_start_is_made_again_to_the_bit(checkpoint: Path) -> None:
    """A checkpoint holds A and B alone, so resuming rests on this."""
    for start in ("pissa", "pissa_niter_4", "olora", "corda", "eva"):
        method = Lora(r=4, init_lora_weights=start)
        one, two = made(method, checkpoint, seed=3), made(method, checkpoint, seed=3)
        assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True)), start


# --- where it starts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["pissa", "olora", "corda"])
def test_a_start_is_pefts(start: str, checkpoint: Path) -> None:
    net = opened(checkpoint)
    targets = sorted({name.rsplit(".", 1)[-1] for name in linear_names(net)})
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=start, task_type="CAUSAL_LM")  # type: ignore[arg-type]
    one = IDS[:1]
    if start == "corda":
        pytest.importorskip("attr", reason="PEFT's CorDA imports attrs, which PEFT does not ask for")
        from peft.tuners.lora.corda import preprocess_corda

        config.corda_config = peft.tuners.lora.config.CordaConfig()
        with torch.no_grad():
            preprocess_corda(net, config, run_model=lambda: net(input_ids=one) and None)
    theirs = dict(initial.layers_of(peft.PeftModelForCausalLM(net, config)))
    method = Lora(r=4, lora_alpha=8, init_lora_weights=start)  # type: ignore[arg-type]
    model = method.attach(opened(checkpoint))
    if start == "corda":
        method.prepare(model, [(lambda: logits(model, one), None)])
    for name, layer in initial.layers_of(model):
        assert nets.relative(layer.get_delta_weight("default"), theirs[name].get_delta_weight("default")) < 2e-3, name
        assert nets.relative(layer.base_layer.weight, theirs[name].base_layer.weight) < 2e-3, name


def test_eva_spans_the_main_directions_of_the_inputs_without_padding(checkpoint: Path) -> None:
    method = Lora(r=4, init_lora_weights="eva")
    model = method.attach(opened(checkpoint))
    real = torch.ones(IDS.shape, dtype=torch.bool)
    real[1, 9:] = False
    layer = dict(initial.layers_of(model))["model.layers.1.mlp.gate_proj"]
    seen: list[torch.Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0][real]))
    logits(model)
    hook.remove()
    exact = torch.linalg.svd(seen[0], full_matrices=False)[2][:4]
    for most_bytes in (1, 1 << 30):  # layer by layer, or all at once
        initial.from_inputs(model, "eva", [(lambda: logits(model), real)], most_bytes)
        a = layer.lora_A["default"].weight
        assert torch.allclose((a @ exact.t()).abs(), torch.eye(4), atol=1e-3)
    initial.from_inputs(model, "eva", [(lambda: logits(model), None)])
    assert not torch.allclose((layer.lora_A["default"].weight @ exact.t()).abs(), torch.eye(4), atol=1e-2)


def test_corda_keeps_the_main_directions_of_the_weight_on_its_inputs(checkpoint: Path) -> None:
    method = Lora(r=4, lora_alpha=8, init_lora_weights="corda")
    model, dense = method.attach(opened(checkpoint)), opened(checkpoint)
    name = "model.layers.1.mlp.gate_proj"
    seen: list[torch.Tensor] = []
    hook = dense.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    for _ in range(2):
        logits(dense)
    hook.remove()
    method.prepare(model, [(lambda: logits(model), None)] * 2)
    inputs, weight = torch.cat(seen).double(), dense.get_submodule(name).weight.detach().double()
    covariance = inputs.t() @ inputs
    covariance = covariance / covariance.diagonal().mean() + 0.01 * torch.eye(len(covariance))
    left, values, right = torch.linalg.svd(weight @ covariance)
    exact = left[:, :4] * values[:4] @ right[:4] @ covariance.inverse()
    layer = dict(initial.layers_of(model))[name]
    assert nets.relative(layer.get_delta_weight("default"), exact) < 1e-3
    assert nets.relative(layer.base_layer.weight, weight - exact) < 1e-3
    a, b = initial.principal(weight, 4)
    assert nets.relative(b @ a, exact) > 0.1, "PiSSA would be something else"


def test_no_adapter_is_written_that_was_to_start_from_data_and_did_not(checkpoint: Path, tmp_path: Path) -> None:
    method = Lora(r=4, init_lora_weights="eva")
    with pytest.raises((AssertionError, AttributeError)):
        method.save(method.attach(opened(checkpoint)), tmp_path)


@pytest.mark.parametrize("storage", PACKED)
@pytest.mark.parametrize("dora", [False, True])
def test_loftq_starts_as_near_to_the_dense_weights_as_its_rank_allows(
    storage: str, dora: bool, checkpoint: Path, tmp_path: Path
) -> None:
    method = Lora(r=8, init_lora_weights="loftq", use_dora=dora)
    assert method.can.storages == PACKED
    model, dense, quantised = made(method, checkpoint, storage), opened(checkpoint), opened(checkpoint, storage)
    for name, layer in initial.layers_of(model):
        exact, base = dense.get_submodule(name).weight, layer.base_layer
        assert isinstance(base, FrozenLinear)
        assert torch.equal(base.dense(torch.float32), quantised.get_submodule(name).dense(torch.float32)), "untouched"
        exact = exact.detach()
        left = float((exact - base.dense(torch.float32) - layer.get_delta_weight("default")).norm())
        best = float(torch.linalg.svdvals(exact - base.dense(torch.float32))[8:].norm())
        assert left <= best * 1.001 + 1e-5
    exact = logits(dense)
    assert far(logits(model.eval()), exact) < far(logits(quantised), exact)
    learn(model.train())
    trained = logits(model.eval())
    method.save(model, tmp_path)
    assert far(logits(method.load(opened(checkpoint, storage), tmp_path)), trained) < 1e-5


# --- DoRA ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["Llama", "GPT2", "Qwen2"])
def test_dora_is_pefts(kind: str, dropout: float) -> None:
    found = []
    for plain in (False, True):
        model = nets.made(kind, plain=plain, use_dora=True, lora_dropout=dropout)
        torch.manual_seed(4)
        nets.loss_of(model, nets.ids()).backward()
        found.append((logits(model.eval(), nets.ids()), nets.gradients(model)))
    assert far(found[0][0], found[1][0]) < 1e-5
    assert any("lora_magnitude_vector" in name for name in found[0][1])
    assert nets.apart(found[0][1], found[1][1]) < 1e-4


@pytest.mark.parametrize("storage", PACKED)
def test_dora_finds_the_dense_weight_of_every_storage(storage: str) -> None:
    from whet.engine.weights.linear import freeze_linears

    net, frozen = nets.network("Llama"), nets.network("Llama")
    freeze_linears(frozen, storage)
    with torch.no_grad():
        for name in linear_names(net):
            net.get_submodule(name).weight.copy_(dense_weight(frozen.get_submodule(name), torch.float32))
    ours, theirs = nets.adapted(frozen, use_dora=True), nets.adapted(net, plain=True, use_dora=True)
    for model in (ours, theirs):
        nets.loss_of(model, nets.ids()).backward()
    assert far(logits(ours, nets.ids()), logits(theirs, nets.ids())) < 1e-5
    assert nets.apart(nets.gradients(ours), nets.gradients(theirs)) < 1e-4


def test_only_plain_lora_is_put_into_groups(checkpoint: Path) -> None:
    for settings, expected in (
        ({}, 14), ({"use_dora": True}, 0), ({"bias": "lora_only"}, 6), ({"bias": "all"}, 6),
        ({"modules_to_save": ["lm_head"]}, 14), ({"rank_pattern": {"q_proj": 2}}, 14),
        ({"init_lora_weights": "pissa"}, 14),
    ):  # fmt: skip
        model = made(Lora(r=4, **settings), checkpoint)  # type: ignore[arg-type]
        names = {name for name, p in model.named_parameters() if p.requires_grad}
        fused = fuse(model.train(), compute=torch.float32)
        assert sum(len(group.members) for group in nets.groups_of(model)) == expected, settings
        assert trained_state(model).keys() == names
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimiser = build_optimiser(Train(learning_rate=0.01), nets.trained(model))
        for _ in range(2):
            fused.refresh()
            nets.loss_of(model, IDS).backward()
            optimiser.step()
            optimiser.zero_grad()
        still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
        assert still == {name for name, p in model.named_parameters() if not p.requires_grad}, settings


# --- how fast its parts learn --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True], ids=["fused", "dora"])
def test_lora_plus_is_pefts(dora: bool, checkpoint: Path) -> None:
    from peft.optimizers import create_loraplus_optimizer

    decay, ratio, rates = 0.0 if dora else 0.1, 8.0, [0.001, 0.004, 0.004, 0.002, 0.001]
    method = Lora(r=4, loraplus_lr_ratio=ratio, use_dora=dora)
    ours, theirs = made(method, checkpoint).train(), made(Lora(r=4, use_dora=dora), checkpoint).train()
    fused = fuse(ours, compute=torch.float32)
    assert bool(len(fused)) != dora
    matrices, vectors = ([p for p in nets.trained(ours) if (p.ndim > 1) == matrix] for matrix in (True, False))
    mine = build_optimiser(Train(weight_decay=decay, learning_rate=rates[0]), [*matrices, *vectors])
    peers = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1.0, loraplus_lr_ratio=ratio, loraplus_weight_decay=decay
    )
    shares = [group["lr"] for group in peers.param_groups]
    for rate in rates:
        set_rate(mine, rate)
        for group, share in zip(peers.param_groups, shares, strict=True):
            group["lr"] = rate * share
        fused.refresh()
        for model, optimiser in ((ours, mine), (theirs, peers)):
            nets.loss_of(model, IDS).backward()
            optimiser.step()
            optimiser.zero_grad()
    left, right = nets.lora_parameters(ours), nets.lora_parameters(theirs)
    assert max(nets.relative(left[name], right[name]) for name in right) < 1e-3
    assert {group["lr"] for group in mine.param_groups} == {rates[-1], rates[-1] * ratio}


def test_a_group_learns_at_the_rates_of_its_layers(checkpoint: Path) -> None:
    for ratio in (1.0, 4.0):
        model = made(Lora(r=4, loraplus_lr_ratio=ratio), checkpoint).train()
        fuse(model, compute=torch.float32)
        groups = nets.groups_of(model)
        assert len(groups) == 8
        assert {(rate_ratio(group.a), rate_ratio(group.b)) for group in groups} == {(1.0, ratio)}


def test_layers_that_learn_at_different_rates_share_no_group(checkpoint: Path) -> None:
    model = made(Lora(r=4), checkpoint).train()
    for name, parameter in model.named_parameters():
        if "k_proj.lora_B" in name:
            set_rate_ratio(parameter, 4.0)
    fuse(model, compute=torch.float32)
    apart = [("q_proj",), ("k_proj",), ("v_proj",), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
    assert sorted(group.members for group in nets.groups_of(model)) == sorted(apart * 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="rates on the device are for CUDA graphs")
def test_two_rates_on_the_device_are_the_same_two_rates() -> None:
    found = []
    for captured in (False, True):
        matrices = [nn.Parameter(torch.ones(4, 4, device="cuda")) for _ in range(2)]
        matrices[1].rate_ratio = 16.0  # type: ignore[attr-defined]
        optimiser = build_optimiser(Train(weight_decay=0.1, learning_rate=0.1), matrices, captured=captured)
        for rate in (0.1, 0.05):
            set_rate(optimiser, rate)
            for matrix in matrices:
                matrix.grad = torch.full_like(matrix, 0.5)
            optimiser.step()
        found.append([matrix.detach().clone() for matrix in matrices])
    assert all(torch.allclose(one, two) for one, two in zip(*found, strict=True))
    assert not torch.allclose(*found[0])


# --- what is refused -----------------------------------------------------------------------------------------------

REFUSED = [
    ("init_lora_weights=pisa", "init_lora_weights", "write pissa"),
    ("init_lora_weights=pissa_niter_x", "init_lora_weights", ""),
    ("init_lora_weights=orthogonal method.r=3", "r", "method.r=4"),
    ("init_lora_weights=orthogonal method.rank_pattern={q_proj: 5}", "r", "method.r=6"),
    ("init_lora_weights=loftq method.bias=all", "bias", "method.bias=none"),
    ("bias=some", "bias", ""),
    ("loraplus_lr_ratio=0", "loraplus_lr_ratio", ""),
    ("layers_to_transform=[-1]", "layers_to_transform.0", ""),
    ("layers_to_transform=[]", "layers_to_transform", "method.layers_to_transform=auto"),
    ("exclude_modules=(", "exclude_modules", ""),
    ("rank_pattern={q_proj: 0}", "rank_pattern.q_proj", ""),
    ("rank_pattern={'(': 2}", "rank_pattern", ""),
    ("alpha_pattern={q_proj: 0}", "alpha_pattern.q_proj", ""),
    ("trainable_token_indices=[-1]", "trainable_token_indices.0", ""),
    ("trainable_token_indices=[1] method.modules_to_save=[embed_tokens]", "trainable_token_indices", "modules_to_save"),
]


@pytest.mark.parametrize(("words", "field", "fix"), REFUSED, ids=[words for words, _, _ in REFUSED])
def test_what_cannot_be_is_refused_when_the_recipe_is_read(words: str, field: str, fix: str) -> None:
    overrides = [
        part if part.startswith("method.") else f"method.{part}"
        for part in words.replace(" method.", "\tmethod.").split("\t")
    ]
    with pytest.raises(UserError) as caught:
        parse(None, overrides)
    assert caught.value.field == f"method.{field}"
    assert fix in caught.value.fix
    assert caught.value.fix


def test_what_the_model_has_not_is_refused_before_it_is_loaded(model_dir: Path) -> None:
    for words in (
        "target_modules=(",
        "layers_to_transform=[2]",
        "rank_pattern={q_prj: 2}",
        "modules_to_save=[lm_haed]",
    ):
        with pytest.raises(UserError) as caught:
            plan(parse(None, [f"model.path={model_dir}", "base.device=cpu", f"method.{words}"]).recipe)
        assert caught.value.field == "method." + words.partition("=")[0]


@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"init_lora_weights": "eva"}, {"init_lora_weights": "pissa"}])
def test_parameters_are_counted_without_starting_anything(more: dict[str, Any], model_dir: Path) -> None:
    settings = {"model.path": str(model_dir), "base.device": "cpu", "base.storage": "fp32"}
    named = settings | {f"method.{name}": value for name, value in more.items()}
    found = plan(parse(None, tiny.words(named)).recipe)["trainable_params"]
    plain = plan(parse(None, tiny.words(settings)).recipe)["trainable_params"]
    assert found == plain + (2 * (64 + 32 + 32 + 64 + 128 + 128 + 64) if "use_dora" in more else 0)


@pytest.mark.parametrize("settings", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"bias": "all"}])
def test_what_changes_the_base_needs_a_dense_one(settings: dict[str, Any]) -> None:
    assert Lora(**settings).can.storages == ("fp32", "bf16")
    assert Lora().can.storages == ("fp32", "bf16", "fp8", "int8", "nf4")


def test_what_servers_cannot_do_is_said() -> None:
    assert Lora().can == Lora.capability
    assert Lora(init_lora_weights="pissa").can.vllm, "its adapter is plain LoRA once it is saved"
    for settings in ({"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["x"]}, {"alpha_pattern": {"x": 2.0}}):
        assert not Lora(**settings).can.vllm  # type: ignore[arg-type]
