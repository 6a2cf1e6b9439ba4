"""Read the text of recipes and overrides: YAML 1.2 in, plain values with their lines out, under limits of size.

YAML 1.2 makes `1e-4` a number and a repeated key an error. Only plain values come out: text, finite numbers, true and
false, lists and mappings; tags are refused, and aliases count as often as they are used. A recipe has some dozens of
lines, so what is far larger is something else and is refused before a parser spends minutes on it.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from whet.base.errors import UserError, nearest

MOST_BYTES, MOST_VALUES, MOST_CHARACTERS = 256_000, 10_000, 1_000_000
LONGEST_KEY, DEEPEST = 500, 12
KINDS = (bool, int, float, str)
_SMALLER = "keep to settings, and put rows, word lists and templates into files of their own"


def read_file(path: Path) -> str:
    """The text of a recipe file. Raises UserError."""
    file = str(path)
    if not path.is_file():
        near = nearest(path.name, [p.name for p in path.parent.glob("*.y*ml") if p.is_file()])
        raise UserError(
            "there is no such recipe", file=file,
            fix=f"did you mean {path.parent / near}?" if near else "whet init lora > recipe.yaml writes one",
        )  # fmt: skip
    try:
        with path.open("rb") as stream:
            raw = stream.read(MOST_BYTES + 1)
    except OSError as error:
        fix = "check the file and its permissions"
        raise UserError(f"the recipe cannot be read: {error.strerror or error}", file=file, fix=fix) from error
    if len(raw) > MOST_BYTES:
        expected = f"at most {MOST_BYTES:,} bytes"
        raise UserError("too large to be a recipe", file=file, found="more", expected=expected, fix=_SMALLER)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"the recipe is not UTF-8: byte {error.start}", file=file, fix="save it as UTF-8") from error


def read_yaml(text: str, file: str) -> tuple[dict[str, Any], dict[str, int]]:
    """(the recipe as a plain nested dict, the line of each dotted path). Raises UserError."""
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    if text.count("\n") + text.count(",") > MOST_VALUES:
        raise _too_many(file)
    lines: dict[str, int] = {}
    try:
        loaded = yaml().load(text)
        if isinstance(loaded, Mapping) and loaded:
            return _Plain(file, lines).of(loaded, "", 0), lines
    except RecursionError as error:
        raise UserError("nested too deeply", file=file, fix="sections and their settings, nothing deeper") from error
    except ValueError as error:  # a date that does not exist, a number of thousands of digits
        raise UserError(f"a value cannot be read: {error}", file=file, fix="put it in quotes") from error
    except MarkedYAMLError as error:
        mark = error.problem_mark
        problem = " ".join((error.problem or str(error)).split())
        raise UserError(
            f"not valid YAML: {problem}",
            file=file,
            row=mark.line + 1 if mark is not None else None,
            fix="each setting once, `key: value`, sections indented by two spaces",
        ) from error
    except YAMLError as error:
        raise UserError(
            f"not valid YAML: {str(error).splitlines()[0]}", file=file, fix="save it as plain text"
        ) from error
    nothing = loaded is None or loaded == {}
    found = ("nothing but comments" if text.strip() else "an empty file") if nothing else None
    raise UserError(
        "the recipe says nothing" if found else "a recipe is a mapping of sections",
        file=file,
        found=found or ("a list" if isinstance(loaded, list) else f"{loaded!r} ({type(loaded).__name__})"),
        expected="model:, method:, data:, train: ...",
        fix="whet init lora prints one to start from",
    )


def override(text: str) -> tuple[str, Any]:
    """The dotted path and the value of `section.key=value`. Raises UserError."""
    from ruamel.yaml.error import YAMLError

    path, equals, value = text.partition("=")
    path = path.strip()
    if not equals or not path:
        raise UserError(
            "not an override", found=text, expected="section.key=value", fix="for instance train.learning_rate=1e-4"
        )
    if len(path) > LONGEST_KEY or path.count(".") > DEEPEST:
        raise UserError("there is no such setting", found=path, fix="docs/recipe.md lists every setting")
    if len(value) > MOST_BYTES or value.count(",") + value.count("\n") > MOST_VALUES:
        raise UserError("the value is too large for a setting", field=path, fix=_SMALLER)
    try:
        loaded = yaml().load(value) if value.strip() else None
        return path, _Plain(None, {}).of(loaded, path, 0)
    except (YAMLError, RecursionError, ValueError) as error:
        raise UserError("the value is not valid YAML", field=path, found=value, fix="put it in quotes") from error


def written(tree: Mapping[str, Any]) -> str:
    """The YAML 1.2 text of a nested dict."""
    out = io.StringIO()
    yaml().dump(tree, out)
    return out.getvalue()


def yaml():
    """A reader and writer of YAML 1.2."""
    from ruamel.yaml import YAML

    reader = YAML(typ="rt", pure=True)
    reader.default_flow_style = False
    return reader


class _Plain:
    """Turns ruamel's containers and scalars into plain ones and notes their lines; tags such as !!python are
    refused."""

    def __init__(self, file: str | None, lines: dict[str, int]) -> None:
        self.file, self.lines = file, lines
        self.values = self.characters = 0

    def of(self, node: Any, path: str, depth: int) -> Any:
        from ruamel.yaml.scalarbool import ScalarBoolean

        tagged = isinstance(node, Mapping | list) and getattr(getattr(node, "tag", None), "value", None)
        if isinstance(node, Mapping | list) and not tagged:
            return self._inside(node, path, depth)
        if node is None:
            return None
        kind: Any = bool if isinstance(node, ScalarBoolean) else next((k for k in KINDS if isinstance(node, k)), None)
        if kind is None or (kind is float and not math.isfinite(cast("float", node))):
            raise UserError(
                "a setting is text, a finite number, true, false, a list or a mapping",
                file=self.file,
                row=self.lines.get(path),
                field=path,
                found=f"the tag {tagged}" if tagged else str(node) if kind else type(node).__name__,
                fix="write a finite number" if kind else "remove the tag, or put the value in quotes",
            )
        self._count(len(str(node)) if kind is str else 0)
        return None if node == "auto" else kind(node)  # type: ignore[arg-type]

    def _inside(self, node: Any, path: str, depth: int) -> Any:
        if depth > DEEPEST:
            raise UserError(
                "nested too deeply", file=self.file, fix="sections and their settings, nothing deeper", field=path
            )
        positions = getattr(getattr(node, "lc", None), "data", None) or {}
        plain: dict[Any, Any] = {}
        for key, value in node.items() if isinstance(node, Mapping) else enumerate(node):
            name = str(key)
            if len(name) > LONGEST_KEY:
                raise UserError("a key is too long to be a setting", file=self.file, found=name, fix="remove it")
            here = f"{path}.{name}" if path else name
            self.lines[here] = positions[key][0] + 1 if key in positions else self.lines.get(path, 1)  # merged by `<<`
            self.values += 1
            self._count(len(here))  # aliases of aliases grow without end
            plain[name] = self.of(value, here, depth + 1)
        return plain if isinstance(node, Mapping) else list(plain.values())

    def _count(self, characters: int) -> None:
        self.characters += characters
        if self.values > MOST_VALUES or self.characters > MOST_CHARACTERS:
            raise _too_many(self.file)


def _too_many(file: str | None) -> UserError:
    return UserError(
        f"the recipe holds over {MOST_VALUES} values", file=file, fix=f"write them without aliases, or {_SMALLER}"
    )
