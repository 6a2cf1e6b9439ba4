"""The rules of the house, checked on the source itself: no patching, no drawers, small files and functions."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "whet").rglob("*.py"))
CODE = [*SOURCES, *sorted((ROOT / "bench").rglob("*.py")), *sorted((ROOT / "recipes").rglob("*.py"))]
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
KERNELS: set[str] = set()  # files whose functions may be longer, by name
DRAWERS = {"utils", "util", "helpers", "common", "misc", "tools"}
ENVIRONMENT_WRITERS = {"cli.py"}
ONE_OWNER = {  # a library and the only places that may import it
    "pydantic": {"recipe.py"},
    "ruamel": {"recipe.py"},
    "bitsandbytes": {"extras.py"},
    "matplotlib": {"charts.py"},
}


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_names(tree: ast.Module) -> set[str]:
    """Local names that are bound to modules or to things that other modules own."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    return names


def patches(source: str) -> list[str]:
    """Assignments to attributes of imported names, and the other ways to change what others wrote."""
    tree = ast.parse(source)
    foreign = imported_names(tree)
    found = []
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
            found += [ast.unparse(t) for t in targets if isinstance(t, ast.Attribute) and root_name(t) in foreign]
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in ("exec", "eval", "inspect.getsource", "compile", "__import__"):
                found.append(name)
            if name == "setattr" and root_name(node.args[0]) in foreign:
                found.append(ast.unparse(node))
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.modules" and not reads_only(node, tree):
            found.append("sys.modules")
    return found


def root_name(node: ast.AST) -> str | None:
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def reads_only(node: ast.Attribute, tree: ast.Module) -> bool:
    """`name in sys.modules` looks; anything else could change it."""
    return any(isinstance(n, ast.Compare) and node in n.comparators for n in ast.walk(tree))


def environment_writes(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            yield from (ast.unparse(t) for t in node.targets if ast.unparse(t).startswith("os.environ["))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "os.putenv",
            "os.environ.update",
            "os.environ.setdefault",
        ):
            yield ast.unparse(node)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_patched(path: Path) -> None:
    assert patches(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "fault",
    [
        "import torch\ntorch.nn.functional.cross_entropy = None",
        "from transformers import LlamaModel\nLlamaModel.forward = print",
        "import peft\nsetattr(peft.LoraConfig, 'x', 1)",
        "exec('1')",
        "import sys\nsys.modules['torch'] = None",
    ],
)
def test_a_patch_would_be_seen(fault: str) -> None:
    assert patches(fault)


def test_the_environment_is_written_in_one_place() -> None:
    writers = {path.name for path in SOURCES if list(environment_writes(parsed(path)))}
    assert writers <= ENVIRONMENT_WRITERS


@pytest.mark.parametrize("path", CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MAX_FILE_LINES
    if path.name in KERNELS:
        return
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


def test_there_are_no_drawers() -> None:
    assert not [p for p in SOURCES if p.stem in DRAWERS or p.parent.name in DRAWERS]


def test_inner_init_files_are_empty() -> None:
    inner = [p for p in SOURCES if p.name == "__init__.py" and p.parent.name != "whet"]
    assert inner
    assert [p for p in inner if p.read_text(encoding="utf-8").strip()] == []


@pytest.mark.parametrize(("library", "owners"), ONE_OWNER.items())
def test_a_library_has_one_owner(library: str, owners: set[str]) -> None:
    users = set()
    for path in SOURCES:
        for node in ast.walk(parsed(path)):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(module.partition(".")[0] == library for module in modules):
                users.add(path.name)
    assert users <= owners


def test_a_rank_is_named_in_one_file() -> None:
    """`lora_alpha` is PEFT's word; whet's code may say it only where the method lives and where a decision is noted."""
    users = {p.name for p in SOURCES if "lora_alpha" in p.read_text(encoding="utf-8")}
    assert users <= {"lora.py", "aliases.py", "setup.py"}


def test_no_pickle_is_read_or_written() -> None:
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert "torch.load(" not in text
        assert "import pickle" not in text
