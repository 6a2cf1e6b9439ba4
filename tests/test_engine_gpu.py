"""What runs on CUDA alone: each kernel against its plain twin or float64, compiled against eager, captured against not.

Bounds: bf16 rounds a tensor by 0.17 % of its length, e4m3 by 2.7 %. A kernel may round a float32 in between otherwise
than its twin, which turns over a code in a thousand at most.
"""

from __future__ import annotations

import itertools
from typing import Any

import nets
import pytest
import torch
from nets import relative
from torch import nn
from torch.nn.functional import cross_entropy

from whet.engine.compute.attention import Documents, attend, fastest_attention
from whet.engine.compute.compile import FEW_TOKENS, compile_layers
from whet.engine.compute.head import HeadLoss
from whet.engine.compute.swiglu import plain_swiglu_backward
from whet.engine.weights.linear import freeze, freeze_linears, quantise_fp8
from whet.engine.weights.nf4 import fp8_scale, plain_rebuild, rebuild_nf4, rebuild_nf4_as_fp8
from whet.engine.weights.product import LONG, backward_product, forward_product, quantised_rows
from whet.engine.weights.stored import Fp8Weight
from whet.methods.layers.fuse import fuse

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
CUDA = torch.device("cuda")
hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs FP8 tensor cores"
)
if torch.cuda.is_available():
    from whet.engine.compute.swiglu_triton import swiglu_rows
E4M3 = torch.float8_e4m3fn
LENGTHS = [100, 300, 7, 105]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(CUDA, dtype)


def frozen(storage: str, rows: int, columns: int, seed: int = 0, double_quant: bool = True) -> Any:
    linear = nn.Linear(columns, rows, bias=False, device=CUDA)
    with torch.no_grad():
        linear.weight.copy_(draw(rows, columns, seed=seed, dtype=torch.float32))
    return freeze(linear, storage, double_quant)


def turned_over(ours: torch.Tensor, twin: torch.Tensor) -> float:
    """Share of the entries that differ at all."""
    return float((ours.view(torch.uint8) != twin.view(torch.uint8)).float().mean())


@hopper
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("columns", [1024, 704, 64])
def test_nf4_kernel(double_quant: bool, columns: int) -> None:
    heights = (512, 33, 96)
    parts = [frozen("nf4", rows, columns, rows, double_quant).tensors() for rows in heights]
    exact = torch.cat([plain_rebuild(part, torch.float32) for part in parts])
    assert relative(rebuild_nf4(parts, torch.float32), exact) < 1e-6
    assert relative(rebuild_nf4(parts, torch.bfloat16), exact.bfloat16()) < 2e-4
    turned = torch.ops.whet.nf4_rebuild(*_columns(parts), torch.bfloat16, True)
    assert torch.equal(turned.t(), rebuild_nf4(parts, torch.bfloat16))
    parts = [part._replace(fp8_scale=fp8_scale(part)) for part in parts]
    codes = rebuild_nf4_as_fp8(parts, transposed=False)
    twin = torch.cat([plain_rebuild(part, E4M3).view(torch.uint8) for part in parts])
    assert turned_over(codes, twin) < 2e-3
    assert relative(codes.float() * torch.cat([part.fp8_scale for part in parts])[:, None], exact) < 0.03
    assert torch.equal(rebuild_nf4_as_fp8(parts, transposed=True).view(torch.uint8).t(), codes.view(torch.uint8))


def _columns(parts: list[Any]) -> list[list[torch.Tensor]]:
    return [[tensor for tensor in column if tensor is not None] for column in zip(*parts, strict=True)]


