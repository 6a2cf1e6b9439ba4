"""What is private in other libraries is touched in base/private.py alone, and each name there still exists."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from whet.base import private
from whet.base.private import SEAMS, Seam

ROOT = Path(__file__).parents[2]
SEAMS_FILE = ROOT / "whet" / "base" / "private.py"
SOURCES = [path for path in sorted((ROOT / "whet").rglob("*.py")) if path != SEAMS_FILE]
TUPLES = {"_replace", "_asdict", "_fields", "_make"}  # public, in spite of their names
BY_NAME = {"getattr", "hasattr", "setattr", "delattr", "get", "pop", "update"}
# Files that still have private names, until they come to use base/private.py.
KNOWN: dict[str, set[str]] = {}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name.isidentifier() and name not in TUPLES | {"_"}


def own_names(tree: ast.Module) -> set[str]:
    """Names that the file itself defines: functions, classes, variables, attributes of self, slots."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            inside = [part for target in targets for part in ast.walk(target)]
            found |= {part.id for part in inside if isinstance(part, ast.Name)}
            found |= {part.attr for part in inside if isinstance(part, ast.Attribute) and ast.unparse(part.value) in (
                "self", "cls")}  # fmt: skip
            if any(isinstance(part, ast.Name) and part.id == "__slots__" for part in inside) and node.value is not None:
                texts = [part for part in ast.walk(node.value) if isinstance(part, ast.Constant)]
                found |= {str(part.value) for part in texts}
    return found


def foreign(source: str) -> Iterator[str]:
    """Private names of others that the source uses: as attributes, as strings, in imports; and swapped classes."""
    tree = ast.parse(source)
    own = own_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            put = isinstance(node.ctx, ast.Store | ast.Del) and ast.unparse(node.value) != "self"
            if (put and node.attr in ("__class__", "forward")) or (is_private(node.attr) and node.attr not in own):
                yield node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in BY_NAME:
            texts = [part.value for part in node.args if isinstance(part, ast.Constant) and isinstance(part.value, str)]
            yield from (text for text in texts if is_private(text) and text not in own)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from private_modules(node)


def private_modules(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """The modules of others of which something private is imported."""
    within = node.module or "" if isinstance(node, ast.ImportFrom) else ""
    for alias in node.names:
        if any(map(is_private, f"{within}.{alias.name}".split("."))) and not within.startswith("whet."):
            yield within or alias.name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_private_elsewhere_is_used_in_one_file(path: Path) -> None:
    assert set(foreign(path.read_text(encoding="utf-8"))) <= KNOWN.get(str(path.relative_to(ROOT)), set())


def test_what_is_known_is_still_there() -> None:
    """So that the list gets shorter and nothing hides behind it."""
    for name, names in KNOWN.items():
        assert set(foreign((ROOT / name).read_text(encoding="utf-8"))) == names, name


@pytest.mark.parametrize(
    ("fault", "seen"),
    [
        ("model._supports_sdpa", "_supports_sdpa"),
        ("import torch\ntorch._scaled_mm(1)", "_scaled_mm"),
        ("layer._compiled_call_impl = None", "_compiled_call_impl"),
        ("getattr(model, '_keep_in_fp32_modules', None)", "_keep_in_fp32_modules"),
        ("vars(network).get('_weight_conversions', [])", "_weight_conversions"),
        ("def f():\n    import torch._functorch.config as settings", "torch._functorch.config"),
        ("from torch._dynamo.exc import TorchDynamoException", "torch._dynamo.exc"),
        ("from peft.tuners import _buffer_dict", "peft.tuners"),
        ("module.__class__ = Other", "__class__"),
        ("model.forward = print", "forward"),
    ],
)
def test_a_private_name_would_be_seen(fault: str, seen: str) -> None:
    assert list(foreign(fault)) == [seen]


@pytest.mark.parametrize(
    "source",
    [
        "class A:\n    def __init__(self):\n        self._own = 1\n    def of(self, other):\n        return other._own",
        "class A:\n    __slots__ = ('_parts',)\ndef parts(a):\n    return a._parts",
        "row._replace(x=1)",
        "from whet.data.prepare import _made",
        "name.endswith('_accuracy')",
        "class A:\n    def __init__(self, forward):\n        self.forward = forward",
    ],
)
def test_what_is_ours_is_allowed(source: str) -> None:
    assert list(foreign(source)) == []


def resolved(path: str) -> Any:
    """The module or the object in one that a dotted path names."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        owner, _, name = path.rpartition(".")
        return getattr(resolved(owner), name)


def is_there(seam: Seam) -> bool:
    """Whether the owner has the name; what stands on instances alone is looked for in the owner's text."""
    owner = resolved(seam.owner)
    return hasattr(owner, seam.name) or (inspect.ismodule(owner) and seam.name in inspect.getsource(owner))


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: f"{seam.owner}.{seam.name}")
def test_the_name_exists_in_a_version_that_was_tried(seam: Seam) -> None:
    assert is_there(seam), "gone, or called something else: mend its function in whet/base/private.py"
    library = seam.owner.partition(".")[0]
    installed = ".".join(version(library).split(".")[:2])
    assert installed in seam.seen, f"try what {seam.name} is for with {library} {installed}, then add that version"


@pytest.mark.parametrize("owner", ["torch", "torch.nn.Module", "transformers.modeling_utils"])
def test_a_name_that_is_gone_would_be_seen(owner: str) -> None:
    assert not is_there(Seam(owner, "_gone_since_then", "", ()))


def test_every_private_name_in_the_file_is_in_the_table() -> None:
    tree = ast.parse(SEAMS_FILE.read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    used = {name for function in functions for name in foreign(ast.unparse(function))}
    used -= {name for name in vars(private) if name.startswith("_")}  # its own
    listed = {seam.name for seam in SEAMS} | {seam.owner for seam in SEAMS}
    assert {name for name in used if name not in listed and name.rpartition(".")[0] not in listed} == set()
    named = {seam.name for seam in SEAMS}
    text = "\n".join(map(ast.unparse, functions))
    assert {name for name in named if name not in text} == set(), "in the table, but used nowhere"
    assert len(named) == len(SEAMS)
