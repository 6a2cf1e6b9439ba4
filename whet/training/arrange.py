"""How the model is laid out for speed on the hardware at hand: groups, forms, memory mode, compilation, graphs.

None of it changes what is computed; each part is a setting, and `auto` takes the fastest that fits. What was decided is
said, and stands in arrangement.json of the run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch

from whet.base.console import bytes_text, say
from whet.base.errors import UserError
from whet.base.private import compile_errors
from whet.data.batch.batches import Batches
from whet.data.batch.forms import choose_forms
from whet.engine.compute.attention import fastest_attention
from whet.engine.compute.compile import compile_layers, forget_compilation, lean_activations, worth_compiling
from whet.engine.compute.head import CHUNK_LOGITS, Head
from whet.engine.device import Placement
from whet.engine.layers import decoder_layers
from whet.engine.memory.checkpointing import checkpoint_layers
from whet.engine.memory.host_adam import halve, halves
from whet.engine.memory.host_tables import offload_embedding
from whet.engine.memory.tiles import tile_mlp
from whet.methods.layers.group import Fused, fuse
from whet.planning.costs import Mode, choose, keep_bytes, peak_bytes, sizes_of
from whet.settings import Train
from whet.training.graph import side_stream
from whet.training.loss import Forward

T = TypeVar("T")
Masters = dict[torch.nn.Parameter, torch.Tensor]
MAX_FORMS, MAX_COMPILED_FORMS = 3, 2  # each form of a compiled layer costs its compilation
CPU_MULTIPLE = 32
# Times the least that a layer must keep. The last two are measured on an H100 (docs/log.md), the first is assumed.
EAGER_KEEPS, COMPILED_KEEPS, LEAN_KEEPS = 2.6, 1.6, 1.15
SLACK_BYTES = 2 << 30
TILE_TOKENS = 4096
LEAST_TOKENS = 4096  # a forward pass of fewer leaves a large model's products waiting
KEPT_SHARE = 0.2  # fp8 bytes are kept in both orders where they take less than this share of the free memory


@dataclass(frozen=True)
class Arrangement:
    """matrices, vectors: what the optimiser trains; graphs: whether steps are captured; facts: what was decided.

    masters: None where the optimiser is on the device, else the exact weights that are on the host already.
    """

    forward: Forward
    batches: Batches
    matrices: list[torch.nn.Parameter]
    vectors: list[torch.nn.Parameter]
    graphs: bool
    facts: dict[str, Any]
    network: torch.nn.Module
    masters: Masters | None = None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """What holds while steps run: the fastest attention, a stream for capture, what compiled layers keep."""
        device = self.forward.device
        with fastest_attention(device), side_stream(device), lean_activations(self.facts["lean_activations"]):
            yield

    def first(self, step: Callable[[], T]) -> T:
        """Run the first step of this process; where a layer cannot be compiled, say so and run it uncompiled."""
        try:
            return step()
        except compile_errors() as problem:
            if not self.facts["compile"]:
                raise
            reason = str(problem).strip().splitlines()[0]
            say(f"this model's layers cannot be compiled, so they run as they are ({reason})", style="yellow")
            forget_compilation(self.network)
            for parameter in (*self.matrices, *self.vectors):
                parameter.grad = None
            return step()


@dataclass(frozen=True)
class Memory:
    """mode: layers run again, offloaded, tiled; lean: compiled layers keep less."""

    mode: Mode
    lean: bool


def arrange(
    train: Train, placement: Placement, model: torch.nn.Module, network: torch.nn.Module, forward: Forward,
    batches: Batches, *, steps: int, masters: Masters | None = None,
) -> Arrangement:  # fmt: skip
    """Lay out `model` (with its method; `network` inside it) for `steps` steps over `batches`.

    masters: what `halve` gave where it was called already.
    """
    on_gpu = placement.device.type == "cuda"
    compiled = _compiled(train, network, batches, steps, on_gpu)
    both = keeps_both(placement)
    fused = fused_groups(train, placement, model, both)
    matrices, vectors = split_trained(fused, model)
    forward = replace(forward, head=_head(forward.head, placement, network, both))
    if placement.offload_embedding:
        offload_embedding(network)
    if fused is not None:
        forward = replace(forward, prepare=fused.refresh)
    free, masters = _with_optimiser(train, placement, network, batches, (matrices + vectors, masters), steps)
    batches = _fitted(train, batches, network, free, compiled, steps)
    batches = formed(batches, steps, on_gpu, _most_forms(batches, network, free, compiled, steps))
    memory = _memory(train, batches, network, free, compiled, steps)
    tokens = _largest(batches, steps)
    if memory.mode.recompute:
        checkpoint_layers(network, range(memory.mode.recompute), offload=memory.mode.offload)
    if memory.mode.tile_tokens:
        tile_mlp(network, memory.mode.tile_tokens)
    if compiled:
        compile_layers(network, tokens=tokens, whole=not memory.mode.tile_tokens)
    here = not (placement.offload_embedding or placement.offload_head or masters is not None)
    graphs = _graphs(train, batches, memory.mode, on_gpu and here)
    facts: dict[str, Any] = {
        "groups": 0 if fused is None else len(fused.groups), "compile": compiled, "cuda_graphs": graphs,
        "micro_batches": batches.accumulate, "tokens_in_a_forward_pass": tokens, "memory": asdict(memory.mode),
        "lean_activations": memory.lean, "forms": [asdict(form) for form in batches.forms],
        "offload_optimizer": masters is not None,
    }  # fmt: skip
    if on_gpu:
        _say(facts, memory.mode)
    return Arrangement(forward, batches, matrices, vectors, graphs, facts, network, masters)


def _head(head: Head | None, placement: Placement, network: torch.nn.Module, both: bool) -> Head | None:
    """The output head in FP8 and on the host, where that is asked for. Raises UserError where it cannot be."""
    if head is not None and placement.fp8_head:
        head = head.in_fp8(network, both_orders=both)
    for wanted, there, what, field in (
        (placement.fp8_head, head is not None and head.fp8 is not None, "multiplied in FP8", "base.fp8_head"),
        (placement.offload_head, head is not None, "kept on the host", "base.offload_head"),
    ):
        if wanted and not there:
            raise UserError(
                f"this model's output head cannot be {what}", field=field, found="true", expected="false",
                fix=f"{field}=false",
            )  # fmt: skip
    return head.on_host(network) if head is not None and placement.offload_head else head


def _compiled(train: Train, network: torch.nn.Module, batches: Batches, steps: int, on_gpu: bool) -> bool:
    """Whether layers are compiled: as set, else where the whole run is long enough."""
    if train.compile is not None or not on_gpu or not batches.flat:
        return bool(train.compile)
    epoch = min(steps, batches.steps_per_epoch)
    tokens = int(batches.facts(epoch).tokens.sum()) * steps // max(1, epoch)
    return worth_compiling(sum(p.numel() for p in network.parameters()), tokens)


def fused_groups(
    train: Train, placement: Placement, model: torch.nn.Module, both: bool, probe: torch.nn.Module | None = None
) -> Fused | None:
    """The LoRA layers in groups, unless the optimiser needs to see each matrix or there are none.

    probe: what to call instead of `model`, which is inside it, where token ids alone are not enough.
    """
    if train.optim == "adafactor" or not hasattr(model, "peft_config"):
        return None
    found = fuse(probe or model, compute=placement.compute, fp8=placement.fp8, keep_transposed=both)
    return found if found.groups else None


def keeps_both(placement: Placement) -> bool:
    """Whether FP8 bytes are kept in both orders: as set, else where they are small beside the free memory."""
    if placement.offload_embedding or placement.offload_head:  # who asks for that wants the least memory
        return False
    if placement.keep_transposed is not None or placement.device.type != "cuda" or not placement.fp8:
        return bool(placement.keep_transposed)
    held = torch.cuda.memory_allocated(placement.device)
    return held < KEPT_SHARE * torch.cuda.mem_get_info(placement.device)[0]


def split_trained(
    fused: Fused | None, model: torch.nn.Module
) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """(weights that decay, those that do not); a group's row holds matrices."""
    rest = [p for p in model.parameters() if p.requires_grad] if fused is None else fused.rest
    leaves = [] if fused is None else fused.leaves
    return leaves + [p for p in rest if p.ndim >= 2], [p for p in rest if p.ndim < 2]


