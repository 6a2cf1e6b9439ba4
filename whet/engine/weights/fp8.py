"""float8_e4m3fn: eight bits a number and one float32 scale a row."""

from __future__ import annotations

import torch

E4M3 = torch.float8_e4m3fn
FP8_MAX = 448.0  # the largest number that e4m3 holds


def quantise_fp8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [M, K] as float8_e4m3fn [M, K] and their scales float32 [M]: row = codes * scale.

    A row below 1e-33 becomes zeros; the bound lies far under gradients of tokens that are predicted almost surely.
    """
    wide = rows.float()
    scale = wide.abs().amax(-1).clamp_min(1e-30) / FP8_MAX
    return (wide / scale[:, None]).to(E4M3), scale