@pytest.mark.parametrize("vocabulary", [1000, 16384, 50257])
@pytest.mark.parametrize(("bias", "cap"), [(False, None), (True, None), (False, 5.0), (True, 5.0)])
def test_loss_kernel(vocabulary: int, bias: bool, cap: float | None) -> None:
    from whet.engine.compute.head_triton import rows_to_gradients

    buffer = 4 * draw(70, vocabulary, seed=1)
    shift = draw(vocabulary, seed=2, dtype=torch.float32) if bias else None
    targets = torch.randint(0, vocabulary, (64,), generator=torch.Generator().manual_seed(3)).to(CUDA)
    targets[[3, 63]] = -1
    targets[:2] = torch.tensor([0, vocabulary - 1])
    wide = buffer[:64].double().requires_grad_()
    logits = wide if shift is None else wide + shift.double()
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    exact = cross_entropy(logits, targets, reduction="sum", ignore_index=-1)
    exact.backward()
    ours, rest = buffer.clone(), buffer[64:].clone()
    loss = rows_to_gradients(ours[:64], shift, targets, cap).sum()
    assert relative(loss, exact.detach()) < 1e-5
    assert relative(ours[:64], wide.grad) < 4e-3  # type: ignore[arg-type]
    assert not ours[[3, 63]].any()
    assert torch.equal(ours[64:], rest)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "columns", "rank"), [(1, 16, 1), (63, 130, 3), (257, 4104, 16), (100, 520, 48), (65, 64, 128)]
)
@pytest.mark.parametrize("turned", [False, True])
def test_low_rank_kernel(rows: int, columns: int, rank: int, turned: bool, dtype: torch.dtype) -> None:
    """y inside a wider buffer, whose other entries must stay; b as it lies or as a transposed view."""
    from whet.engine.weights.rows_triton import add_low_rank

    buffer = draw(rows + 1, columns + 24, seed=1, dtype=dtype)
    before, y = buffer.clone(), buffer[:rows, 8 : columns + 8]
    wide = draw(rows, rank + 8, seed=2, dtype=dtype)
    a, b = wide[:, :rank], draw(columns, rank, seed=3, dtype=dtype)
    b = b.t().contiguous().t() if turned else b
    exact = y.double() + a.double() @ b.double().t()
    add_low_rank(y, a, b)
    assert relative(y, exact) < 4e-3
    buffer[:rows, 8 : columns + 8] = before[:rows, 8 : columns + 8]
    assert torch.equal(buffer, before)


@hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("columns", [16, 31, 4096, 16384, 16385, 40000])
@pytest.mark.parametrize("scaled", [False, True])
def test_quantising_kernel(columns: int, scaled: bool, dtype: torch.dtype) -> None:
    from whet.engine.weights.rows_triton import quantise_rows

    sizes = torch.tensor([1.0, 0.0, 1e-20, 1e20, 60.0], device=CUDA)
    x = (draw(5, columns + 8, seed=1, dtype=torch.float32) * sizes[:, None]).to(dtype)[:, :columns]
    channel = draw(columns, seed=2, dtype=torch.float32).abs() if scaled else None
    codes, scale = quantise_rows(x, channel)
    wide = x.float() if channel is None else x.float() * channel
    twin, twin_scale = quantise_fp8(wide)
    assert torch.allclose(scale, twin_scale, rtol=1e-5, atol=0)
    assert turned_over(codes, twin) < (5e-3 if columns > 1000 else 0.05)
    assert not codes[1].float().any()
    for row in (0, 2, 3, 4):
        assert relative(codes[row].double() * scale[row].double(), wide[row]) < 0.0626  # the most that e4m3 rounds


@hopper
def test_gradients_that_do_not_lie_in_rows_are_quantised_right() -> None:
    """The gradient of a sum is one number seen many times; that of a transposed output lies in columns."""
    for x in (torch.ones((), device=CUDA).expand(64, 48), draw(48, 64).t()):
        codes, scale = quantised_rows(x, None)
        assert relative(codes.float() * scale[:, None], x) < 0.035


@hopper
@pytest.mark.parametrize(("storage", "bound"), [("fp8", 0.03), ("nf4", 0.043), ("int8", 0.043)])
@pytest.mark.parametrize("tokens", [512, 37])
def test_fp8_products(storage: str, bound: float, tokens: int) -> None:
    layer = frozen(storage, 528, 1024)
    layer.keep_for_fp8(both_orders=False)
    weight = layer.stored
    x, dy, bias = draw(tokens, 1024, seed=1), draw(tokens, 528, seed=2), draw(528, seed=3)
    exact = layer.dense(torch.float32).double()
    y = forward_product(weight, x, bias, fp8=True)
    assert relative(y, x.double() @ exact.t() + bias.double()) < bound
    dx = backward_product(weight, dy, fp8=True)
    assert relative(dx, dy.double() @ exact) < bound
    if storage == "fp8":
        layer.keep_for_fp8(both_orders=True)
        assert layer.turned is not None
        assert torch.equal(backward_product(layer.stored, dy, fp8=True), dx)


