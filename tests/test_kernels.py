"""Every hand-written forward and backward pass against the plain formula in float64."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear

from whet.engine.compute import head as head_module
from whet.engine.compute.attention import Documents, attend
from whet.engine.compute.head import Head, HeadLoss
from whet.engine.weights.linear import dense_weight, freeze
from whet.methods.layers.lora_layer import LoraFunction

CHUNK_ROWS = 32
VOCABULARY = 97


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def leaf(tensor: torch.Tensor, dtype: torch.dtype = torch.float32, grad: bool = True) -> torch.Tensor:
    return tensor.to(dtype).detach().clone().requires_grad_(grad)


def near(ours: torch.Tensor | None, exact: torch.Tensor | None, tolerance: float = 1e-5, floor: float = 0.0) -> None:
    assert ours is not None
    assert exact is not None
    scale = max(float(exact.abs().max()), floor, 1e-12)
    apart = float((ours.double() - exact.double()).abs().max()) / scale
    assert apart <= tolerance, f"apart by {apart:.2g} of the largest entry"


@pytest.mark.parametrize("rows", [1, CHUNK_ROWS - 1, CHUNK_ROWS, CHUNK_ROWS + 1, 3 * CHUNK_ROWS + 5])
@pytest.mark.parametrize(("bias", "softcap"), [(False, None), (True, None), (False, 2.5), (True, 2.5)])
@pytest.mark.parametrize("weighted", [False, True])
def test_head_and_loss_in_chunks(
    rows: int, bias: bool, softcap: float | None, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(head_module.CHUNK_LOGITS, "cpu", CHUNK_ROWS * VOCABULARY)
    inputs = [draw(rows, 16, seed=1), draw(VOCABULARY, 16, seed=2), draw(VOCABULARY, seed=3) if bias else None]
    targets = torch.randint(0, VOCABULARY, (rows,), generator=torch.Generator().manual_seed(4))
    ours = [None if tensor is None else leaf(tensor) for tensor in inputs]
    weights = draw(rows, seed=5).abs().float() if weighted else None
    loss = HeadLoss.apply(*ours, targets, softcap, None, weights).sum()
    (loss * 0.37).backward()
    exact = [None if tensor is None else leaf(tensor.float(), torch.float64) for tensor in inputs]
    logits = linear(*exact)  # type: ignore[arg-type]
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    each = cross_entropy(logits, targets, reduction="none")
    expected = (each if weights is None else each * weights.double()).sum()
    (expected * 0.37).backward()
    near(loss.detach(), expected.detach())
    for mine, theirs in zip(ours, exact, strict=True):
        if mine is not None and theirs is not None:
            near(mine.grad, theirs.grad)


def test_head_of_extreme_logits_does_not_overflow() -> None:
    hidden, weight = leaf(draw(5, 16, scale=300.0)), leaf(draw(VOCABULARY, 16, seed=2, scale=300.0))
    targets = torch.arange(5)
    loss = HeadLoss.apply(hidden, weight, None, targets, None).sum()
    loss.backward()
    expected = cross_entropy(hidden.detach().double() @ weight.detach().double().t(), targets, reduction="sum")
    near(loss.detach(), expected)
    assert bool(torch.isfinite(hidden.grad).all())  # type: ignore[arg-type]


def test_head_gives_a_frozen_weight_no_gradient() -> None:
    hidden, weight = leaf(draw(5, 16)), leaf(draw(VOCABULARY, 16, seed=2), grad=False)
    HeadLoss.apply(hidden, weight, None, torch.arange(5), None).sum().backward()
    assert weight.grad is None
    assert hidden.grad is not None


def test_head_without_a_single_row_is_zero() -> None:
    hidden, weight = leaf(draw(4, 16))[:0], leaf(draw(VOCABULARY, 16, seed=2))
    losses = HeadLoss.apply(hidden, weight, None, torch.zeros(0, dtype=torch.long), None)
    assert losses.shape == (0,)
    losses.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


class Decoder(nn.Module):
    """Gives what it is given as its hidden states."""

    def forward(self, hidden: torch.Tensor) -> Any:
        return SimpleNamespace(last_hidden_state=hidden)


def head_of(bias: bool, softcap: float | None, *, trained: bool) -> Head:
    output = nn.Linear(16, VOCABULARY, bias=bias)
    with torch.no_grad():
        output.weight.copy_(draw(VOCABULARY, 16, seed=2))
        if bias:
            output.bias.copy_(draw(VOCABULARY, seed=3))
    return Head(Decoder(), output.requires_grad_(trained), softcap)


def exact_losses(head: Head, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(-log p of each target, 0 for those below 0; the head's weight and bias), all float64."""
    weights = [leaf(parameter.detach(), torch.float64) for parameter in head.output.parameters()]
    logits = linear(hidden, *weights)
    logits = logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
    return cross_entropy(logits, targets, reduction="none", ignore_index=-1), weights


