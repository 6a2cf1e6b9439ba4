"""Memory that ran out: how it is told from other errors, and the one error for a person where nothing could be done.

A graph that could not be captured, a library's workspace that was not to be had and a page that the host refused come
as errors of other kinds, or with the cause behind them. Nothing heavy is imported: the command line asks, too. What is
done about it is said where it happens: `training.launch` and `training.relief`, `engine.answer.batches`, `ship.merge`,
`opening.base_anew`.
"""

from __future__ import annotations

import errno

from whet.base.errors import UserError

_NAME = "OutOfMemoryError"  # torch's, whichever device it is about
_TEXTS = (  # of errors that have no kind of their own
    "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "cudaErrorMemoryAllocation",
    "not enough memory: you tried to allocate", "can't allocate memory",
)  # fmt: skip
CLOSE_OTHERS = "close what else uses the memory (nvidia-smi lists who holds a GPU's)"


def ran_out(error: BaseException | None) -> bool:
    """Tell whether memory ran out: in `error`, or in what it was raised in place of."""
    while error is not None:
        if isinstance(error, MemoryError) or any(kind.__name__ == _NAME for kind in type(error).__mro__):
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        if isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False


def memory_fault(error: BaseException, doing: str = "the command ran out of memory") -> UserError | None:
    """The error for a person where memory ran out and nothing else could be said, or None if `error` is another."""
    if not ran_out(error):
        return None
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__ or error
    lines = str(error).strip().splitlines()
    return UserError(
        doing, found=lines[0] if lines else type(error).__name__, expected="memory for it",
        fix=f"{CLOSE_OTHERS}; whet plan RECIPE says what training would take, and on which card",
    )  # fmt: skip
