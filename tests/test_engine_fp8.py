"""Products with frozen weights in every storage and arithmetic against float64, and faults that must be seen.

e4m3 keeps three bits after the leading one: rounding a row to it moves the product by 2.6 % of its length. Weights that
are not FP8 already (nf4, int8) are rounded too, which makes it 3.7 %.
"""

from __future__ import annotations

import pytest
import torch
from nets import relative
from torch import nn
from torch.nn.functional import cross_entropy

from whet.engine.compute import head as head_module
from whet.engine.compute.head import HeadLoss
from whet.engine.weights import product
from whet.engine.weights.linear import Nf4Linear, freeze, quantise_fp8
from whet.engine.weights.nf4 import fp8_scale, plain_rebuild, rebuild_nf4, rebuild_nf4_as_fp8
from whet.engine.weights.product import add_product, backward_product, forward_product
from whet.engine.weights.stored import Fp8Weight, FrozenWeight
from whet.methods.layers.fuse import fuse

ONE_ROUNDED, BOTH_ROUNDED = 0.03, 0.042
BOUNDS = {"fp8": ONE_ROUNDED, "nf4": BOTH_ROUNDED, "int8": BOTH_ROUNDED}
WIDTH = 256


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spread(count: int) -> torch.Tensor:
    """Factors over three decades: a scale at the wrong place cannot hide."""
    return torch.logspace(-2, 1, count)[torch.randperm(count, generator=torch.Generator().manual_seed(9))]


def frozen(storage: str, rows: int = WIDTH, columns: int = WIDTH, seed: int = 0, double_quant: bool = True):
    """Output channels of very different size."""
    linear = nn.Linear(columns, rows, bias=False)
    with torch.no_grad():
        linear.weight.copy_(draw(rows, columns, seed=seed) * spread(rows)[:, None])
    found = freeze(linear, storage, double_quant)
    assert found is not None
    return found


def weight_of(layer) -> FrozenWeight:
    """The layer's weight with what its FP8 products need, taken apart and put together as autograd does."""
    layer.keep_for_fp8(both_orders=False)
    weight = layer.stored
    return type(weight).of(weight.tensors())


def errors(storage: str, x: torch.Tensor, dy: torch.Tensor, rows: int = WIDTH) -> tuple[float, float]:
    """Relative errors of the FP8 products forward and backward against float64 on the dense weight."""
    layer = frozen(storage, rows)
    exact = layer.dense(torch.float32).double()
    y = forward_product(weight_of(layer), x, None, fp8=True)
    dx = backward_product(weight_of(layer), dy, fp8=True)
    return relative(y, x.double() @ exact.t()), relative(dx, dy.double() @ exact)


@pytest.mark.parametrize("storage", BOUNDS)
@pytest.mark.parametrize("rows", [WIDTH, 96])
def test_fp8_products_are_within_their_rounding(storage: str, rows: int) -> None:
    forward, backward = errors(storage, draw(64, WIDTH, seed=1), draw(64, rows, seed=2), rows)
    assert 0.01 < forward < BOUNDS[storage]
    assert 0.01 < backward < BOUNDS[storage]


