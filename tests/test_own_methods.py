"""BitFit, freeze, head, diff pruning and bottleneck adapters: each on a decoder, an encoder and an encoder-decoder."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import numpy as np
import pytest
import tiny
import torch
from test_resume import killed_before
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from whet.base.errors import UserError
from whet.engine.layers import decoder_layers
from whet.engine.memory.checkpointing import checkpoint_layers
from whet.engine.task import CAUSAL, Task
from whet.engine.weights.linear import freeze_linears
from whet.methods.adalora import AdaLora
from whet.methods.bitfit import BitFit
from whet.methods.bottleneck import Bottleneck
from whet.methods.delta import ABOUT, TENSORS, plain_name
from whet.methods.diff_pruning import DiffPruning
from whet.methods.freeze import Freeze, Head
from whet.methods.layers.bottleneck import Adapted
from whet.methods.layers.gates import hard_concrete, open_probability
from whet.methods.method import Method
from whet.methods.structure import layer_stacks, residual_ends
from whet.recipe import Parsed, parse
from whet.settings import Train
from whet.training.objective.objective import Arithmetic, Objective
from whet.training.optim import build_optimiser, set_rate
from whet.training.run import train
from whet.training.step import train_step

S: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = S | {"num_key_value_heads": 2, "head_dim": 8}
SHORT = {"n_layer": 2, "n_head": 4, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": GROUPED | {"attention_bias": True}, "Mistral": GROUPED, "Qwen2": GROUPED, "Qwen3": GROUPED,
    "Gemma2": GROUPED, "Gemma3Text": GROUPED, "Phi3": GROUPED, "GPT2": SHORT | {"n_embd": 32},
    "Bloom": SHORT | {"hidden_size": 32}, "Bert": S, "Roberta": S,
    "T5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 99,
           "decoder_start_token_id": 0},
    "DistilBert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 99},
    "ModernBert": S | {"cls_token_id": 1, "sep_token_id": 2},
}  # fmt: skip
TASKS = {"T5": Task("seq2seq")} | dict.fromkeys(
    ("Bert", "Roberta", "DistilBert", "ModernBert"), Task("classification", ("a", "b", "c"))
)
METHODS: list[Method] = [
    BitFit(), Freeze(layers=1), Head(), DiffPruning(density=0.3), DiffPruning(density=0.3, structured=False),
    Bottleneck(), Bottleneck(which="pfeiffer", bottleneck_size=3, non_linearity="gelu"),
]  # fmt: skip
NAMES = ["bitfit", "freeze", "head", "diff", "diff-flat", "houlsby", "pfeiffer"]
CASES = [
    pytest.param(method, kind, id=f"{name}-{kind}")
    for name, method in zip(NAMES, METHODS, strict=True) for kind in ("Llama", "Bert", "T5")
    if (method.name, kind) != ("bitfit", "T5")
]  # fmt: skip
IDS = torch.randint(3, 99, (4, 7), generator=torch.Generator().manual_seed(5))
each = pytest.mark.parametrize(("method", "kind"), CASES)


def task_of(kind: str) -> Task:
    return TASKS.get(kind, CAUSAL)


def network(kind: str, seed: int = 0) -> Any:
    """A random model with no parameter left at a value that would hide a mistake."""
    import transformers

    task = task_of(kind)
    config = getattr(transformers, f"{kind}Config")(**FAMILIES[kind])
    for name, value in task.config_values().items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    net = task.auto_class().from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():  # a head that stays must be able to tell tokens apart
            parameter += (0.5 if name in ("lm_head.weight", "shared.weight") else 0.05) * torch.randn_like(parameter)
    return net


def inputs(kind: str) -> dict[str, torch.Tensor]:
    return {"input_ids": IDS} | ({"decoder_input_ids": IDS.flip(1)} if kind == "T5" else {})


def logits(model: Any, kind: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(kind)).logits


def loss(model: Any, kind: str) -> torch.Tensor:
    found = model(**inputs(kind)).logits
    targets = IDS.roll(-1, 1) if found.ndim == 3 else IDS[:, 0] % 3
    return cross_entropy(found.flatten(0, -2), targets.flatten())


def nudge(model: nn.Module, seed: int = 1) -> None:
    """Move everything trainable, gates to where they are neither open nor shut."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = 0.1 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise if name.endswith(("gates", "group")) else parameter + noise)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def steps(model: Any, method: Method, kind: str, count: int, rate: float) -> float:
    """AdamW by hand with the method's hooks; the loss before the last update, in evaluation mode."""
    gates = [p for name, p in trained(model).items() if name.endswith(("gates", "group"))]
    others = [p for p in trained(model).values() if not any(p is gate for gate in gates)]
    groups = [{"params": others}, {"params": gates, "lr": 0.1}] if gates else [{"params": others}]
    optimiser = torch.optim.AdamW(groups, lr=rate, weight_decay=0.0)
    found = torch.zeros(())
    for step in range(count):
        method.before_step(model, step / count)
        optimiser.zero_grad()
        found = loss(model, kind)
        found.backward()
        extra = method.penalty(model)
        if extra is not None:
            extra.backward()
        optimiser.step()
    method.finalize(model)
    return float(loss(model, kind).detach())


