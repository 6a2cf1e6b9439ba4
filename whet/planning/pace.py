"""Seconds of an optimiser step, before anything is loaded: operations and bytes of the layout by what hardware reached.

A step of a GPU is the longest of three: what its arithmetic and memory need one after the other; the time in which the
host starts its kernels, where the step is not captured; the transfers that run beside it. The first is a sum: products
with the weights, attention over each document, the output head, tensors between them that are read and written, weights
that are rebuilt from few bits, the update. Peak rates are those of the card (`planning.card_table`); which share of
them is reached was fitted to steps measured on an H100 and an H200 (`bench/pace.py`, docs/log.md), and is assumed of
other cards: the plan says so. On a CPU the rate of a product is measured, in a tenth of a second.

Gives up: Apple's GPUs, forms of a card that run at other clocks, windows of attention, evaluation, loading and
compiling, and what other processes take meanwhile.
"""

from __future__ import annotations

import re
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from whet.engine.device import PACKED
from whet.planning.card_table import Card
from whet.planning.cards import known_card
from whet.planning.facts import Facts
from whet.planning.layout import Layout

STEPS_LOOKED_AT = 16
TILE = 128  # tokens on a side of what an attention kernel computes at once
MEASURED_ON = ("H100 80GB", "H200")
HOST_BYTES_A_SECOND = 2e10  # of one PCIe 4 x16 direction, and of the memory of a host that updates weights
UNLIKE_LENGTHS = 1.6  # the kernel for documents of unlike lengths, in times of the one for rows of one (docs/log.md)
UPDATE_BYTES = {"adamw": 32, "adamw_8bit": 20, "paged_adamw_8bit": 20, "adafactor": 16, "sgd": 24}


@dataclass(frozen=True)
class Reached:
    """What steps really reach. bf16, fp8, attention, fp32: shares of peak rates (attention: of bf16's); memory: share
    of the bandwidth. compiled, eager: bytes that pass memory for each byte that a layer has to keep, there and back.
    kernel_seconds: of a layer's kernels in a step, however little they do. started_compiled, started_eager: seconds in
    which the host starts the kernels of a layer in a step. seen: share of transfers that the device waits for. cpu:
    share of a measured product's rate."""

    bf16: float = 0.61
    fp8: float = 0.55
    fp32: float = 0.61
    attention: float = 0.31
    memory: float = 0.80
    compiled: float = 6.5
    eager: float = 19.0
    kernel_seconds: float = 0.0002
    started_compiled: float = 0.0042
    started_eager: float = 0.0070
    seen: float = 0.5
    cpu: float = 0.6


REACHED = Reached()


@dataclass(frozen=True)
class Rates:
    """Of a device: operations a second of products, attention and head, bytes a second."""

    products: float
    attention: float
    head: float
    bytes: float


@dataclass(frozen=True)
class StepWork:
    """A mean step. passes: forward passes; tokens: read, filling and padding included; learned: predicted ones;
    pairs: of tokens that are compared in attention, which goes by tiles."""

    passes: float
    tokens: float
    learned: float
    pairs: float


@dataclass(frozen=True)
class Pace:
    """seconds: of a mean step, None where it cannot be said, with the reason; parts: of it, by what they are spent on;
    steps: of the run; rests_on: where the rates come from."""

    seconds: float | None
    steps: int
    parts: dict[str, float]
    reason: str = ""
    rests_on: str = ""

    def as_dict(self) -> dict[str, object]:
        """seconds_per_step, seconds of all steps, and `time` with what they rest on."""
        whole = None if self.seconds is None else self.seconds * self.steps
        return {"seconds_per_step": self.seconds, "seconds": whole, "time": asdict(self)}


def pace_of(facts: Facts, layout: Layout, reached: Reached = REACHED) -> Pace:
    """The pace of a layout on the hardware of the facts."""
    steps = facts.work.steps
    if facts.hardware.device.type == "cpu":
        rates = _rates_of_cpu(facts, reached)
        rests_on = "a product measured on this machine just now"
    elif not facts.on_gpu:
        return Pace(None, steps, {}, "no rates are known of this kind of device")
    else:
        card = known_card(facts.hardware.name, facts.hardware.total_bytes)
        reason = _unknown(facts, card)
        if card is None or reason:
            return Pace(None, steps, {}, reason)
        rates = _rates_of_card(facts, card, reached)
        rests_on = "steps measured on this kind of card"
        if card.name not in MEASURED_ON:
            rests_on = "the card's peak rates, and the share of them that an H100 and an H200 reached"
    work = mean_step(facts, layout)
    parts = _spent(facts, layout, work, rates, reached)
    beside = _beside(facts, layout, work, reached)
    if "transfers" in beside:
        parts["transfers"] = reached.seen * beside["transfers"]
    busy = sum(parts.values())
    for name, seconds in sorted(beside.items(), key=lambda item: item[1]):
        if seconds > busy:
            parts[name] = parts.get(name, 0.0) + seconds - busy
            busy = seconds
    return Pace(busy, steps, parts, "", rests_on)


def mean_step(facts: Facts, layout: Layout) -> StepWork:
    """The mean of some steps of the first epoch, as the layout cuts and fills them."""
    batches = facts.work.batches.with_cut(layout.cut)
    count = min(batches.steps_per_epoch, max(1, facts.work.steps))
    chosen = np.unique(np.linspace(0, count - 1, min(count, STEPS_LOOKED_AT)).round().astype(int)).tolist()
    passes = tokens = learned = pairs = 0.0
    for index in chosen:
        for batch in batches.step(index):
            rows, length = batch.ids.shape
            bounds = getattr(batch, "bounds", None)
            documents: Any = np.full(rows, length) if bounds is None else np.diff(np.asarray(bounds))
            passes, tokens, learned = passes + 1, tokens + rows * length, learned + len(batch.targets)
            tiles = np.ceil(documents / TILE)
            pairs += TILE**2 * float((tiles**2 if bounds is None else tiles * (tiles + 1) / 2).sum())
    return StepWork(*(value / len(chosen) for value in (passes, tokens, learned, pairs)))