@hopper
@pytest.mark.parametrize("columns", [4096, LONG])
def test_an_update_is_added_to_fp8_products(columns: int) -> None:
    """Long rows are multiplied without scales, which the update brings with it; both ways, and turned round."""
    layer, r = frozen("fp8", 528, columns), 16
    weight, exact = layer.stored, layer.dense(torch.float32).double()
    x, dy, a, b = draw(300, columns, seed=1), draw(300, 528, seed=2), draw(300, r, seed=3), draw(528, r, seed=4)
    y = forward_product(weight, x, None, (a, 30 * b), fp8=True)
    assert relative(y, x.double() @ exact.t() + 30 * (a.double() @ b.double().t())) < 0.03
    wide = frozen("fp8", columns, 528)
    dx = backward_product(Fp8Weight(wide.codes, wide.scale), draw(300, columns, seed=5), (a, 30 * b), fp8=True)
    product = draw(300, columns, seed=5).double() @ wide.dense(torch.float32).double()
    assert relative(dx, product + 30 * (a.double() @ b.double().t())) < 0.03
    other = draw(columns, r, seed=6)
    found = backward_product(weight, dy, (a, other), fp8=True)
    assert relative(found, dy.double() @ exact + a.double() @ other.double().t()) < 0.03


@hopper
@pytest.mark.parametrize("width", [14336, 3072, 500, 18000])
def test_swiglu_backward_equals_its_twin(width: int) -> None:
    y, dh = draw(37, 2 * width, seed=1), draw(37, width, seed=2)
    channel = draw(2 * width, seed=3, dtype=torch.float32).abs() + 0.1
    gate, up = y[:, :width], y[:, width:]
    ours, codes, scales = swiglu_rows(dh, gate, up, channel)
    twin, other, wanted = plain_swiglu_backward(dh, gate, up, channel)
    assert relative(ours, twin) < 1e-3
    assert float((ours != twin).float().mean()) < 1e-2  # bf16 rounded the other way
    assert relative(scales, wanted) < 4e-3
    again = ours.float() * channel
    assert relative(codes.float() * scales[:, None], again) < 0.035
    assert relative(other.float() * wanted[:, None], codes.float() * scales[:, None]) < 0.01


@hopper
@pytest.mark.parametrize("both_orders", [False, True])
def test_fp8_head(both_orders: bool) -> None:
    weight, targets = draw(1024, 256, seed=1), torch.arange(300, device=CUDA) * 3 - 1
    codes, scale = quantise_fp8(weight)
    codes = codes.view(torch.uint8)
    hidden = (0.1 * draw(300, 256, seed=2)).requires_grad_()
    kept = (codes, scale, codes.t().contiguous()) if both_orders else (codes, scale)
    loss = HeadLoss.apply(hidden, codes, None, targets, None, kept).sum()
    loss.backward()
    wide = hidden.detach().double().requires_grad_()
    exact = cross_entropy(wide @ weight.double().t(), targets, reduction="sum", ignore_index=-1)
    exact.backward()
    assert relative(loss.detach(), exact.detach()) < 0.005
    assert relative(hidden.grad, wide.grad) < 0.06  # type: ignore[arg-type]
    assert not hidden.grad[0].any()  # type: ignore[index]


def exact_attention(query, key, value, lengths, window, cap):
    """[1, H, T, D] in float64; [1, T, H, D] out."""
    group, total = query.shape[1] // key.shape[1], query.shape[2]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(CUDA)
    place = torch.arange(total, device=CUDA)
    allowed = (document[:, None] == document[None]) & (place[:, None] >= place[None])
    if window is not None:
        allowed &= place[:, None] - place[None] < window
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    return (scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ value).transpose(1, 2)


def documents_of(lengths: list[int], row: int = 0, empty: int = 0) -> Documents:
    ends = [0, *itertools.accumulate(lengths)]
    return Documents(torch.tensor(ends + ends[-1:] * empty, dtype=torch.int32, device=CUDA), 384, row)