@each
def test_it_starts_as_the_base_to_the_bit(method: Method, kind: str) -> None:
    base = logits(network(kind), kind)
    model = method.attach(network(kind), task_of(kind))
    assert torch.equal(logits(model, kind), base)
    nudge(model)
    assert not torch.equal(logits(model, kind), base)


@each
def test_what_is_frozen_stays_and_what_is_trained_moves(method: Method, kind: str) -> None:
    model = method.attach(network(kind), task_of(kind))
    before = {name: p.detach().clone() for name, p in [*model.named_parameters(), *model.named_buffers()]}
    names = set(trained(model))
    steps(model, method, kind, 4, 0.01)
    after = dict([*model.named_parameters(), *model.named_buffers()])
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed <= names
    assert names - changed <= {name for name in names if name.endswith("bias")}  # a key's bias moves nothing
    assert all((p.grad is not None) == (name in names) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("method", "kind", "expected"),
    [
        (BitFit(), "Bert", lambda name: name.endswith("bias") or name.startswith("classifier")),
        (BitFit(biases=["query"]), "Bert", lambda name: name.endswith("query.bias") or name.startswith("classifier")),
        (Freeze(layers=1), "Llama", lambda name: "layers.1." in name),
        (Freeze(layers=[0], modules=["model.norm"]), "Llama", lambda name: "layers.0." in name or "model.norm" in name),
        (Freeze(layers=1), "T5", lambda name: "block.1." in name),
        (Freeze(layers=0, modules=r".*up_proj\.weight"), "Llama", lambda name: "up_proj" in name),
        (Freeze(layers=0, train_embeddings=True, train_head=True), "Llama",
         lambda name: "embed" in name or "head" in name),
        (Head(), "Llama", lambda name: name.startswith("lm_head")),
        (Head(), "Bert", lambda name: name.startswith("classifier")),
        (Head(), "DistilBert", lambda name: name.startswith(("classifier", "pre_classifier"))),
        (Head(), "T5", lambda name: name == "shared.weight"),
    ],
    ids=lambda value: "expected" if callable(value) else str(value),
)  # fmt: skip
def test_exactly_the_chosen_parameters_are_trained(method: Method, kind: str, expected: Callable[[str], bool]) -> None:
    model = method.attach(network(kind), task_of(kind))
    assert set(trained(model)) == {name for name, _ in model.named_parameters() if expected(name)}
    assert trained(model)


