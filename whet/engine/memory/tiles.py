"""MLPs computed in pieces of a row, for rows whose wide activations do not fit.

The tiled MLP of ALST (arXiv:2506.13996) swaps the class of the instance, as `engine.memory.checkpointing` does.
Swapping the module would rename `mlp.up_proj` to `mlp.inner.up_proj` and break adapters; hooks cannot replace a
forward. Each piece of the row is differentiated on its own, so the 2 F wide activations exist for one piece at a time.

Gives up: a tiled MLP is a graph break, so such layers are compiled with fullgraph=False or not at all.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from whet.base.errors import UserError
from whet.base.private import restore_class, swap_class
from whet.engine.layers import decoder_layers
from whet.engine.memory.rerun import autocast_now, drawn_again, has_moved, random_state_of


def tile_mlp(network: nn.Module, tokens: int, *, compiled: Callable[[Any], Any] | None = None) -> int:
    """Compute every decoder layer's MLP in pieces of `tokens` tokens; returns how many layers have one.

    compiled: wraps the MLP's own forward once for each class, e.g. `torch.compile`. 0 tokens: whole rows again.
    Raises UserError when a layer has no MLP that takes one tensor.
    """
    mlps = [_mlp(layer) for layer in decoder_layers(network)]
    for mlp in mlps:
        if "forward" in vars(mlp):
            raise TypeError(f"{type(mlp).__name__} has a forward of its own on the instance, which tiling would miss")
        restore_class(mlp, TiledMlp)
        if tokens:
            inner = _inner(type(mlp), compiled)
            swap_class(mlp, TiledMlp, "Tiled")
            mlp.tokens, mlp.inner = tokens, inner  # type: ignore[assignment]
    return len(mlps)


def _mlp(layer: nn.Module) -> nn.Module:
    """The last child that maps one tensor through two linear layers or more: attention takes more arguments."""
    for child in reversed(list(layer.children())):
        linears = [m for m in child.modules() if hasattr(m, "in_features") or (hasattr(m, "nx") and hasattr(m, "nf"))]
        takes = inspect.signature(_untiled(type(child)).forward).parameters
        needed = [p for p in takes.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        if len(linears) >= 2 and len(needed) == 2 and "attention_mask" not in takes:
            return child
    raise UserError(
        "a decoder layer has no MLP that can be computed in pieces", found=type(layer).__name__,
        expected="a part with two linear layers that takes the hidden states alone", fix="turn tiling off",
    )  # fmt: skip


class TiledMlp(nn.Module):
    """Mixed into the class of one MLP: the same function of [..., H], a few tokens at a time."""

    tokens: int
    inner: Callable[..., torch.Tensor]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return cast("Any", _in_tiles)(self, hidden)


@torch.compiler.disable
def _in_tiles(mlp: TiledMlp, hidden: torch.Tensor) -> torch.Tensor:
    run = functools.partial(mlp.inner, mlp)
    rows = hidden.reshape(1, -1, hidden.shape[-1])
    if torch.is_grad_enabled() and (rows.requires_grad or any(p.requires_grad for p in mlp.parameters())):
        anchor = torch.empty(0, requires_grad=True, device=rows.device)
        output = cast("torch.Tensor", Tiles.apply(anchor, run, mlp.tokens, rows))
    else:
        output = torch.cat([run(piece) for piece in rows.split(mlp.tokens, dim=1)], dim=1)
    return output.view(hidden.shape)


@functools.cache
def _inner(kind: type[nn.Module], compiled: Callable[[Any], Any] | None) -> Callable[..., torch.Tensor]:
    return kind.forward if compiled is None else compiled(kind.forward)


def _untiled(kind: type[nn.Module]) -> type[nn.Module]:
    return kind.__mro__[2] if issubclass(kind, TiledMlp) else kind


class Tiles(torch.autograd.Function):
    """run(x) of x [1, T, H] in pieces of `tokens`; keeps x, and backward runs and differentiates each piece alone.

    Gradients of weights are added up where they lie, once for each piece: whatever leaf `run` reads gets its own, known
    to a module or not. So trained weights should be float32.
    """

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, run: Callable[..., Any], tokens: int, rows: torch.Tensor):
        ctx.run, ctx.tokens, ctx.autocast = run, tokens, autocast_now(rows.device.type)
        ctx.states = []
        output: torch.Tensor | None = None
        for start in range(0, rows.shape[1], tokens):
            before = random_state_of(rows.device)
            piece = run(rows[:, start : start + tokens])
            if not isinstance(piece, torch.Tensor):
                raise TypeError("a tiled MLP must return one tensor [1, T, H]")
            ctx.states.append(before if has_moved(before, random_state_of(rows.device)) else None)
            output = torch.empty_like(rows, dtype=piece.dtype) if output is None else output
            output[:, start : start + tokens] = piece
        ctx.save_for_backward(rows)
        return torch.empty_like(rows) if output is None else output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor):
        (rows,) = ctx.saved_tensors
        grad_rows = torch.empty_like(rows) if ctx.needs_input_grad[3] else None
        for state, start in zip(ctx.states, range(0, rows.shape[1], ctx.tokens), strict=True):
            span = slice(start, start + ctx.tokens)
            piece = rows[:, span].detach().requires_grad_(grad_rows is not None)
            with torch.enable_grad(), ctx.autocast(), drawn_again(state, rows.device):
                output = ctx.run(piece)
            torch.autograd.backward(output, grad_outputs[0][:, span])
            if grad_rows is not None:
                grad_rows[:, span] = 0 if piece.grad is None else piece.grad
        return None, None, None, grad_rows