@pytest.mark.parametrize(
    ("lengths", "row", "window", "cap"),
    [
        (LENGTHS, 0, None, None),
        (LENGTHS, 0, 64, None),
        (LENGTHS, 0, 1, None),
        ([128] * 4, 128, None, None),
        ([128] * 4, 128, 64, None),
        ([128] * 4, 128, None, 2.0),
        (LENGTHS, 0, None, 2.0),
        (LENGTHS, 0, 50, 2.0),
    ],
)
def test_attention(lengths: list[int], row: int, window: int | None, cap: float | None) -> None:
    total = sum(lengths)
    ours = [draw(1, heads, total, 64, seed=heads + i).requires_grad_() for i, heads in enumerate((8, 2, 2))]
    with fastest_attention(CUDA):
        output, _ = attend(
            nn.Module(), *ours, None, sliding_window=window, softcap=cap,
            documents=documents_of(lengths, row, empty=0 if row else 3),
        )  # fmt: skip
        pull = draw(*output.shape, seed=9)
        found = torch.autograd.grad(output, ours, pull)
    wide = [tensor.detach().double().requires_grad_() for tensor in ours]
    exact = exact_attention(*wide, lengths, window, cap)
    expected = torch.autograd.grad(exact, wide, pull.double())
    assert relative(output, exact) < 0.02
    floor = 1e-2 * float(expected[2].norm())  # a window of one token leaves query and key no gradient
    for mine, theirs in zip(found, expected, strict=True):
        assert float((mine.double() - theirs).norm()) < 0.03 * float(theirs.norm()) + floor


@hopper
def test_dense_rows_go_to_cudnn() -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("cuDNN leads from Hopper on")
    ours = [draw(1, heads, 512, 64, seed=heads) for heads in (8, 2, 2)]
    with torch.profiler.profile() as profile, fastest_attention(CUDA):
        attend(nn.Module(), *ours, None, documents=documents_of([128] * 4, 128))
    assert any("cudnn_attention" in event.key for event in profile.key_averages())


WIDE = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "num_hidden_layers": 3,
}  # fmt: skip


def built(kind: str, storage: str, *, compute: torch.dtype = torch.bfloat16, fp8: bool = False) -> Any:
    net = nets.network(kind, dtype=torch.bfloat16, device="cuda", **WIDE)
    if storage != "dense":
        freeze_linears(net, storage)
    model = nets.adapted(net, r=8, lora_alpha=8)
    if compute == torch.float32:
        model = model.float()
    fuse(model, compute=compute, fp8=fp8)
    return model


def flat_gradient(model: Any) -> torch.Tensor:
    """Of the mean loss of a flat row of four documents."""
    nets.clear(model)
    tokens = nets.ids(1, sum(LENGTHS)).to(CUDA)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None].to(CUDA)
    with fastest_attention(CUDA):
        logits = model.get_base_model()(
            input_ids=tokens, position_ids=positions, documents=documents_of(LENGTHS, empty=2), use_cache=False
        ).logits
        cross_entropy(logits[0].float(), tokens[0]).backward()
    return torch.cat([gradient.flatten() for gradient in nets.gradients(model).values()])


@pytest.mark.slow
@hopper
@pytest.mark.parametrize(
    ("kind", "storage", "fp8", "joined"),
    [
        ("Qwen3", "dense", False, False),
        ("Qwen3", "dense", False, True),
        ("Llama", "nf4", False, False),
        ("Qwen3", "fp8", True, True),
        ("Llama", "nf4", True, False),
        ("Gemma2", "dense", False, False),
    ],
)
def test_compiled_layers_are_as_exact_as_eager_ones(kind: str, storage: str, fp8: bool, joined: bool) -> None:
    """Both against the same weights in float32; torch 2.11 is known to compile some things wrongly."""
    torch.compiler.reset()
    exact = flat_gradient(built(kind, storage, compute=torch.float32))
    model = built(kind, storage, fp8=fp8)
    eager = relative(flat_gradient(model), exact)
    compile_layers(model.get_base_model(), tokens=FEW_TOKENS if joined else FEW_TOKENS + 1)
    first = flat_gradient(model)
    assert eager < (0.6 if fp8 else 0.1)
    assert relative(first, exact) < 1.3 * eager
    assert relative(flat_gradient(model), first) < (0.1 if fp8 else 0.02)  # not only the first time
