"""The rules of the house, checked on the source itself: no patching, no drawers, small files and functions."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "whet").rglob("*.py"))
CODE = [*SOURCES, *sorted((ROOT / "bench").rglob("*.py")), *sorted((ROOT / "recipes").rglob("*.py"))]
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
KERNELS: set[str] = set()  # files whose functions may be longer, by name
DRAWERS = {"utils", "util", "helpers", "common", "misc", "tools"}
MAX_PARAMETERS = 7  # self aside
PRESCRIBED = {"attend", "attend_cached"}  # functions whose parameters transformers says
RANK = re.compile(r"\blora_alpha\b|\bmethod\.r\b|\bLora\((?:[^()]*,\s*)?r\s*=")
ENVIRONMENT_WRITERS = {"cli.py"}
ONE_OWNER = {  # a library and the only places that may import it
    "pydantic": {"recipe.py"},
    "ruamel": {"text.py"},
    "bitsandbytes": {"extras.py"},
    "matplotlib": {"loss_plot.py"},
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


def names_a_rank(source: str) -> bool:
    """Whether a source names the rank of LoRA, or the scale that goes with it, as a setting."""
    return bool(RANK.search(source))


def test_a_rank_is_named_in_one_file() -> None:
    """Where the method lives; beside it stand the names that other tools have for it."""
    users = {str(p.relative_to(ROOT)) for p in SOURCES if names_a_rank(p.read_text(encoding="utf-8"))}
    assert users - {"whet/spelling/aliases.py"} == {"whet/methods/lora.py"}


@pytest.mark.parametrize(
    "fault", ["method.r", "field='method.r'", "recipe.method.r + 1", "Lora(r=8)", "x.lora_alpha", "Lora(a=0.0, r=rank)"]
)
def test_a_rank_that_is_named_elsewhere_would_be_seen(fault: str) -> None:
    assert names_a_rank(fault)
    assert not names_a_rank("method.rank_pattern; layer.r[name]; shape.r; dict(r=1); BRIDGED(r=1)")


def prescribed(function: ast.FunctionDef | ast.AsyncFunctionDef, owner: ast.AST | None) -> bool:
    """Whether somebody else says what a function takes: autograd, an operator's schema, transformers."""
    bases = [ast.unparse(base) for base in owner.bases] if isinstance(owner, ast.ClassDef) else []
    if function.name in ("forward", "backward") and any(base.endswith("autograd.Function") for base in bases):
        return True
    marks = [ast.unparse(mark) for mark in function.decorator_list]
    return function.name in PRESCRIBED or any("custom_op" in mark or "register_fake" in mark for mark in marks)


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    """All but self, and but what is left over for `*args` and `**more`."""
    found = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
    return [arg for arg in found if arg.arg not in ("self", "cls")]


def crowded(source: str) -> Iterator[str]:
    """Functions with more parameters than a reader keeps in mind, by name."""
    tree = ast.parse(source)
    owners = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not prescribed(node, owners.get(node)):
            yield from [node.name] * (len(parameters(node)) > MAX_PARAMETERS)


def bundled(source: str) -> Iterator[str]:
    """Functions with a parameter that is two in one: a tuple of unlike things, whose parts have no names."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            types = [part for arg in parameters(node) if arg.annotation is not None for part in choices(arg.annotation)]
            if any(map(unlike, types)):
                yield node.name


def choices(annotation: ast.expr) -> Iterator[ast.expr]:
    """The parts of a union."""
    if isinstance(annotation, ast.BinOp):
        yield from (*choices(annotation.left), *choices(annotation.right))
    else:
        yield annotation


def unlike(annotation: ast.expr) -> bool:
    """Whether a type is a tuple whose parts have different types, or are tuples themselves."""
    if not (isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "tuple"):
        return False
    parts = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
    types = {ast.unparse(part) for part in parts}
    return "..." not in types and (len(types) > 1 or any(name.startswith("tuple[") for name in types))


@pytest.mark.parametrize("path", CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_take_few_parameters_and_each_by_its_name(path: Path) -> None:
    name, source = str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
    if not name.endswith("_triton.py"):
        assert set(crowded(source)) == set()
    assert set(bundled(source)) == set()


def test_what_the_lists_name_is_still_there() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)
    assert [name for name in PRESCRIBED if f"def {name}(" not in text] == []


@pytest.mark.parametrize(
    "fault",
    [
        "def f(a, b, c, d, e, g, h, i): ...",
        "class A:\n    def __init__(self, a, b, c, d, *, e, g, h, i): ...",
        "async def f(a, b, c, d, /, e, g, h, i): ...",
        "class A(nn.Module):\n    def forward(self, a, b, c, d, e, g, h, i): ...",
    ],
)
def test_many_parameters_would_be_seen(fault: str) -> None:
    assert list(crowded(fault))
    assert not list(crowded(fault.replace(", i", "")))


def test_a_prescribed_signature_is_allowed() -> None:
    eight = "(ctx, a, b, c, d, e, g, h): ..."
    assert not list(crowded(f"class A(torch.autograd.Function):\n    @staticmethod\n    def forward{eight}"))
    assert not list(crowded(f"@library.custom_op('x::y', mutates_args=())\ndef f{eight}"))
    assert not list(crowded(f"@op.register_fake\ndef _{eight}"))
    assert not list(crowded("def f(a, b, c, d, e, g, h, *rest, **more): ..."))


@pytest.mark.parametrize(
    "annotation", ["tuple[list[int], str]", "tuple[int, str] | None", "None | tuple[tuple[int, int], tuple[int, int]]"]
)
def test_a_bundle_would_be_seen(annotation: str) -> None:
    assert list(bundled(f"def f(a: {annotation}): ..."))


@pytest.mark.parametrize("annotation", ["tuple[int, ...]", "tuple[int, int]", "list[tuple[int, str]]", "int | None"])
def test_what_is_one_thing_is_allowed(annotation: str) -> None:
    assert not list(bundled(f"def f(a: {annotation}): ..."))


def test_no_pickle_is_read_or_written() -> None:
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert "torch.load(" not in text
        assert "import pickle" not in text
