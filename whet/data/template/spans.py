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
    """The span of message `index` in the text. start..end: what the one whose turn it is writes; stop: the end of its
    last token.

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

    data: the spans of all text that is not the template's own, in order and apart. markers: special tokens in the
    template's own text. dropped: (index of the message, field) of all that the template does not render, or only in
    part; the index is -1 for the definitions of tools.
    """

    text: str
    turns: tuple[Turn, ...]
    data: tuple[tuple[int, int], ...]
    markers: int
    dropped: tuple[tuple[int, str], ...]


@dataclass(frozen=True, slots=True)
class LastAnswer:
    """An answer with nothing behind it. closing: its end token; times: how often each field is said."""

    closing: str
    times: Mapping[str, int]


Tail = tuple[int | None, str]


def turns_of(
    traced: str,
    messages: Sequence[Message],
    left_out: Sequence[tuple[int, str]],
    *,
    last_answer: Callable[[int], LastAnswer | None],
    tails: Callable[[int], tuple[Tail | None, Callable[[], Tail]]],
    closing: Callable[[str], int],
) -> tuple[Turn, ...]:
    """The turns of a rendered conversation, those of whose messages something was rendered.

    last_answer: message index -> that answer with nothing behind it. tails: message index -> what follows the last
    content in the prompt for it, from a trial and, on demand, from the row itself. closing: characters up to the end of
    the first special token. Raises UserError where an answer or a call is missing, or turns are not one after the
    other.
    """
    text, spans = str.__str__(traced), sorted(spans_of(traced))
    _refuse_missing(messages, spans, left_out)
    turns: list[Turn] = []
    for index, message in enumerate(messages):
        own = [span for span in spans if span.source.message == index]
        if message.role == "assistant":
            own = _without_echoes(own, last_answer(index))
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
        trial, actual = tails(index)
        start = _start(text, spans, first, index, trial, actual, last_turn=index == len(messages) - 1)
        closed = stop > last
        alone = last_answer(index)
        if (
            alone is not None
            and alone.closing
            and not text[last:stop].endswith(alone.closing)
            and index < len(messages) - 1
        ):
            stop = last  # the answer was closed with another token when it was written
        turns.append(Turn(index, message.role, start, first, last, stop, closed))
    return tuple(turns)


def _without_echoes(own: Sequence[Span], alone: LastAnswer | None) -> list[Span]:
    """The spans of an answer without those by which a later turn repeats a part of it (the name of a called tool)."""
    first_said: list[Span] = []
    for span in own:
        again = sum(1 for other in first_said if other.source == span.source and _overlap(other, span))
        if alone is None or again < max(1, alone.times.get(span.source.field, 1)):
            first_said.append(span)
    return first_said


def _overlap(one: Span, other: Span) -> bool:
    if CHANGED in (one.offset, other.offset):
        return True
    ends = one.offset + one.end - one.start, other.offset + other.end - other.start
    return max(one.offset, other.offset) < min(ends) or one.offset == other.offset


def _start(
    text: str, spans: Iterable[Span], first: int, index: int, trial: Tail | None, actual: Callable[[], Tail], *,
    last_turn: bool,
) -> int:  # fmt: skip
    """The offset at which a model begins to write: the end of the prompt for this answer, known by the text behind what
    is before.

    An earlier answer that the template writes after another header than its prompt's begins with its content.
    """
    if index == 0:
        return first
    before = max((span for span in spans if span.end <= first and span.source.message < index),
                 key=lambda span: (span.end, span.start), default=None)  # fmt: skip
    anchor, behind = (None, 0) if before is None else (before.source.message, before.end)
    for attempt in (lambda: trial, actual):
        prompt = attempt()
        if prompt is None or prompt[0] != anchor or not text.startswith(prompt[1], behind):
            continue
        if behind + len(prompt[1]) <= first:
            return behind + len(prompt[1])
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
    """True if an earlier message that shows up behind an answer also stands before it."""
    return any(other.source == span.source and other.end <= first for other in spans)


def dropped(traced: str, messages: Sequence[Message], tools: str | None) -> tuple[tuple[int, str], ...]:
    """(index of the message, field) of all text that was not rendered.

    White space is not missed, nor what the template takes out and writes itself in the same position (thinking tags).
    """
    rendered, spans = str.__str__(traced), spans_of(traced)
    by_field: dict[tuple[int, str], list[Span]] = {}
    calls: set[tuple[int, str]] = set()
    for span in spans:
        by_field.setdefault((span.source.message, span.source.field), []).append(span)
        if span.source.field.startswith("tool_calls."):
            calls.add((span.source.message, ".".join(span.source.field.split(".")[:2])))
    fields: list[tuple[int, str]] = []
    for index, message in enumerate(messages):
        for field, text in ((REASONING, message.reasoning), (CONTENT, message.content)):
            if text and not text.isspace() and _missing(text, by_field.get((index, field), []), rendered):
                fields.append((index, field))
        names = (f"tool_calls.{number}" for number in range(len(message.tool_calls)))
        fields += [(index, name) for name in names if (index, name) not in calls]
    if tools is not None and (TOOLS, "tools") not in by_field:
        fields.append((TOOLS, "tools"))
    return tuple(fields)


def _missing(text: str, spans: Sequence[Span], rendered: str) -> bool:
    """True if a character of `text` that is not white space is neither in a span nor next to one in `rendered`."""
    if any(span.offset == CHANGED for span in spans):
        return False
    at, before = 0, None
    for span in sorted((span for span in spans if span.start < span.end), key=lambda span: span.offset):
        gap = text[at : span.offset].strip()
        beside = rendered[0 if before is None else before.end : span.start].strip()
        if gap and not (beside.endswith(gap) if before is None else beside == gap):
            return True
        at, before = max(at, span.offset + span.end - span.start), span
    return bool(text[at:].strip())


def lost_source(traced: str) -> str | None:
    """A message of a trial run whose words are in the text without their source: the template hid where they come
    from."""
    text, with_source = str.__str__(traced), {span.source.message for span in spans_of(traced)}
    for index in range(text.count("qzx") + 1):
        if f"qzx{index}xzq" in text and index not in with_source:
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
