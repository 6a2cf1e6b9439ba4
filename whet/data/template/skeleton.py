"""Skeletons: what a chat template writes around the contents of plain turns, and for which rows that is sure.

For each order of roles the template's own words are learned once from a trial run. A row that follows them to the last
character has its spans without being traced. Nor does the template have to be run for most rows: a run in which it was
recorded what was asked of the contents (`template.watched`) stands for every row that gives the same answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from whet.data.example import Message, PlainTurns
from whet.data.template.isolated import IsolatedTemplate, Run, TemplateRefusal
from whet.data.template.spans import Rendered, Turn
from whet.data.template.watched import QUESTIONS, Guard, TextPart, stands_alone

MOST_ORDERS, MOST_RUNS = 4096, 8


@dataclass(frozen=True, slots=True, eq=False)
class Skeleton:
    """A rendered conversation without its contents: what the template writes for plain turns in one order of roles.

    literals: one before each content, and the last text. turns: of each its role, how far before its content it starts,
    how far behind it stops, and whether it is closed. markers: special tokens in the literals.
    """

    literals: tuple[str, ...]
    turns: tuple[tuple[str, int, int, bool], ...]
    markers: int

    def unplaced_turns(self) -> list[Turn]:
        """The turns in order, all at offset 0."""
        return [Turn(index, role, 0, 0, 0, 0, closed) for index, (role, _, _, closed) in enumerate(self.turns)]


def follow(text: str, messages: Sequence[Message], skeleton: Skeleton) -> Rendered | None:
    """The turns of a text that consists of the skeleton and of the contents in it, None if it does not.

    A template may strip contents; each is taken as it stands, else without the white space on one side or both.
    """
    position = 0
    contents: list[str] = []
    for index, message in enumerate(messages):
        before, after = skeleton.literals[index], skeleton.literals[index + 1]
        if not text.startswith(before, position):
            return None
        start = position + len(before)
        content = message.content
        if not (text.startswith(content, start) and text.startswith(after, start + len(content))):
            forms = (content.rstrip(), content.lstrip(), content.strip())
            fitting = (f for f in forms if text.startswith(f, start) and text.startswith(after, start + len(f)))
            content = next(fitting, None)
            if content is None:
                return None
        position = start + len(content)
        contents.append(content)
    return filled(skeleton, contents) if len(text) == position + len(skeleton.literals[-1]) else None


def filled(skeleton: Skeleton, contents: Sequence[str]) -> Rendered:
    """The skeleton with these contents in it."""
    parts: list[str] = []
    turns: list[Turn] = []
    data: list[tuple[int, int]] = []
    position = 0
    for index, (literal, content, turn) in enumerate(zip(skeleton.literals, contents, skeleton.turns, strict=False)):
        role, ahead, behind, closed = turn
        start = position + len(literal)
        position = start + len(content)
        parts += (literal, content)
        turns.append(Turn(index, role, start - ahead, start, position, position + behind, closed))
        data.append((start, position))
    return Rendered("".join((*parts, skeleton.literals[-1])), tuple(turns), tuple(data), skeleton.markers, ())


@dataclass(slots=True)
class _Runs:
    """The runs that were recorded of one order of roles. tried: how often one was begun."""

    skeleton: Skeleton | None = None
    guards: list[tuple[Guard, ...]] = field(default_factory=list)
    tried: int = 0


class SkeletonLookup:
    """Tells for rows of plain turns whether the template would write no more than a skeleton around their contents.

    It counts what it is asked, so a row is to be asked for once, and the answer passed on.
    """

    def __init__(self, template: IsolatedTemplate, skeletons: Callable[[tuple[str, ...]], Skeleton | None]) -> None:
        self._template, self._skeletons = template, skeletons
        self._known: dict[tuple[str, ...], _Runs] = {}

    def skeleton(self, turns: PlainTurns) -> Skeleton | None:
        """The skeleton that the template would fill with the contents of a row, None where that is not sure.

        An order of roles is recorded when it comes a second time, since to record costs more than to run.
        """
        runs = self._known.get(turns.roles)
        if runs is None:
            if len(self._known) < MOST_ORDERS:
                self._known[turns.roles] = _Runs()
            return None
        if not all(map(stands_alone, turns.contents)):
            return None
        for guards in runs.guards:
            if _same_answers(guards, turns.contents):
                return runs.skeleton
        if runs.tried == MOST_RUNS:
            return None
        runs.tried += 1
        runs.skeleton = runs.skeleton or self._skeletons(turns.roles)
        guards = None if runs.skeleton is None else self._recorded(runs.skeleton, turns)
        if guards is None:
            return None
        runs.guards.append(guards)
        return runs.skeleton

    def _recorded(self, skeleton: Skeleton, turns: PlainTurns) -> tuple[Guard, ...] | None:
        """The answers that decide a run on this row, None where it cannot be repeated or writes other words."""
        messages = [{"role": role, "content": text} for role, text in zip(turns.roles, turns.contents, strict=True)]
        try:
            reply = self._template.run(Run("watched", messages, None, False))
        except TemplateRefusal:
            return None
        if tuple(reply["parts"]) != _parts(skeleton):
            return None
        return tuple(
            Guard(QUESTIONS[name], index, tuple(asked) if isinstance(asked, list) else asked, answer)
            for name, index, asked, answer in reply["guards"]
        )


def _same_answers(guards: Iterable[Guard], contents: Sequence[str]) -> bool:
    """True if the contents give every answer that was given in the recorded run."""
    for guard in guards:  # noqa: SIM110 (half the time of `all`, for every row)
        if guard.ask(contents[guard.index], guard.asked) is not guard.answer:
            return False
    return True


def _parts(skeleton: Skeleton) -> tuple[TextPart, ...]:
    """The skeleton as a recorded run would write it."""
    parts: list[TextPart] = []
    for index, literal in enumerate(skeleton.literals):
        parts += [literal] * bool(literal)
        parts += [index] * (index < len(skeleton.turns))
    return tuple(parts)
