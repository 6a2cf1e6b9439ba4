"""Parameters that learn at a rate of their own: a multiple of the learning rate, noted on the parameter."""

from __future__ import annotations

import torch


def rate_ratio(parameter: torch.Tensor) -> float:
    """How many times the learning rate this parameter learns at: 1, unless its method gave it a rate of its own."""
    return float(getattr(parameter, "rate_ratio", 1.0))


def set_rate_ratio(parameter: torch.Tensor, ratio: float) -> None:
    """Let this parameter learn at `ratio` times the learning rate. To be called before `fuse` and the optimiser."""
    parameter.rate_ratio = ratio  # type: ignore[attr-defined]