def reference(method: Method, model: Any, kind: str) -> dict[str, torch.Tensor]:
    """The gradients of the same formula, written down anew on the plain model in float64."""
    plain = network(kind).double()
    values = {name: p.detach().double().requires_grad_() for name, p in trained(model).items()}
    if isinstance(method, Bottleneck):
        f = {"relu": torch.relu, "gelu": nn.functional.gelu}[method.non_linearity]
        for name, module in model.named_modules():
            if isinstance(module, Adapted):
                d, c, u, b = (values[f"{name}.{part}"] for part in ("down.weight", "down.bias", "up.weight", "up.bias"))
                plain.get_submodule(name).register_forward_hook(
                    lambda _, __, y, d=d, c=c, u=u, b=b: y + f(y @ d.T + c) @ u.T + b
                )
    changes: dict[str, torch.Tensor] = {}
    for name, _ in plain.named_parameters():
        owner, _, leaf = name.rpartition(".")
        path = f"{owner}.parametrizations.{leaf}.0"
        if f"{path}.weights" in values:
            z = (3 * torch.sigmoid(values[f"{path}.gates"]) - 1.5).clamp(0, 1).view_as(values[f"{path}.weights"])
            if f"{path}.group" in values:
                z = z * (3 * torch.sigmoid(values[f"{path}.group"]) - 1.5).clamp(0, 1)
            changes[name] = plain.get_parameter(name).detach() + z * values[f"{path}.weights"]
        elif name in values:
            changes[name] = values[name]
    found = functional_call(plain, changes, (), inputs(kind)).logits if changes else plain(**inputs(kind)).logits
    targets = IDS.roll(-1, 1) if found.ndim == 3 else IDS[:, 0] % 3
    cross_entropy(found.flatten(0, -2), targets.flatten()).backward()
    return {name: value.grad for name, value in values.items()}  # type: ignore[misc]


@each
def test_gradients_are_those_of_the_formula(method: Method, kind: str) -> None:
    model = method.attach(network(kind), task_of(kind))
    nudge(model)
    expected = reference(method, model, kind)
    loss(model, kind).backward()
    for name, parameter in trained(model).items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.double(), expected[name], rtol=1e-3, atol=2e-6, msg=name)


@each
def test_saved_it_opens_to_the_same_logits_and_switches_and_folds(method: Method, kind: str, tmp_path: Path) -> None:
    base = logits(network(kind), kind)
    model = method.attach(network(kind), task_of(kind))
    nudge(model)
    method.finalize(model)
    live = logits(model, kind)
    method.save(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {TENSORS, ABOUT}
    opened = method.load(network(kind), tmp_path, task_of(kind))
    assert torch.equal(logits(opened, kind), live)
    with method.base_only(opened):
        assert torch.equal(logits(opened, kind), base)
    assert torch.equal(logits(opened, kind), live)
    if method.can.mergeable:
        plain = network(kind)
        names = set(plain.state_dict())
        folded = method.fold(plain, tmp_path, task_of(kind))
        assert set(folded.state_dict()) == names
        assert torch.equal(logits(folded, kind), live)
    else:
        with pytest.raises(NotImplementedError):
            method.fold(network(kind), tmp_path, task_of(kind))


@each
def test_it_learns_four_rows_by_heart(method: Method, kind: str) -> None:
    model = method.attach(network(kind), task_of(kind))
    first = float(loss(model, kind).detach())
    rate = {"bitfit": 0.05, "head": 0.05, "bottleneck": 0.03}.get(method.name, 0.01)
    last = steps(model, method, kind, 80, rate)
    few = (method.name == "bitfit" and kind == "Llama") or getattr(method, "which", "") == "pfeiffer"
    assert last < (0.75 if few else 0.2) * first


@pytest.mark.parametrize("kind", FAMILIES)
def test_layers_and_their_ends_are_found_in_every_family(kind: str) -> None:
    net = network(kind)
    attention, forward = residual_ends(net, net.config.get_text_config().hidden_size)
    both = 2 if kind == "T5" else 1
    assert [len(stack) for stack in layer_stacks(net)] == [2] * both
    assert len(forward) == 2 * both
    assert len(attention) == (6 if kind == "T5" else 2)  # a decoder that reads an encoder attends twice
    ends = {"Llama": "o_proj", "Mistral": "o_proj", "Qwen2": "o_proj", "Qwen3": "o_proj", "Gemma2": "o_proj",
            "Gemma3Text": "o_proj", "Phi3": "o_proj", "GPT2": "attn.c_proj", "Bloom": "self_attention.dense",
            "Bert": "attention.output.dropout", "Roberta": "attention.output.dropout", "T5": "Attention.o",
            "DistilBert": "out_lin", "ModernBert": "attn.Wo"}  # fmt: skip
    lasts = {"GPT2": "mlp.c_proj", "Bloom": "dense_4h_to_h", "Bert": "output.dropout", "Roberta": "output.dropout",
             "T5": "wo", "DistilBert": "lin2", "ModernBert": "mlp.Wo"}  # fmt: skip
    assert all(name.endswith(ends[kind]) for name in attention)
    assert all(name.endswith(lasts.get(kind, "mlp.down_proj")) for name in forward)
    base = logits(net, kind)
    model = Bottleneck(bottleneck_size=8).attach(net, task_of(kind))
    assert torch.equal(logits(model, kind), base)
    loss(model, kind).backward()
    assert all(bool(p.grad.any()) for name, p in trained(model).items() if name.endswith("up.weight"))  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["Llama", "Bert"])
