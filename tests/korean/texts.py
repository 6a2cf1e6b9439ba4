"""The texts of whet that a person can be shown at a terminal, read from its source.

A string counts as shown unless its place says otherwise: docstrings, patterns, keys, comparisons, names, messages of
our own mistakes. A template has a numbered place for each value: f"no such {kind}: {name}" is "no such {0}: {1}".
Texts of one word count where they are printed: table headers, help, the parts of an error, choices within a sentence.
A page names its texts by `phrase`, or in a constant dict whose values it looks up; a text of a page that is neither is
not `named`, and would stay English. Comments of the recipes are texts as well.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2] / "whet"
SCOPE = json.loads((Path(__file__).parent / "scope.json").read_text("utf-8"))

PAGES = "report/"
RECIPES = "recipes"
OTHERS = "others"  # texts of argparse, pydantic, YAML and the system, which whet shows
# Where the arguments of a call are read by people, even when they are one word.
PRINTED = {
    "UserError", "Rule", "say", "answer", "add_column", "add_row", "Progress", "ArgumentTypeError", "advance", "phrase",
}  # fmt: skip
PRINTED_KEYWORDS = {"problem", "fix", "expected", "found", "help", "title"}
# Calls whose texts are read by programs, or by those who mend whet.
UNREAD = {
    "compile", "getattr", "hasattr", "setattr", "startswith", "endswith", "removeprefix", "removesuffix",
    "get", "search", "match", "fullmatch", "sub", "split", "rsplit", "partition", "rpartition", "replace",
    "count", "find", "index", "encode", "TypeVar", "import_module", "find_spec", "AssertionError",
    "ValueError", "TypeError", "RuntimeError", "KeyError", "NotImplementedError", "ImportError",
    "filterwarnings", "getLogger", "strip", "lstrip", "rstrip", "Literal", "Private",
}  # fmt: skip


@dataclass
class Text:
    """english: the template. place: file and line. values: the code of each place. optional: places to leave out.

    named: of a page, the text goes through `phrase`.
    """

    english: str
    room: str
    place: str
    values: list[str] = field(default_factory=list)
    optional: set[int] = field(default_factory=set)
    named: bool = False


def collect(root: Path = ROOT) -> dict[str, Text]:
    """Every text below `root` by its English template, in the order of files and lines."""
    found: dict[str, Text] = {}
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    for name in sorted(names, key=lambda name: name.startswith(PAGES)):  # a page shares what another room says as well
        for text in texts_of(root, name):
            if text.english in SCOPE["found"] or text.english in SCOPE["tables"]:
                text.room = "found" if text.english in SCOPE["found"] else "tables"
            if text.english not in found or text.room == "found":
                found[text.english] = text
    found = {english: text for english, text in found.items() if english not in SCOPE["texts"]}
    found |= {text.english: text for text in comments(root.parent / "recipes")}
    for room, texts in SCOPE["also"].items():
        for english in texts:
            found[english] = Text(english, room, "scope.json")
    return found


def texts_of(root: Path, name: str) -> Iterator[Text]:
    """The texts of one file below `root`; none of a file that `scope.json` leaves out."""
    if not any(name == one or name.startswith(one) for one in SCOPE["files"]):
        yield from _Reader(name).read(ast.parse((root / name).read_text("utf-8")))


def comments(folder: Path) -> Iterator[Text]:
    """The comments of the recipes: a block of lines is one text, and one behind a setting another."""
    for path in sorted(folder.glob("*.yaml")):
        block: list[str] = []
        for number, line in enumerate([*path.read_text("utf-8").splitlines(), ""], 1):
            setting, _, comment = line.partition("#")
            if comment and not setting.strip():
                block.append(comment.strip())
                continue
            for text in (" ".join(block), comment.strip()):
                if text:
                    yield Text(text, RECIPES, f"{path.name}:{number}")
            block = []


def unnamed(root: Path = ROOT) -> list[str]:
    """Texts of pages that do not go through `phrase`, each with its place."""
    names = (path.relative_to(root).as_posix() for path in sorted((root / PAGES).rglob("*.py")))
    texts = (text for name in names for text in texts_of(root, name))
    return [f"{one.place}: {one.english}" for one in texts if not one.named and one.english not in SCOPE["texts"]]


def room_of(name: str) -> str:
    """The catalogue file for a source file: its room, or the file's own name at the top."""
    return name.split("/")[0].removesuffix(".py")


