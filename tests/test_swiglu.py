"""SwiGLU's backward pass as one operator: its arithmetic, where it is put and where not, and faults to be seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nets
import pytest
import torch
from nets import relative
from torch import fx, nn
from torch._subclasses import FakeTensorMode
from torch.nn.functional import silu

from whet.engine.compute import swiglu
from whet.engine.compute.compile import compile_layers
from whet.engine.compute.swiglu import CONVERT, WIDEST, FuseSwiglu, plain_swiglu_backward
from whet.engine.layers import decoder_layers
from whet.engine.weights.linear import quantise_fp8
from whet.engine.weights.product import quantised_rows
from whet.methods.layers.fuse import fuse

ATEN = torch.ops.aten
BF16_ROUNDING = 4e-3
T, F = 6, 32


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def inputs() -> list[torch.Tensor]:
    """dh [1, T, F], gate and up, views of one tensor as the fused product leaves them, and the channels' scale."""
    y = 3 * draw(1, T, 2 * F, seed=1)
    return [draw(1, T, F, seed=2), y[..., :F], y[..., F:], torch.logspace(-2, 1, 2 * F)]


def test_the_plain_form_is_the_gradient_and_rounds_as_products_do() -> None:
    dh, gate, up, channel = inputs()
    exact = [tensor.double().requires_grad_() for tensor in (gate, up)]
    (silu(exact[0]) * exact[1]).backward(dh.double())
    out, codes, scales = torch.ops.whet.swiglu_backward(dh, gate, up, channel)
    assert out.dtype == torch.bfloat16
    assert relative(out, torch.cat([one.grad for one in exact], -1).view(T, 2 * F)) < BF16_ROUNDING  # type: ignore[misc]
    expected, expected_scales = quantised_rows(out, channel)
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scales, expected_scales)


class Steps:
    """A graph in which each step is written as the compiler's listing of a backward pass shows it."""

    def __init__(self, values: list[torch.Tensor]) -> None:
        self.graph, self.mode = fx.Graph(), FakeTensorMode()
        self.inputs = [self.graph.placeholder(f"input_{index}") for index in range(len(values))]
        for node, value in zip(self.inputs, values, strict=True):
            node.meta["val"] = self.mode.from_tensor(value)

    def __call__(self, op: Any, *args: Any) -> fx.Node:
        node = self.graph.call_function(op, args)
        with self.mode:
            node.meta["val"] = op(*fx.map_arg(args, lambda one: one.meta["val"]))
        return node


def sigmoid_by_exp(do: Steps, wide: fx.Node) -> tuple[fx.Node, fx.Node]:
    """silu and its slope's sigmoid as torch 2.11 decomposes them."""
    below = do(ATEN.add.Tensor, do(ATEN.exp.default, do(ATEN.neg.default, wide)), 1)
    return do(ATEN.div.Tensor, wide, below), do(ATEN.mul.Tensor, do(ATEN.reciprocal.default, below), 1)


def sigmoid_by_name(do: Steps, wide: fx.Node) -> tuple[fx.Node, fx.Node]:
    """As torch 2.13 does."""
    below = do(ATEN.add.Tensor, do(ATEN.exp.default, do(ATEN.neg.default, wide)), 1)
    return do(ATEN.div.Tensor, wide, below), do(ATEN.sigmoid.default, wide)


def backward_graph(
    values: list[torch.Tensor], *, form: Any = sigmoid_by_exp, one: int = 1, turned: bool = False,
    swapped: bool = False, largest: float = 448.0, dims: list[int] | None = None, watched: bool = False,
    half: torch.dtype = torch.bfloat16, late: bool = False, other: bool = False, number: bool = False,
) -> fx.GraphModule:  # fmt: skip
    """The backward pass from dh to what the two products read: rows, codes, scales. Arguments change what is looked
    for: `one` in the slope, `turned` factors, `swapped` halves, the quantisation's constants, other users, an
    `other` gate for silu than for its slope, channels made `late` or a `number`."""
    do = Steps(values)
    dh, gate, up, channel = do.inputs
    wide = do(CONVERT, gate, torch.float32)
    smooth, sigmoid = form(do, wide)
    if other:
        smooth, _ = form(do, do(CONVERT, up, torch.float32))
    smooth = do(CONVERT, smooth, half)
    of_up = do(ATEN.mul.Tensor, *((smooth, dh) if turned else (dh, smooth)))
    pulled = do(CONVERT, do(ATEN.mul.Tensor, *((up, dh) if turned else (dh, up))), torch.float32)
    slope = do(ATEN.add.Tensor, do(ATEN.mul.Tensor, wide, do(ATEN.sub.Tensor, one, sigmoid)), 1)
    of_gate = do(CONVERT, do(ATEN.mul.Tensor, do(ATEN.mul.Tensor, pulled, sigmoid), slope), half)
    both = do(ATEN.cat.default, [of_up, of_gate] if swapped else [of_gate, of_up], 2)
    rows = do(ATEN.reshape.default, both, [T, 2 * F])
    read = do(ATEN.neg.default, rows)  # a product that reads the rows before the channels' scale is made
    if late:
        channel = do(ATEN.cat.default, [channel])
    if number:
        channel = 0.5
    scaled = do(ATEN.mul.Tensor, do(CONVERT, rows, torch.float32), channel)
    bound = do(ATEN.clamp_min.default, do(ATEN.amax.default, do(ATEN.abs.default, scaled), dims or [-1]), 1e-30)
    scale = do(ATEN.unsqueeze.default, do(ATEN.div.Tensor, bound, largest), 0 if dims == [0] else 1)
    codes = do(CONVERT, do(ATEN.div.Tensor, scaled, scale), torch.float8_e4m3fn)
    do.graph.output((rows, codes, scale, read, *([scaled] if watched else [])))
    return fx.GraphModule(nn.Module(), do.graph)


