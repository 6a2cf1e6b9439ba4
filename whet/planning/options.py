"""Other ways to run the same recipe, and what each would take: the memory modes, the longest row, the least memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from whet.base.errors import UserError
from whet.data.batch.batches import Cut
from whet.planning import memory
from whet.planning.cards import smallest_card
from whet.planning.costs import TILE_TOKENS, MemoryMode
from whet.planning.decide import decide, free_needed, slack_bytes
from whet.planning.facts import Facts, Work
from whet.planning.layout import Layout
from whet.settings import Train

LONGEST_TOKENS = 1 << 24


def fits(facts: Facts, layout: Layout) -> bool | None:
    """Whether the layout's peak, with the room that torch needs beside it, is in free memory; None without a bound."""
    free = facts.hardware.free_bytes
    return None if free is None else layout.peak_bytes + slack_bytes(free) <= free


def modes(facts: Facts) -> list[tuple[str, MemoryMode]]:
    """The memory modes with their names, from the fastest to the leanest."""
    most = facts.model.shape.layers - 1
    return [
        ("keep everything", MemoryMode()),
        ("gradient checkpointing of half the layers", MemoryMode(most // 2)),
        ("gradient checkpointing of all layers", MemoryMode(most)),
        ("and layer inputs in host memory", MemoryMode(most, offload=most > 0)),
        ("and MLPs in tiles", MemoryMode(most, offload=most > 0, tile_tokens=TILE_TOKENS)),
    ]


def in_mode(facts: Facts, layout: Layout, mode: MemoryMode, *, lean: bool) -> Layout:
    """The same layout with its activations kept otherwise."""
    other = replace(layout, mode=mode, lean=lean and layout.compile_layers, cuda_graphs=False)
    return replace(other, memory=memory.classes(facts, other), host_bytes=memory.host_bytes(facts, other))


def mode_table(facts: Facts, layout: Layout) -> list[dict[str, Any]]:
    """Each memory mode with its peak in bytes, host memory in bytes, and whether it fits."""
    found = []
    for name, mode in modes(facts):
        other = in_mode(facts, layout, mode, lean=mode != MemoryMode())
        found.append(
            {"mode": name, "peak_bytes": other.peak_bytes, "host_bytes": other.host_bytes, "fits": fits(facts, other)}
        )
    return found


def decide_anyway(train: Train, facts: Facts) -> Layout:
    """The layout that is decided, and where none fits, the one that takes the least memory."""
    try:
        return decide(train, facts)
    except UserError:
        return least(train, facts)


def options_of(train: Train, facts: Facts, layout: Layout) -> dict[str, Any]:
    """modes: each memory mode with its peak; least_bytes: what must be free for single rows in the leanest one;
    smallest_card: the known card with the least memory that has it; longest_row_tokens: of a forward pass in this
    layout, None without a bound.

    Empty where memory has no hard end.
    """
    if not facts.on_gpu:
        return {}
    leanest = free_needed(least(train, facts).peak_bytes)
    return {
        "modes": [] if facts.padded_task else mode_table(facts, layout), "least_bytes": leanest,
        "smallest_card": smallest_card(leanest), "longest_row_tokens": longest_row(facts, layout),
    }  # fmt: skip


def least(train: Train, facts: Facts) -> Layout:
    """The layout that takes the least memory on the device: single rows, in the leanest mode that is allowed."""
    alone = Cut(1, facts.work.batches.cut.size * facts.work.batches.cut.accumulate)
    unbounded = replace(
        facts, hardware=replace(facts.hardware, free_bytes=None),
        work=Work(facts.work.batches.with_cut(alone), facts.work.steps),
    )  # fmt: skip
    layout = decide(train, unbounded)
    if train.gradient_checkpointing is False or facts.padded_task:
        return layout
    candidates = [in_mode(facts, layout, mode, lean=True) for _, mode in modes(facts)]
    return min(candidates, key=lambda other: other.peak_bytes)


def longest_row(facts: Facts, layout: Layout) -> int | None:
    """Tokens of the longest forward pass that fits in this layout's mode; None without a bound."""
    if facts.hardware.free_bytes is None or facts.padded_task:
        return None
    low, high = 0, LONGEST_TOKENS
    while low < high:
        middle = (low + high + 1) // 2
        other = replace(layout, tokens=middle)
        if fits(facts, replace(other, memory=memory.classes(facts, other))):
            low = middle
        else:
            high = middle - 1
    return low
