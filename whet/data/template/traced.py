"""Strings that remember which message each of their characters came from, through all that a chat template does.

A template joins, strips, splits, cuts and encodes what it is given. A `Traced` string goes through these steps as any
string does, and carries the span of every piece along; so after rendering, the text itself says where each content
stands and what was left out. That is exact where searching for the content's words would not be: they may occur
elsewhere, occur twice, be empty, or be rewritten.

What changes characters one by one (replace, upper, JSON) keeps its source but loses the offset in it. The steps of
Python itself that build a string from others without asking them ("%" and str.join of a plain string) lose the source;
whoever uses these strings has to check that nothing is missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, SupportsIndex, cast

CHANGED, TOOLS = -1, -1


class Source(NamedTuple):
    """message: its index, TOOLS for the definitions of tools. field: content, reasoning, or a path in tool_calls."""

    message: int
    field: str


class Span(NamedTuple):
    """text[start:end] came from `source`, from its character `offset` on; offset == CHANGED where it was rewritten."""

    start: int
    end: int
    source: Source
    offset: int

    def moved(self, by: int) -> Span:
        return Span(self.start + by, self.end + by, self.source, self.offset)


class Traced(str):
    """A string with the sources of its characters; empty sources are kept too, as spans of no length."""

    __slots__ = ("_spans",)
    _spans: tuple[Span, ...]

    @classmethod
    def of(cls, text: str, source: Source) -> Traced:
        """`text`, all of it from `source`."""
        return _traced(text, (Span(0, len(text), source, 0),))

    def __str__(self) -> str:
        return self

    def __add__(self, other: str) -> str:
        return _joined((self, other))

    def __radd__(self, other: str) -> str:
        return _joined((other, self))

    def __mul__(self, count: SupportsIndex) -> str:
        return _joined([self] * int(count))

    def __rmul__(self, count: SupportsIndex) -> str:
        return self * count

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        if not isinstance(key, slice):
            index = int(key) + (len(self) if int(key) < 0 else 0)
            super().__getitem__(key)  # an index outside is Python's error
            return self._cut(index, index + 1)
        start, stop, step = key.indices(len(self))
        return self._cut(start, max(start, stop)) if step == 1 else self._changed(super().__getitem__(key))

    def __iter__(self) -> Iterator[str]:
        return (self._cut(index, index + 1) for index in range(len(self)))

    def strip(self, chars: str | None = None) -> str:
        return cast("Traced", self.lstrip(chars)).rstrip(chars)

    def lstrip(self, chars: str | None = None) -> str:
        return self._cut(len(self) - len(super().lstrip(chars)), len(self))

    def rstrip(self, chars: str | None = None) -> str:
        return self._cut(0, len(super().rstrip(chars)))

    def removeprefix(self, prefix: str) -> str:
        return self._cut(len(self) - len(super().removeprefix(prefix)), len(self))

    def removesuffix(self, suffix: str) -> str:
        return self._cut(0, len(super().removesuffix(suffix)))

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:  # type: ignore[override]
        return self._parts(super().split(sep, maxsplit), 0 if sep is None else len(sep))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:  # type: ignore[override]
        return self._parts(super().rsplit(sep, maxsplit), 0 if sep is None else len(sep))

    def splitlines(self, keepends: bool = False) -> list[str]:
        lines, start = [], 0
        for whole, line in zip(super().splitlines(True), super().splitlines(keepends), strict=True):
            lines.append(self._cut(start, start + len(line)))
            start += len(whole)
        return lines

    def partition(self, sep: str) -> tuple[str, str, str]:
        return self._three(super().partition(sep))

    def rpartition(self, sep: str) -> tuple[str, str, str]:
        return self._three(super().rpartition(sep))

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> str:
        return self._changed(super().replace(old, new, count))

    def upper(self) -> str:
        return self._changed(super().upper())

    def lower(self) -> str:
        return self._changed(super().lower())

    def title(self) -> str:
        return self._changed(super().title())

    def capitalize(self) -> str:
        return self._changed(super().capitalize())

    def expandtabs(self, tabsize: SupportsIndex = 8) -> str:
        return self._changed(super().expandtabs(tabsize))

    def format(self, *args: object, **kwargs: object) -> str:
        return changed(super().format(*args, **kwargs), [self, args, kwargs])

    def join(self, parts: Iterable[str]) -> str:
        separated: list[str] = []
        for part in parts:
            separated += [self, part] if separated else [part]
        return _joined(separated)

    def _three(self, parts: tuple[str, str, str]) -> tuple[str, str, str]:
        first, second = len(parts[0]), len(parts[0]) + len(parts[1])
        return self._cut(0, first), self._cut(first, second), self._cut(second, len(self))

    def _parts(self, parts: list[str], between: int) -> list[str]:
        """`parts` with their sources; they lie in order, `between` characters apart (0: white space of any length)."""
        traced, start = [], 0
        for part in parts:
            if not between:  # the first character after white space is where the part begins
                while str.__getitem__(self, start) != str.__getitem__(part, 0):
                    start += 1
            traced.append(self._cut(start, start + len(part)))
            start += len(part) + between
        return traced

    def _cut(self, start: int, stop: int) -> str:
        """self[start:stop]; a span that is cut down to nothing stays, so that an empty content has an offset."""
        spans = []
        for span in self._spans:
            first, last = max(span.start, start), min(span.end, stop)
            if first < last or (first == last and (span.start == span.end or start == stop)):
                offset = CHANGED if span.offset == CHANGED else span.offset + first - span.start
                spans.append(Span(first - start, last - start, span.source, offset))
        return _traced(str.__getitem__(self, slice(start, stop)), tuple(spans))

    def _changed(self, text: str) -> str:
        return self if text == self else changed(text, self)


def _traced(text: str, spans: tuple[Span, ...]) -> Traced:
    traced = str.__new__(Traced, text)
    traced._spans = spans
    return traced


def restored(text: str, spans: Iterable[Sequence[Any]]) -> str:
    """The text with spans that were written as [start, end, message, field, offset]; a plain string without any."""
    known = tuple(Span(start, end, Source(message, field), offset) for start, end, message, field, offset in spans)
    return _traced(text, known) if known else text


def _joined(parts: Iterable[str]) -> str:
    """The parts as one string; a plain one where none has a source."""
    parts = list(parts)
    text = "".join(parts)
    spans: list[Span] = []
    start = 0
    for part in parts:
        if type(part) is Traced:
            spans += [span.moved(start) for span in part._spans]
        start += len(part)
    return _traced(text, tuple(spans)) if spans else text


concat = _joined


def spans_of(text: str) -> tuple[Span, ...]:
    """The spans of a rendered text; () where nothing in it has a source."""
    return text._spans if isinstance(text, Traced) else ()


class TracedObject(dict):
    """An object of a tool call or a tool's definition: traced itself where it is rendered whole, and so its values."""

    __slots__ = ("_source",)
    _source: Source

    @classmethod
    def of(cls, values: dict[str, Any], source: Source) -> TracedObject:
        """`values`, an object of `source`."""
        traced = cls(values)
        traced._source = source
        return traced

    def __str__(self) -> str:
        return changed(repr(self), self)


def traced_value(value: Any, source: Source, *, paths: bool = True) -> Any:
    """JSON values with every string in them traced; with `paths`, each under the path to it in the source's field."""

    def inside(key: object, item: Any) -> Any:
        return traced_value(item, Source(source.message, f"{source.field}.{key}") if paths else source, paths=paths)

    if isinstance(value, str):
        return Traced.of(value, source)
    if isinstance(value, dict):
        return TracedObject.of({key: inside(key, item) for key, item in value.items()}, source)
    if isinstance(value, list | tuple):
        return [inside(index, item) for index, item in enumerate(value)]
    return value


def changed(text: str, value: object) -> str:
    """`text`, which was made of `value`: all of it from the sources that `value` has, a plain string if it has none."""
    sources = list(dict.fromkeys(_sources(value)))
    return _traced(text, tuple(Span(0, len(text), source, CHANGED) for source in sources)) if sources else text


def _sources(value: object) -> Iterator[Source]:
    if isinstance(value, Traced):
        yield from (span.source for span in value._spans)
    elif isinstance(value, dict):
        if isinstance(value, TracedObject):
            yield value._source
        for item in value.values():
            yield from _sources(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _sources(item)
