"""The conformance table: what every method must keep on every task, as checks that a planted fault turns red.

Each check takes a `Case` and a `tamper`, which is called at the one place where the fault that it looks for would
arise; the table runs them with a `tamper` that does nothing, `test_conformance.py` also with one that breaks the model.
A check returns False where the method does not promise what it looks at.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import nets
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from whet.engine.task import Task
from whet.methods.all import METHODS

Tamper = Callable[[Any], None]
ROWS, LENGTH, CLASSES, VOCABULARY = 4, 9, 3, 64
TASKS = {"causal": Task(), "classification": Task("classification", ("a", "b", "c")), "seq2seq": Task("seq2seq")}
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": VOCABULARY, "max_position_embeddings": 64, "initializer_range": 0.15, "pad_token_id": 0,
}  # fmt: skip
T5: dict[str, Any] = {
    "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY,
    "decoder_start_token_id": 0, "pad_token_id": 0, "initializer_factor": 1.0, "dropout_rate": 0.0,
}  # fmt: skip
# The first output is not the base's: virtual tokens are read, or the paper's initialisation says so.
NOT_NEUTRAL = {"prefix", "prompt", "p_tuning", "c3a", "unilora", "vblora"}
# They train few numbers: a random model gives them little to work with, and they are held to a thirtieth.
WEAK = {"ia3", "p_tuning", "adaption_prompt", "beft", "tinylora", "trainable_tokens", "prompt", "bitfit", "ln_tuning"}
# What a method cannot do without; None: the tiny model of the task has nothing for it to train.
NEEDS: dict[tuple[str, str] | str, dict[str, Any] | None] = {
    "trainable_tokens": {"options": {"token_indices": list(range(3, 40))}}, ("bitfit", "seq2seq"): None,
}  # fmt: skip


def nothing(model: Any) -> None:
    """The tamper of the table: no fault."""


@dataclass(frozen=True)
class Case:
    """A method with its settings on a task; storage: of the frozen linear layers, or None for dense."""

    method: Any
    task: str
    storage: str | None = None

    @property
    def name(self) -> str:
        return f"{self.method.name}-{self.task}"

    def network(self) -> Any:
        """The same random model each time, without dropout."""
        network = _built(self.task, biased=self.method.name == "bitfit")
        if self.storage is not None:
            from whet.engine.weights.linear import freeze_linears

            freeze_linears(network, self.storage)
        return network.eval()

    def attached(self) -> Any:
        torch.default_generator.manual_seed(1)
        return self.method.attach(self.network(), TASKS[self.task])


def _built(task: str, *, biased: bool = False) -> Any:
    import transformers

    torch.default_generator.manual_seed(0)
    if task == "seq2seq":
        network = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5))
        with torch.no_grad():  # its own start gives logits of some hundreds
            network.lm_head.weight.mul_(0.3)
        return network
    if task == "classification":
        silent = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": CLASSES}
        network = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, **silent))
    else:
        network = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                **SIZES, num_key_value_heads=2, tie_word_embeddings=False, attention_bias=biased, mlp_bias=biased
            )
        )
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):  # families start them at 0, where a forgotten one would not be seen
            nn.init.normal_(parameter, std=0.1)
    return network


@cache
def rows(task: str) -> dict[str, torch.Tensor]:
    """Four rows, two of them shorter, and what they ask for."""
    draw = torch.Generator().manual_seed(7)
    ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=draw)
    mask = torch.ones_like(ids)
    if task != "causal":
        ids[1, 6:], mask[1, 6:], ids[2, 7:], mask[2, 7:] = 0, 0, 0, 0
    found = {"input_ids": ids, "attention_mask": mask}
    if task == "seq2seq":
        found["decoder_input_ids"] = torch.randint(3, VOCABULARY, (ROWS, 5), generator=draw)
        found["decoder_input_ids"][:, 0] = 0
    return found


def logits(model: Any, task: str) -> torch.Tensor:
    """What the model says to the rows, in fp32 or fp64; virtual tokens in front are cut off."""
    torch.default_generator.manual_seed(3)
    found = model(**rows(task)).logits
    found = found if found.dtype == torch.float64 else found.float()
    return found if task != "causal" else found[:, -LENGTH:]


def loss(model: Any, task: str) -> torch.Tensor:
    """Mean cross-entropy against fixed targets that the random model does not know."""
    found = logits(model, task)
    if task == "classification":
        return cross_entropy(found, torch.tensor([0, 1, 2, 0]))
    draw = torch.Generator().manual_seed(8)
    targets = torch.randint(3, VOCABULARY, found.shape[:-1], generator=draw)
    return cross_entropy(found.flatten(0, 1), targets.flatten())


def trained(model: Any) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def steps(case: Case, model: Any, count: int, optimiser: Any = None, rate: float | None = None) -> list[float]:
    """Training steps as `training.step` makes them: loss and penalty, one update; returns the losses before each."""
    model.train()
    rate = case.method.can.learning_rate if rate is None else rate
    optimiser = optimiser or nets.AdamW(trained(model).values(), lr=rate, weight_decay=0.0)
    seen = []
    for _ in range(count):
        value = loss(model, case.task)
        penalty = case.method.penalty(model)
        (value if penalty is None else value + penalty).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        seen.append(float(value.detach()))
    return seen


def moved(case: Case) -> Any:
    """A model that has learned a little, as it is saved."""
    model = case.attached()
    steps(case, model, 3, rate=max(1e-2, case.method.can.learning_rate))
    case.method.finalize(model)
    return model.eval()


def saved(case: Case, model: Any, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    case.method.save(model, folder)
    return folder


def fresh(case: Case, folder: Path) -> Any:
    """What `save` wrote, on a freshly loaded model."""
    if case.method.can.whole_model:
        return _opened(case.task, folder)
    return case.method.load(case.network(), folder, TASKS[case.task]).eval()


def _opened(task: str, folder: Path) -> Any:
    kind = TASKS[task].auto_class()
    return kind.from_pretrained(str(folder), dtype=torch.float32).eval()


def same(one: torch.Tensor, two: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)


def spoil(model: Any) -> None:
    """A fault: the largest parameter of the model is off by a little, not all by the same (norms take that away)."""
    with torch.no_grad():
        largest = max((p for p in model.parameters() if p.is_floating_point()), key=lambda p: p.numel())
        largest.add_(0.05 * torch.randn(largest.shape, generator=torch.Generator().manual_seed(9)))


def check_freeze(case: Case, tamper: Tamper = nothing) -> bool:
    """What is not trained keeps its bytes, and something is trained."""
    model = case.attached()
    names = trained(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    steps(case, model, 2, rate=1e-2)
    tamper(model)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p.detach(), before[name])}
    assert changed, "nothing was trained"
    assert changed <= set(names), sorted(changed - set(names))[:3]
    return True


def spoil_frozen(model: Any) -> None:
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    with torch.no_grad():
        (frozen[0] if frozen else next(iter(model.buffers()))).add_(1e-4)


def check_start(case: Case, tamper: Tamper = nothing) -> bool:
    """The first output is the base's."""
    if case.method.name in NOT_NEUTRAL:
        return False
    model = case.attached().eval()
    tamper(model)
    with torch.no_grad():
        same(logits(model, case.task), logits(case.network(), case.task), 1e-5)
    return True


