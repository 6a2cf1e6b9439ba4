"""A compiled layer keeps the codes of its frozen weights for the backward pass, never a dense copy of them.

Forward and backward pass rebuild the same dense weight; a compiler that notices builds it once and keeps it, which for
all layers is the whole model in bf16: more than a card that was chosen for 4-bit weights has.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.compile_utils import fx_graph_cse
from torch._functorch.partitioners import min_cut_rematerialization_partition

from whet.engine.weights.linear import Fp8Linear, FrozenLinear, Int8Linear, Nf4Linear
from whet.methods.layers.group import GroupProduct

SIZE, TOKENS, RANK = 256, 64, 8
BACKEND = "aot_eager_decomp_partition"  # what is kept is decided before code is generated
TO = torch.ops.aten._to_copy.default
LAYERS = {"nf4": Nf4Linear, "fp8": Fp8Linear, "int8": Int8Linear}


def layer(storage: str, *, fp8: bool) -> FrozenLinear:
    if storage == "nf4":
        pytest.importorskip("bitsandbytes")
    made = LAYERS[storage](SIZE, SIZE, None)
    made.fill(torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0)))
    if fp8:
        made.keep_for_fp8(both_orders=False)
    return made


def group(frozen: FrozenLinear, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, fp8: bool) -> torch.Tensor:
    stored = frozen.stored
    return GroupProduct.apply(
        x, None, a, b, a.detach().bfloat16(), b.detach().bfloat16(), None, (SIZE,), 1.0, fp8, type(stored),
        *stored.tensors(),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["alone", "group", "group in fp8"])
@pytest.mark.parametrize("storage", ["nf4", "fp8", "int8"])
def test_a_compiled_layer_keeps_no_dense_weight(storage: str, kind: str) -> None:
    torch.compiler.reset()
    fp8 = kind == "group in fp8"
    frozen = layer(storage, fp8=fp8)
    a, b = torch.ones(RANK, SIZE, requires_grad=True), torch.ones(SIZE, RANK, requires_grad=True)
    own = {tensor.data_ptr() for tensor in frozen.parameters()}

    def run(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(frozen(x) if kind == "alone" else group(frozen, x, a, b, fp8=fp8))

    def gradient(call: object, kept: list[torch.Tensor]) -> torch.Tensor:
        x = torch.linspace(-1, 1, TOKENS * SIZE).view(TOKENS, SIZE).bfloat16().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
            y = call(x)  # type: ignore[operator]
        y.sum().backward()
        assert x.grad is not None
        return x.grad

    kept: list[torch.Tensor] = []
    compiled = gradient(torch.compile(run, fullgraph=True, dynamic=False, backend=BACKEND), kept)
    assert kept
    dense = [(tuple(t.shape), t.dtype) for t in kept if t.numel() >= SIZE * SIZE // 2 and t.data_ptr() not in own]
    assert dense == []
    assert torch.equal(compiled, gradient(run, []))


def test_the_backward_pass_rounds_its_own_fp8_codes_of_int8() -> None:
    """What both passes round to FP8 in the same way is one tensor once a compiler has merged what is equal. Whether it
    then keeps that or rounds anew is a matter of costs, which the test above asks at one size; here none can be merged.
    """
    torch.compiler.reset()
    frozen, rounded = layer("int8", fp8=True), []
    a, b = torch.ones(RANK, SIZE, requires_grad=True), torch.ones(SIZE, RANK, requires_grad=True)

    def partition(joint: torch.fx.GraphModule, inputs: object, **more: object) -> object:
        made = [node.meta.get("val") for node in fx_graph_cse(joint.graph).nodes if node.target is TO]
        rounded.extend(tuple(one.shape) for one in made if one.dtype == torch.float8_e4m3fn)
        return min_cut_rematerialization_partition(joint, inputs, **more)

    backend = aot_autograd(fw_compiler=lambda graph, _: graph, partition_fn=partition)
    run = torch.compile(lambda x: group(frozen, x, a, b, fp8=True), fullgraph=True, dynamic=False, backend=backend)
    run(torch.ones(TOKENS, SIZE).bfloat16().requires_grad_()).sum().backward()
    assert (TOKENS, SIZE) in rounded, "the graph was seen"
    assert rounded.count((SIZE, SIZE)) == 2
