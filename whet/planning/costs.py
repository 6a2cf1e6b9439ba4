"""What each memory mode costs, as arithmetic that a planner can add up, and the fastest mode that fits.

All modes are told apart by what one decoder layer keeps for backward. The kernels of whet keep, per token, the output
of both norms (2 H), q and the attention's output (2 Hq D), k and v (2 Hkv D), gate and up (2 F): 92 KiB in bf16 at
Llama-3-8B width. Everything else is made again. What a mode adds is a `Cost` against keeping everything; costs are
for one micro-batch and one device. Sources: Korthikanti et al. (arXiv:2205.05198) for recompute, ALST
(arXiv:2506.13996) for offloaded inputs and tiles.

The order of speed is fixed, not computed: keep all, run the first m layers again (the smallest m that fits), offload
their inputs, tile the MLPs. The first m, because backward begins at the end: when it reaches them, the kept layers are
gone already. So the last layer is never run again: that would keep its input and need its activations at once anyhow.

Gives up: rank-r products, row statistics and the allocator's gaps are not counted (leave some per cent free).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from whet.base.errors import UserError

RING_BYTES = 128 << 20  # chunks through which the optimiser on the host sends and receives
IN_FLIGHT = 3  # layer inputs on the device under offload: the one in use, the next one, and the last layer's


@dataclass(frozen=True)
class Cost:
    """Added to a micro-batch by a mode; negative device_bytes are saved.

    device_bytes: at the peak. host_bytes: pinned host memory. flops: floating-point operations run again.
    transfer_bytes: over the link between host and device, both directions added up.
    """

    device_bytes: int = 0
    host_bytes: int = 0
    flops: int = 0
    transfer_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.device_bytes + other.device_bytes,
            self.host_bytes + other.host_bytes,
            self.flops + other.flops,
            self.transfer_bytes + other.transfer_bytes,
        )


@dataclass(frozen=True)
class Sizes:
    """A decoder's shape. intermediate: F, of the experts a token visits where there are several; gated: SwiGLU-like.

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
        """Per token, in the layer that is being differentiated: the gradients of the wide values and their product."""
        return (self.wide + self.intermediate) * self.itemsize

    @property
    def working_bytes(self) -> int:
        """Per token, in the layer that is being differentiated: the above and the gradients of its two ends."""
        return 2 * self.hidden * self.itemsize + self.working_wide_bytes

    @property
    def mlp_flops(self) -> int:
        """Forward operations of an MLP per token: 2 H F for each of its matrices."""
        return 2 * self.hidden * (self.wide + self.intermediate)

    def layer_flops(self, row_tokens: int) -> int:
        """Forward operations of a layer per token, causal rows of S tokens: 2 P + 2 S Hq D."""
        width = self.head_dim * self.heads
        projections = 2 * self.hidden * (2 * width + 2 * self.head_dim * self.kv_heads)
        return projections + self.mlp_flops + 2 * row_tokens * width


