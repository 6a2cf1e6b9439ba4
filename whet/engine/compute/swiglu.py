"""SwiGLU's backward pass, with the FP8 rounding that follows it, as one kernel inside compiled layers.

transformers writes `down(act(gate(x)) * up(x))`; what happens between the two products backward is decided by the
compiler alone. So the place is found in the compiler's graph of the backward pass (inductor's option for a pass of
one's own, `base.private.graph_pass`), by structure: the gradients of gate and up side by side, made from silu
as torch decomposes it, scaled by channel and rounded row by row as `engine.weights.product` does. That is replaced by
one operator; anything else is left as it is, and the layer of transformers is not touched. Gives up: a form of silu
that a future torch writes in another way is not found, which costs the speed and nothing else.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, library

from whet.base.private import graph_pass, hash_of_files, sort_graph
from whet.engine.weights.fp8 import FP8_MAX, quantise_fp8

WIDEST = 32768  # numbers of a row of gate: above it a row and its codes do not fit into the registers of a program
HALF = (torch.bfloat16, torch.float16)
Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@library.custom_op("whet::swiglu_backward", mutates_args=())
def swiglu_backward(dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, channel: torch.Tensor) -> Three:
    """[dh up silu'(gate) | dh silu(gate)] [T, 2F] in dh's type, its e4m3 codes after `channel` float32 [2F], and their
    row scales float32 [T]. dh, gate, up: [..., F] of T rows."""
    d, g, u = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (dh, gate, up))
    if not dh.is_cuda:
        return plain_swiglu_backward(d, g, u, channel)
    from whet.engine.compute.swiglu_triton import swiglu_rows

    d, g, u = (tensor if tensor.stride(1) == 1 else tensor.contiguous() for tensor in (d, g, u))
    return swiglu_rows(d, g, u, channel.contiguous())


@swiglu_backward.register_fake
def _(dh, gate, up, channel):
    rows, width = dh.numel() // dh.shape[-1], dh.shape[-1]
    out = dh.new_empty(rows, 2 * width)
    return out, out.new_empty(out.shape, dtype=torch.float8_e4m3fn), out.new_empty(rows, dtype=torch.float32)


def plain_swiglu_backward(dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, channel: torch.Tensor) -> Three:
    """The operator in plain torch, for rows [T, F]: computed in float32, rounded to dh's type before it is scaled."""
    d, g = dh.float(), gate.float()
    sigmoid = torch.sigmoid(g)
    left, right = d * up.float() * sigmoid * (1 + g * (1 - sigmoid)), d * (g * sigmoid)
    out = torch.cat([left, right], -1).to(dh.dtype)
    return out, *quantise_fp8(out.float() * channel)


class OneOf(tuple[Any, ...]):
    """Patterns of which one has to match."""


# A pattern is a name that binds what it meets, a number or type that must be met, or a tuple: an operator and patterns
# of its arguments.
ATEN, CONVERT = torch.ops.aten, torch.ops.prims.convert_element_type.default
ADD, SUB, MUL, DIV = ATEN.add.Tensor, ATEN.sub.Tensor, ATEN.mul.Tensor, ATEN.div.Tensor
EITHER_ORDER = (ADD, MUL)
GATE = (CONVERT, "gate", torch.float32)
ONE_AND_EXP = (ADD, (ATEN.exp.default, (ATEN.neg.default, GATE)), 1)
RECIPROCAL = (ATEN.reciprocal.default, ONE_AND_EXP)
SIGMOID = OneOf(((ATEN.sigmoid.default, GATE), (MUL, RECIPROCAL, 1), RECIPROCAL))
SILU = OneOf(((DIV, GATE, ONE_AND_EXP), (MUL, GATE, (ATEN.sigmoid.default, GATE))))
DUP = (MUL, "dh", (CONVERT, SILU, "type"))
SLOPE = (ADD, (MUL, GATE, (SUB, 1, SIGMOID)), 1)
DGATE = (CONVERT, (MUL, (MUL, (CONVERT, (MUL, "dh", "up"), torch.float32), SIGMOID), SLOPE), "type")
SCALED = (MUL, (CONVERT, "rows", torch.float32), "channel")
SCALE = (DIV, (ATEN.clamp_min.default, (ATEN.amax.default, (ATEN.abs.default, SCALED), [-1]), 1e-30), FP8_MAX)
CODES = (CONVERT, (DIV, SCALED, (ATEN.unsqueeze.default, "scale", 1)), torch.float8_e4m3fn)


def matched(value: Any, pattern: Any, found: dict[str, Any]) -> dict[str, Any] | None:
    """`found` and what the names in `pattern` met under `value`, or None where it differs."""
    if isinstance(pattern, str):
        return {**found, pattern: value} if found.get(pattern, value) == value else None
    if isinstance(pattern, OneOf):
        return next((one for each in pattern if (one := matched(value, each, found)) is not None), None)
    if isinstance(pattern, tuple):
        if not isinstance(value, fx.Node) or value.target is not pattern[0] or value.kwargs:
            return None
        orders = [value.args, value.args[::-1]] if pattern[0] in EITHER_ORDER else [value.args]
        return next((one for args in orders if (one := _all_matched(args, pattern[1:], found)) is not None), None)
    return found if not isinstance(value, fx.Node) and value == pattern else None


def _all_matched(values: Any, patterns: Any, found: dict[str, Any] | None) -> dict[str, Any] | None:
    if len(values) != len(patterns):
        return None
    for value, pattern in zip(values, patterns, strict=True):
        found = None if found is None else matched(value, pattern, found)
    return found


class FuseSwiglu(graph_pass()):
    """The pass. replaced: how many places it has found since it was made; a cached compilation does not ask it."""

    def __init__(self) -> None:
        self.replaced = 0

    def __call__(self, graph: fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=CONVERT):
            found = self.place(node)
            if found is not None:
                _replace(graph, node, found)
                self.replaced += 1

    @staticmethod
    def place(codes: fx.Node) -> dict[str, Any] | None:
        """The nodes of one place that ends in the node `codes`: dh, gate, up, channel, both (the cat) and scale."""
        found = matched(codes, CODES, {})
        found = found and matched(found["scale"], SCALE, found)
        if not found:
            return None
        rows = found["rows"]
        both = rows.args[0] if rows.target is ATEN.reshape.default else rows
        if both.target is not ATEN.cat.default or len(both.args) != 2 or len(both.args[0]) != 2:
            return None
        (left, right), dim = both.args
        found = matched(right, DUP, found)
        found = found and matched(left, DGATE, found)
        if not found or dim not in (-1, both.meta["val"].dim() - 1) or not isinstance(found["channel"], fx.Node):
            return None
        like = found["dh"].meta["val"]
        same = all(found[name].meta["val"].shape == like.shape for name in ("gate", "up"))
        typed = all(found[name].meta["val"].dtype == found["type"] for name in ("dh", "gate", "up"))
        width = like.shape[-1]
        fits = width <= WIDEST and rows.meta["val"].shape[-1] == 2 * width == found["channel"].meta["val"].numel()
        return {**found, "both": both} if same and typed and fits and found["type"] in HALF else None

    def uuid(self) -> bytes:
        return hash_of_files(__file__)

    def __eq__(self, other: object) -> bool:  # so that layers that are compiled later count as compiled alike
        return type(other) is type(self)

    def __hash__(self) -> int:
        return hash(type(self))


def _replace(graph: fx.Graph, codes: fx.Node, found: dict[str, Any]) -> None:
    """Put the operator where the gradients stood; `channel` may be made only after them, so the graph is sorted."""
    inputs = tuple(found[name] for name in ("dh", "gate", "up", "channel"))
    both, op = found["both"], torch.ops.whet.swiglu_backward.default
    with both.meta["val"].fake_mode:
        values = op(*(node.meta["val"] for node in inputs))
    with graph.inserting_before(both):
        whole = graph.call_function(op, inputs)
        parts = [graph.call_function(operator.getitem, (whole, index)) for index in range(3)]
        shaped = graph.call_function(ATEN.reshape.default, (parts[0], list(both.meta["val"].shape)))
    whole.meta["val"], shaped.meta["val"] = values, both.meta["val"]
    for old, new, value in zip((None, codes, found["scale"]), parts, values, strict=True):
        new.meta["val"] = value
        if old is not None:
            old.replace_all_uses_with(new)
    both.replace_all_uses_with(shaped)
    sort_graph(graph)
    graph.eliminate_dead_code()