def _free_bytes(trained: list[torch.nn.Parameter], device: torch.device, *, on_host: bool) -> int:
    """What activations may take: free now, less gradients and moments to come, logits and slack.

    on_host: moments are there, and of the gradients all but two, the largest ones at worst.
    """
    free, _ = torch.cuda.mem_get_info(device)
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    numbers = [p.numel() for p in trained]
    coming = 8 * max(numbers, default=0) if on_host else 12 * sum(numbers)
    return free + idle - coming - 3 * CHUNK_LOGITS["cuda"] - SLACK_BYTES


def _with_optimiser(
    train: Train, placement: Placement, network: torch.nn.Module, batches: Batches,
    trained: tuple[list[torch.nn.Parameter], Masters | None], steps: int,
) -> tuple[int | None, Masters | None]:  # fmt: skip
    """(bytes for activations, None on a CPU; masters, None where the optimiser stays on the device).

    trained: all parameters, and the masters there are.
    """
    parameters, masters = trained
    device = placement.device
    on_gpu = device.type == "cuda"
    free = _free_bytes(parameters, device, on_host=masters is not None) if on_gpu else None
    wanted = train.offload_optimizer
    if wanted is None and free is not None and train.optim == "adamw" and not train.cuda_graphs:
        wanted = free < least_bytes(network, batches, steps)
    if not wanted or masters is not None:
        return free, masters
    masters = halve(network, device, placement.compute) if placement.autocast and halves(network) else {}
    return (_free_bytes(parameters, device, on_host=True) if on_gpu else None), masters


