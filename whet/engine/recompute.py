"""Memory for time: layers that keep only their input and run again in backward, and MLPs in pieces.

Recompute (Chen et al., 2016, arXiv:1604.06174) goes through the switch that transformers' GradientCheckpointingLayer
offers on each layer: `gradient_checkpointing` and `_gradient_checkpointing_func`. Ours is a function of the reentrant
kind, because it lies outside the layer's compiled call, keeps exactly one tensor per layer, and that tensor can wait on
the host (`engine.offload`). A layer whose class lacks the switch gets it from a subclass made for that instance, as
FSDP2's `fully_shard` does: no class is changed, and names in the state dict stay. The last layer should never be
chosen: its activations are needed at once, so to drop them saves nothing (`engine.costs`).

The tiled MLP (ALST, arXiv:2506.13996) swaps the instance's class in the same way. Swapping the module would rename
`mlp.up_proj` to `mlp.inner.up_proj` and break adapters; hooks cannot replace a forward. Each piece of the row is
differentiated on its own, so the 2 F wide activations exist for one piece at a time.

Gives up: `torch.autograd.grad`, hooks that count the gradients of a weight, and a second backward (training calls
`loss.backward()` once). Of the contexts around forward only autocast is brought back, not e.g. `sdpa_kernel`. A tiled
MLP is a graph break, so such layers are compiled with fullgraph=False or not at all.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import GradientCheckpointingLayer

from whet.base.errors import UserError
from whet.engine.offload import Stash


def decoder_layers(network: nn.Module) -> list[nn.Module]:
    """The decoder's layers in order: the longest outermost ModuleList of one class, or of checkpointing layers.

    Raises UserError when there is none.
    """
    get = getattr(network, "get_decoder", None)
    found = get() if callable(get) else None
    top = found if isinstance(found, nn.Module) else network
    stacks = list(_stacks(top)) or list(_stacks(network))
    if not stacks:
        raise UserError(
            "the model has no list of like layers", found=type(network).__name__, expected="a decoder of layers",
            fix="turn recompute, offload and tiling off",
        )  # fmt: skip
    return max(stacks, key=len)


def _stacks(module: nn.Module) -> Iterator[list[nn.Module]]:
    # Outermost only: a mixture of experts has more experts in a layer than layers.
    for child in module.children():
        layers = list(child) if isinstance(child, nn.ModuleList) else []
        alike = len({type(layer) for layer in layers}) == 1
        if layers and (alike or all(isinstance(layer, GradientCheckpointingLayer) for layer in layers)):
            yield layers
        else:
            yield from _stacks(child)


def recompute(network: nn.Module, layers: Sequence[int] | None = None, *, offload: bool = False) -> list[int]:
    """Let the layers with these indices keep only their input; None: all but the last, (): none. Returns them.

    offload: inputs wait in host memory, all but that of the last chosen layer, which is needed first. Active in
    training mode with gradients enabled only. May be called again; the last call holds. Raises UserError for a layer
    that does not exist.
    """
    stack = decoder_layers(network)
    chosen = sorted(set(range(len(stack) - 1) if layers is None else layers))
    if any(not 0 <= index < len(stack) for index in chosen):
        raise UserError(
            "there is no such layer", found=str([c for c in chosen if not 0 <= c < len(stack)]),
            expected=f"0 to {len(stack) - 1}", fix="name layers that the model has",
        )  # fmt: skip
    stash = Stash() if offload else None
    for index, layer in enumerate(stack):
        if index in chosen and not isinstance(layer, GradientCheckpointingLayer):
            layer.__class__ = _switchable(type(layer))
        if isinstance(layer, GradientCheckpointingLayer):
            checkpoint: Any = Checkpoint(stash, away=offload and index != max(chosen, default=-1))
            layer.gradient_checkpointing = index in chosen
            layer._gradient_checkpointing_func = checkpoint
    return chosen


@functools.cache
def _switchable(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Recomputed{kind.__name__}", (GradientCheckpointingLayer, kind), {})


@dataclass(frozen=True)
class Slot:
    """Stands in kept arguments for the tensor that backward puts there."""

    place: int


class Checkpoint:
    """What a layer calls in place of itself: `checkpoint(partial(layer, **kwargs), hidden, *args)`.

    stash: shared by the layers whose inputs are offloaded; away: whether this layer's is. random: whether the layer
    draws random numbers, as its first run shows; their state is kept only then.
    """

    def __init__(self, stash: Stash | None = None, *, away: bool = False) -> None:
        self.stash, self.away = stash, away
        self.random: bool | None = None

    def __call__(self, call: functools.partial[Any], *args: Any) -> Any:
        given = list(_tensors((args, call.keywords)))
        grows = [t for t in given if t.requires_grad]
        if not torch.is_grad_enabled() or not (grows or any(p.requires_grad for p in _owner(call).parameters())):
            return call(*args)
        if not args or not isinstance(args[0], torch.Tensor):
            raise TypeError("a recomputed layer takes its hidden states [B, T, H] as the first positional argument")
        inputs = [args[0], *{id(t): t for t in grows if t is not args[0]}.values()]
        # The output must ask for a gradient even where only the layer's own weights do.
        anchor = torch.empty(0, requires_grad=True, device=args[0].device)
        output = Rerun.apply(anchor, self, call, args, *inputs)
        if len(given) != len(list(_tensors((args, call.keywords)))):
            raise UserError(
                "layers of this model hand each other tensors beside their output, so they cannot be run again",
                found=type(_owner(call)).__name__, expected="layers that only read their arguments",
                fix="turn recompute off, or choose layers that do not",
            )  # fmt: skip
        return output


class Rerun(torch.autograd.Function):
    """A layer's forward that keeps its differentiable inputs alone; backward runs the layer again with a graph."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, checkpoint: Checkpoint, call: Any, args: Any, *inputs: torch.Tensor):
        slots = {id(tensor): Slot(place) for place, tensor in enumerate(inputs)}
        ctx.inner, ctx.arguments = call.func, _replace((args, call.keywords), slots)
        ctx.autocast = _autocast_now(inputs[0].device.type)
        before = None if checkpoint.random is False else _random_state(inputs[0].device)
        output = _first_run(call, args, ctx.arguments, inputs)
        if before is not None and checkpoint.random is None:
            checkpoint.random = _moved(before, _random_state(inputs[0].device))
        ctx.random = before if checkpoint.random else None
        ctx.stash = checkpoint.stash
        ctx.stowed = checkpoint.stash.put(inputs[0]) if checkpoint.stash is not None and checkpoint.away else None
        ctx.save_for_backward(*(inputs if ctx.stowed is None else inputs[1:]))
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor | None):
        inputs = ctx.saved_tensors
        if ctx.stowed is not None:
            inputs = (ctx.stash.get(ctx.stowed), *inputs)
        elif ctx.stash is not None:
            ctx.stash.expect()
        wanted = ctx.needs_input_grad[4:]
        fresh = [tensor.detach().requires_grad_(want) for tensor, want in zip(inputs, wanted, strict=True)]
        args, kwargs = _fill(ctx.arguments, fresh)
        with torch.enable_grad(), ctx.autocast(), _drawn_again(ctx.random, fresh[0].device):
            output = ctx.inner(*args, **kwargs)
        outputs = output if isinstance(output, tuple) else (output,)
        pairs = [(o, g) for o, g in zip(outputs, grad_outputs, strict=True) if g is not None and o.requires_grad]
        torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
        return None, None, None, None, *(tensor.grad for tensor in fresh)


