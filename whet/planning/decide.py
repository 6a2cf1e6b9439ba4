"""The one place where it is decided how a run sits on the hardware: a pure function of settings and facts.

Each setting that is left open (`auto`) gets the fastest choice that fits the memory which is free; a setting that says
something is obeyed. The order is fixed: what costs no time first (larger or fewer forward passes), then what costs a
little (lean activations), then gradient checkpointing, offloading, tiles. What cannot hold together was refused before
(`planning.rules`). Gives up: nothing is tried out; where the arithmetic is wrong, training cuts the step when memory
runs out (`training.launch`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from whet.data.batch.batches import Batches
from whet.data.batch.text_batches import TextBatches
from whet.engine.compute.compile import worth_compiling
from whet.planning import memory
from whet.planning.costs import TILE_TOKENS, MemoryMode, fastest_mode
from whet.planning.facts import Facts
from whet.planning.layout import Layout
from whet.settings import Train

MAX_FORMS, MAX_COMPILED_FORMS = 3, 2  # each form of a compiled layer costs its compilation
SLACK_BYTES, SLACK_SHARE = 2 << 30, 1 / 8
LEAST_TOKENS = 4096  # a forward pass of fewer leaves a large model's products waiting
CAPTURED = ("adamw", "adamw_8bit", "paged_adamw_8bit")  # optimisers whose update can be part of a CUDA graph
TRANSPOSED_SHARE = 0.2  # fp8 bytes are kept in both orders where weights take less than this share of the free memory


def decide(train: Train, facts: Facts) -> Layout:
    """The layout that the settings allow and the memory holds. Raises UserError where nothing fits."""
    layout = Layout(
        flat=facts.flat, padded_task=facts.padded_task, cut=facts.work.batches.cut, tokens=facts.work.largest_tokens,
        optim=train.optim, group_lora=groups_lora(train, facts),
    )  # fmt: skip
    layout = replace(layout, compile_layers=compiles(train, facts), keep_transposed=_keeps_transposed(facts, layout))
    layout = _place_optimiser(train, facts, layout)
    room = _room(facts, layout)
    if asks_for_memory_mode(train):
        layout = _asked_mode(train, facts, layout)
    layout = _cut(train, facts, layout, room)
    layout = _fill(facts, layout, room)
    layout = _keep_activations(train, facts, layout, room)
    layout = replace(layout, cuda_graphs=_captures(train, facts, layout))
    return replace(layout, memory=memory.classes(facts, layout), host_bytes=memory.host_bytes(facts, layout))


def asks_for_memory_mode(train: Train) -> bool:
    """Tell whether the settings ask for gradient checkpointing, offloaded inputs or tiles."""
    return bool(train.gradient_checkpointing or train.activation_offload or train.tile_mlp)


def groups_lora(train: Train, facts: Facts) -> bool:
    """Whether LoRA layers that read one input are one product. Adafactor's moments are those of each matrix."""
    return facts.model.has_peft and train.optim != "adafactor"


def compiles(train: Train, facts: Facts) -> bool:
    """Whether layers are compiled: as set, else where the whole run is long enough."""
    if train.compile is not None or not facts.on_gpu or not facts.flat:
        return bool(train.compile)
    return worth_compiling(facts.model.total, facts.work.tokens)


def _keeps_transposed(facts: Facts, layout: Layout) -> bool:
    """As set, else where the weights are small beside the free memory."""
    placement = facts.placement
    if placement.offload_embedding or placement.offload_head:  # who asks for that wants the least memory
        return False
    if placement.keep_transposed is not None or not placement.fp8 or facts.hardware.free_bytes is None:
        return bool(placement.keep_transposed)
    held = memory.weights_and_optimiser(facts, layout)["frozen weights"]
    return held < TRANSPOSED_SHARE * (facts.hardware.free_bytes - held)


def _place_optimiser(train: Train, facts: Facts, layout: Layout) -> Layout:
    """On the host where that is asked for, or where not even the leanest activations would fit beside it; paged moments
    in pages there."""
    wanted = train.offload_optimizer
    room = _room(facts, layout)
    if train.optim == "paged_adamw_8bit" and room is not None:
        return replace(layout, page_optimizer=room < memory.passing(facts, _leanest(facts, layout)))
    if wanted is None and room is not None and train.optim == "adamw" and not (train.cuda_graphs or facts.padded_task):
        wanted = room < memory.passing(facts, _leanest(facts, layout))
    if not wanted:
        return layout
    short = facts.placement.autocast and facts.model.short_numbers > 0 and not facts.padded_task
    return replace(layout, offload_optimizer=True, short_weights=short)