def least_bytes(network: torch.nn.Module, batches: Batches, steps: int) -> float:
    """Activations of the largest batch in the leanest mode; only when that does not fit, something else must help."""
    sizes = sizes_of(network.config)  # type: ignore[arg-type]
    return LEAN_KEEPS * peak_bytes(sizes, _largest(batches, steps), Mode(sizes.layers - 1, True, TILE_TOKENS))


def _largest(batches: Batches, steps: int) -> int:
    if batches.forms:
        return batches.forms[-1].tokens
    return int(batches.facts(min(steps, batches.steps_per_epoch)).tokens.max())


def cut(batches: Batches, fits: Callable[[Batches], bool], steps: int) -> Batches:
    """The micro-batches of a step as few and large as fit: joined, or cut down to LEAST_TOKENS; the result is the same.

    Where nothing fits they stay as they are, and a memory mode has to help.
    """
    together = batches.size * batches.accumulate
    for size in (n for n in range(together, 0, -1) if together % n == 0):
        found = replace_sizes(batches, size, together // size)
        if size < batches.size and _largest(found, steps) < LEAST_TOKENS:
            break
        if fits(found):
            return found
    return batches


def _fitted(
    train: Train, batches: Batches, network: torch.nn.Module, free: int | None, compiled: bool, steps: int
) -> Batches:
    """Batches cut to what fits with all activations kept, where whet may decide."""
    if train.fit_micro_batches is False or not batches.flat or free is None or _asked(train):
        return batches
    sizes = sizes_of(network.config)  # type: ignore[arg-type]
    keeps, _ = _keeps(batches, compiled)
    return cut(batches, lambda found: keeps * keep_bytes(sizes, _largest(found, steps)) <= free, steps)


def _asked(train: Train) -> bool:
    """Whether the recipe asks for a memory mode."""
    return bool(train.gradient_checkpointing or train.activation_offload or train.tile_mlp)


def replace_sizes(batches: Batches, size: int, accumulate: int, multiple: int = 1, forms: Any = ()) -> Batches:
    """The same units in the same order, cut otherwise."""
    return Batches(
        batches.rows, batches.units, size=size, accumulate=accumulate, flat=batches.flat, seed=batches.seed,
        multiple=multiple, forms=forms, by_length=batches.by_length,
    )  # fmt: skip


def _most_forms(batches: Batches, network: torch.nn.Module, free: int | None, compiled: bool, steps: int) -> int:
    """One where two do not fit: a captured form holds its memory while another one runs uncaptured."""
    if free is None or not batches.flat:
        return MAX_FORMS
    most = _keeps(batches, compiled)[0] * keep_bytes(sizes_of(network.config), _largest(batches, steps))  # type: ignore[arg-type]
    if 2 * most > free:
        return 1
    return MAX_COMPILED_FORMS if compiled else MAX_FORMS


def formed(batches: Batches, steps: int, on_gpu: bool, limit: int) -> Batches:
    """Batches that are filled up: to a few forms on a GPU, to a multiple on a CPU."""
    if not on_gpu or not batches.flat:
        return replace_sizes(batches, batches.size, batches.accumulate, 1 if on_gpu else CPU_MULTIPLE)
    forms = choose_forms(batches.facts(steps), limit)
    return replace_sizes(batches, batches.size, batches.accumulate, 1, forms)


def _memory(
    train: Train, batches: Batches, network: torch.nn.Module, free: int | None, compiled: bool, steps: int
) -> Memory:
    """What the settings ask for, and where they leave it open, the fastest that fits."""
    wanted = train.gradient_checkpointing
    if _asked(train):
        mode = Mode(len(decoder_layers(network)) - 1, bool(train.activation_offload), train.tile_mlp or 0)
        return Memory(mode, lean=compiled)
    if free is None:
        return Memory(Mode(), lean=False)
    sizes, tokens = sizes_of(network.config), _largest(batches, steps)  # type: ignore[arg-type]
    full, lean = _keeps(batches, compiled)
    if full * keep_bytes(sizes, tokens) <= free:
        return Memory(Mode(), lean=False)
    if wanted is False:
        return Memory(Mode(), lean=compiled)
    return Memory(choose(int(free / lean), sizes, tokens, tokens, tile_tokens=TILE_TOKENS).mode, lean=compiled)


def _keeps(batches: Batches, compiled: bool) -> tuple[float, float]:
    """What a layer keeps, as a multiple of the least, with everything kept and at its leanest."""
    if not compiled:
        return EAGER_KEEPS, EAGER_KEEPS
    lengths = batches.rows.lengths
    dense = bool(lengths.min() == lengths.max())
    return (COMPILED_KEEPS, LEAN_KEEPS) if dense else (1.15 * COMPILED_KEEPS, 1.2 * LEAN_KEEPS)


def _graphs(train: Train, batches: Batches, mode: Mode, on_gpu: bool) -> bool:
    """Whether steps can be captured; a setting that asks for the impossible is refused."""
    possible = on_gpu and train.optim == "adamw" and bool(batches.forms) and not mode.recompute and not mode.tile_tokens
    if train.cuda_graphs and not possible:
        raise UserError(
            "this run's steps cannot be captured", field="train.cuda_graphs", found="true",
            expected="padding-free rows, optim adamw, no recomputed layers", fix="train.cuda_graphs=auto",
        )  # fmt: skip
    return possible if train.cuda_graphs is None else train.cuda_graphs


def _say(facts: dict[str, Any], mode: Mode) -> None:
    forms = ", ".join(f"{form['tokens']:,}" for form in facts["forms"])
    words = [f"{facts['micro_batches']} forward pass(es) a step"]
    words += [f"of {forms} tokens"] if forms else []
    words += ["layers compiled (the first steps take long)"] if facts["compile"] else []
    words += ["steps captured as CUDA graphs"] if facts["cuda_graphs"] else []
    words += [f"{mode.recompute} layers run again in the backward pass"] if mode.recompute else []
    words += ["their inputs in host memory"] if mode.offload else []
    words += ["lean activations"] if facts["lean_activations"] else []
    words += ["the optimiser in host memory, so no CUDA graphs"] if facts["offload_optimizer"] else []
    free, total = torch.cuda.mem_get_info()
    say(", ".join(words) + f"; {bytes_text(total - free)} of {bytes_text(total)} in use", style="dim")