@pytest.mark.parametrize("storage", BOUNDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_arithmetic_is_as_exact_as_its_type(storage: str, dtype: torch.dtype) -> None:
    layer = frozen(storage, 96)
    exact = layer.dense(torch.float32).double()
    x, dy = draw(64, WIDTH, seed=1).to(dtype), draw(64, 96, seed=2).to(dtype)
    bound = 1e-6 if dtype == torch.float32 else 5e-3
    bias = draw(96, seed=3).to(dtype)
    y = forward_product(layer.stored, x, bias)
    assert y.dtype == dtype
    assert relative(y, x.double() @ exact.t() + bias.double()) < bound
    assert relative(backward_product(layer.stored, dy), dy.double() @ exact) < bound
    assert torch.equal(forward_product(weight_of(layer), x, bias), y), "what FP8 needs changes dense products"


def test_a_forgotten_scale_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    x, dy = draw(64, WIDTH, seed=1), draw(64, WIDTH, seed=2)
    monkeypatch.setattr(product, "quantised_rows", lambda rows, channel: quantise_fp8(rows))
    forward, backward = errors("fp8", x, dy)
    assert forward < ONE_ROUNDED  # it has no such scale
    assert backward > 0.5


def test_a_scale_on_the_wrong_side_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Applied to the inputs of the weight, not to its outputs; the weight is square, so the shapes agree."""
    kept: list[torch.Tensor] = []
    scaled = product.scaled_product

    def quantised(rows: torch.Tensor, channel: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        kept[:] = [] if channel is None else [channel]
        return quantise_fp8(rows)

    def multiplied(rows, row_scale, codes, scale, bias, dtype, update):
        return scaled(rows, row_scale, codes, kept[0] if kept else scale, bias, dtype, update)

    monkeypatch.setattr(product, "quantised_rows", quantised)
    monkeypatch.setattr(product, "scaled_product", multiplied)
    forward, backward = errors("fp8", draw(64, WIDTH, seed=1), draw(64, WIDTH, seed=2))
    assert forward < ONE_ROUNDED
    assert backward > 0.5


def test_gradients_in_e5m2_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def coarse(rows: torch.Tensor, channel: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        wide = rows if channel is None else rows * channel
        scale = wide.abs().amax(-1) / 57344.0
        return (wide / scale[:, None]).to(torch.float8_e5m2), scale

    monkeypatch.setattr(product, "quantised_rows", coarse)
    assert errors("fp8", draw(64, WIDTH, seed=1), draw(64, WIDTH, seed=2))[1] > 1.5 * ONE_ROUNDED


def test_one_scale_for_all_channels_would_not_do() -> None:
    """Why the scale is folded into dy first: dy alone cannot be rounded and scaled later."""
    layer, dy = frozen("fp8"), draw(64, WIDTH, seed=2)
    assert relative(dy * layer.scale, (dy.double() * layer.scale.double())) < 1e-6
    codes, scale = quantise_fp8(dy * layer.scale)
    folded = (codes.double() * scale.double()[:, None]) @ layer.codes.view(torch.float8_e4m3fn).double()
    assert relative(backward_product(weight_of(layer), dy, fp8=True), folded) < 1e-5


def test_bytes_kept_in_both_orders_give_the_same_bits() -> None:
    layer, dy = frozen("fp8", 96), draw(64, 96, seed=2)
    once = weight_of(layer)
    layer.keep_for_fp8(both_orders=True)
    twice = layer.stored
    assert [tensor is not None for tensor in twice.tensors()] == [True, True, True]
    assert torch.equal(backward_product(twice, dy, fp8=True), backward_product(once, dy, fp8=True))
    x = draw(64, WIDTH, seed=1)
    assert torch.equal(forward_product(twice, x, None, fp8=True), forward_product(once, x, None, fp8=True))
    codes = Fp8Weight(layer.codes, layer.scale, torch.zeros_like(layer.codes.t()))
    assert not backward_product(codes, dy, fp8=True).any(), "the bytes that are kept turned round are not read"


@pytest.mark.parametrize("storage", BOUNDS)
def test_outlier_channels_cost_the_others_nothing(storage: str) -> None:
    """As in large models: a few channels sixty times as large as the rest."""
    large = torch.ones(WIDTH)
    large[[3, 77, 200]] = 60.0
    layer, x, dy = frozen(storage), draw(64, WIDTH, seed=1), draw(64, WIDTH, seed=2)
    exact = layer.dense(torch.float32).double()
    y = forward_product(weight_of(layer), x * large, None, fp8=True)
    dx = backward_product(weight_of(layer), dy * large, fp8=True)
    assert relative(y, (x * large).double() @ exact.t()) < 1.3 * BOUNDS[storage]
    assert relative(dx, (dy * large).double() @ exact) < 1.3 * BOUNDS[storage]


@pytest.mark.parametrize("storage", BOUNDS)
def test_rows_of_zeros_and_of_tiny_and_huge_numbers(storage: str) -> None:
    """Each row has a scale of its own, so none disturbs another, and nothing becomes NaN or infinite."""
    layer = frozen(storage)
    exact = layer.dense(torch.float32).double()
    sizes = torch.tensor([0.0, 1e-30, 1e-20, 1e-10, 1.0, 1e10, 1e20, 1e30, 0.0])
    x = draw(len(sizes), WIDTH, seed=1) * sizes[:, None]
    for ours, expected in (
        (forward_product(weight_of(layer), x, None, fp8=True), x.double() @ exact.t()),
        (backward_product(weight_of(layer), x, fp8=True), x.double() @ exact),
    ):
        assert bool(torch.isfinite(ours).all())
        for row, size in enumerate(sizes.tolist()):
            if size == 0.0:
                assert not ours[row].any()
            elif size > 1e-21:  # 1e-20 is a little less in float32
                assert relative(ours[row], expected[row]) < 1.5 * BOUNDS[storage], size


def test_a_weight_with_a_row_of_zeros() -> None:
    for storage in BOUNDS:
        linear = nn.Linear(64, 32, bias=False)
        with torch.no_grad():
            linear.weight[5] = 0
        layer = freeze(linear, storage)
        assert layer is not None
        y = forward_product(weight_of(layer), draw(4, 64), None, fp8=True)
        assert bool(torch.isfinite(y).all())
        assert not y[:, 5].any()


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nf4_is_rebuilt_as_bitsandbytes_does_it(double_quant: bool, dtype: torch.dtype) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = (draw(96, 640, seed=4) * spread(96)[:, None]).to(dtype)
    packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=double_quant, quant_type="nf4")
    layer = Nf4Linear(640, 96, double_quant=double_quant)
    layer.take(packed, state)
    assert torch.equal(plain_rebuild(layer.tensors(), dtype), functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("double_quant", [False, True])
def test_parts_stand_side_by_side(double_quant: bool) -> None:
    parts = [frozen("nf4", rows, 128, seed, double_quant).tensors() for seed, rows in enumerate((64, 16, 48))]
    alone = torch.cat([plain_rebuild(part, torch.float32) for part in parts])
    assert torch.equal(rebuild_nf4(parts, torch.float32), alone)
    scales = [fp8_scale(part) for part in parts]
    parts = [part._replace(fp8_scale=scale) for part, scale in zip(parts, scales, strict=True)]
    codes = rebuild_nf4_as_fp8(parts, transposed=False)
    turned = rebuild_nf4_as_fp8(parts, transposed=True)
    assert turned.is_contiguous()
    assert torch.equal(turned.view(torch.uint8).t(), codes.view(torch.uint8))
    assert relative(codes.double() * torch.cat(scales)[:, None].double(), alone) < ONE_ROUNDED


def test_a_size_that_fp8_cores_do_not_take_is_computed_dense() -> None:
    import nets

    kinds = {}
    for width in (64, 72):
        net = nets.network("Llama", hidden_size=width, head_dim=18 if width == 72 else 16)
        from whet.engine.weights.linear import freeze_linears

        freeze_linears(net, "int8")
        model = nets.adapted(net)
        fuse(model, compute=torch.float32, fp8=True)
        kinds[width] = {(group.base.storage, group.fp8) for group in nets.groups_of(model)}
    assert kinds == {64: {("int8", True)}, 72: {("int8", False)}}


def test_nf4_of_an_odd_width_stays_dense() -> None:
    assert freeze(nn.Linear(33, 64), "nf4") is None


def test_the_low_rank_product_is_added_in_place() -> None:
    y, a, b = draw(10, 12), draw(10, 4, seed=1), draw(12, 4, seed=2)
    expected = y.double() + a.double() @ b.double().t()
    result = add_product(y, a, b)
    assert result is y
    assert relative(y, expected) < 1e-6
    torch.ops.whet.add_product_(y, -a, b)  # the form that compiled layers use
    assert relative(y, expected - a.double() @ b.double().t()) < 1e-5


@pytest.mark.parametrize("scaled", ["rows", "columns", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_brings_the_scales_with_it(scaled: str, dtype: torch.dtype) -> None:
    """y is scaled before the update is added, by rows and by columns; in both forms that layers use."""
    y, a, b = draw(6, 8, seed=1).to(dtype), draw(6, 3, seed=2).to(dtype), draw(8, 3, seed=3).to(dtype)
    of_row = draw(6, 1, seed=4).flatten().float() if scaled != "columns" else None
    of_column = draw(8, 1, seed=5).flatten().float() if scaled != "rows" else None
    exact = y.double() * (1 if of_row is None else of_row.double()[:, None])
    exact = exact * (1 if of_column is None else of_column.double()) + a.double() @ b.double().t()
    bound = 1e-6 if dtype == torch.float32 else 4e-3
    plain = add_product(y.clone(), a, b, of_row, of_column)
    assert relative(plain, exact) < bound
    operated = y.clone()
    torch.ops.whet.add_product_(operated, a, b, of_row, of_column)
    assert torch.equal(operated, plain)
    assert relative(add_product(y.clone(), a, b), exact) > 0.1, "the planted fault: scales left out"


def fp8_head(weight: torch.Tensor, both_orders: bool = False) -> tuple[torch.Tensor, ...]:
    """The tensors that `HeadLoss` takes for `weight` [V, H]."""
    codes, scale = quantise_fp8(weight.detach())
    codes = codes.view(torch.uint8)
    return (codes, scale, *((codes.t().contiguous(),) if both_orders else ()))


def head_losses(targets: torch.Tensor, softcap: float | None, both_orders: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(head_module.CHUNK_LOGITS, "cpu", 5 * 512)
    hidden, output = draw(len(targets), 64, seed=1).requires_grad_(), nn.Linear(64, 512, bias=False)
    output.weight.requires_grad_(False)
    kept = fp8_head(output.weight, both_orders)
    loss = HeadLoss.apply(hidden, kept[0], None, targets, softcap, kept).sum()
    loss.backward()
    wide = hidden.detach().double().requires_grad_()
    logits = wide @ output.weight.double().t()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    exact = cross_entropy(logits, targets, reduction="sum", ignore_index=-1)
    exact.backward()
    assert hidden.grad is not None
    assert wide.grad is not None
    return loss.detach(), hidden.grad, exact.detach(), wide.grad


@pytest.mark.parametrize("both_orders", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_an_fp8_head_is_within_its_rounding(
    softcap: float | None, both_orders: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three roundings meet in the gradient: hidden states, weight, and the gradient of the logits."""
    targets = torch.randint(0, 512, (23,), generator=torch.Generator().manual_seed(4))
    loss, grad, exact, exact_grad = head_losses(targets, softcap, both_orders, monkeypatch)
    assert relative(loss, exact) < 0.005
    assert relative(grad, exact_grad) < 0.055


@pytest.mark.parametrize("both_orders", [False, True])
def test_each_loss_of_an_fp8_head_takes_a_gradient_of_its_own(
    both_orders: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes in for a row multiplies a gradient that is rounded already, so it adds no error of its own."""
    monkeypatch.setitem(head_module.CHUNK_LOGITS, "cpu", 5 * 512)
    targets = torch.randint(0, 512, (23,), generator=torch.Generator().manual_seed(4))
    pull = 100.0 ** draw(23, 1, seed=7)[:, 0]  # from tiny to huge
    pull[::2] *= -1
    output = nn.Linear(64, 512, bias=False).requires_grad_(False)
    kept = fp8_head(output.weight, both_orders)
    hidden = draw(23, 64, seed=1).requires_grad_()
    losses = HeadLoss.apply(hidden, kept[0], None, targets, None, kept)
    losses.backward(pull)
    wide = hidden.detach().double().requires_grad_()
    exact = cross_entropy(wide @ output.weight.double().t(), targets, reduction="none")
    exact.backward(pull.double())
    assert hidden.grad is not None
    assert wide.grad is not None
    assert relative(losses.detach(), exact.detach()) < 0.005
    for mine, theirs in zip(hidden.grad, wide.grad, strict=True):
        assert relative(mine, theirs) < 0.075
    assert relative(hidden.grad.flip(0), wide.grad) > 0.5, "the planted fault: gradients of other rows"


@pytest.mark.parametrize("fp8", [False, True])
def test_a_target_below_zero_counts_for_nothing(fp8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head_module.CHUNK_LOGITS, "cpu", 4 * 512)  # one chunk holds nothing that counts
    output = nn.Linear(64, 512)
    kept = fp8_head(output.weight) if fp8 else None
    targets = torch.tensor([7, -1, 3, 500, -1, -1, -1, -1, 0, -1])
    counts = targets >= 0
    results = []
    for places in (slice(None), counts):
        hidden = draw(len(targets), 64, seed=1)[places].requires_grad_()
        given = output.weight if kept is None else kept[0]
        weight, bias = (tensor.detach().clone().requires_grad_(not fp8) for tensor in (given, output.bias))
        loss = HeadLoss.apply(hidden, weight, bias, targets[places], None, kept).sum()
        loss.backward()
        results.append((loss.detach(), hidden.grad, weight.grad, bias.grad))
    filled, alone = results
    assert abs(float(filled[0] - alone[0])) <= 1e-5 * float(alone[0])
    assert filled[1] is not None
    assert not filled[1][~counts].any()
    assert relative(filled[1][counts], alone[1]) < 1e-6
    if not fp8:
        assert relative(filled[2], alone[2]) < 1e-6
        assert relative(filled[3], alone[3]) < 1e-6
