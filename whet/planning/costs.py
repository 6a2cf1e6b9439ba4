"""Activation memory of each memory mode, and the fastest mode that fits: arithmetic on the shape of one layer.

All modes are told apart by what the decoder layers keep for the backward pass. That is counted where it can be
(`planning.counted`); else it is reckoned from the least that a layer must keep, per token: the output of both norms
(2 H), q and the attention's output (2 Hq D), k and v (2 Hkv D), gate and up (2 F): 92 KiB in bf16 at Llama-3-8B width.
Everything else is made again. Sources: Korthikanti et al. (arXiv:2205.05198) for gradient checkpointing, ALST
(arXiv:2506.13996) for offloaded inputs and tiles.

The order of speed is fixed, not computed: keep all, checkpoint the first m layers (the smallest m that fits), offload
their inputs, tile the MLPs. The first m, because the backward pass begins at the end: when it reaches them, the kept
layers are gone already. So the last layer is never checkpointed: that would keep its input and need its activations at
once anyhow.

Gives up: rank-r products, row statistics and the allocator's gaps are not counted (leave some per cent free).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from whet.base.errors import UserError
from whet.engine.memory.kept import Kept
from whet.engine.sizes import sizes_of
from whet.settings import TILE_TOKENS

RING_BYTES = 128 << 20  # chunks through which the optimiser on the host sends and receives
IN_FLIGHT = 3  # layer inputs on the device under offload: the one in use, the next one, and the last layer's


@dataclass(frozen=True)
class LayerShape:
    """Sizes of a decoder's layers. intermediate: F, of the experts a token visits where there are several; gated:
    SwiGLU-like.

    itemsize: bytes of one activation.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    gated: bool = True
    itemsize: int = 2

    @property
    def wide(self) -> int:
        """Values of width F that the MLP keeps per token: gate and up, or the one before the activation."""
        return (2 if self.gated else 1) * self.intermediate

    @property
    def input_bytes(self) -> int:
        """Per token: the layer's input, H."""
        return self.hidden * self.itemsize

    @property
    def wide_bytes(self) -> int:
        """Per token and layer: what the MLP keeps between its two products, 2 F when gated."""
        return self.wide * self.itemsize

    @property
    def kept_bytes(self) -> int:
        """Per token and layer: 2 H + 2 Hq D + 2 Hkv D + 2 F values."""
        attention = 2 * self.head_dim * (self.heads + self.kv_heads)
        return (2 * self.hidden + attention) * self.itemsize + self.wide_bytes

    @property
    def working_wide_bytes(self) -> int:
        """Per token, in the layer that is being differentiated: the gradients of the wide values. That of their product
        takes the place of the product, which the layer kept."""
        return self.wide * self.itemsize

    @property
    def working_bytes(self) -> int:
        """Per token, in the layer that is being differentiated: the above and the gradients of its two ends."""
        return 2 * self.hidden * self.itemsize + self.working_wide_bytes

    @property
    def given_back_bytes(self) -> int:
        """Per token: what the backward pass has let go of, beyond what it has made, when it comes to the products with
        the MLP's first weights."""
        return (self.intermediate + self.hidden) * self.itemsize

    @property
    def widest_weights(self) -> int:
        """Numbers of the largest weight that is multiplied at once: the MLP's first, gate and up together."""
        return self.wide * self.hidden


def layer_shape(config: Any, itemsize: int = 2, network: Any = None) -> LayerShape:
    """The shape of the text part in a transformers config; itemsize: bytes of one activation.

    A config without attention heads counts as one head over the hidden size. network: for what the config leaves out.
    """
    sizes = sizes_of(config, network)
    return LayerShape(
        hidden=sizes.hidden, intermediate=sizes.intermediate, heads=sizes.heads or 1, kv_heads=sizes.kv_heads or 1,
        head_dim=sizes.head_dim or sizes.hidden, layers=sizes.layers, gated=sizes.gated, itemsize=itemsize,
    )  # fmt: skip


@dataclass(frozen=True)
class MemoryMode:
    """How activations are kept: the first `checkpointed_layers` keep only their input, which may wait in host memory
    (`offload`), and MLPs are computed in pieces of `tile_tokens` tokens (0: whole)."""

    checkpointed_layers: int = 0
    offload: bool = False
    tile_tokens: int = 0


def activation_bytes(shape: LayerShape, tokens: int, mode: MemoryMode, kept: Kept | None = None) -> int:
    """Activation bytes on the device at the peak of one micro-batch of `tokens` tokens. kept: what the layers keep,
    None: the least that each must."""
    kept = Kept((float(shape.kept_bytes),) * shape.layers, 0.0) if kept is None else kept
    layers = mode.checkpointed_layers
    # With all layers the last one's activations come back while all inputs are kept.
    first = min(layers, len(kept.layers) - 1)
    waiting, fixed = sum(kept.layers[first:]), sum(kept.fixed[first:])
    total = tokens * (waiting + layers * shape.input_bytes + kept.outside + shape.working_bytes) + fixed
    if mode.offload:
        total -= tokens * shape.input_bytes * max(0, layers - IN_FLIGHT)
    if mode.tile_tokens:
        # The wide values exist for one tile at a time: those of the kept layers, of one when all are checkpointed.
        tile, whole = min(mode.tile_tokens, tokens), max(shape.layers - layers, 1)
        total += tile * (shape.wide_bytes + shape.working_wide_bytes)
        total -= tokens * (whole * shape.wide_bytes + shape.working_wide_bytes)
    return int(total)


def unpacking_bytes(shape: LayerShape, tokens: int, mode: MemoryMode, weight_bytes: int) -> int:
    """What the peak grows by where a weight of `weight_bytes` is unpacked for its product: at another moment than the
    widest gradients, so with many tokens it is nothing."""
    working = shape.working_bytes if not mode.tile_tokens else shape.working_bytes - shape.working_wide_bytes
    return max(0, weight_bytes - tokens * (shape.given_back_bytes + working))


def offloaded_bytes(shape: LayerShape, tokens: int, mode: MemoryMode) -> int:
    """Pinned host memory for the inputs that wait there: of all checkpointed layers but the last of them."""
    return tokens * shape.input_bytes * max(0, mode.checkpointed_layers - 1) if mode.offload else 0


def fastest_mode(
    free_bytes: int, layers: int, needs: Callable[[MemoryMode], int], *, tile_tokens: int = TILE_TOKENS
) -> MemoryMode:
    """The fastest mode that needs at most `free_bytes`, what weights, optimiser and loss leave of the device. needs:
    bytes of a mode. Raises UserError when nothing fits."""
    most = layers - 1
    modes = [MemoryMode(count) for count in range(most + 1)]
    modes += [MemoryMode(most, offload=most > 0), MemoryMode(most, tile_tokens=tile_tokens)]
    modes.append(MemoryMode(most, offload=most > 0, tile_tokens=tile_tokens))
    for mode in modes:
        if needs(mode) <= free_bytes:
            return mode
    least = min(map(needs, modes))
    raise UserError(
        "the activations of one micro-batch do not fit in any memory mode", found=f"{free_bytes:,} bytes free",
        expected=f"{least:,} bytes", fix="fewer tokens in a micro-batch: a smaller batch, or a smaller data.max_length",
    )  # fmt: skip


def pinned_bytes(nbytes: int) -> int:
    """Host memory that torch's pinned allocator takes for one request: the next power of two."""
    return 1 << max(0, nbytes - 1).bit_length()
