"""All that is wrong with a recipe, in the one shape of errors: what the schema refuses, and several faults at once.

A recipe that was written for another tool has many names that do not fit; to learn of them one after the other would
take as many starts. So every fault is collected and all are raised together, in the order of the lines.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from whet.base.config import field_docs
from whet.base.errors import UserError, nearest
from whet.methods.all import METHODS
from whet.methods.bridged import BRIDGED, LEFT_OUT
from whet.sections import SECTION_CLASSES, SECTIONS
from whet.spelling.aliases import TOP_LEVEL
from whet.spelling.translations import preference

_PREFERENCE = frozenset(
    ("dpo", "orpo", "kto", "ppo", "grpo", "simpo", "cpo", "ipo", "rm", "reward", "rlhf", "gspo", "rloo")
)


MOST_SHOWN = 20


class RecipeProblems(UserError):
    """Several faults of one recipe; as an error it is the first of them, and its text and `--json` hold all."""

    def __init__(self, problems: Sequence[UserError]) -> None:
        first = problems[0]
        super().__init__(
            first.problem, first.fix, first.file, first.row, first.field, first.found, first.expected
        )  # fmt: skip
        self.problems = tuple(problems)

    def __str__(self) -> str:
        shown = list(map(str, self.problems[:MOST_SHOWN]))
        return "\n\n".join([*shown, f"{len(self.problems)} problems in all"])

    def __reduce__(self) -> tuple[Any, ...]:
        return RecipeProblems, (self.problems,)

    def as_dict(self) -> dict[str, Any]:
        """The first fault, and all of them under `problems`."""
        return super().as_dict() | {"problems": [problem.as_dict() for problem in self.problems]}


def raise_all(problems: Sequence[UserError]) -> None:
    """Raise the faults, if there are any: one as it is, several together."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise RecipeProblems(sorted(problems, key=lambda one: (one.row is None, one.row or 0)))


def complaints(
    errors: Iterable[Any], file: str | None, lines: Mapping[str, int], overridden: Sequence[str]
) -> Iterator[UserError]:
    """pydantic's errors in our shape, one for each setting."""
    said: list[str] = []
    for error in errors:
        one = _complaint(error, file, lines, overridden)
        path = one.field or ""
        if not any(path == other or path.startswith(f"{other}.") for other in said):
            said.append(path)
            yield one


def _complaint(error: Any, file: str | None, lines: Mapping[str, int], overridden: Sequence[str]) -> UserError:
    """With file and row only if the wrong value stands in the file."""
    parts = [str(p) for p in error["loc"]]
    method = None
    if parts[:1] == ["method"] and len(parts) > 1 and parts[1] in METHODS:
        method = parts.pop(1)
    parts = [p for p in parts if not p.startswith(("list[", "str", "function-", "literal[", "constrained"))]
    path = ".".join(parts)
    where: dict[str, Any] = {"file": file, "row": lines.get(path), "field": path}
    if any(f"{other}.".startswith(f"{path}.") or f"{path}.".startswith(f"{other}.") for other in overridden):
        where |= {"file": None, "row": None}
    kind = error["type"]
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return _unknown(path, method, where)
    if kind == "union_tag_invalid":
        return _no_such_method(str(error["input"].get("name")), where | {"field": "method.name"})
    value = error["input"]
    if kind == "literal_error" and (near := nearest(str(value), error["ctx"]["expected"].split("'")[1::2])):
        choices = error["ctx"]["expected"]
        return UserError("there is no such choice", **where, found=str(value), expected=choices, fix=f"write {near}")
    return UserError(
        f"the value does not fit: {error['msg'].lower()}", **where,
        found=f"{value!r} ({type(value).__name__})",
        expected=error["msg"].removeprefix("Input should be ").removeprefix("a "),
        fix=_doc(path) or "whet init lora shows every section",
    )  # fmt: skip


def _unknown(path: str, method: str | None, where: dict[str, Any]) -> UserError:
    names = {known.rpartition(".")[2]: known for known in sorted(_known_paths(method), reverse=True)}
    if method and (owner := next((name for name in METHODS if path in _known_paths(name)), None)):
        return UserError(
            f"the method {method} has no such setting", **where, found=path, expected=f"method.name: {owner}",
            fix=f"remove it, or write method.name: {owner}",
        )  # fmt: skip
    last = path.rpartition(".")[2]
    near = names.get(nearest(last, names) or "")
    return UserError(
        "there is no such setting", **where, found=path,
        expected=f"the nearest is {near}" if near else "whet init lora lists the usual ones",
        fix=f"write {near}" if near else "remove the line; docs/recipe.md lists every setting",
    )  # fmt: skip


def _no_such_method(value: str, where: dict[str, Any]) -> UserError:
    if value in LEFT_OUT:
        reason, instead = LEFT_OUT[value]
        return UserError(
            f"whet leaves out this method of PEFT: {reason}", **where,
            found=value, expected="a method that `whet methods` lists", fix=f"method.name={instead}",
        )  # fmt: skip
    if value.lower() in _PREFERENCE:
        return preference(value, **where)
    near = nearest(value, METHODS.keys() - BRIDGED.keys()) or nearest(value, METHODS) or "lora"
    return UserError("there is no such method", **where, found=value, expected=", ".join(METHODS), fix=f"write {near}")


def _known_paths(method: str | None = None) -> list[str]:
    """Dotted paths of all settings, or those with this method."""
    sections = SECTION_CLASSES | ({"method": (METHODS[method],)} if method else {})
    dotted = [
        f"{section}.{name}" for section, classes in sections.items() for cls in classes for name in field_docs(cls)
    ]
    return [*dict.fromkeys(dotted), *TOP_LEVEL]


def _doc(path: str) -> str | None:
    section, _, name = path.partition(".")
    for cls in SECTION_CLASSES.get(section, ()):
        if doc := field_docs(cls).get(name.partition(".")[0] or section):
            return doc
    return SECTIONS_DOC.get(path)


SECTIONS_DOC = {"output_dir": "The run directory; auto = runs/NAME-OF-THE-RECIPE."} | dict.fromkeys(
    SECTIONS, "A section holds settings: whet init lora shows every one."
)