@pytest.mark.parametrize(
    "method", [Freeze(layers=1), Head(), DiffPruning(density=0.3), Bottleneck(), BitFit()], ids=str
)
def test_a_bf16_base_is_trained_in_fp32(method: Method, kind: str, tmp_path: Path) -> None:
    task = task_of(kind)
    base = logits(network(kind).bfloat16(), kind)
    model = method.attach(network(kind).bfloat16(), task)
    assert all(p.dtype == torch.float32 for p in trained(model).values())
    assert torch.equal(logits(model, kind), base)
    small = {name: p.detach().clone() for name, p in trained(model).items()}
    steps(model, method, kind, 2, 1e-5)  # too small a step for 8 bits
    assert any(not torch.equal(p, small[name]) for name, p in trained(model).items() if "gates" not in name)
    nudge(model)
    method.finalize(model)
    method.save(model, tmp_path)
    opened = method.load(network(kind).bfloat16(), tmp_path, task)
    assert torch.equal(logits(opened, kind), logits(model, kind))
    method.load(network(kind), tmp_path, task)  # the same base in fp32 is the same base


@pytest.mark.parametrize("storage", ["nf4", "fp8", "int8"])
@pytest.mark.parametrize("method", [Head(), Bottleneck(), BitFit()], ids=str)
def test_a_packed_base_is_trained_as_well(method: Method, storage: str, tmp_path: Path) -> None:
    def packed() -> Any:
        net = network("Llama")
        assert freeze_linears(net, storage)
        return net

    base = logits(packed(), "Llama")
    model = method.attach(packed())
    assert torch.equal(logits(model, "Llama"), base)
    first = float(loss(model, "Llama").detach())
    assert steps(model, method, "Llama", 30, 0.03) < 0.95 * first
    assert all(p.grad is not None for p in trained(model).values())
    method.save(model, tmp_path)
    opened = method.load(packed(), tmp_path)
    assert torch.equal(logits(opened, "Llama"), logits(model, "Llama"))
    with method.base_only(opened):
        assert torch.equal(logits(opened, "Llama"), base)


@pytest.mark.parametrize("method", [Freeze(), DiffPruning(), Bottleneck(), BitFit()], ids=str)
def test_layers_compile_whole_and_run_again(method: Method) -> None:
    def gradients(change: Callable[[Any], None]) -> list[torch.Tensor]:
        model = method.attach(network("Llama").bfloat16())
        nudge(model)
        change(model.train())
        torch.manual_seed(3)
        loss(model, "Llama").backward()
        return [p.grad for p in trained(model).values() if p.grad is not None]

    def compiled(model: Any) -> None:
        for layer in decoder_layers(model):
            layer.compile(fullgraph=True, backend="eager")

    torch._dynamo.reset()
    plain = gradients(lambda model: None)
    for change in (compiled, lambda model: checkpoint_layers(model)):
        for ours, theirs in zip(gradients(change), plain, strict=True):  # type: ignore[arg-type]
            torch.testing.assert_close(ours, theirs, rtol=0.02, atol=2e-3)


def test_hard_concrete_gates_have_the_probabilities_of_the_paper() -> None:
    torch.manual_seed(0)
    for log_alpha in (-2.0, 0.0, 1.0, 3.0):
        z = hard_concrete(torch.full((200_000,), log_alpha), True)
        assert 0 <= float(z.min()) <= float(z.max()) <= 1
        shut = 1 / (1 + math.exp(log_alpha))  # s <= 1/2
        opened = 1 / (1 + math.exp(math.log(5) - log_alpha))  # s >= 5/6
        assert abs(float((z == 0).float().mean()) - shut) < 0.005
        assert abs(float((z == 1).float().mean()) - opened) < 0.005
        assert abs(float(open_probability(torch.tensor(log_alpha))) - (1 - shut)) < 1e-6
    decided = torch.tensor([30.0, -30.0]).repeat_interleave(500_000)
    assert torch.equal(hard_concrete(decided, True), (decided > 0).float())