def _first_run(call: functools.partial[Any], args: Any, arguments: Any, inputs: Sequence[torch.Tensor]) -> Any:
    """The layer's output without a graph. A compiled layer makes its graph and drops it at once.

    Compiled without gradients it would be another program, which costs a second compilation, rounds otherwise and need
    not draw the same dropout masks.
    """
    if getattr(_owner(call), "_compiled_call_impl", None) is None:
        return call(*args)
    with torch.enable_grad():
        again, kwargs = _fill(arguments, [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in inputs])
        output = call.func(*again, **kwargs)
    if isinstance(output, tuple):
        return tuple(part.detach() if isinstance(part, torch.Tensor) else part for part in output)
    return output.detach()


def _owner(call: functools.partial[Any]) -> nn.Module:
    return cast("Any", call.func).__self__


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested tuples, lists and mappings."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _replace(value: Any, slots: dict[int, Slot]) -> Any:
    """`value` with slots where those tensors were; what holds none of them stays the same object."""
    if isinstance(value, torch.Tensor):
        return slots.get(id(value), value)
    if not any(id(tensor) in slots for tensor in _tensors(value)):
        return value
    if isinstance(value, Mapping):
        return {key: _replace(item, slots) for key, item in value.items()}
    return type(value)([_replace(item, slots) for item in value])