@pytest.mark.parametrize("rows", [1, CHUNK_ROWS - 1, CHUNK_ROWS, CHUNK_ROWS + 1, 3 * CHUNK_ROWS + 5])
@pytest.mark.parametrize(("bias", "softcap"), [(False, None), (True, None), (False, 2.5), (True, 2.5)])
@pytest.mark.parametrize("weighted", [False, True])
def test_each_loss_of_a_frozen_head_takes_a_gradient_of_its_own(
    rows: int, bias: bool, softcap: float | None, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any function of the losses: some come in with a negative gradient, some with none, some places twice."""
    monkeypatch.setitem(head_module.CHUNK_LOGITS, "cpu", CHUNK_ROWS * VOCABULARY)
    generator = torch.Generator().manual_seed(4)
    targets = torch.randint(-1, VOCABULARY, (rows,), generator=generator)
    places = torch.randint(0, 40, (rows,), generator=generator)
    weights = draw(rows, seed=5).abs().float() if weighted else None
    pull = draw(rows, seed=6)
    pull[::3] = 0.0
    head, hidden = head_of(bias, softcap, trained=False), leaf(draw(2, 20, 16, seed=1))
    losses = head.losses({"hidden": hidden}, places, targets, weights)
    losses.backward(pull.float())
    wide = leaf(hidden.detach(), torch.float64)
    exact, _ = exact_losses(head, wide.flatten(0, 1)[places], targets)
    exact = exact if weights is None else exact * weights.double()
    exact.backward(pull.float().double())
    assert losses.shape == (rows,)
    assert losses.dtype == torch.float32
    near(losses.detach(), exact.detach(), floor=1.0)
    near(hidden.grad, wide.grad, floor=0.1)
    assert not (losses.detach() * (targets < 0)).any()
    assert all(parameter.grad is None for parameter in head.output.parameters())
    if rows > 1:  # the planted fault: one gradient for all losses
        alike = leaf(hidden.detach())
        losses = head.losses({"hidden": alike}, places, targets, weights)
        losses.backward(torch.full_like(losses, float(pull.mean())))
        with pytest.raises(AssertionError, match="apart"):
            near(alike.grad, wide.grad, floor=0.1)


def test_a_frozen_head_keeps_one_hidden_state_for_each_loss() -> None:
    head, hidden = head_of(True, None, trained=False), leaf(draw(1, 50, 16, seed=1))
    losses = head.losses({"hidden": hidden}, torch.arange(50), torch.arange(50))
    assert losses.grad_fn is not None
    kept = [t for t in losses.grad_fn.saved_tensors if t is not None]  # type: ignore[attr-defined]
    assert [tuple(tensor.shape) for tensor in kept] == [(50, 16)]


def test_the_factor_of_a_loss_is_not_rounded_to_the_type_of_the_hidden_states() -> None:
    """One over 111 in bf16 is off by 0.27 %, which every gradient of a step would be."""
    head, factor = head_of(False, None, trained=False), 1 / 111
    head.output.bfloat16()
    grads = []
    for scale in (1.0, factor):
        hidden = leaf(draw(1, 64, 16, seed=1), torch.bfloat16)
        (head.losses({"hidden": hidden}, torch.arange(64), torch.arange(64)).sum() * scale).backward()
        grads.append(hidden.grad.double())  # type: ignore[union-attr]
    ratio = float((grads[0] * grads[1]).sum() / grads[0].square().sum())
    assert abs(ratio / factor - 1) < 5e-4
    assert abs(float(torch.tensor(factor, dtype=torch.bfloat16)) / factor - 1) > 2e-3, "the planted fault"


@pytest.mark.parametrize("bias", [False, True])
def test_a_trained_head_takes_one_gradient_for_all_losses(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head_module.CHUNK_LOGITS, "cpu", CHUNK_ROWS * VOCABULARY)
    targets, places = torch.arange(70), torch.arange(70)
    weights, pull = draw(70, seed=5).abs().float(), draw(70, seed=6).float()
    inputs = draw(1, 70, 16, seed=1)

    def gradients(function: Any) -> tuple[Any, list[torch.Tensor | None], list[torch.Tensor | None]]:
        """Of whet's losses, and of those in float64."""
        head, hidden = head_of(bias, None, trained=True), leaf(inputs)
        wide = leaf(hidden.detach(), torch.float64)
        exact, parameters = exact_losses(head, wide.flatten(0, 1), targets)
        function(exact * weights.double(), torch.float64).backward()
        function(head.losses({"hidden": hidden}, places, targets, weights), torch.float32).backward()
        ours = [hidden.grad, *(parameter.grad for parameter in head.output.parameters())]
        return head, ours, [wide.grad, *(parameter.grad for parameter in parameters)]

    for function in (lambda losses, _: losses.sum() / 7, lambda losses, _: (0.3 * losses.sum()).square()):
        _, ours, exact = gradients(function)
        for mine, theirs in zip(ours, exact, strict=True):
            near(mine, theirs)
    for function in (
        lambda losses, dtype: (losses * pull.to(dtype)).sum(),
        lambda losses, _: losses.logsumexp(0),
        lambda losses, _: losses[:30].sum(),
    ):
        with pytest.raises(RuntimeError, match="trained, so its losses can only be added up"):
            gradients(function)
    monkeypatch.setattr(head_module, "_same_for_all", lambda incoming: incoming[0])
    _, ours, exact = gradients(lambda losses, dtype: (losses * pull.to(dtype)).sum())
    with pytest.raises(AssertionError, match="apart"):  # what would be learned if it were not refused
        near(ours[1], exact[1], 0.1)


def test_a_trained_head_learns_any_loss_when_it_is_told_the_derivatives() -> None:
    """As preference losses do: read the losses without gradients, then ask again with the derivatives as weights."""
    targets, places, sides = torch.arange(40), torch.arange(40), torch.arange(40) % 4

    def preference(losses: torch.Tensor) -> torch.Tensor:
        """Of the summed losses of two pairs."""
        each = losses.new_zeros(4).index_add(0, sides, losses)
        return -nn.functional.logsigmoid(0.1 * (each[1::2] - each[::2])).sum()

    head, hidden = head_of(True, 2.5, trained=True), leaf(draw(1, 40, 16, seed=1))
    with torch.no_grad():
        read = head.losses({"hidden": hidden}, places, targets)
    (slopes,) = torch.autograd.grad(preference(read.requires_grad_()), read)
    head.losses({"hidden": hidden}, places, targets, slopes).sum().backward()
    wide = leaf(hidden.detach(), torch.float64)
    exact, parameters = exact_losses(head, wide.flatten(0, 1), targets)
    preference(exact).backward()
    near(read.detach(), exact.detach())
    near(hidden.grad, wide.grad)
    for mine, theirs in zip(head.output.parameters(), parameters, strict=True):
        near(mine.grad, theirs.grad)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("first_layer", [False, True])
def test_lora_function(dtype: torch.dtype, tolerance: float, bias: bool, first_layer: bool) -> None:
    base = nn.Linear(24, 40, bias=bias).to(dtype).requires_grad_(False)
    x, a, b = leaf(draw(3, 7, 24), dtype, not first_layer), leaf(draw(4, 24, seed=1)), leaf(draw(40, 4, seed=2))
    pull = draw(3, 7, 40, seed=3).to(dtype)
    output = LoraFunction.apply(x, base, a, b, 0.7)
    output.backward(pull)
    exact = [leaf(tensor.detach(), torch.float64) for tensor in (x, a, b)]
    wide, wide_bias = base.weight.double(), base.bias.double() if bias else None
    expected = linear(exact[0], wide, wide_bias) + 0.7 * (exact[0] @ exact[1].t()) @ exact[2].t()
    expected.backward(pull.double())
    assert output.dtype == dtype
    near(output.detach(), expected.detach(), tolerance)
    near(a.grad, exact[1].grad, tolerance)
    near(b.grad, exact[2].grad, tolerance)
    assert a.grad.dtype == torch.float32  # type: ignore[union-attr]
    if first_layer:
        assert x.grad is None
    else:
        near(x.grad, exact[0].grad, tolerance)


def test_lora_layer_under_autocast_computes_in_bf16() -> None:
    """fp32 weights with bf16 arithmetic: base.storage=fp32 base.compute=bf16."""
    layer, x = adapted(nn.Linear(24, 40)), draw(3, 7, 24)
    given = leaf(x)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(given)
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    exact = adapted(nn.Linear(24, 40)).double()
    exact.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
    wide = leaf(x, torch.float64)
    plain(exact, wide).sum().backward()
    near(given.grad, wide.grad, 3e-2)
    near(layer.lora_B["default"].weight.grad, exact.lora_B["default"].weight.grad, 3e-2)


def adapted(linear_layer: nn.Linear) -> Any:
    """whet's LoRA layer around a linear one, B not zero."""
    from peft import LoraConfig, inject_adapter_in_model

    from whet.methods.layers.lora_layer import LoraLinear

    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["0"])
    settings._register_custom_module({nn.Linear: LoraLinear})
    layer = inject_adapter_in_model(settings, nn.Sequential(linear_layer))[0]
    assert isinstance(layer, LoraLinear)
    nn.init.normal_(layer.lora_B["default"].weight)
    return layer