class _Reader:
    """Walk through one file, knowing what stands around each string."""

    def __init__(self, name: str) -> None:
        self.name, self.on_page = name, name.startswith(PAGES)

    def read(self, tree: ast.Module) -> Iterator[Text]:
        yield from self._of(tree, printed=False)

    def _of(self, node: ast.AST, printed: bool) -> Iterator[Text]:
        """The texts of a node. printed: whether its value is shown, so that one word counts."""
        match node:
            case ast.Expr(value=ast.Constant()):
                return  # a docstring
            case ast.Call():
                yield from self._of_call(node, printed)
            case ast.Assign() | ast.AnnAssign():
                yield from self._of_assignment(node)
            case ast.Compare() | ast.Assert() | ast.Subscript():
                yield from self._of_each(self._values_of(node), printed=False)
            case ast.BinOp(op=ast.Add()) if any(_is_text(part) for part in _added(node)):
                yield from self._of_parts(list(_added(node)), node, printed)
            case ast.JoinedStr() | ast.Constant(value=str()):
                yield from self._of_parts([node], node, printed)
            case ast.For():
                yield from self._of_loop(node)
            case ast.Dict():
                yield from self._of_each([one for one in node.keys if one and not _is_text(one)], printed=False)
                yield from self._of_each(node.values, printed)
            case ast.IfExp():
                yield from self._of(node.test, False)
                yield from self._of_each([node.body, node.orelse], printed)
            case _:
                yield from self._of_children(node, printed)

    def _of_each(self, nodes: Iterable[ast.AST], printed: bool) -> Iterator[Text]:
        for node in nodes:
            yield from self._of(node, printed)

    def _of_children(self, node: ast.AST, printed: bool) -> Iterator[Text]:
        if isinstance(node, ast.ClassDef) and self.name.startswith("methods/"):
            yield from self._of_method(node)
        keeps = isinstance(node, ast.BoolOp | ast.Tuple | ast.List | ast.Lambda | ast.Starred)
        children = [one for one in ast.iter_child_nodes(node) if one is not getattr(node, "annotation", None)]
        yield from self._of_each(children, printed and keeps)

    def _of_assignment(self, node: ast.Assign | ast.AnnAssign) -> Iterator[Text]:
        """Constants that `scope.json` names hold nothing that is shown; `found` holds what an error found."""
        if self._private_constant(node) or node.value is None:
            return
        targets = node.targets if isinstance(node, ast.Assign) else []
        constant = isinstance(node.value, ast.Dict) and all(getattr(one, "id", "").isupper() for one in targets)
        if self.on_page and constant:
            yield from _as_named(self._of(node.value, True))
            return
        if {getattr(one, "id", "") for one in targets} & {"found", "shown"} and not self.on_page:
            yield from _as_found(self._of(node.value, True))
        else:
            yield from self._of(node.value, False)

    def _private_constant(self, node: ast.Assign | ast.AnnAssign) -> bool:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        return any(f"{self.name}:{name}" in SCOPE["constants"] for name in names)

    def _values_of(self, node: ast.Compare | ast.Assert | ast.Subscript) -> list[ast.AST]:
        """What in a comparison, an assertion or an index is no text of its own."""
        parts = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
        if isinstance(node, ast.Assert):
            parts = [node.test]
        if isinstance(node, ast.Subscript):
            return [node.value, *([] if isinstance(node.slice, ast.Constant | ast.JoinedStr) else [node.slice])]
        return [part for part in parts if not isinstance(part, ast.Constant | ast.JoinedStr | ast.Tuple)]

    def _of_method(self, node: ast.ClassDef) -> Iterator[Text]:
        """The docstring of a method's config, which `whet methods` shows."""
        named = any(isinstance(one, ast.AnnAssign) and getattr(one.target, "id", "") == "name" for one in node.body)
        if named and (shown := ast.get_docstring(node)):
            yield Text(shown, room_of(self.name), f"{self.name}:{node.lineno}")

    def _of_loop(self, node: ast.For) -> Iterator[Text]:
        """A loop over a literal list whose members are printed one by one."""
        names = {one.id for one in ast.walk(node.target) if isinstance(one, ast.Name)}
        calls = [one for part in node.body for one in ast.walk(part) if isinstance(one, ast.Call)]
        printed = any(
            _called(call) in PRINTED and any(isinstance(one, ast.Name) and one.id in names for one in call.args)
            for call in calls
        )
        yield from self._of(node.iter, printed)
        for child in [*node.body, *node.orelse]:
            yield from self._of(child, False)

    def _of_call(self, node: ast.Call, printed: bool) -> Iterator[Text]:
        name = _called(node)
        if isinstance(node.func, ast.Attribute):
            yield from self._of(node.func.value, printed and name in ("format", "join"))
        for argument in node.args:
            if name in UNREAD and _is_text(argument):
                continue
            texts = self._of(argument, name in PRINTED)
            yield from _as_named(texts) if name == "phrase" else texts
        for keyword in node.keywords:
            shown = keyword.arg in PRINTED_KEYWORDS or (name in PRINTED and keyword.arg not in STYLES)
            if name in UNREAD and _is_text(keyword.value):
                continue
            if not (keyword.arg in STYLES and _is_text(keyword.value)):
                texts = self._of(keyword.value, shown)
                yield from _as_found(texts) if keyword.arg == "found" else texts

    def _of_parts(self, parts: list[ast.expr], node: ast.AST, printed: bool) -> Iterator[Text]:
        """One template of literals, f-strings and values that are added up."""
        english, values, optional, inner = "", [], set(), []
        for part in parts:
            pieces = part.values if isinstance(part, ast.JoinedStr) else [part]
            for piece in pieces:
                if isinstance(piece, ast.Constant) and isinstance(piece.value, str):
                    english += piece.value
                    continue
                value = piece.value if isinstance(piece, ast.FormattedValue) else piece
                if _is_ending(value):
                    optional.add(len(values))
                english += f"{{{len(values)}}}"
                values.append(ast.unparse(value))
                inner.append(value)
        english = _numbered(english, values)
        if _is_shown(english, printed) if printed or not self.on_page else _is_on_page(english):
            place = f"{self.name}:{getattr(node, 'lineno', 0)}"
            yield Text(english, room_of(self.name), place, values, optional)
        for value in inner:
            choice = isinstance(value, ast.IfExp | ast.BoolOp) and not _is_ending(value)
            yield from self._of(value, choice and not self.on_page)  # on a page: of classes and attributes