def _fill(value: Any, tensors: Sequence[torch.Tensor]) -> Any:
    if isinstance(value, Slot):
        return tensors[value.place]
    if type(value) is dict:
        return {key: _fill(item, tensors) for key, item in value.items()}
    return type(value)([_fill(item, tensors) for item in value]) if type(value) in (list, tuple) else value


def _autocast_now(device: str) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Makes the autocast context that holds now, for later: backward runs outside of it."""
    kept = {
        "dtype": torch.get_autocast_dtype(device),
        "enabled": torch.is_autocast_enabled(device),
        "cache_enabled": torch.is_autocast_cache_enabled(),
    }
    return functools.partial(torch.autocast, device, **kept)


def _random_state(device: torch.device) -> tuple[torch.Tensor, ...]:
    """States of the generators that a layer on `device` draws from; both lie on the host, so nothing waits."""
    here = torch.get_rng_state()
    return (here, torch.cuda.get_rng_state(device)) if device.type == "cuda" else (here,)


def _moved(before: tuple[torch.Tensor, ...], after: tuple[torch.Tensor, ...]) -> bool:
    return not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@contextlib.contextmanager
def _drawn_again(state: tuple[torch.Tensor, ...] | None, device: torch.device) -> Iterator[None]:
    """Within, random numbers come as they did after `state`; outside nothing has been drawn. None: nothing happens."""
    if state is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(state[1], device)
        yield


def tile_mlp(network: nn.Module, tokens: int, *, compiled: Callable[[Any], Any] | None = None) -> int:
    """Compute every decoder layer's MLP in pieces of `tokens` tokens; returns how many layers have one.

    compiled: wraps the MLP's own forward once for each class, e.g. `torch.compile`. 0 tokens: whole rows again.
    Raises UserError when a layer has no MLP that takes one tensor.
    """
    mlps = [_mlp(layer) for layer in decoder_layers(network)]
    for mlp in mlps:
        if "forward" in vars(mlp):
            raise TypeError(f"{type(mlp).__name__} has a forward of its own on the instance, which tiling would miss")
        kind = _untiled(type(mlp))
        mlp.__class__ = kind if not tokens else _tiled(kind, tokens, compiled)
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
    run = functools.partial(type(mlp).inner, mlp)
    rows = hidden.reshape(1, -1, hidden.shape[-1])
    if torch.is_grad_enabled() and (rows.requires_grad or any(p.requires_grad for p in mlp.parameters())):
        anchor = torch.empty(0, requires_grad=True, device=rows.device)
        output = cast("torch.Tensor", Tiles.apply(anchor, run, mlp.tokens, rows))
    else:
        output = torch.cat([run(piece) for piece in rows.split(mlp.tokens, dim=1)], dim=1)
    return output.view(hidden.shape)


@functools.cache
def _tiled(kind: type[nn.Module], tokens: int, compiled: Callable[[Any], Any] | None) -> type[nn.Module]:
    inner = kind.forward if compiled is None else compiled(kind.forward)
    return type(f"Tiled{kind.__name__}", (TiledMlp, kind), {"tokens": tokens, "inner": staticmethod(inner)})


def _untiled(kind: type[nn.Module]) -> type[nn.Module]:
    return kind.__mro__[2] if issubclass(kind, TiledMlp) else kind


class Tiles(torch.autograd.Function):
    """run(x) of x [1, T, H] in pieces of `tokens`; keeps x, and backward runs and differentiates each piece alone.

    Gradients of weights are added up where they lie, once for each piece: whatever leaf `run` reads gets its own, known
    to a module or not. So trained weights should be float32.
    """

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, run: Callable[..., Any], tokens: int, rows: torch.Tensor):
        ctx.run, ctx.tokens, ctx.autocast = run, tokens, _autocast_now(rows.device.type)
        ctx.states = []
        output: torch.Tensor | None = None
        for start in range(0, rows.shape[1], tokens):
            before = _random_state(rows.device)
            piece = run(rows[:, start : start + tokens])
            if not isinstance(piece, torch.Tensor):
                raise TypeError("a tiled MLP must return one tensor [1, T, H]")
            ctx.states.append(before if _moved(before, _random_state(rows.device)) else None)
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
            with torch.enable_grad(), ctx.autocast(), _drawn_again(state, rows.device):
                output = ctx.run(piece)
            torch.autograd.backward(output, grad_outputs[0][:, span])
            if grad_rows is not None:
                grad_rows[:, span] = 0 if piece.grad is None else piece.grad
        return None, None, None, grad_rows
