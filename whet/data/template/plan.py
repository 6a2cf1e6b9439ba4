"""Plain turns in one order of roles: what the template writes around their contents, and for which rows that is sure.

For each order the template's own words are learned once from a trial run. A row that follows them to the last character
has its spans without being traced. Nor does the template have to be run for most rows: a run in which it was seen what
was asked of the contents (`template.watched`) stands for every row that gives the same answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from whet.data.example import Message
from whet.data.template.sandbox import mistakes, watching
from whet.data.template.spans import Rendered, Turn
from whet.data.template.watched import Guard, Part, Record, Unfollowed, parts_of, stands_alone

MOST_ORDERS, MOST_RUNS = 4096, 8


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What the template writes between the contents of plain turns in one order of roles.

    literals: one before each content, and the last text. turns: of each its role, how far before its content it starts,
    how far behind it stops, and whether it is closed. markers: special tokens in the literals.
    """

    literals: tuple[str, ...]
    turns: tuple[tuple[str, int, int, bool], ...]
    markers: int

    def order(self) -> list[Turn]:
        """The turns, with no place."""
        return [Turn(index, role, 0, 0, 0, 0, closed) for index, (role, _, _, closed) in enumerate(self.turns)]


def follow(text: str, messages: Sequence[Message], plan: Plan) -> Rendered | None:
    """The turns of a text that consists of the plan's literals and of the contents between them, None if it does not.

    A template may strip contents; each is taken as it stands, else without the white space on one side or both.
    """
    position = 0
    found: list[str] = []
    for index, message in enumerate(messages):
        before, after = plan.literals[index], plan.literals[index + 1]
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
        found.append(content)
    return filled(plan, found) if len(text) == position + len(plan.literals[-1]) else None


def filled(plan: Plan, contents: Sequence[str]) -> Rendered:
    """The plan's literals with these contents between them."""
    parts: list[str] = []
    turns: list[Turn] = []
    data: list[tuple[int, int]] = []
    position = 0
    for index, (literal, content, turn) in enumerate(zip(plan.literals, contents, plan.turns, strict=False)):
        role, ahead, behind, closed = turn
        start = position + len(literal)
        position = start + len(content)
        parts += (literal, content)
        turns.append(Turn(index, role, start - ahead, start, position, position + behind, closed))
        data.append((start, position))
    return Rendered("".join((*parts, plan.literals[-1])), tuple(turns), tuple(data), plan.markers, ())


@dataclass(slots=True)
class _Runs:
    """The runs that were recorded of one order of roles. tried: how often one was begun."""

    plan: Plan | None = None
    guards: list[tuple[Guard, ...]] = field(default_factory=list)
    tried: int = 0


class Repeats:
    """Says of rows of plain turns whether the template would write no more than its plan around their contents."""

    def __init__(
        self, source: str, variables: Mapping[str, Any], plans: Callable[[tuple[str, ...]], Plan | None]
    ) -> None:
        self._source, self._variables, self._plans = source, variables, plans
        self._known: dict[tuple[str, ...], _Runs] = {}

    def plan(self, roles: tuple[str, ...], contents: Sequence[str]) -> Plan | None:
        """The plan that the template would follow for a row of these roles and contents, None where that is not sure.

        An order of roles is recorded when it comes a second time, since to record costs more than to run.
        """
        runs = self._known.get(roles)
        if runs is None:
            if len(self._known) < MOST_ORDERS:
                self._known[roles] = _Runs()
            return None
        if not all(map(stands_alone, contents)):
            return None
        for guards in runs.guards:
            if _alike(guards, contents):
                return runs.plan
        if runs.tried == MOST_RUNS:
            return None
        runs.tried += 1
        runs.plan = runs.plan or self._plans(roles)
        guards = None if runs.plan is None else self._recorded(runs.plan, roles, contents)
        if guards is None:
            return None
        runs.guards.append(guards)
        return runs.plan

    def _recorded(self, plan: Plan, roles: Sequence[str], contents: Sequence[str]) -> tuple[Guard, ...] | None:
        """What a run on this row hangs on, None where it cannot be repeated or writes other things than the plan."""
        record = Record(contents)
        messages = [{"role": role, "content": value} for role, value in zip(roles, record.watched(), strict=True)]
        try:
            rendered = watching(self._source).render(
                messages=messages, tools=None, documents=None, add_generation_prompt=False, **self._variables
            )
        except (Unfollowed, *mistakes()):
            return None
        return None if record.spoiled or parts_of(rendered) != _parts(plan) else tuple(record.guards.values())


def _alike(guards: Iterable[Guard], contents: Sequence[str]) -> bool:
    """Whether the contents give every answer that was given."""
    for guard in guards:  # noqa: SIM110 (half the time of `all`, for every row)
        if guard.ask(contents[guard.index], guard.asked) is not guard.answer:
            return False
    return True


def _parts(plan: Plan) -> tuple[Part, ...]:
    """The plan as a recorded run would write it."""
    found: list[Part] = []
    for index, literal in enumerate(plan.literals):
        found += [literal] * bool(literal)
        found += [index] * (index < len(plan.turns))
    return tuple(found)