def sizes_of(config: Any, itemsize: int = 2) -> Sizes:
    """The shape in a transformers config, of its text part; itemsize: bytes of one activation."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    intermediate = getattr(text, "intermediate_size", None)
    gated = intermediate is not None
    experts = getattr(text, "num_experts_per_tok", None)
    if experts:
        intermediate = experts * (getattr(text, "moe_intermediate_size", None) or intermediate or 0)
    return Sizes(
        hidden=text.hidden_size,
        # GPT-2 has another name for it and its own default.
        intermediate=intermediate or getattr(text, "n_inner", None) or 4 * text.hidden_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        layers=text.num_hidden_layers,
        gated=gated,
        itemsize=itemsize,
    )


@dataclass(frozen=True)
class Mode:
    """Settings of the memory modes: run the first `recompute` layers again, offload their inputs, tile the MLPs.

    tile_tokens: 0 is off.
    """

    recompute: int = 0
    offload: bool = False
    tile_tokens: int = 0


@dataclass(frozen=True)
class Choice:
    """A mode, what it adds to keeping everything, and all activation bytes at its peak."""

    mode: Mode
    cost: Cost
    peak_bytes: int


def keep_bytes(sizes: Sizes, tokens: int) -> int:
    """Activations at the peak when every layer keeps everything: (L kept + working) per token."""
    return tokens * (sizes.layers * sizes.kept_bytes + sizes.working_bytes)


def recompute_cost(sizes: Sizes, tokens: int, row_tokens: int, layers: int) -> Cost:
    """The first m layers keep their input alone: m (kept - input) bytes less per token, m forward passes more.

    With m = L the last layer's activations come back while all inputs are kept, so only L - 1 layers' worth is saved.
    """
    saved = layers * sizes.input_bytes - min(layers, sizes.layers - 1) * sizes.kept_bytes
    return Cost(device_bytes=tokens * saved, flops=tokens * layers * sizes.layer_flops(row_tokens))


def offload_cost(sizes: Sizes, tokens: int, layers: int) -> Cost:
    """Added to recompute of m layers: all inputs but the last go to the host and come back; 3 are on the device."""
    away = max(0, layers - 1)
    moved = tokens * sizes.input_bytes
    return Cost(
        device_bytes=-moved * max(0, layers - IN_FLIGHT), host_bytes=moved * away, transfer_bytes=2 * moved * away
    )


def tile_cost(sizes: Sizes, tokens: int, tile_tokens: int, recomputed: int) -> Cost:
    """Added to recompute of m layers: the wide values exist for one tile at a time; one MLP forward more per layer.

    Saved are the wide values of the L - m kept layers (of one when all are run again) and the working bytes beyond
    the tile.
    """
    tile = min(tile_tokens, tokens)
    kept = max(sizes.layers - recomputed, 1)
    tiled = tile * (sizes.wide_bytes + sizes.working_wide_bytes)
    whole = tokens * (kept * sizes.wide_bytes + sizes.working_wide_bytes)
    return Cost(device_bytes=tiled - whole, flops=tokens * sizes.layers * sizes.mlp_flops)


def embedding_cost(vocabulary: int, hidden: int, tokens: int, itemsize: int = 2) -> Cost:
    """The frozen embedding on the host, beside any mode: V H values saved, T H values and T ids of 8 bytes moved."""
    weight = vocabulary * hidden * itemsize
    return Cost(device_bytes=-weight, host_bytes=weight, transfer_bytes=tokens * (hidden * itemsize + 8))


def head_cost(vocabulary: int, hidden: int, itemsize: int = 2) -> Cost:
    """The frozen head on the host: V H values come in every micro-batch, before the decoder's forward pass. What is
    saved is saved in the backward pass; while the loss is computed the head is there."""
    weight = vocabulary * hidden * itemsize
    return Cost(device_bytes=-weight, host_bytes=pinned_bytes(weight), transfer_bytes=weight)


def optimiser_cost(trained: int, halved: int = 0, gradient_itemsize: int = 4) -> Cost:
    """AdamW on the host, of `trained` weights, `halved` of which are in bf16 on the device. Transfers are of a step of
    one micro-batch: gradients one way, in their type, and weights the other.

    Saved: moments and gradients of 4 bytes each, and 2 bytes of each halved weight. On the host: master, moments and
    gradient of 4 bytes each, beside a ring of chunks.
    """
    saved = 12 * trained + 2 * halved
    moved = (gradient_itemsize + 4) * (trained - halved) + 4 * halved
    return Cost(device_bytes=-saved, host_bytes=16 * trained + RING_BYTES, transfer_bytes=moved)


def pinned_bytes(nbytes: int) -> int:
    """What torch's pinned allocator takes for one request: the next power of two."""
    return 1 << max(0, nbytes - 1).bit_length()


def mode_cost(sizes: Sizes, tokens: int, row_tokens: int, mode: Mode) -> Cost:
    """Everything that `mode` adds to keeping all activations of `tokens` tokens in rows of `row_tokens`."""
    cost = recompute_cost(sizes, tokens, row_tokens, mode.recompute)
    if mode.offload:
        cost += offload_cost(sizes, tokens, mode.recompute)
    if mode.tile_tokens:
        cost += tile_cost(sizes, tokens, mode.tile_tokens, mode.recompute)
    return cost


def peak_bytes(sizes: Sizes, tokens: int, mode: Mode) -> int:
    """Activation bytes on the device at the peak of one micro-batch of `tokens` tokens."""
    return keep_bytes(sizes, tokens) + mode_cost(sizes, tokens, 0, mode).device_bytes


def choose(
    free_bytes: int, sizes: Sizes, tokens: int, row_tokens: int, *, host_bytes: int | None = None,
    tile_tokens: int = 4096, allow: Mode | None = None,
) -> Choice:  # fmt: skip
    """The fastest mode whose activations fit into `free_bytes`, what weights, optimiser and loss leave of the device.

    tokens: of a micro-batch; row_tokens: of its longest document. host_bytes: pinned memory there may be; None: enough.
    allow: a mode whose zero and False parts stay off (a layer count other than 0 allows any); None: all are allowed.
    Raises UserError when nothing fits.
    """
    allow = allow or Mode(1, True, tile_tokens)
    most = sizes.layers - 1 if allow.recompute else 0
    modes = [Mode(count) for count in range(most + 1)]
    if allow.offload and most:
        modes.append(Mode(most, offload=True))
    if allow.tile_tokens:
        modes += [Mode(most, tile_tokens=tile_tokens), Mode(most, allow.offload and most > 0, tile_tokens)]
    least: int | None = None
    for mode in modes:
        cost = mode_cost(sizes, tokens, row_tokens, mode)
        peak = keep_bytes(sizes, tokens) + cost.device_bytes
        if host_bytes is not None and cost.host_bytes > host_bytes:
            continue
        if peak <= free_bytes:
            return Choice(mode, cost, peak)
        least = peak if least is None else min(least, peak)
    raise UserError(
        "the activations of one micro-batch do not fit in any memory mode", found=f"{free_bytes:,} bytes free",
        expected=f"{least:,} bytes", fix="fewer tokens in a micro-batch: a smaller batch, or a smaller data.max_length",
    )  # fmt: skip
