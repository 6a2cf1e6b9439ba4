"""What the bridge to PEFT reaches, one row a method: PEFT's type, what it trains, what it can do, defaults that fit.

A row is all that a method needs; `methods.bridge` does the rest. The cells are tried by tests/test_bridge.py: freezing,
learning, saving, plain PEFT, merging, storages. Learning rates are for AdamW: the paper's where it trains transformers
with it, else a value at which small models learn steadily; they are starting points, not results of a search.

What PEFT has besides is in LEFT_OUT, with the reason and the nearest method; LoRA and AdaLoRA have files of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import gcd
from typing import Any, Literal

from whet.methods.capability import ANY, DENSE, Capability

BridgedName = Literal[
    "ia3", "prefix", "prompt", "p_tuning", "adaption_prompt", "ln_tuning", "trainable_tokens", "beft", "vera", "pvera",
    "oft", "boft", "shira", "supertuning", "loha", "lokr", "fourierft", "waveft", "c3a", "hra", "road", "miss",
    "gralora", "randlora", "hira", "delora", "deft", "glora", "psoft", "osf", "vblora", "unilora", "tinylora", "frod",
    "lily", "peanut",
]  # fmt: skip

Shapes = Sequence[tuple[int, int]]  # (in, out) of every layer that is adapted


@dataclass(frozen=True)
class Bridged:
    """peft: PEFT's type. what: one sentence, with the paper. defaults: options that differ from PEFT's own.

    targets: what is adapted when the recipe names nothing: linear | ia3 | norm | embedding | none (PEFT needs none).
    fits: options whose usual value may be too large for a model's layers, each with what it can be at most. count: how
    many numbers it trains, from PEFT's config and the layers' shapes; needed where PEFT reads the weights to set up.
    """

    peft: str
    what: str
    can: Capability
    targets: Literal["linear", "ia3", "norm", "embedding", "none"] = "linear"
    defaults: dict[str, Any] = field(default_factory=dict)
    fits: dict[str, Callable[[Shapes], int]] = field(default_factory=dict)
    count: Callable[[Any, Shapes], int] | None = None


def divisor(most: int) -> Callable[[Shapes], int]:
    """The largest number up to `most` that divides both sides of every layer, if `most` is a power of two."""
    return lambda shapes: gcd(most, *(side for shape in shapes for side in shape))


def entries(most: int) -> Callable[[Shapes], int]:
    """`most`, or as many as the smallest layer has entries."""
    return lambda shapes: min(most, *(inside * outside for inside, outside in shapes))


def side(most: int) -> Callable[[Shapes], int]:
    """`most`, or half the shortest side."""
    return lambda shapes: min(most, *(min(shape) // 2 for shape in shapes))


def sparse(most: int) -> Callable[[Shapes], int]:
    """`most`, or a rank whose r * (in + out) entries fill half the smallest layer."""
    return lambda shapes: max(1, min(most, *(i * o // (2 * (i + o)) for i, o in shapes)))


def _can(rate: float, **changes: Any) -> Capability:
    """Of a method that wraps linear layers: dense bases only, merged by PEFT."""
    usual: dict[str, Any] = {
        "storages": DENSE, "mergeable": True, "peft_format": True, "vllm": False,
        "learning_rate": rate,
    }  # fmt: skip
    return Capability(**(usual | changes))


def _prompt(rate: float, **changes: Any) -> Capability:
    """Of a method that puts virtual tokens in front: any base, never merged, through PEFT's wrapper."""
    return _can(rate, storages=ANY, mergeable=False, inside=False, compiles=False, **changes)


_NO_HEAD = ("causal", "seq2seq")  # PEFT's config cannot name a head that is trained beside

