"""Bytes on the device by class, for a layout: arithmetic on counts, the same for `whet plan` and for training.

Parameters are counted on the real modules, and so is what layers keep (`planning.counted`). Where a model cannot be
counted, its activations are the least that a layer must keep (`planning.costs`) times a factor for what autograd and
the compiler keep beyond it, which is that of a Llama (docs/log.md).
"""

from __future__ import annotations

from whet.engine.compute.head import CHUNK_LOGITS
from whet.engine.device import PACKED
from whet.planning.costs import RING_BYTES, activation_bytes, offloaded_bytes, pinned_bytes, unpacking_bytes
from whet.planning.counted import way_of
from whet.planning.facts import Facts
from whet.planning.layout import Layout

# What a layer that cannot be counted keeps, as a multiple of the least: uncompiled, compiled, compiled lean.
EAGER_KEEPS, COMPILED_KEEPS, LEAN_KEEPS = 2.6, 1.6, 1.15
OPTIMISER_BYTES = {"adamw": 8, "adamw_8bit": 2.04, "paged_adamw_8bit": 2.04, "adafactor": 0.1, "sgd": 4}
COPY_SHARE = 2  # LoRA's copies in the arithmetic's type: B is block-diagonal there, so wider than B itself


def keeps(facts: Facts, *, compiled: bool, lean: bool) -> float:
    """What a layer keeps for the backward pass, as a multiple of the least."""
    if not compiled:
        return EAGER_KEEPS
    dense = LEAN_KEEPS if lean else COMPILED_KEEPS
    if facts.work.is_dense:
        return dense
    return (1.2 if lean else 1.15) * dense


def classes(facts: Facts, layout: Layout) -> dict[str, int]:
    """Bytes on the device at the peak, by class."""
    return weights_and_optimiser(facts, layout) | of_passes(facts, layout)


def weights_and_optimiser(facts: Facts, layout: Layout) -> dict[str, int]:
    """Bytes by class of what stays between two steps."""
    model, placement = facts.model, facts.placement
    frozen = model.frozen_bytes + (model.fp8_bytes if layout.keep_transposed else 0)
    if placement.fp8_head:
        copies = model.head_numbers * (2 if layout.keep_transposed else 1)
        frozen += copies if model.tied else copies - model.head_bytes
    frozen -= _waiting_bytes(facts)
    itemsize = model.shape.itemsize
    copies = COPY_SHARE * itemsize * model.trainable if model.has_peft and itemsize < 4 else 0
    if layout.offload_optimizer:
        trained = 4 * model.trainable - (2 * model.short_numbers if layout.short_weights else 0)
        optimiser = 0
    else:
        trained = 4 * model.trainable
        optimiser = 0 if layout.page_optimizer else int(OPTIMISER_BYTES[layout.optim] * model.trainable)
    return {"frozen weights": frozen, "trained weights": trained + copies, "optimiser": optimiser}


def of_passes(facts: Facts, layout: Layout) -> dict[str, int]:
    """Bytes by class of what a forward and a backward pass add at their peak.

    Where a model is trained whole and a step is one pass, gradients come while activations go: the peak is at the
    beginning of the backward pass, with the gradient of the output head alone, or at its end, with all of them.
    """
    model, kept = facts.model, activations(facts, layout)
    start = {"gradients": 4 * model.trainable, "activations": kept, "logits": logits(facts, layout)}
    if layout.offload_optimizer:  # one gradient is made while another one is on its way
        return start | {"gradients": 8 * model.largest_trained}
    whole = model.short_numbers > 0 and not facts.padded_task
    if not whole or layout.cut.accumulate > 1:
        return start
    head = 4 * model.head_numbers
    start["gradients"] = head
    working = layout.tokens * model.shape.working_bytes + kept // model.shape.layers
    end = {"gradients": 4 * model.trainable + (head if model.tied else 0), "activations": working, "logits": 0}
    return max(start, end, key=lambda classes: sum(classes.values()))


def activations(facts: Facts, layout: Layout) -> int:
    """Bytes of activations at the peak of the largest forward and backward pass."""
    shape, tokens = facts.model.shape, layout.tokens
    kept = facts.kept.get(way_of(compiled=layout.compile_layers, lean=layout.lean))
    unpacked = unpacking_bytes(shape, tokens, layout.mode, rebuilt_bytes(facts, layout))
    if kept is not None:
        return activation_bytes(shape, tokens, layout.mode, kept) + unpacked
    factor = keeps(facts, compiled=layout.compile_layers, lean=layout.lean)
    return int(factor * activation_bytes(shape, tokens, layout.mode)) + unpacked


def rebuilt_bytes(facts: Facts, layout: Layout) -> int:
    """Bytes of the largest packed weight while it is multiplied: unpacked, or with its FP8 bytes turned round."""
    placement, shape = facts.placement, facts.model.shape
    if placement.storage not in PACKED or (placement.storage == "fp8" and placement.fp8 and layout.keep_transposed):
        return 0
    return shape.widest_weights * (1 if placement.fp8 else shape.itemsize)


def logits(facts: Facts, layout: Layout) -> int:
    """Bytes of the logits that are alive at once, and of an output head that comes for them, as far as they are not
    back in time for the backward pass of the layers."""
    if facts.padded_task:
        return 0
    kind, shape = facts.hardware.device.type, facts.model.shape
    chunk = CHUNK_LOGITS.get(kind, CHUNK_LOGITS["cpu"])
    each = 3 if kind == "cuda" else 4 + shape.itemsize  # a kernel turns them into their gradient in place
    head = facts.model.head_bytes if facts.placement.offload_head and not facts.model.tied else 0
    if facts.model.short_numbers > 0:  # the gradient of a head that is trained is added up from parts of its size
        head += 4 * facts.model.head_numbers
    whole = chunk * each + (facts.model.table_bytes if _tied_head_waits(facts) else head)
    working = shape.working_bytes if not layout.mode.tile_tokens else shape.working_bytes - shape.working_wide_bytes
    return max(0, whole - layout.tokens * working)


def passing(facts: Facts, layout: Layout) -> int:
    """Bytes that the largest forward and backward pass takes beside weights and moments."""
    return sum(of_passes(facts, layout).values())


def host_bytes(facts: Facts, layout: Layout) -> int:
    """Bytes in host memory: tables, an optimiser, layer inputs that wait there."""
    placement, model = facts.placement, facts.model
    total = offloaded_bytes(model.shape, layout.tokens, layout.mode)
    if placement.offload_embedding and not model.tied:
        total += model.table_bytes
    if placement.offload_head:
        total += pinned_bytes(model.head_bytes) + (model.table_bytes if model.tied else 0)
    if layout.offload_optimizer:  # master, moments and gradient of 4 bytes each, beside a ring of chunks
        total += 16 * model.trainable + RING_BYTES
    return total


def _tied_head_waits(facts: Facts) -> bool:
    return facts.placement.offload_head and facts.model.tied


def _waiting_bytes(facts: Facts) -> int:
    """Bytes of the tables that wait in host memory."""
    placement, model = facts.placement, facts.model
    table = model.table_bytes if placement.offload_embedding or _tied_head_waits(facts) else 0
    return table + (model.head_bytes if placement.offload_head and not model.tied else 0)