def check_gradient(case: Case, tamper: Tamper = nothing) -> bool:
    """The gradient is the slope of the loss, along itself and a random direction."""
    model = case.attached().double().train()
    draw = torch.Generator().manual_seed(4)
    parameters = list(trained(model).values())
    with torch.no_grad():  # away from the start, where half of LoRA's gradient is 0
        for p in parameters:
            p.add_(0.02 * torch.randn(p.shape, generator=draw, dtype=p.dtype))
    tamper(model)
    loss(model, case.task).backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    length = torch.sqrt(sum((g * g).sum() for g in gradients))  # type: ignore[arg-type]
    assert length > 1e-6, "what is trained does not reach the loss"
    noise = [torch.randn(p.shape, generator=draw, dtype=p.dtype) for p in parameters]
    far = torch.sqrt(sum((n * n).sum() for n in noise))  # type: ignore[arg-type]
    directions = [g / length + n / far for g, n in zip(gradients, noise, strict=True)]
    slope = float(sum((g * d).sum() for g, d in zip(gradients, directions, strict=True)))
    step, values = 1e-3 / max(1.0, float(length)), []  # norms are computed in float32: less would measure rounding
    with torch.no_grad():
        for sign in (1, -2):
            for p, d in zip(parameters, directions, strict=True):
                p.add_(sign * step * d)
            values.append(float(loss(model, case.task)))
    measured = (values[0] - values[1]) / (2 * step)
    assert abs(slope - measured) <= 3e-2 * abs(measured), (slope, measured)
    return True


def double_gradients(model: Any) -> None:
    for parameter in trained(model).values():
        parameter.register_hook(lambda grad: 2 * grad)


def check_round_trip(case: Case, tamper: Tamper = nothing) -> bool:
    """Saved and loaded on a fresh base it says the same."""
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        with torch.enable_grad():
            model = moved(case)
        loaded = fresh(_exact(case), saved(_exact(case), model, Path(scratch) / "a"))
        tamper(loaded)
        same(logits(loaded, case.task), logits(model, case.task), 1e-5)
    return True


def _exact(case: Case) -> Case:
    """The same case, writing what it writes in fp32."""
    if hasattr(case.method, "save_dtype"):
        return replace(case, method=replace(case.method, save_dtype="fp32"))
    return case


def check_merge(case: Case, tamper: Tamper = nothing) -> bool:
    """Folded into plain weights it says the same."""
    if not case.method.can.mergeable:
        return False
    with tempfile.TemporaryDirectory() as scratch:
        model = moved(case)
        place = saved(case, model, Path(scratch) / "a")
        folded = case.method.fold(case.network(), place, TASKS[case.task]).eval()
        tamper(folded)
        with torch.no_grad():
            same(logits(folded, case.task), logits(model, case.task), 1e-4)
        assert type(folded) is type(case.network()), type(folded)
    return True