def replaced(module: fx.GraphModule) -> int:
    fuse_swiglu = FuseSwiglu()
    fuse_swiglu(module.graph)
    module.graph.lint()
    module.recompile()
    return fuse_swiglu.replaced


@pytest.mark.parametrize("form", [sigmoid_by_exp, sigmoid_by_name])
@pytest.mark.parametrize("options", [{}, {"turned": True}, {"watched": True}, {"late": True}])
def test_it_is_put_where_the_compiler_lists_it(form: Callable[..., Any], options: dict[str, Any]) -> None:
    values = inputs()
    module = backward_graph(values, form=form, **options)
    expected = module(*values)
    assert replaced(module) == 1
    targets = [node.target for node in module.graph.nodes]
    assert targets.count(torch.ops.whet.swiglu_backward.default) == 1
    assert ATEN.amax.default not in targets
    assert ATEN.exp.default not in targets
    rows, codes, scale, *rest = module(*values)
    assert relative(rows, expected[0].double()) < BF16_ROUNDING
    assert relative(codes.float() * scale, (expected[1].float() * expected[2]).double()) < 0.03
    again = quantise_fp8(rows.float() * values[3])
    assert torch.equal(codes.float(), again[0].float())
    assert torch.equal(scale, again[1][:, None])
    assert torch.equal(rest[0], -rows)


@pytest.mark.parametrize(
    "options",
    [
        {"one": 2},
        {"swapped": True},
        {"largest": 240.0},
        {"dims": [0]},
        {"half": torch.float16},
        {"other": True},
        {"number": True},
    ],
)
def test_what_differs_is_left_alone(options: dict[str, Any]) -> None:
    values = inputs()
    module = backward_graph(values, **options)
    expected = module(*values)
    assert replaced(module) == 0
    for found, before in zip(module(*values), expected, strict=True):
        assert torch.equal(found.float(), before.float())


def test_full_precision_and_rows_too_wide_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    single = [tensor.float() for tensor in inputs()]
    assert replaced(backward_graph(single, half=torch.float32)) == 0
    assert F <= WIDEST
    monkeypatch.setattr(swiglu, "WIDEST", F - 1)
    assert replaced(backward_graph(inputs())) == 0


def mlp_gradients(mlp: Any, options: dict[str, Any]) -> list[torch.Tensor]:
    mlp._compiled_call_impl = None
    mlp.compile(fullgraph=True, dynamic=False, options=options)
    return run(mlp)


def run(mlp: Any) -> list[torch.Tensor]:
    nets.clear(mlp)
    x = draw(1, 24, 64, seed=3).requires_grad_()
    mlp(x).backward(draw(1, 24, 64, seed=4))
    return [x.grad, *(parameter.grad for parameter in mlp.parameters() if parameter.requires_grad)]


def test_a_compiled_mlp_of_transformers_has_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    from whet.engine.weights.linear import freeze_linears

    torch._dynamo.reset()
    net = nets.network("Llama", dtype=torch.bfloat16)
    freeze_linears(net, "fp8")
    model = nets.adapted(net)
    fuse(model, compute=torch.bfloat16, fp8=True)
    mlp = decoder_layers(model.get_base_model())[0].mlp
    expected = mlp_gradients(mlp, {})
    calls: list[int] = []

    def counted(*args: torch.Tensor):
        calls.append(len(args))
        return plain_swiglu_backward(*args)

    monkeypatch.setattr(swiglu, "plain_swiglu_backward", counted)
    found = mlp_gradients(mlp, {"post_grad_custom_post_pass": FuseSwiglu()})
    assert len(found) == 5  # of x, and of A and B of two groups
    assert calls == [4]
    assert far(found, expected) < BF16_ROUNDING

    def unscaled(dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, channel: torch.Tensor):
        return plain_swiglu_backward(dh, gate, up, torch.ones_like(channel))

    def swapped(dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, channel: torch.Tensor):
        return plain_swiglu_backward(dh, up, gate, channel)

    for fault in (unscaled, swapped):
        monkeypatch.setattr(swiglu, "plain_swiglu_backward", fault)
        assert far(run(mlp), expected) > 0.1


def far(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(relative(mine, theirs.double()) for mine, theirs in zip(found, expected, strict=True))


def test_compiled_layers_get_the_pass_and_count_as_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **settings: asked.append(settings["options"]))
    net = nets.network("Llama")
    assert compile_layers(net) == compile_layers(net) == 2
    passes = [options["post_grad_custom_post_pass"] for options in asked]
    assert len(passes) == 4
    assert all(isinstance(one, FuseSwiglu) for one in passes)
    assert len(set(passes)) == 1
    assert passes[0].uuid() == FuseSwiglu().uuid()