BRIDGED: dict[BridgedName, Bridged] = {
    "ia3": Bridged(
        "IA3", "Rescale keys, values and the MLP's inner activations (Liu et al., 2022, arXiv:2205.05638).",
        _can(3e-3), targets="ia3",
    ),
    "prefix": Bridged(
        "PREFIX_TUNING", "Train keys and values in front of every layer's own (Li and Liang, 2021, arXiv:2101.00190).",
        _prompt(1e-2, recomputes=False), targets="none", defaults={"num_virtual_tokens": 20},
    ),
    "prompt": Bridged(
        "PROMPT_TUNING", "Train embeddings in front of the input (Lester et al., 2021, arXiv:2104.08691).",
        _prompt(3e-2), targets="none", defaults={"num_virtual_tokens": 20, "prompt_tuning_init": "SAMPLE_VOCAB"},
    ),
    "p_tuning": Bridged(
        "P_TUNING", "Train embeddings in front of the input through a small network (Liu et al., 2021, "
        "arXiv:2103.10385).", _prompt(1e-3), targets="none", defaults={"num_virtual_tokens": 20},
    ),
    "adaption_prompt": Bridged(
        "ADAPTION_PROMPT", "Train gated prompts in the upper layers' attention (LLaMA-Adapter: Zhang et al., 2023, "
        "arXiv:2303.16199).", _can(9e-3, mergeable=False, tasks=("causal",)), targets="none",
        defaults={"adapter_len": 10},
    ),
    "ln_tuning": Bridged(
        "LN_TUNING", "Train the normalisation layers (Zhao et al., 2023, arXiv:2312.11420).",
        _can(1e-3, storages=ANY), targets="norm",
    ),
    "trainable_tokens": Bridged(
        "TRAINABLE_TOKENS", "Train the embeddings of chosen tokens (options: token_indices).",
        _can(1e-3, storages=ANY, tasks=_NO_HEAD), targets="embedding",
    ),
    "beft": Bridged(
        "BEFT", "Train a bias of the value projections, or of the layers that are named (arXiv:2509.15974).",
        _can(1e-3, mergeable=False),
    ),
    "vera": Bridged(
        "VERA", "Train two vectors a layer around random matrices that all layers share (Kopiczko et al., 2023, "
        "arXiv:2310.11454).", _can(1e-2),
    ),
    "pvera": Bridged("PVERA", "VeRA with a learned spread of its latent vector (arXiv:2512.07703).", _can(1e-2)),
    "oft": Bridged(
        "OFT", "Rotate each layer's inputs by learned orthogonal blocks (Qiu et al., 2023, arXiv:2306.07280).",
        _can(1e-3), fits={"oft_block_size": divisor(32)},
    ),
    "boft": Bridged(
        "BOFT", "Orthogonal blocks in the order of a butterfly (Liu et al., 2023, arXiv:2311.06243).", _can(1e-3),
        count=lambda c, shapes: sum(c.boft_n_butterfly_factor * i * (c.boft_block_size or i // c.boft_block_num) + o
                                    for i, o in shapes),
    ),
    "shira": Bridged(
        "SHIRA", "Train a random sparse set of a layer's entries (Bhardwaj et al., 2024, arXiv:2406.13175).",
        _can(1e-3, compiles=False), defaults={"random_seed": 0}, fits={"r": sparse(32)},
        count=lambda c, shapes: sum(c.r * (i + o) for i, o in shapes),
    ),
    "supertuning": Bridged(
        "SUPERTUNING", "Train the entries of largest magnitude in each layer (arXiv:2607.09287).", _can(1e-3),
    ),
    "loha": Bridged(
        "LOHA", "The entrywise product of two low-rank updates (Hyeon-Woo et al., 2021, arXiv:2108.06098).", _can(1e-3),
    ),
    "lokr": Bridged(
        "LOKR", "A Kronecker product of small matrices (Yeh et al., 2023, arXiv:2309.14859).", _can(1e-3),
    ),
    "fourierft": Bridged(
        "FOURIERFT", "Train a few Fourier coefficients of the update (Gao et al., 2024, arXiv:2405.03003).",
        _can(1e-2), fits={"n_frequency": entries(1000)}, defaults={"init_weights": True},
    ),
    "waveft": Bridged(
        "WAVEFT", "Train a few wavelet coefficients of the update (Bilican et al., 2025, arXiv:2505.12532).",
        _can(1e-3, compiles=False), fits={"n_frequency": entries(2592)},
    ),
    "c3a": Bridged(
        "C3A", "Circular convolutions in blocks (Chen et al., 2024, arXiv:2407.19342).", _can(3e-2),
        fits={"block_size": divisor(256)},
    ),
    "hra": Bridged("HRA", "A chain of Householder reflections (Yuan et al., 2024, arXiv:2405.17484).", _can(1e-3)),
    "road": Bridged(
        "ROAD", "Rotate and scale pairs of a layer's outputs (Liao and Monz, 2024, arXiv:2409.00119).", _can(3e-3),
        fits={"group_size": divisor(64)},
    ),
    "miss": Bridged(
        "MISS", "One small matrix shared by the shards of each layer (Kang and Yin, 2024, arXiv:2409.15371).",
        _can(2e-4), fits={"r": divisor(64)},
    ),
    "gralora": Bridged(
        "GRALORA", "Low-rank updates of a layer's blocks (Jung et al., 2025, arXiv:2505.20355).", _can(2e-4),
        fits={"r": divisor(32)},
    ),
    "randlora": Bridged(
        "RANDLORA", "Train the scales of full-rank sums of random matrices (Albert et al., 2025, arXiv:2502.00987).",
        _can(1e-3), fits={"r": side(32)},
    ),
    "hira": Bridged("HIRA", "The base weight times a low-rank matrix, entry by entry (Huang et al., ICLR 2025).",
                    _can(1e-3)),
    "delora": Bridged(
        "DELORA", "Low-rank updates whose strength is learned apart from their direction (Bini et al., 2025, "
        "arXiv:2503.18225).", _can(1e-3),
    ),
    "deft": Bridged("DEFT", "Replace a low-rank subspace of each layer by a learned one.", _can(1e-3)),
    "glora": Bridged(
        "GLORA", "Scale and shift weights and biases by low-rank terms (Chavan et al., 2023, arXiv:2306.07967).",
        _can(1e-3),
    ),
    "psoft": Bridged(
        "PSOFT", "Rotate inside of each layer's principal subspace.", _can(1e-3), fits={"r": side(32)},
    ),
    "osf": Bridged(
        "OSF", "Train each layer outside of its principal subspace, against forgetting (Nayak et al., 2025, "
        "arXiv:2504.07097).", _can(2e-5),
    ),
    "vblora": Bridged(
        "VBLORA", "Low-rank updates put together from one bank of vectors (Li et al., 2024, arXiv:2405.15179).",
        _can(1e-2), fits={"vector_length": divisor(256)},
    ),
    "unilora": Bridged(
        "UNILORA", "One short vector, projected into the low-rank updates of all layers (arXiv:2506.00799).",
        _can(1e-2), count=lambda c, shapes: c.theta_d_length,
    ),
    "tinylora": Bridged(
        "TINYLORA", "A few numbers a layer, projected between its singular vectors (arXiv:2602.04118).", _can(1e-3),
    ),
    "frod": Bridged(
        "FROD", "Train a sparse middle between factors that layers of one role share.", _can(1e-3, compiles=False),
        defaults={"progressbar": False}, count=lambda c, shapes: sum(i + int(c.sparse_rate * i * i) for i, _ in shapes),
    ),
    "lily": Bridged(
        "LILY", "Low-rank updates whose second halves all layers share through a router (arXiv:2407.09946).",
        _can(1e-3, mergeable=False),
    ),
    "peanut": Bridged(
        "PEANUT", "A small network of each weight computes its update (arXiv:2410.01870).", _can(1e-3),
    ),
}  # fmt: skip

assert set(BRIDGED) == set(BridgedName.__args__)  # type: ignore[attr-defined]

# Why not, and which method comes nearest.
LEFT_OUT: dict[str, tuple[str, str]] = {
    "poly": ("it mixes adapters by the number of a task, which rows of data do not have", "lora"),
    "multitask_prompt_tuning": ("it needs the number of a task with every row", "prompt"),
    "cpt": ("it needs a kind for every token of an example that is fixed beforehand", "prompt"),
    "xlora": ("it mixes adapters that are trained already; `whet adapters` combines those", "lora"),
    "cartridge": ("it starts from the cache that the model computes for a corpus", "prefix"),
    "adamss": ("it clusters the weights to set up, so nothing could be counted before a model is loaded", "adalora"),
    "shadow": ("it runs layers of its own beside the model's, in which documents of one row would see each other",
               "bottleneck"),
}  # fmt: skip
