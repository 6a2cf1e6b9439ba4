"""What training gives up when memory runs out, and the error once there is nothing left to give up.

Smaller micro-batches come first (`training.launch`): they cost nothing but the size of a product. Where a row is alone,
layers begin to run again in the backward pass, then their inputs wait on the host, then MLPs are computed in pieces, as
far as the recipe allows each (a setting that says something is obeyed) and no rule speaks against it. All of it is the
same computation, so the result is that of a run that was laid out so from the start. Gives up: a mode that was taken is
kept to the end of the process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from whet.base.console import bytes_text
from whet.base.errors import UserError
from whet.base.out_of_memory import CLOSE_OTHERS
from whet.engine.compute.compile import forget_compilation
from whet.engine.device import PACKED
from whet.engine.memory.scarce import free_text, reachable_bytes
from whet.planning.costs import TILE_TOKENS, MemoryMode
from whet.planning.decide import free_needed
from whet.planning.facts import Facts
from whet.planning.layout import Layout
from whet.planning.options import least, longest_row, smallest_card
from whet.planning.plan import Plan
from whet.planning.rules import RULES, decided
from whet.training.apply import Arranged, keep_less


class Relief:
    """The memory modes that a run can still take, and what it says in the end.

    note: keeps what was changed, as entries of layout.json; name_rows: says where rows of the training data come from.
    """

    def __init__(
        self, plan: Plan, note: Callable[[dict[str, Any]], None], name_rows: Callable[[Sequence[int]], str]
    ) -> None:
        self.plan, self.note, self.name_rows = plan, note, name_rows
        self.left = leaner_modes(plan)
        self.changes: list[dict[str, Any]] = []

    def next_mode(self, arranged: Arranged) -> tuple[Arranged, str] | None:
        """`arranged` with its activations kept in the next leaner mode, and that in words; None: there is none."""
        while self.left:
            mode = self.left.pop(0)
            layout = replace(arranged.layout, mode=mode, cuda_graphs=False)
            if mode.tile_tokens and layout.compile_layers:  # pieces are a break in a graph that has to be whole
                forget_compilation(arranged.network)
                layout = replace(layout, compile_layers=False)
            with contextlib.suppress(UserError):  # layers of this family cannot be run so
                keep_less(layout, arranged.network)
                return replace(arranged, layout=layout), _words(mode)
        return None

    def remember(self, step: int, change: dict[str, Any], entries: dict[str, Any]) -> None:
        """Note in layout.json that `change` was made in a step, from 1, and what holds since."""
        self.changes.append({"step": step} | change)
        self.note(entries | {"cuda_graphs": False, "out_of_memory": self.changes})

    def refusal(self, batches: Sequence[Any]) -> UserError:
        """The error for a step that cannot be cut any further: what was found, and what would fit."""
        largest = max(batches, key=lambda batch: batch.ids.size)
        tokens, device = largest.ids.size, self.plan.facts.placement.device
        return UserError(
            "a forward and backward pass of one row does not fit in memory", file=self.name_rows(largest.sources[:3]),
            found=f"{tokens:,} tokens; {free_text(device)}", expected=self._what_fits(tokens), fix=self._fix(tokens),
        )  # fmt: skip

    def _what_fits(self, tokens: int) -> str:
        """The longest row, by the plan, and half of this one where the plan thought that it fits; the least memory."""
        found = least_memory(self.plan)
        if found is None:
            return "a row that fits by itself"
        leanest, facts, memory = found
        longest = min(longest_row(facts, leanest) or tokens, tokens // 2)
        return f"rows of about {longest:,} tokens, or {memory}"

    def _fix(self, tokens: int) -> str:
        """The first thing that the recipe could give up and does not, and the rest."""
        train, method = self.plan.recipe.train, self.plan.recipe.method
        fix = f"a shorter data.max_length, as {max(1, tokens // 2)}; or {CLOSE_OTHERS}"
        if self.plan.facts.placement.storage not in PACKED and "nf4" in method.can.storages:
            fix = f"base.storage=nf4; or {fix}"
        if train.gradient_checkpointing is False or train.activation_offload is False:
            fix = f"train.gradient_checkpointing=auto train.activation_offload=auto; or {fix}"
        return fix


def least_memory(plan: Plan) -> tuple[Layout, Facts, str] | None:
    """The leanest layout of a plan, the facts with what this process can reach now, and the memory that it takes in
    words; None where memory has no hard end."""
    reachable = reachable_bytes(plan.facts.placement.device)
    if reachable is None or not plan.facts.on_gpu:
        return None
    facts = replace(plan.facts, hardware=replace(plan.facts.hardware, free_bytes=reachable))
    leanest = least(decided(plan.asked), facts)
    needed = free_needed(leanest.peak_bytes)
    card = smallest_card(needed)
    text = f"at least {bytes_text(needed)} free"
    return leanest, facts, text if card is None else f"{text}, as the smallest known card has it ({card})"


def no_room_to_train(plan: Plan, file: str | None) -> UserError:
    """The error where a model is loaded and what is trained does not fit beside it."""
    found, placement = least_memory(plan), plan.facts.placement
    packs = placement.storage not in PACKED and "nf4" in plan.recipe.method.can.storages
    return UserError(
        "what is trained does not fit in memory beside the model", file=file,
        found=f"{bytes_text(plan.facts.model.frozen_bytes)} of frozen weights; {free_text(placement.device)}",
        expected="room for it" if found is None else found[2],
        fix=f"base.storage=nf4; or {CLOSE_OTHERS}" if packs else CLOSE_OTHERS,
    )  # fmt: skip


def leaner_modes(plan: Plan) -> list[MemoryMode]:
    """The memory modes that are leaner than the plan's and that recipe, model and rules allow, the fastest first."""
    now, train, layers = plan.layout.mode, decided(plan.asked), plan.facts.model.shape.layers
    if plan.layout.padded_task:  # transformers' own switch, for all layers or none
        candidates = [] if now.checkpointed_layers else [MemoryMode(layers)]
    else:
        most = max(layers - 1, now.checkpointed_layers)
        candidates = [MemoryMode(most), MemoryMode(most, True), MemoryMode(most, True, now.tile_tokens or TILE_TOKENS)]
        if train.activation_offload is False:
            candidates = [MemoryMode(most), MemoryMode(most, False, now.tile_tokens or TILE_TOKENS)]
    return [mode for mode in candidates if _leaner(mode, now) and _allowed(plan, mode)]