def test_a_drawn_gate_has_the_gradient_of_its_formula() -> None:
    log_alpha = torch.linspace(-3, 3, 50, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(4)
    hard_concrete(log_alpha, True).sum().backward()
    torch.manual_seed(4)
    s = torch.sigmoid(torch.logit(torch.rand(50, dtype=torch.float64), eps=1e-6) + log_alpha.detach())
    inside = (3 * s - 1.5 > 0) & (3 * s - 1.5 < 1)
    assert 5 < int(inside.sum()) < 45
    torch.testing.assert_close(log_alpha.grad, inside * 3 * s * (1 - s))


@pytest.mark.parametrize("structured", [True, False])
def test_the_penalty_is_the_expected_share_of_differences(structured: bool) -> None:
    method = DiffPruning(structured=structured, sparsity_weight=7.0)
    model = method.attach(network("Bert"), task_of("Bert"))
    nudge(model)
    found = method.penalty(model)
    found.backward()
    values = {name: p.detach().double().requires_grad_() for name, p in trained(model).items()}
    total, share = 0, torch.zeros((), dtype=torch.float64)
    for name, value in values.items():
        if name.endswith("gates"):
            each_gate = torch.sigmoid(value)
            if structured:
                each_gate = each_gate * torch.sigmoid(values[name.removesuffix("gates") + "group"])
            share, total = share + each_gate.sum(), total + value.numel()
    expected = 7.0 * share / total
    expected.backward()
    assert abs(float(found.detach()) - float(expected.detach())) < 1e-5
    for name, parameter in trained(model).items():
        if name.endswith(("gates", "group")):
            torch.testing.assert_close(parameter.grad.double(), values[name].grad, rtol=1e-4, atol=1e-9)  # type: ignore[union-attr]
        else:
            assert parameter.grad is None


def test_the_penalty_counts_once_however_a_step_is_cut() -> None:
    net = nn.Linear(3, 3)
    kept: dict[int, torch.Tensor] = {}

    def loss_of(model: Any, batch: Any) -> torch.Tensor:
        return (model(batch.x) ** 2).sum()

    class Fake:
        def __init__(self, x: torch.Tensor) -> None:
            self.x, self.targets, self.tokens, self.sources = x, np.zeros(len(x)), len(x), ()

        def tensors(self) -> list[torch.Tensor]:
            return [self.x]

    class Squares(Objective[Any, Fake]):
        def worth(self, batch: Fake) -> float:
            return len(batch.x)

        def to_device(self, batch: Fake) -> Fake:
            return batch

        def losses(self, model: Any, on_device: Fake) -> torch.Tensor:
            return (model(on_device.x) ** 2).sum(1)

    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    for pieces in (1, 3):
        model = copy.deepcopy(net)
        batches: list[Any] = [Fake(part) for part in x.chunk(pieces)]
        train_step(
            model, nets.Sgd(model.parameters(), lr=1.0), batches, Squares(Arithmetic(torch.device("cpu"))),
            max_grad_norm=0.0, step=1, penalty=lambda model=model: 5 * model.weight.sum(),
        )  # fmt: skip
        kept[pieces] = net.weight.detach() - model.weight.detach()
    plain = torch.autograd.grad(loss_of(net, Fake(x)) / 6, net.weight)[0]
    torch.testing.assert_close(kept[1], plain + 5)
    torch.testing.assert_close(kept[3], kept[1])


@pytest.mark.parametrize("ratio", [0.0, 0.4])
def test_diff_pruning_reaches_its_density_and_saves_no_more(ratio: float, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    method = DiffPruning(density=0.01, fixed_mask_ratio=ratio)
    model = method.attach(network("Bert"), task_of("Bert")).train()
    steps(model, method, "Bert", 20, 0.01)
    method.save(model, tmp_path)
    found = load_file(tmp_path / TENSORS)
    total = sum(p.numel() for name, p in model.named_parameters() if name.endswith("gates"))
    kept = sum(len(value) for name, value in found.items() if name.endswith(".places"))
    assert kept == int(0.01 * total)
    assert found["classifier.weight"].shape == (3, 32)
    assert (tmp_path / TENSORS).stat().st_size < 0.05 * 4 * total
    before, after = network("Bert"), method.fold(network("Bert"), tmp_path, task_of("Bert"))
    changed = sum(
        int((a != b).sum())
        for (name, a), b in zip(before.named_parameters(), after.parameters(), strict=True) if "classifier" not in name
    )  # fmt: skip
    assert 0.95 * kept <= changed <= kept


def test_with_a_fixed_mask_only_kept_differences_move_and_nothing_is_drawn() -> None:
    method = DiffPruning(density=0.05)
    model = method.attach(network("Bert"), task_of("Bert")).train()
    nudge(model)
    assert method.before_step(model, 0.7)
    assert not method.before_step(model, 0.8)
    first = {name: value.clone() for name, value in method.tensors(model).items() if name.endswith(".places")}
    steps(model, method, "Bert", 5, 0.01)
    after = method.tensors(model)
    assert {name for name in after if name.endswith(".places")} == set(first)
    assert all(torch.equal(after[name], places) for name, places in first.items())
    values = [p for name, p in model.named_parameters() if name.endswith("weights")]
    diffs = [module for module in model.modules() if hasattr(module, "difference")]
    assert len(diffs) == len(values)
    assert all(torch.equal(diff.difference(True), diff.difference(False)) for diff in diffs)  # type: ignore[operator]


def test_kept_differences_learn_at_the_whole_rate_and_all_others_at_a_part_of_it() -> None:
    method = DiffPruning(density=0.5, dense_rate_ratio=0.1, gate_rate_ratio=7.0, fixed_mask_ratio=0.5)
    model = method.attach(network("Bert"), task_of("Bert")).train()
    nudge(model)
    optimiser = build_optimiser(Train(optim="sgd", learning_rate=1e-3), list(trained(model).values()))
    method.begin(model, optimiser, 10, lambda: 0)

    def step(done: float) -> dict[str, float]:
        """How far a gradient of 1 moves each kind of parameter, without momentum, in learning rates."""
        set_rate(optimiser, 1e-3)
        method.before_step(model, done)
        optimiser.state.clear()
        before = {name: p.detach().clone() for name, p in trained(model).items()}
        for parameter in trained(model).values():
            parameter.grad = torch.ones_like(parameter)
        optimiser.step()
        found: dict[str, float] = {}
        for name, p in trained(model).items():
            kind = name.rpartition(".")[2] if "parametrizations" in name else "head"
            found[kind] = round(float((before[name] - p.detach()).abs().max()) / 1e-3, 2)
        return found

    assert step(0.0) == {"weights": 0.1, "gates": 7.0, "group": 7.0, "head": 1.0}
    assert step(0.4)["weights"] == 0.1
    for done in (0.5, 0.6):  # not once more with each step
        found = step(done)
        assert (found["weights"], found["head"]) == (1.0, 1.0)
    optimiser.load_state_dict(optimiser.state_dict())  # a resumed run has other groups
    assert step(0.7)["weights"] == 1.0


@pytest.mark.parametrize("method", [DiffPruning(), AdaLora()], ids=str)
def test_an_optimiser_that_updates_copies_is_refused(method: Method) -> None:
    model = method.attach(network("Llama"))
    copies = [nn.Parameter(p.detach().clone()) for p in trained(model).values()]
    error = refused(lambda: method.begin(model, nets.Sgd(copies, lr=1.0), 10, lambda: 0))
    assert error.fix == "train.offload_optimizer=false"


def refused(run: Callable[[], Any]) -> UserError:
    with pytest.raises(UserError) as caught:
        run()
    assert caught.value.fix
    return caught.value


def test_bad_input_is_refused_with_what_would_do() -> None:
    error = refused(lambda: BitFit().attach(network("Mistral")))
    assert "ln_tuning" in error.fix
    assert refused(lambda: BitFit(biases=["qurey"]).attach(network("Bert"), task_of("Bert"))).fix == "write query"
    assert refused(lambda: Freeze(layers=3).attach(network("Llama"))).field == "method.layers"
    assert refused(lambda: Freeze(layers=[2]).attach(network("Llama"))).field == "method.layers"
    assert refused(lambda: Freeze(layers=-1).attach(network("Llama"))).field == "method.layers"
    assert refused(lambda: Freeze(layers=0).attach(network("Llama"))).field == "method.layers"
    assert refused(lambda: Freeze(modules=["up_porj"]).attach(network("Llama"))).fix == "write up_proj"
    assert refused(lambda: Freeze(modules="(").attach(network("Llama"))).field == "method.modules"


@pytest.mark.parametrize(
    "method", [BitFit(), Freeze(layers=1), Head(), DiffPruning(density=0.1), Bottleneck()], ids=str
)
def test_it_does_not_open_on_another_base(method: Method, tmp_path: Path) -> None:
    model = method.attach(network("Llama"))
    nudge(model)
    method.finalize(model)
    method.save(model, tmp_path)
    assert "another base" in refused(lambda: method.load(network("Llama", seed=1), tmp_path)).problem
    refused(lambda: method.load(network("Bert"), tmp_path, task_of("Bert")))
    other = Head() if method.name != "head" else Freeze()
    assert "another method" in refused(lambda: other.load(network("Llama"), tmp_path)).problem
    about = json.loads((tmp_path / ABOUT).read_text())
    assert about["method"] == method.name
    assert set(about["base"]).isdisjoint(plain_name(name) for name in trained(model))
    (tmp_path / TENSORS).unlink()
    refused(lambda: method.load(network("Llama"), tmp_path))


def test_planted_faults_are_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from whet.methods import delta
    from whet.methods.layers import gates

    faults: list[tuple[Any, str, Any, Callable[[Path], None]]] = [
        (delta.Change, "swap", lambda self: None,
         lambda out: test_saved_it_opens_to_the_same_logits_and_switches_and_folds(Head(), "Bert", out)),
        (delta, "_fingerprint", lambda parameter: "the same",
         lambda out: test_it_does_not_open_on_another_base(Head(), out)),
        (gates.Diff, "keep", lambda self, mask: None,
         lambda out: test_diff_pruning_reaches_its_density_and_saves_no_more(0.4, out)),
        (gates, "LOW", -0.1, lambda out: test_gradients_are_those_of_the_formula(DiffPruning(), "Bert")),
        (gates, "LOW", -0.1, lambda out: test_hard_concrete_gates_have_the_probabilities_of_the_paper()),
        (Adapted, "forward", lambda self, x: self.base_layer(x),
         lambda out: test_it_starts_as_the_base_to_the_bit(Bottleneck(), "Llama")),
        (gates, "at_full_rate", lambda optimiser, model: None,
         lambda out: test_kept_differences_learn_at_the_whole_rate_and_all_others_at_a_part_of_it()),
        (DiffPruning, "penalty", lambda self, model: 1.01 * whole_penalty(self, model),
         lambda out: test_the_penalty_is_the_expected_share_of_differences(True)),
    ]  # fmt: skip
    whole_penalty = DiffPruning.penalty
    for index, (owner, name, fault, check) in enumerate(faults):
        out = tmp_path / str(index)
        out.mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fault)
            with pytest.raises((AssertionError, pytest.fail.Exception)):
                check(out)


def made(model: Path, data: Path, out: Path, **changes: Any) -> Parsed:
    values = tiny.settings(model, data, out, **changes)
    values.pop("method.r")
    return parse(None, tiny.words(values))


@pytest.mark.parametrize("step", [3, 7])
def test_a_run_cut_off_ends_with_the_same_bytes(step: int, model_dir: Path, data_file: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "method__name": "diff_pruning", "method__density": 0.02, "method__parameters": "linear",
        "train__max_steps": 9, "train__save_steps": 2,
        "train__eval_steps": 3, "data__val_size": 4, "train__gradient_accumulation_steps": 2,
        "train__learning_rate": 1e-3,
    }  # fmt: skip
    whole = train(made(model_dir, data_file, tmp_path / "whole", **settings))
    killed_before(made(model_dir, data_file, tmp_path / "cut", **settings), step)
    again = train(made(model_dir, data_file, tmp_path / "cut", **settings))
    for name in (f"adapter/{TENSORS}", "metrics.jsonl", "checkpoints/step-9/model.safetensors",
                 "checkpoints/step-9/optimizer.safetensors"):  # fmt: skip
        assert (whole.path / name).read_bytes() == (again.path / name).read_bytes(), name
    assert whole.finished is not None
    assert whole.finished["best_step"] == 9  # losses before the projection do not count