def _leanest(facts: Facts, layout: Layout) -> Layout:
    """The layout that keeps the least activations of the same forward pass."""
    mode = MemoryMode(facts.model.shape.layers - 1, True, TILE_TOKENS)
    return replace(layout, mode=mode, compile_layers=True, lean=True)


def _room(facts: Facts, layout: Layout) -> int | None:
    """Bytes for a forward and backward pass: free memory less weights, moments and slack; None: no bound."""
    free = facts.hardware.free_bytes
    if free is None:
        return None
    taken = sum(memory.weights_and_optimiser(facts, layout).values())
    return free - taken - slack_bytes(free)


def slack_bytes(free: int) -> int:
    """What is left free: torch keeps blocks of freed memory that do not fit the next request."""
    return min(SLACK_BYTES, int(SLACK_SHARE * free))


def free_needed(peak: int) -> int:
    """The least free memory in which a peak of so many bytes fits with its slack."""
    return peak + min(SLACK_BYTES, int(SLACK_SHARE / (1 - SLACK_SHARE) * peak) + 8)


def _cut(train: Train, facts: Facts, layout: Layout, room: int | None) -> Layout:
    """Forward passes as few and large as fit with all activations kept, where whet may decide.

    Who asks for layers that run again wants little memory: their passes are joined up to LEAST_TOKENS alone. Who asks
    for more than that gets the passes that were asked for.
    """
    if train.fit_micro_batches is False or not facts.flat or room is None or layout.mode.offload:
        return layout
    if layout.mode.tile_tokens:
        return layout
    work, most = facts.work, None
    if layout.mode.checkpointed_layers:
        most = max(layout.tokens, LEAST_TOKENS)

    def fits(batches: TextBatches) -> bool:
        candidate = replace(layout, tokens=batches.largest_tokens(work.steps))
        return memory.passing(facts, candidate) <= room and (most is None or candidate.tokens <= most)

    assert isinstance(work.batches, TextBatches), "only text is flat"
    return _with_batches(layout, work.batches.fewest(fits, work.steps, least_tokens=LEAST_TOKENS), work.steps)


def _fill(facts: Facts, layout: Layout, room: int | None) -> Layout:
    """Fill flat batches up: to a few forms on a GPU, to a multiple of tokens on a CPU."""
    if not facts.flat:
        return layout
    most_forms = 0
    if facts.on_gpu:
        most_forms = MAX_COMPILED_FORMS if layout.compile_layers else MAX_FORMS
        # A captured form holds its memory while another one runs uncaptured.
        if room is not None and 2 * memory.passing(facts, layout) > room:
            most_forms = 1
    steps, batches = facts.work.steps, facts.work.batches.with_cut(layout.cut)
    assert isinstance(batches, TextBatches), "only text is flat"
    return _with_batches(layout, batches.filled(steps, most_forms=most_forms), steps)


def _with_batches(layout: Layout, batches: Batches[Any], steps: int) -> Layout:
    return replace(layout, cut=batches.cut, tokens=batches.largest_tokens(steps))


def _asked_mode(train: Train, facts: Facts, layout: Layout) -> Layout:
    """The memory mode that the settings ask for."""
    layers = facts.model.shape.layers
    count = layers if facts.padded_task else layers - 1  # transformers' own switch knows no layer by itself
    mode = MemoryMode(count, bool(train.activation_offload), train.tile_mlp or 0)
    return replace(layout, mode=mode, lean=layout.compile_layers)


def _keep_activations(train: Train, facts: Facts, layout: Layout, room: int | None) -> Layout:
    """The memory mode that was asked for, and where the settings leave it open, the fastest that fits."""
    layers = facts.model.shape.layers
    if asks_for_memory_mode(train):
        return layout
    if room is None or facts.padded_task or memory.passing(facts, layout) <= room:
        return layout
    layout = replace(layout, lean=layout.compile_layers)
    if train.gradient_checkpointing is False:
        return layout
    return replace(
        layout, mode=fastest_mode(room, layers, lambda mode: memory.passing(facts, replace(layout, mode=mode)))
    )


def _captures(train: Train, facts: Facts, layout: Layout) -> bool:
    """Whole steps as CUDA graphs: wherever they can be and are not turned off.

    Layers that run again may do so in a graph where they draw nothing from torch's generator, whose state is out of
    reach there.
    """
    tables = facts.placement.offload_embedding or facts.placement.offload_head
    on_host = tables or layout.offload_optimizer or layout.page_optimizer or layout.mode.offload
    again = layout.mode.checkpointed_layers > 0 and facts.model.draws
    possible = (
        facts.on_gpu and train.optim in CAPTURED and bool(layout.cut.forms) and not layout.mode.tile_tokens
        and not on_host and not again
    )  # fmt: skip
    return possible and train.cuda_graphs is not False
