"""Letting go of memory after it ran out, how much there is then, and turning what cannot be helped into one error.

An exception keeps the frames that it passed, and they keep their tensors: whoever wants to try again leaves the handler
first, and calls `let_go` there.
"""

from __future__ import annotations

import contextlib
import gc
import traceback
from collections.abc import Callable, Iterator

import torch

from whet.base.amounts import bytes_text
from whet.base.errors import UserError
from whet.base.out_of_memory import ran_out


class NoRoom(UserError):
    """The error for what does not fit in memory; a caller that can do it elsewhere catches it."""


def let_go() -> None:
    """Drop what only cycles hold, and give back what torch keeps for later."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def forget_frames(error: BaseException | None) -> None:
    """Drop the local variables of the calls that `error`, and what is behind it, came out of."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def free_text(device: torch.device) -> str:
    """What is free on `device`, and what this process holds of it; for other devices than a GPU only its name."""
    if device.type != "cuda":
        return f"the memory of this {device.type}"
    free, total = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device)
    return f"{bytes_text(free)} free of {bytes_text(total)}, {bytes_text(held)} of it held here"


def reachable_bytes(device: torch.device) -> int | None:
    """What this process could have if it held nothing; None on a device without a hard end."""
    if device.type != "cuda":
        return None
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


@contextlib.contextmanager
def refusing(refusal: Callable[[], UserError]) -> Iterator[None]:
    """Inside, memory that runs out ends in this error, made once what was being done has let go of its memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        forget_frames(error)
        let_go()
        raise refusal() from error