STYLES = {"style", "justify", "overflow", "file", "field", "dest", "action", "metavar", "default", "choices", "mode"}
STYLES |= {"prog", "encoding", "errors", "formatter_class", "type", "nargs", "epilog", "name", "path", "dtype", "verb"}
_FIELD = re.compile(r"\{(?!\d+\})(?:[a-z_]\w*(?:\.\w+|\[\d+\])*(?::[^{}]*)?)?\}|%s")
_PATTERN = re.compile(r"\(\?[:i<=!P]|\\[dsw]|\[\^|\[A-Z")  # signs of a regular expression
_WORD = re.compile(r"[A-Za-z]{2,}")


def _as_found(texts: Iterator[Text]) -> Iterator[Text]:
    """Texts in the place of a found value, which are looked up apart from all others."""
    for text in texts:
        text.room = "found"
        yield text


def _as_named(texts: Iterator[Text]) -> Iterator[Text]:
    """Texts that a page looks up before it shows them."""
    for text in texts:
        text.named = True
        yield text


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _added(node: ast.expr) -> Iterator[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        yield from _added(node.left)
        yield from _added(node.right)
    else:
        yield node


def _numbered(english: str, values: list[str]) -> str:
    """The fields of str.format and % are numbered on, as those of an f-string are."""

    def number(field: re.Match[str]) -> str:
        values.append(field[0])
        return f"{{{len(values) - 1}}}"

    return _FIELD.sub(number, english)


def _is_ending(node: ast.AST) -> bool:
    """True for a plural's ending or the like: a choice between constants of at most three characters."""
    return isinstance(node, ast.IfExp) and all(
        isinstance(part, ast.Constant)
        and isinstance(part.value, str)
        and len(part.value) <= 3
        and " " not in part.value
        for part in (node.body, node.orelse)
    )


def _is_on_page(english: str) -> bool:
    """True if words are left of a text of a page without its markup: one beside a tag, two alone."""
    words = re.sub(r"<[^<>]*>", " ", english)
    return _is_shown(words, "<" in english)


def _is_shown(english: str, printed: bool) -> bool:
    """True if the literal words of a template are ones that people read."""
    if _PATTERN.search(english):
        return False
    literal = re.sub(r"\{\d+\}", " ", english)
    words = _WORD.findall(literal)
    if not words:
        return False
    if printed:
        return not re.fullmatch(r"[\W\d]*(whet )?[\w.\-/=:]*[._=/\-:][\w.\-/=:]*\s*", literal) or " " in literal.strip()
    return " " in literal.strip() and len(re.findall(r"[A-Za-z]+", literal)) >= 2
