"""Docstrings say what a thing does, in plain words: how they begin, and that the modules which they name exist.

The norm for words is docs/glossary.md, where each has one meaning.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from whet.base.config import field_docs
from whet.sections import SECTION_CLASSES

ROOT = Path(__file__).parents[2]
WHET = ROOT / "whet"
ROOMS = ("data", "report", "base", ".")  # directories of whet/; "." is the files at its top alone
NOT_YET: set[str] = set()
# A docstring that begins so names no action and no thing, and has to be read twice.
VAGUE = {"What", "Whether", "Where", "Of", "Why", "Who", "As"}
REFERENCE = re.compile(r"(?<!`)`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+)`(?!`)")
FILES = {"gz", "jinja", "json", "jsonl", "md", "py", "xz", "yaml"}  # suffixes: the name of a file, not of a module
OUTSIDE = {"Dataset", "LoraConfig", "backports", "message", "mlp", "str", "torch"}  # what others' names begin with


def sources() -> list[Path]:
    rooms = [(WHET / room).rglob("*.py") if room != "." else WHET.glob("*.py") for room in ROOMS]
    return sorted(path for paths in rooms for path in paths if path.relative_to(WHET).as_posix() not in NOT_YET)


def docstrings(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(name, docstring) of the module and of every class and function in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "name", "module"), text


def vague(source: str) -> list[str]:
    """Docstrings whose first word is one of VAGUE."""
    texts = docstrings(ast.parse(source))
    return [f"{name}: {text.splitlines()[0]}" for name, text in texts if re.findall(r"\w+", text)[:1][0] in VAGUE]


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(WHET).as_posix())
def test_a_docstring_begins_with_what_the_thing_does_or_is(path: Path) -> None:
    assert vague(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("word", sorted(VAGUE))
def test_a_vague_beginning_would_be_seen(word: str) -> None:
    for form in (f'"""{word} rows are."""', f'def f():\n    """{word}: rows."""', f'class A:\n    """{word} a row."""'):
        assert vague(form)
    assert not vague(f'"""Tell {word.lower()} rows are."""')


@cache
def names_of(module: str) -> dict[str, set[str]] | None:
    """Names at the top of a module of whet, each with the members of its class; None where there is no such module."""
    path = ROOT / Path(*module.split("."))
    if path.is_dir():
        return {}
    if not path.with_suffix(".py").is_file():
        return None
    names: dict[str, set[str]] = {}
    for node in ast.parse(path.with_suffix(".py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            names[node.name] = members(node)
        elif isinstance(node, ast.FunctionDef):
            names[node.name] = set()
        else:
            stored = [part for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)]
            names |= {part.id: set() for part in stored}
    return names


def members(node: ast.ClassDef) -> set[str]:
    """Methods, fields and attributes of a class."""
    names = {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
    for part in ast.walk(node):
        if isinstance(part, ast.Name | ast.Attribute) and isinstance(part.ctx, ast.Store):
            names.add(part.id if isinstance(part, ast.Name) else part.attr)
    return names


@cache
def classes() -> dict[str, set[str]]:
    """The members of every class of whet by its name."""
    by_name: dict[str, set[str]] = {}
    for path in WHET.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                by_name[node.name] = by_name.get(node.name, set()) | members(node)
    return by_name


def exists(reference: str, package: str) -> bool:
    """True for a module, a name in one, a member of a class, or a setting. package: of the file that refers to it."""
    first, *rest = reference.split(".")
    if first in classes():
        return rest[0] in classes()[first]
    if any(rest[0] in field_docs(owner) for owner in SECTION_CLASSES.get(first, ())):
        return True
    above = package.split(".")
    for depth in range(len(above), -1, -1):
        full = [*above[:depth], first, *rest]
        for end in range(len(full), depth, -1):
            names = names_of(".".join(full[:end])) if full[0] == "whet" else None
            if names is None:
                continue
            left = full[end:]
            if not left or (left[0] in names and (not left[1:] or left[1] in names[left[0]])):
                return True
    return False


def unknown(source: str, package: str) -> list[str]:
    """Dotted names in backticks, in docstrings and comments, that are nothing in whet and nobody else's."""
    texts = [text for _, text in docstrings(ast.parse(source))]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    texts += [token.string for token in tokens if token.type == tokenize.COMMENT]
    names = {name for text in texts for name in REFERENCE.findall(text)}
    ours = {name for name in names if name.split(".")[-1] not in FILES and name.split(".")[0] not in OUTSIDE}
    return sorted(name for name in ours if not exists(name, package))


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(WHET).as_posix())
def test_a_module_that_is_referred_to_exists(path: Path) -> None:
    package = ".".join(("whet", *path.relative_to(WHET).parts[:-1]))
    assert unknown(path.read_text(encoding="utf-8"), package) == []


@pytest.mark.parametrize("name", [
    "data.batches", "data.minhash", "data.curriculum", "evaluate.label_metrics", "batch.rows.Row", "Rows.shout",
    "data.lenght", "whet.data.batch.rows.Rows.shout",
])  # fmt: skip
def test_a_stale_reference_would_be_seen(name: str) -> None:
    assert unknown(f'"""Rows, as `{name}` has them."""', "whet.data.batch") == [name]
    assert unknown(f"# as `{name}`\n", "whet.data.batch") == [name]


@pytest.mark.parametrize("name", [
    "data.batch.rows", "batch.rows", "rows.Rows", "Rows.targets", "data.max_length", "whet.data.batch.rows.Rows.row",
    "detect.minhash", "train.seed", "torch.nn.utils", "metrics.jsonl", "str.split",
])  # fmt: skip
def test_a_good_reference_is_let_through(name: str) -> None:
    assert unknown(f'"""Rows, as `{name}` has them."""', "whet.data.batch") == []


def test_each_word_of_the_glossary_has_one_meaning() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    words = [word for cell in re.findall(r"(?m)^\| \*\*(.+?)\*\* \|", text) for word in cell.split(", ")]
    assert len(words) > 60
    assert sorted({word for word in words if words.count(word) > 1}) == []