def _leaner(mode: MemoryMode, now: MemoryMode) -> bool:
    """Whether `mode` keeps less than `now`, in no way more."""
    less = mode.checkpointed_layers >= now.checkpointed_layers and mode.offload >= now.offload
    return mode != now and less and bool(mode.tile_tokens) >= bool(now.tile_tokens)


def _allowed(plan: Plan, mode: MemoryMode) -> bool:
    """Whether the recipe leaves the mode open, and no rule forbids it."""
    train = decided(plan.asked)
    asked: dict[str, Any] = {"gradient_checkpointing": True}
    if mode.offload:
        asked["activation_offload"] = True
    if mode.tile_tokens:
        asked["tile_mlp"] = mode.tile_tokens
    if any(getattr(train, name) not in (None, value) for name, value in asked.items()):
        return False
    captured = {} if train.cuda_graphs is None else {"cuda_graphs": False}
    wanted = replace(plan.asked, train=replace(train, **asked, **captured))
    return all(rule.holds(wanted) for rule in RULES)


def _words(mode: MemoryMode) -> str:
    words = f"gradient checkpointing of {mode.checkpointed_layers} layers"
    words += ", their inputs in host memory" if mode.offload else ""
    return words + (", MLPs in pieces" if mode.tile_tokens else "")


def mode_entries(arranged: Arranged) -> dict[str, Any]:
    """What layout.json says of the mode of a layout."""
    return {"mode": asdict(arranged.layout.mode), "compile_layers": arranged.layout.compile_layers}
