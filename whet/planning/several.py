"""What several cards of one kind would need each: the base replicated, or its frozen bytes shared. A plan only.

Training on several cards is not built yet, and the plan says so. The arithmetic is that of the two ways that suit a
frozen base:

- replicate: every card holds the whole base and its own rows; gradients are added once a step.
- shard: every card holds its share of the layers' frozen bytes, and gathers one layer at a time into a ring of two, so
  that the next one comes while this one is computed with. The tables, and what is trained, stay on every card. A model
  that is trained whole is shared with its gradients and moments.

Gives up: the buffers of the library that carries the bytes, and the time, which depends on how the cards are joined.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from whet.base.errors import UserError
from whet.planning import memory
from whet.planning.costs import MemoryMode
from whet.planning.decide import slack_bytes
from whet.planning.facts import Facts
from whet.planning.layout import Layout
from whet.planning.options import modes

RING = 2  # gathered layers at once
NOTICE = "training on several cards is not available in this version: this is what each card would need"
SHARED = ("trained weights", "gradients", "optimiser")


def check_cards(cards: int) -> None:
    """Raise UserError for a number of cards that is none."""
    if cards < 1:
        raise UserError(
            "this is no number of cards",
            field="--gpus",
            found=str(cards),
            expected="a number from 1",
            fix="remove it, or --gpus 2",
        )


def on_several(facts: Facts, layout: Layout, cards: int) -> dict[str, Any]:
    """What each of `cards` cards would need, both ways: memory by class, peak_bytes, fits, and the memory mode."""
    return {
        "cards": cards, "available": False, "notice": NOTICE,
        "replicate": _first_that_fits(facts, layout, 1), "shard": _first_that_fits(facts, layout, cards),
    }  # fmt: skip


def _first_that_fits(facts: Facts, layout: Layout, share: int) -> dict[str, Any]:
    """The fastest memory mode that fits with 1/share of the base on the card, else the leanest."""
    if not facts.on_gpu:
        raise UserError(
            "several cards are planned for GPUs only", field="--gpus", found=facts.placement.device.type,
            expected="cuda or auto with --gpu", fix='name one that need not be here: --gpu "RTX 4090"',
        )  # fmt: skip
    free, found = facts.hardware.free_bytes, {}
    for name, mode in [(None, layout.mode), *modes(facts)] if share == 1 else modes(facts):
        lean = mode != MemoryMode() and layout.compile_layers
        one = layout if name is None else replace(layout, mode=mode, lean=lean, cuda_graphs=False)
        if share > 1:
            one = replace(one, keep_transposed=False, offload_optimizer=False)
        classes = _shared(facts, one, share)
        peak = sum(classes.values())
        fits = None if free is None else peak + slack_bytes(free) <= free
        found = {"memory": classes, "peak_bytes": peak, "fits": fits, "mode": name or "as on one card"}
        if fits is not False:
            break
    return found


def _shared(facts: Facts, layout: Layout, share: int) -> dict[str, int]:
    classes, model = memory.classes(facts, layout), facts.model
    if share == 1:
        return classes
    tables = model.table_bytes + (0 if model.tied else model.head_bytes)
    frozen = max(0, classes["frozen weights"] - tables)
    whole = not model.has_peft and not model.frozen_bytes
    layer = (4 * model.multiplied if whole else frozen) // model.shape.layers
    classes["frozen weights"] = classes["frozen weights"] - frozen + frozen // share
    if whole:
        classes |= {name: classes[name] // share for name in SHARED}
    return classes | {"gathered layers": RING * layer}