def _unknown(facts: Facts, card: Card | None) -> str:
    """Why the rates of this card are not known, or nothing."""
    name = facts.hardware.name
    if card is None or card.bandwidth is None:
        return "the rates of this GPU are not in the table of known cards"
    if re.search(r"laptop|max-q|pcie|nvl", name, re.IGNORECASE):
        return "this form of the card runs at other clocks than the one in the table"
    return ""


def _rates_of_card(facts: Facts, card: Card, reached: Reached) -> Rates:
    placement = facts.placement
    assert card.fp32 is not None
    assert card.bandwidth is not None
    peaks = {"fp32": card.fp32, "bf16": card.bf16 or card.fp32, "fp8": card.fp8 or card.bf16 or card.fp32}
    shares = {"fp32": reached.fp32, "bf16": reached.bf16, "fp8": reached.fp8}
    rate = {name: 1e12 * peaks[name] * shares[name] for name in peaks}
    short = "fp32" if placement.arithmetic == "fp32" else "bf16"
    return Rates(
        products=rate[placement.arithmetic], attention=1e12 * peaks[short] * reached.attention,
        head=rate["fp8"] if placement.fp8_head else rate[short], bytes=1e9 * card.bandwidth * reached.memory,
    )  # fmt: skip


def _rates_of_cpu(facts: Facts, reached: Reached) -> Rates:
    """A product of the model's width, and a copy, timed here and now."""
    shape, dtype = facts.model.shape, facts.placement.compute
    left = torch.randn(512, min(shape.hidden, 4096)).to(dtype)
    right = torch.randn(min(shape.hidden, 4096), min(shape.intermediate, 4096)).to(dtype)
    rate = 2 * left.numel() * right.shape[1] / _timed(lambda: left @ right)
    block = torch.zeros(1 << 22)
    rate, speed = rate * reached.cpu, 2 * block.nbytes / _timed(block.clone)
    return Rates(products=rate, attention=rate, head=rate, bytes=speed)


def _timed(run: object, seconds: float = 0.04) -> float:
    """Seconds of a call, the best of those that fit into `seconds`."""
    assert callable(run)
    run()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def _spent(facts: Facts, layout: Layout, work: StepWork, rates: Rates, reached: Reached) -> dict[str, float]:
    """Seconds of the device in a step, by what they are spent on, one after the other."""
    model, shape = facts.model, facts.model.shape
    again = layout.mode.checkpointed_layers / shape.layers  # share of the layers that run forward twice
    whole = 0 if model.has_peft else min(1.0, model.trainable / max(1, model.multiplied))
    there_and_back = 2 + whole + again
    products = 2 * work.tokens * model.multiplied * there_and_back / rates.products
    stored = model.frozen_bytes if facts.placement.storage in PACKED else 0
    least = work.passes * (2 + again) * (stored or 2 * model.multiplied) / rates.bytes
    attention = 4 * (shape.heads * shape.head_dim) * work.pairs * shape.layers * (3.5 + again) / rates.attention
    attention *= 1.0 if facts.work.is_dense else UNLIKE_LENGTHS
    head = 2 * work.learned * model.head_numbers * (2 if model.has_peft or model.head_bytes else 3) / rates.head
    touched = reached.compiled if layout.compile_layers else reached.eager
    between = work.tokens * shape.layers * shape.kept_bytes * touched * (1 + again / 3) / rates.bytes
    return {
        "products": max(products, least), "attention": attention, "output head": head,
        "between the products": between + shape.layers * work.passes * reached.kernel_seconds * facts.on_gpu,
        "weights rebuilt": work.passes * _rebuilt_bytes(facts, layout, again) / rates.bytes,
        "update": 0.0 if layout.offload_optimizer else UPDATE_BYTES[layout.optim] * model.trainable / rates.bytes,
    }  # fmt: skip


def _rebuilt_bytes(facts: Facts, layout: Layout, again: float) -> float:
    """Bytes of a forward and backward pass that go into making weights of few bits fit for products."""
    placement, model = facts.placement, facts.model
    if placement.storage not in PACKED:
        return 0.0
    short = 1 if placement.fp8 else model.shape.itemsize
    if placement.storage == "fp8" and placement.fp8:  # only their order is turned, for the backward pass
        return 0.0 if layout.keep_transposed else 2.0 * model.multiplied
    stored = model.frozen_bytes / max(1, model.total)
    return (2 + again) * model.multiplied * (stored + 2 * short)


def _beside(facts: Facts, layout: Layout, work: StepWork, reached: Reached) -> dict[str, float]:
    """Seconds of a step that pass beside the device's work: the host that starts kernels, transfers."""
    if not facts.on_gpu:
        return {}
    shape, mode = facts.model.shape, layout.mode
    found = {}
    if not layout.cuda_graphs:
        each = reached.started_compiled if layout.compile_layers else reached.started_eager
        again = mode.checkpointed_layers / shape.layers
        found["waiting for the host"] = work.passes * shape.layers * each * (1 + again / 3)
    moved = 2 * work.tokens * shape.input_bytes * mode.checkpointed_layers if mode.offload else 0
    if layout.offload_optimizer:
        moved += (8 + UPDATE_BYTES[layout.optim]) * facts.model.trainable
    if facts.placement.offload_head:
        moved += work.passes * facts.model.head_bytes
    if moved:
        found["transfers"] = moved / HOST_BYTES_A_SECOND
    return found
