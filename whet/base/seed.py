"""Seed, save and restore every source of randomness in one module."""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """(tensors, plain values) from which `restore_random_state` goes on exactly."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()  # type: ignore[misc]
    tensors["numpy"] = torch.from_numpy(np.asarray(keys, dtype=np.int64).copy())
    return tensors, {
        "python": [version, list(numbers), gauss],
        "numpy": [str(name), int(position), int(has_gauss), float(cached)],
    }


def restore_random_state(tensors: dict[str, torch.Tensor], values: dict[str, object]) -> None:
    """Put the generators back to the state that `random_state` gave."""
    torch.set_rng_state(tensors["torch"])
    states = [tensors[f"cuda.{index}"] for index in range(len(tensors)) if f"cuda.{index}" in tensors]
    if states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states)
    version, numbers, gauss = values["python"]  # type: ignore[misc]
    random.setstate((version, tuple(numbers), gauss))
    name, position, has_gauss, cached = values["numpy"]  # type: ignore[misc]
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state((name, keys, position, has_gauss, cached))
