"""What a computation that is run again in the backward pass must find as it was: autocast, and the random numbers."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch


def autocast_now(device: str) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Makes the autocast context that holds now, for later: backward runs outside of it."""
    kept = {
        "dtype": torch.get_autocast_dtype(device),
        "enabled": torch.is_autocast_enabled(device),
        "cache_enabled": torch.is_autocast_cache_enabled(),
    }
    return functools.partial(torch.autocast, device, **kept)


def random_state_of(device: torch.device) -> tuple[torch.Tensor, ...]:
    """States of the generators that a layer on `device` draws from; both lie on the host, so nothing waits."""
    here = torch.get_rng_state()
    return (here, torch.cuda.get_rng_state(device)) if device.type == "cuda" else (here,)


def put_back(state: tuple[torch.Tensor, ...], device: torch.device) -> None:
    """Let random numbers come as they did after `state`, from here on."""
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)


def has_moved(before: tuple[torch.Tensor, ...], after: tuple[torch.Tensor, ...]) -> bool:
    return not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@contextlib.contextmanager
def drawn_again(state: tuple[torch.Tensor, ...] | None, device: torch.device) -> Iterator[None]:
    """Within, random numbers come as they did after `state`; outside nothing has been drawn. None: nothing happens."""
    if state is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        put_back(state, device)
        yield