def check_nf4(case: Case, tamper: Tamper = nothing) -> bool:
    """On nf4 it starts as the nf4 base, learns, and leaves the bytes alone."""
    if "nf4" not in case.method.can.storages:
        return False
    packed = replace(case, storage="nf4")
    model = packed.attached()
    before = {name: p.clone() for name, p in model.named_parameters() if p.dtype == torch.uint8}
    assert before, "nothing is stored as nf4"
    if case.method.name not in NOT_NEUTRAL:
        with torch.no_grad():
            same(logits(model.eval(), case.task), logits(packed.network(), case.task), 1e-4)
    seen = steps(packed, model, 8, rate=max(5e-3, case.method.can.learning_rate))
    tamper(model)
    assert seen[-1] < seen[0], seen
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    return True


def spoil_bytes(model: Any) -> None:
    next(p for p in model.parameters() if p.dtype == torch.uint8).data.add_(1)


def check_compile(case: Case, tamper: Tamper = nothing) -> bool:
    """Its layers are whole graphs, and compiled they say the same."""
    if not (case.method.can.compiles and case.method.can.inside) or case.task != "causal":
        return False
    from whet.engine.layers import decoder_layers

    model = case.attached().eval()
    with torch.no_grad():
        wanted = logits(model, case.task)
        tamper(model)
        torch._dynamo.reset()
        network = model.get_base_model() if hasattr(model, "get_base_model") else model
        for layer in decoder_layers(network):
            layer.compile(backend="eager", fullgraph=True, dynamic=False)
        same(logits(model, case.task), wanted, 1e-5)
    return True


def break_graph(model: Any) -> None:
    from whet.engine.layers import decoder_layers

    network = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner = next(decoder_layers(network)[0].children())
    inner.register_forward_hook(lambda module, inputs, output: torch._dynamo.graph_break() or output)


def check_resume(case: Case, tamper: Tamper = nothing) -> bool:
    """Continued from a checkpoint it ends at the same bits."""
    from whet.training import checkpoint
    from whet.training.checkpoint import Identity

    def new() -> tuple[Any, Any]:
        model = case.attached()
        return model, nets.AdamW(trained(model).values(), lr=1e-2)

    with tempfile.TemporaryDirectory() as scratch:
        model, optimiser = new()
        steps(case, model, 2, optimiser)
        path = checkpoint.save(Path(scratch), 2, model, optimiser, {}, Identity("a", "b"))
        steps(case, model, 2, optimiser)
        again, other = new()
        checkpoint.load(path, again, other)
        tamper(again)
        steps(case, again, 2, other)
    for name, parameter in trained(model).items():
        assert torch.equal(parameter, trained(again)[name]), name
    return True


def nudge(model: Any) -> None:
    with torch.no_grad():
        next(iter(trained(model).values())).add_(1e-3)


def check_peft(case: Case, tamper: Tamper = nothing) -> bool:
    """What it saves opens in plain PEFT on a plain model, and says the same."""
    if not case.method.can.peft_format:
        return False
    import peft

    with tempfile.TemporaryDirectory() as scratch:
        model = moved(case)
        place = saved(case, model, Path(scratch) / "a")
        plain = peft.PeftModel.from_pretrained(case.network(), str(place)).eval()
        tamper(plain)
        with torch.no_grad():
            same(logits(plain, case.task), logits(model, case.task), 1e-5)
    return True


def check_overfits(case: Case, tamper: Tamper = nothing) -> bool:
    """It learns four rows: within 60 steps, at one of two rates, the loss falls by a third; by a tenth on T5, whose
    random head few methods reach."""
    worst, enough = [], 0.967 if case.method.name in WEAK else 0.9 if case.task == "seq2seq" else 0.67
    for rate in (case.method.can.learning_rate, 2e-2):
        model = case.attached()
        tamper(model)
        optimiser, seen = nets.AdamW(trained(model).values(), lr=rate, weight_decay=0.0), []
        for _ in range(12):
            seen += steps(case, model, 5, optimiser)
            if min(seen) < enough * seen[0]:
                return True
        worst.append((rate, seen[0], min(seen)))
    raise AssertionError(worst)


def stop_learning(model: Any) -> None:
    for parameter in trained(model).values():
        parameter.register_hook(torch.zeros_like)


CHECKS: dict[str, tuple[Callable[..., bool], Tamper]] = {
    "freeze": (check_freeze, spoil_frozen),
    "start": (check_start, spoil),
    "gradient": (check_gradient, double_gradients),
    "round trip": (check_round_trip, spoil),
    "merge": (check_merge, spoil),
    "nf4": (check_nf4, spoil_bytes),
    "compile": (check_compile, break_graph),
    "resume": (check_resume, nudge),
    "peft": (check_peft, spoil),
    "overfits": (check_overfits, stop_learning),
}


def cases() -> list[Case]:
    """Every method on every task that it can be trained for."""
    found = []
    for name, kind in METHODS.items():
        method = kind(name=name, **(NEEDS.get(name) or {}))
        found += [Case(method, task) for task in TASKS if task in method.can.tasks and (name, task) not in NEEDS]
    return found
