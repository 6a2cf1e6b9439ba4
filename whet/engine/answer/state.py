"""A model that is kept ready to answer, in one state at a time, and put back as it was at the end.

A state is what answers depend on beside the prompt: which modules there are, how they are set (an adapter switched off,
another one active), and the memory and contents of their tensors. A captured graph goes on with the kernels and the
addresses of the state in which it was captured, a dense copy with the numbers that it was made of, and a proof holds
for what was proven. So nothing that is set up in one state is used in another. Who switches does it inside of
`Session.state` (or `base`), before and after which everything is put back, and is set up anew by the next question. And
each question first compares the model with how it was when it was set up: a switch behind the session's back is found
and costs the same. Gives up: keeping the graphs of two states side by side; some ten milliseconds a question for the
comparison, with an adapter on every layer of a large model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Self, TypeVar

import torch
from torch import nn

from whet.base.errors import UserError
from whet.base.out_of_memory import CLOSE_OTHERS, ran_out
from whet.base.private import version_of
from whet.engine.answer.batches import Scarce
from whet.engine.answer.notices import Notices
from whet.engine.memory.scarce import NoRoom, forget_frames, free_text, let_go

PLAIN = frozenset((bool, int, float, str, type(None)))
COLLECTIONS = frozenset((list, tuple, set))
T = TypeVar("T")
OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}


class Session:
    """What the sessions of every kind of model share: set up by the first question, put back by `close`.

    model: a transformers model, or PEFT's around one; base_only: how to switch off what was trained. `notices` is for
    the caller to tell.
    """

    def __init__(self, model: Any, base_only: Callable[[], AbstractContextManager[None]] | None = None) -> None:
        self.model = model
        self.notices = Notices()
        self._base_only = base_only
        self._undo = contextlib.ExitStack()
        self._state: list[Any] | None = None
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Put the model back as it was before the session; no more questions."""
        self.release()
        self._closed = True

    def release(self) -> None:
        """Put the model back as it was before the session; the next question sets it up again."""
        self._state = None
        self._undo.close()

    @contextlib.contextmanager
    def state(self, change: AbstractContextManager[Any]) -> Iterator[None]:
        """Answer inside the block with the model as `change` makes it: it finds, and leaves, a model put back."""
        self.release()
        with change:
            try:
                yield
            finally:
                self.release()

    def base(self) -> AbstractContextManager[None]:
        """Answer inside the block without what was trained. RuntimeError where nothing can be switched off."""
        if self._base_only is None:
            raise RuntimeError("nothing can be switched off here: a plain model was opened")
        return self.state(self._base_only())

    def _prepare(self) -> None:
        """Set the model up, unless it is and nothing has changed since."""
        self._check()
        self._set_up_once()

    def _check(self) -> None:
        """Put the model back if it was switched since it was set up. RuntimeError after `close`."""
        if self._closed:
            raise RuntimeError("the model was let go: open it again to ask it")
        if self._state is not None and self._state != state_of(self._modules()):
            self.release()

    def _set_up_once(self) -> None:
        """Set the model up unless it is; where memory runs out in it, once more in the leaner way."""
        while self._state is None:
            try:
                self._set_up(self._undo)
                self._state = state_of(self._modules())
            except BaseException as error:
                self.release()
                if not isinstance(error, RuntimeError | MemoryError) or not ran_out(error):
                    raise
                forget_frames(error)
            if self._state is None:
                let_go()
                if not self._leaner():
                    raise self._refusal("the model with its working memory")

    def _leaner(self) -> bool:
        """Give up speed for memory from here on, which changes no answer; returns whether there was any to give up."""
        return False

    def _scarce(self, many: Callable[[int], str], one: str) -> Scarce:
        """What is done when memory runs out. many: says how many are computed together; one: what a single one is."""
        return Scarce(
            fewer=lambda size: self.notices.add(many(size)), leaner=self._leaner,
            refusal=lambda tokens: self._refusal(one, tokens),
        )  # fmt: skip

    def _alone(self, work: Callable[[], T], what: str, tokens: int, *, again: bool = True) -> T:
        """Compute for one item; where memory runs out, once more in the leaner way. again: False where pieces of the
        answer are given away already: then the next question finds the leaner way. Raises UserError."""
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not ran_out(error):
                    raise
                forget_frames(error)
            let_go()
            if not self._leaner() or not again:
                raise self._refusal(what, tokens)

    def _refusal(self, what: str, tokens: int | None = None) -> UserError:
        """The error for what does not fit. tokens: of the item that is alone."""
        device = next(self.model.parameters()).device
        found = free_text(device) if tokens is None else f"{tokens:,} tokens; {free_text(device)}"
        return NoRoom(
            f"{what} does not fit in memory", found=found, expected=self._what_fits(tokens, device),
            fix=f"{CLOSE_OTHERS}; or base.storage=nf4 where the model was not trained in it; CUDA_VISIBLE_DEVICES= "
            "in front of the command answers on the CPU",
        )  # fmt: skip

    def _what_fits(self, tokens: int | None, device: torch.device) -> str:
        """What would fit, in words."""
        return "memory for the model and one row" if tokens is None else f"about {max(1, tokens // 2):,} tokens"

    def _set_up(self, undo: contextlib.ExitStack) -> None:
        """Make the model ready; what puts it back goes on `undo`."""
        undo.enter_context(evaluating(self.model))

    def _modules(self) -> Iterable[nn.Module]:
        """The modules that answers depend on."""
        return self.model.modules()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, the mode of each module outside."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def ended(streamer: Any) -> Iterator[None]:
    """Inside, an answer that breaks off ends for the streamer, which would take the next prompt for more of it."""
    try:
        yield
    except BaseException:
        if streamer is not None:
            streamer.end()
        raise


def state_of(modules: Iterable[nn.Module]) -> list[Any]:
    """All that tells two states apart: the modules, what they hold beside tensors, and for each tensor where it lies
    and how often it was written to. Equal states answer alike; a change that alters no answer may be seen, too."""
    state: list[Any] = []
    for module in modules:
        state.append(id(module))
        state += [_plain(value) for name, value in vars(module).items() if name not in OF_EVERY_MODULE]
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            state += (tensor.data_ptr(), version_of(tensor))
    return state


def _plain(value: Any) -> Any:
    """A copy of numbers, names and collections of them; which object it is of anything else."""
    if type(value) in PLAIN:
        return value
    if type(value) in COLLECTIONS and all(type(inner) in PLAIN for inner in value):
        return tuple(value)
    if type(value) is dict and all(type(inner) in PLAIN for inner in value.values()):
        return tuple(value.items())
    return id(value)
