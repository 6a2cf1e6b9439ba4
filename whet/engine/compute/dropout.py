"""Dropout whose mask depends on seed, step, token and place alone: the same however a step is cut, rerun or replayed.

A generator that moves on with every draw makes a mask depend on all draws before it: micro-batches of another size are
another training, a layer that runs again in the backward pass needs the old state put back, and in a CUDA graph that
state is out of reach. Here each number is hashed by itself (lowbias32, C. Wellons, https://nullprogram.com/blog/2018/07/31/)
from a key of the step, the number of the layer, the token's position among the tokens of the step, and the feature. Key
and position are tensors on the device that the host writes before a step, so nothing has to be saved or brought back.
The compiler makes the mask within the kernel that uses it.

Gives up: on padded rows the position counts the padding too, so another cut is another mask there.
"""

from __future__ import annotations

import torch

FIRST, SECOND = 0x7FEB352D, 0x846CA68B - 2**32  # lowbias32's factors, as signed numbers of 32 bits
LAYER, FEATURE = 0x9E3779B1 - 2**32, 0x85EBCA77 - 2**32  # odd, and far from each other in their bits


class Draws:
    """What all masks of a model depend on, on its device: `key` of the step, and `before`, the tokens of the step in
    front of this forward pass; int32 scalars that stay where they are."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.seed = seed
        self.key, self.before = (torch.zeros((), dtype=torch.int32, device=device) for _ in range(2))

    def place(self, step: int, before: int) -> None:
        """Let what runs next belong to optimiser step `step`, and begin with token `before` of it."""
        self.key.fill_(_signed(self.seed * 0x27D4EB2F + step * 0x165667B1 + (self.seed >> 32)))
        self.before.fill_(_signed(before))


def keyed_dropout(x: torch.Tensor, share: float, draws: Draws, layer: torch.Tensor) -> torch.Tensor:
    """x [T, K] with a share of its numbers set to 0 and the others divided by what is left.

    layer: int32 scalar, an own one for every layer.
    """
    tokens = torch.arange(x.shape[0], dtype=torch.int32, device=x.device) + draws.before
    features = torch.arange(x.shape[1], dtype=torch.int32, device=x.device) * FEATURE
    of_token = _mixed(tokens ^ _mixed(draws.key + layer * LAYER))
    hashed = _mixed(of_token[:, None] + features)
    kept = hashed >= int(share * 2**32) - 2**31
    return torch.where(kept, x * (1 / (1 - share)), 0)


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """Each int32 of x as another one, every bit of which depends on all of its own; products wrap around."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * FIRST
    x = (x ^ ((x >> 15) & 0x1FFFF)) * SECOND
    return x ^ ((x >> 16) & 0xFFFF)


def _signed(number: int) -> int:
    """The last 32 bits of a whole number, as an int32."""
    return (number & 0xFFFFFFFF) - (2**32 if number & 0x80000000 else 0)