def plain(layer: Any, x: torch.Tensor) -> torch.Tensor:
    update = layer.lora_B["default"](layer.lora_A["default"](x)) * layer.scaling["default"]
    return layer.base_layer(x) + update


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_product(double_quant: bool, dtype: torch.dtype) -> None:
    frozen = freeze(nn.Linear(64, 48), "nf4", double_quant)
    x, pull = leaf(draw(5, 64), dtype), draw(5, 48, seed=1).to(dtype)
    frozen.bias = None if frozen.bias is None else nn.Parameter(frozen.bias.to(dtype), requires_grad=False)
    output = frozen(x)
    output.backward(pull)
    weight = dense_weight(frozen, torch.float32).double()
    exact = leaf(x.detach(), torch.float64)
    expected = linear(exact, weight, frozen.bias.double())  # type: ignore[union-attr]
    expected.backward(pull.double())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    near(output.detach(), expected.detach(), tolerance)
    near(x.grad, exact.grad, tolerance)
    assert all(parameter.grad is None for parameter in frozen.parameters())


def exact_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int], scale: float,
    window: int | None, softcap: float | None,
) -> torch.Tensor:  # fmt: skip
    """softmax over the tokens of the same document that are not later and inside the window; [B, T, H, D]."""
    groups = query.shape[1] // key.shape[1]
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    output = torch.zeros_like(query)
    for head, i in itertools.product(range(query.shape[1]), range(query.shape[2])):
        seen = [j for j in range(i + 1) if document[i] == document[j] and (window is None or i - j < window)]
        scores = torch.einsum("bd,bjd->bj", query[:, head, i], key[:, head // groups, seen]) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        output[:, head, i] = torch.einsum("bj,bjd->bd", scores.softmax(-1), value[:, head // groups, seen])
    return output.transpose(1, 2)


@pytest.mark.parametrize("lengths", [[9], [1], [4, 1, 7], [3, 3, 3, 2]], ids=str)
@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_attention_within_documents(lengths: list[int], window: int | None, softcap: float | None) -> None:
    total = sum(lengths)
    shapes = [(1, 4, total, 8), (1, 2, total, 8), (1, 2, total, 8)]
    ours = [leaf(draw(*shape, seed=seed)) for seed, shape in enumerate(shapes)]
    exact = [leaf(tensor.detach(), torch.float64) for tensor in ours]
    bounds = (0, *itertools.accumulate(lengths))
    documents = Documents(torch.tensor(bounds, dtype=torch.int32), max(lengths), bounds=bounds)
    pull = draw(1, total, 4, 8, seed=9)
    output, _ = attend(
        nn.Module(), *ours, None, scaling=0.3, sliding_window=window, softcap=softcap, documents=documents
    )
    expected = exact_attention(*exact, lengths, 0.3, window, softcap)
    near(output.detach(), expected.detach())
    output.backward(pull.float())
    expected.backward(pull)
    for mine, theirs in zip(ours, exact, strict=True):
        near(mine.grad, theirs.grad, floor=0.1)  # a window of one token leaves query and key no gradient


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_attention_of_padded_rows(window: int | None, softcap: float | None) -> None:
    shapes = [(3, 4, 10, 8), (3, 1, 10, 8), (3, 1, 10, 8)]
    tensors = [draw(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    output, _ = attend(nn.Module(), *(t.float() for t in tensors), None, sliding_window=window, softcap=softcap)
    near(output, exact_attention(*tensors, [10], 8**-0.5, window, softcap))


def test_attention_takes_the_mask_of_a_caller() -> None:
    query, key, value = (draw(1, 2, 6, 8, seed=seed) for seed in range(3))
    allowed = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    allowed[..., :, 0] = False
    allowed[..., 0, 0] = True
    output, _ = attend(nn.Module(), query, key, value, allowed)
    alone = exact_attention(query[:, :, 1:], key[:, :, 1:], value[:, :, 1:], [5], 8**-0.5, None, None)
    near(output[:, 1:], alone)


def test_the_comparison_itself_can_fail() -> None:
    with pytest.raises(AssertionError, match="apart"):
        near(torch.ones(3), torch.ones(3) * 1.001)
