"""From the sources of a rendered text to turns: where each begins, where its content lies, and what was left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from whet.base.errors import UserError
from whet.data.example import Message
from whet.data.template.traced import CHANGED, TOOLS, Span, spans_of

REASONING, CONTENT = "reasoning", "content"


@dataclass(frozen=True, slots=True)
class Turn:
    """Where message `index` stands in the text. start..end: what whoever takes the turn writes; stop: end of its last
    token.

    content: where the content begins, after what a model has to write in front of its answer because the generation
    prompt lacks it (an empty thinking block); elsewhere start. stop == end when no special token closes the turn, or
    when the template closes it otherwise than a model would have to. closed: False when nothing tells a model that the
    answer is at its end.
    """

    index: int
    role: str
    start: int
    content: int
    end: int
    stop: int
    closed: bool = True


@dataclass(frozen=True, slots=True)
class Rendered:
    """One conversation as the model reads it, with its turns in order.

    data: the places of all text that is not the template's own, in order and apart. markers: special tokens in the
    template's own text. dropped: (index of the message, field) of all that the template does not render, or only in
    part; the index is -1 for the definitions of tools.
    """

    text: str
    turns: tuple[Turn, ...]
    data: tuple[tuple[int, int], ...]
    markers: int
    dropped: tuple[tuple[int, str], ...]


@dataclass(frozen=True, slots=True)
class Alone:
    """An answer that ends its conversation. closing: its end token; times: how often each field is said."""

    closing: str
    times: Mapping[str, int]


Tail = tuple[int | None, str]


def place(
    traced: str,
    messages: Sequence[Message],
    left_out: Sequence[tuple[int, str]],
    *,
    alone: Callable[[int], Alone | None],
    tails: Callable[[int], tuple[Tail | None, Callable[[], Tail]]],
    closing: Callable[[str], int],
) -> tuple[Turn, ...]:
    """The turns of a rendered conversation, those of whose messages something was rendered.

    alone: message index -> that answer with nothing behind it. tails: message index -> what follows the last content in
    the prompt for it, from a trial and, on demand, from the row itself. closing: characters up to the end of the first
    special token. Raises UserError where an answer or a call is missing, or turns are not one after the other.
    """
    text, spans = str.__str__(traced), sorted(spans_of(traced))
    _refuse_missing(messages, spans, left_out)
    turns: list[Turn] = []
    for index, message in enumerate(messages):
        own = [span for span in spans if span.source.message == index]
        if message.role == "assistant":
            own = _without_echoes(own, alone(index))
        if not own:
            continue
        first, last = own[0].start, max(span.end for span in own)
        following = min((span.start for span in spans if span.start >= last and span not in own), default=len(text))
        literal = text[last:following]
        stop = last + closing(literal)
        if message.role != "assistant":
            turns.append(Turn(index, message.role, first, first, last, stop))
            continue
        _refuse_mixed(spans, own, index, len(messages))
        start = _start(text, spans, first, index, tails(index), last_turn=index == len(messages) - 1)
        closed = stop > last
        lonely = alone(index)
        if (
            lonely is not None
            and lonely.closing
            and not text[last:stop].endswith(lonely.closing)
            and index < len(messages) - 1
        ):
            stop = last  # the answer was closed with another token when it was written
        turns.append(Turn(index, message.role, start, first, last, stop, closed))
    return tuple(turns)


def _without_echoes(own: Sequence[Span], lonely: Alone | None) -> list[Span]:
    """The spans of an answer without those by which a later turn repeats a part of it (the name of a called tool)."""
    kept: list[Span] = []
    for span in own:
        again = sum(1 for other in kept if other.source == span.source and _overlap(other, span))
        if lonely is None or again < max(1, lonely.times.get(span.source.field, 1)):
            kept.append(span)
    return kept


def _overlap(one: Span, other: Span) -> bool:
    if CHANGED in (one.at, other.at):
        return True
    ends = one.at + one.end - one.start, other.at + other.end - other.start
    return max(one.at, other.at) < min(ends) or one.at == other.at


def _start(
    text: str, spans: Iterable[Span], first: int, index: int, tail: tuple[Tail | None, Callable[[], Tail]], *,
    last_turn: bool,
) -> int:  # fmt: skip
    """Where a model begins to write: at the end of the prompt for this answer, known by its end behind what is before.

    An earlier answer that the template writes after another header than its prompt's begins with its content.
    """
    if index == 0:
        return first
    before = max((span for span in spans if span.end <= first and span.source.message < index),
                 key=lambda span: (span.end, span.start), default=None)  # fmt: skip
    anchor, at = (None, 0) if before is None else (before.source.message, before.end)
    trial, actual = tail
    for attempt in (lambda: trial, actual):
        found = attempt()
        if found is not None and found[0] == anchor and text.startswith(found[1], at) and at + len(found[1]) <= first:
            return at + len(found[1])
    if last_turn:
        raise UserError(
            "the chat template asks for an answer with other text than stands before one",
            field="model.chat_template", found=f"prompt: …{actual()[1][-30:]!r}",
            expected="the text before an answer, as in a whole conversation",
            fix="mend the add_generation_prompt part of the template, or use model.chat_template=chatml",
        )  # fmt: skip
    return first


def _refuse_mixed(spans: Sequence[Span], own: Sequence[Span], index: int, count: int) -> None:
    """Refuse an answer with something else inside, or that does not stand between what came before and after it."""
    first, last = own[0].start, max(span.end for span in own)
    for span in spans:
        other = span.source.message
        inside = other != index and span.start < last and span.end > first
        early = other > index and span.start < last
        late = TOOLS < other < index and span.start >= last and not _echoed(span, spans, first)
        if inside or early or late:
            raise _rewrites(index, count, "turns that stand one after the other, in the order of the conversation")


def _echoed(span: Span, spans: Iterable[Span], first: int) -> bool:
    """Whether an earlier message that shows up behind an answer also stands before it."""
    return any(other.source == span.source and other.end <= first for other in spans)


def dropped(traced: str, messages: Sequence[Message], tools: str | None) -> tuple[tuple[int, str], ...]:
    """(index of the message, field) of all text that was not rendered.

    White space is not missed, nor what the template takes out and writes itself at the same place (thinking tags).
    """
    rendered, spans = str.__str__(traced), spans_of(traced)
    by_field: dict[tuple[int, str], list[Span]] = {}
    calls: set[tuple[int, str]] = set()
    for span in spans:
        by_field.setdefault((span.source.message, span.source.field), []).append(span)
        if span.source.field.startswith("tool_calls."):
            calls.add((span.source.message, ".".join(span.source.field.split(".")[:2])))
    found: list[tuple[int, str]] = []
    for index, message in enumerate(messages):
        for field, text in ((REASONING, message.reasoning), (CONTENT, message.content)):
            if text and not text.isspace() and _missing(text, by_field.get((index, field), []), rendered):
                found.append((index, field))
        names = (f"tool_calls.{number}" for number in range(len(message.tool_calls)))
        found += [(index, name) for name in names if (index, name) not in calls]
    if tools is not None and (TOOLS, "tools") not in by_field:
        found.append((TOOLS, "tools"))
    return tuple(found)


def _missing(text: str, spans: Sequence[Span], rendered: str) -> bool:
    """Whether a character of `text` that is not white space is neither in a span nor next to it in `rendered`."""
    if any(span.at == CHANGED for span in spans):
        return False
    at, before = 0, None
    for span in sorted((span for span in spans if span.start < span.end), key=lambda span: span.at):
        gap = text[at : span.at].strip()
        beside = rendered[0 if before is None else before.end : span.start].strip()
        if gap and not (beside.endswith(gap) if before is None else beside == gap):
            return True
        at, before = max(at, span.at + span.end - span.start), span
    return bool(text[at:].strip())


def lost(traced: str) -> str | None:
    """A source of a trial run whose words are in the text and yet belong to nobody: the template hid where they are
    from."""
    text, known = str.__str__(traced), {span.source.message for span in spans_of(traced)}
    for index in range(text.count("qzx") + 1):
        if f"qzx{index}xzq" in text and index not in known:
            return f"message {index + 1}"
    return None


def _refuse_missing(messages: Sequence[Message], spans: Sequence[Span], left_out: Sequence[tuple[int, str]]) -> None:
    """Refuse what must not be missing: calls, the turns of tools, and answers of which nothing is left."""
    for index, field in left_out:
        if field.startswith("tool_calls"):
            raise UserError(
                "the chat template does not render this tool call, so it would not be learned",
                field="messages", found=f"turn {index + 1} of {len(messages)}, call {int(field.split('.')[1]) + 1}",
                expected="a template with tool calls, and as many in a turn as it renders",
                fix="use a model whose template has tool calls, or leave such rows out",
            )  # fmt: skip
        if field != CONTENT or any(span.source.message == index and span.end > span.start for span in spans):
            continue
        if messages[index].role == "tool":
            raise UserError(
                "the chat template does not render what a tool answered", field="messages",
                found=f"turn {index + 1} of {len(messages)}", expected="a template with tool turns",
                fix="use a model whose template has tool turns, or leave such rows out",
            )  # fmt: skip
        if messages[index].role == "assistant":
            raise _rewrites(index, len(messages), "a template that renders every answer")


def _rewrites(index: int, count: int, expected: str) -> UserError:
    return UserError(
        "the chat template rewrites the conversation, so what is learned could not be said exactly",
        field="messages", found=f"turn {index + 1} of {count}", expected=expected,
        fix="split the conversation so that each row ends with one answer, or use model.chat_template=chatml",
    )  # fmt: skip
