"""Record the questions that a chat template asks of the contents that it writes, so that its run can be repeated.

A template is run on contents that have no text: a `Watched` value answers what it is asked from a real row, and records
question and answer. What comes out is a list of the template's own words and of contents between them. For another row
of which every question has the same answer, the template would do the same, step by step, so its text is those words
around that row's contents (the trace and guard of a tracing compiler). Whatever is not known here spoils the run: a
value without text cannot be read behind its back, as a string could, and Python refuses to do with it what it lacks.

All contents are taken to begin and end with a character that is not white space (`stands_alone`): then none is empty,
and to strip it changes nothing. Gives up: templates that cut, encode or measure plain contents are run for every row.
Source of the idea: Bolz and others, Tracing the Meta-Level: PyPy's Tracing JIT Compiler, 2009.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import update_wrapper
from typing import Any, NoReturn

TextPart = str | int  # the template's own words, or the index of the message whose content stands there


class Unfollowed(Exception):
    """The template does something with a content that cannot be repeated on another."""


# All that a template may ask of a content, by the name under which a recorded run knows it.
QUESTIONS: dict[str, Callable[[str, Any], bool]] = {
    ask.__name__: ask for ask in (str.startswith, str.endswith, operator.contains, operator.eq)
}


@dataclass(frozen=True, slots=True)
class Guard:
    """One answer: `ask(content of message index, asked)` was `answer`."""

    ask: Callable[[str, Any], bool]
    index: int
    asked: Any
    answer: bool


@dataclass(slots=True)
class RecordedRun:
    """One run of a template. guards: the answers that decided it, in order; spoiled: it cannot be repeated."""

    contents: Sequence[str]
    guards: dict[tuple[str, int, Any], Guard] = field(default_factory=dict)
    spoiled: bool = False

    def watched(self) -> list[Watched]:
        """The contents as the template is to be given them: values that record what they are asked."""
        return [Watched(self, (index,)) for index in range(len(self.contents))]

    def ask(self, ask: Callable[[str, Any], bool], index: int, asked: Any) -> bool:
        """The answer for this row, recorded."""
        answer = ask(self.contents[index], asked)
        self.guards[ask.__name__, index, asked] = Guard(ask, index, asked, answer)
        return answer


def stands_alone(content: str) -> bool:
    """True if a content has text, and no white space at its ends."""
    return bool(content) and not (content[0].isspace() or content[-1].isspace())


class Watched:
    """A content, or a text with contents in it, during a run that is recorded."""

    __slots__ = ("_parts", "_run")

    def __init__(self, run: RecordedRun, parts: tuple[TextPart, ...]) -> None:
        self._run, self._parts = run, parts

    def _spoil(self, *_: object, **__: object) -> NoReturn:
        self._run.spoiled = True  # whoever catches the exception does not save the run
        raise Unfollowed

    def _index(self) -> int:
        """The message whose content this is; a text around a content is asked nothing."""
        (first, *rest) = self._parts
        return first if isinstance(first, int) and not rest else self._spoil()

    def _ask(self, ask: Callable[[str, Any], bool], asked: object, *rest: object) -> bool:
        several = isinstance(asked, tuple) and all(isinstance(one, str) for one in asked)
        if rest or not (several or isinstance(asked, str)):
            self._spoil()
        return self._run.ask(ask, self._index(), asked)

    def startswith(self, prefix: object, *rest: object) -> bool:
        return self._ask(str.startswith, prefix, *rest)

    def endswith(self, suffix: object, *rest: object) -> bool:
        return self._ask(str.endswith, suffix, *rest)

    def __contains__(self, part: object) -> bool:
        return self._ask(operator.contains, part) if isinstance(part, str) else self._spoil()

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Watched):
            self._spoil()
        return self._ask(operator.eq, other) if isinstance(other, str) else False

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __bool__(self) -> bool:
        return True  # it holds a content, and none is empty

    def strip(self, chars: str | None = None) -> Watched:
        """The content itself: none has white space at its ends."""
        self._index()
        return self if chars is None or (isinstance(chars, str) and (not chars or chars.isspace())) else self._spoil()

    lstrip = rstrip = strip

    def __add__(self, other: object) -> Watched:
        return joined([self, other]) if isinstance(other, str | Watched) else self._spoil()  # type: ignore[return-value]

    def __radd__(self, other: object) -> Watched:
        return joined([other, self]) if isinstance(other, str | Watched) else self._spoil()  # type: ignore[return-value]

    def __getattr__(self, name: str) -> NoReturn:
        self._spoil()

    __str__ = __repr__ = __format__ = __hash__ = __len__ = __iter__ = __getitem__ = _spoil  # type: ignore[assignment]
    __lt__ = __le__ = __gt__ = __ge__ = __mul__ = __rmul__ = __mod__ = __rmod__ = _spoil
    __int__ = __float__ = __index__ = __reversed__ = _spoil  # type: ignore[assignment]


def text(value: Any) -> str | Watched:
    """`str(value)` of a template, which leaves a watched value as it is."""
    return value if isinstance(value, Watched) else str(value)


def joined(values: Iterable[Any]) -> str | Watched:
    """Texts one after the other; a plain string where none is watched."""
    parts: list[TextPart] = []
    run: RecordedRun | None = None
    for value in values:
        run = value._run if isinstance(value, Watched) else run
        for part in value._parts if isinstance(value, Watched) else (value,):
            if isinstance(part, str) and parts and isinstance(parts[-1], str):
                parts[-1] += part
            elif part != "":
                parts.append(part)
    return "".join(parts) if run is None else Watched(run, tuple(parts))  # type: ignore[arg-type]


def parts_of(rendered: object) -> tuple[TextPart, ...]:
    """The parts of a rendered text: words and contents in turn."""
    return rendered._parts if isinstance(rendered, Watched) else (str(rendered),)


# What jinja's filters do with a watched value as their first argument, or with lists and objects that hold some. They
# are those whose work does not ask for the kind of a value, or fails aloud on one that is no string.
FILTERS = frozenset(("default", "d", "length", "count", "list", "first", "last", "items", "tojson", "selectattr",
                     "rejectattr", "map", "join"))  # fmt: skip
STRIPPING, TEXT = "trim", "string"
TESTS = {"string": True, "iterable": True, "sequence": True, "mapping": False, "none": False, "boolean": False,
         "number": False, "integer": False, "float": False, "true": False, "false": False, "defined": True,
         "undefined": False, "callable": False}  # fmt: skip
_COMPARING = frozenset(("eq", "equalto", "==", "ne", "!=", "in"))


def watching_filter(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """jinja's filter `run`, which spoils a run whose contents it would treat otherwise than strings."""

    def filtered(*args: Any, **kwargs: Any) -> Any:
        held = [*args, *kwargs.values()]
        value = next((item for item in held if isinstance(item, Watched)), None)
        if value is not None and value is args[0] and len(held) == 1 and name in (STRIPPING, TEXT):
            return value.strip() if name == STRIPPING else value
        if value is not None and not (name in ("default", "d") and value is args[0]):
            value._spoil()
        if name not in FILTERS:
            for item in held:
                _refuse_holding(item)
        return run(*args, **kwargs)

    return _as(run, filtered)


def watching_test(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """jinja's test `run`, which answers for a content as it does for any string."""

    def tested(*args: Any, **kwargs: Any) -> Any:
        value = next((item for item in (*args, *kwargs.values()) if isinstance(item, Watched)), None)
        if value is None or name in _COMPARING:
            return run(*args, **kwargs)
        return TESTS[name] if name in TESTS and args and value is args[0] else value._spoil()

    return _as(run, tested)


def _as(run: Callable[..., Any], wrapped: Callable[..., Any]) -> Callable[..., Any]:
    """`wrapped` with the attributes of `run` that tell jinja to pass the context or the environment first."""
    return update_wrapper(wrapped, run)


def _refuse_holding(value: Any) -> None:
    """Spoil the run of any watched value inside lists and objects."""
    if isinstance(value, Watched):
        value._spoil()
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        _refuse_holding(item)
