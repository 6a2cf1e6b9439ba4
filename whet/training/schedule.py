"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math


def learning_rate(step: int, total: int, *, peak: float, shape: str, warmup_steps: int, decay_ratio: float) -> float:
    """Rate of optimiser step `step` (from 0) out of `total`.

    Warm-up rises linearly over `warmup_steps` and reaches the peak with its last one. `linear` and
    `cosine` then fall to 0 after the last step; `warmup_stable_decay` (Hu et al., 2024, arXiv:2404.06395) stays at the
    peak and falls linearly over the last decay_ratio of the steps.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    left = (total - step) / max(1, total - warmup_steps)
    if shape == "constant":
        return peak
    if shape == "linear":
        return peak * left
    if shape == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * (1 - left)))
    assert shape == "warmup_stable_decay", shape
    decay = max(1, math.ceil(decay_ratio * total))
    return peak * min(1.0, (total - step) / decay)
