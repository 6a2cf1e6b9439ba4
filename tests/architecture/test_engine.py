"""The fast engine keeps to the rules: no GPU code on a CPU, nobody's classes changed, every kernel has a plain twin."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "whet").rglob("*.py"))
KERNELS = sorted((ROOT / "whet").rglob("*_triton.py"))


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.name)
def test_a_kernel_names_its_twin(path: Path) -> None:
    """As `package.module` in the docstring of its file; the module must exist, be free of triton, and import it."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    named = [ROOT / "whet" / (word.strip("`.,;:").replace(".", "/") + ".py") for word in text.split() if "`" in word]
    twins = [twin for twin in named if twin.is_file()]
    assert twins, f"the docstring of {path.name} names no module of whet"
    assert any(path.stem in twin.read_text(encoding="utf-8") for twin in twins)


def imports_at_load(tree: ast.Module) -> set[str]:
    """Modules that are imported when a file is: everywhere but inside functions and `if TYPE_CHECKING`."""
    found: set[str] = set()

    def walk(nodes: list[Any]) -> None:
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                walk(node.orelse)
                continue
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            if isinstance(node, ast.ImportFrom):
                found.add(node.module or "")
                found.update(f"{node.module}.{alias.name}" for alias in node.names)
            walk(list(ast.iter_child_nodes(node)))

    walk(tree.body)
    return found


def gpu_only(names: set[str]) -> set[str]:
    return {name for name in names if name.partition(".")[0] == "triton" or name.endswith("_triton")}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_kernels_are_imported_inside_functions_only(path: Path) -> None:
    found = gpu_only(imports_at_load(ast.parse(path.read_text(encoding="utf-8"))))
    assert not {name for name in found if name.endswith("_triton")}
    assert not found or path in KERNELS


@pytest.mark.parametrize(
    "fault",
    [
        "import triton",
        "from whet.engine import nf4_triton",
        "from whet.engine.weights.nf4_triton import launch",
        "try:\n    import triton.language as tl\nexcept ImportError:\n    pass",
        "class A:\n    from triton import jit",
    ],
)
def test_an_early_import_would_be_seen(fault: str) -> None:
    assert gpu_only(imports_at_load(ast.parse(fault)))


def test_a_late_import_is_allowed() -> None:
    assert not gpu_only(imports_at_load(ast.parse("def f():\n    from whet.engine.weights.nf4_triton import launch")))


def contents(network: torch.nn.Module) -> dict[type, dict[str, Any]]:
    """What stands in every class of a model and in the classes above it."""
    kinds = {kind for module in network.modules() for kind in type(module).__mro__ if kind is not object}
    return {kind: dict(vars(kind)) for kind in kinds}


def differences(before: dict[type, dict[str, Any]]) -> list[str]:
    changed = []
    for kind, old in before.items():
        new = vars(kind)
        names = {name for name in old.keys() | new.keys() if old.get(name) is not new.get(name)}
        changed += [f"{kind.__name__}.{name}" for name in names]
    return sorted(changed)


@pytest.mark.parametrize("kind", ["Llama", "Gemma2", "Qwen3"])
def test_the_classes_of_transformers_stay_as_they_are(kind: str) -> None:
    import nets

    from whet.engine.compute.compile import compile_layers
    from whet.engine.layers import decoder_layers
    from whet.engine.memory.checkpointing import checkpoint_layers
    from whet.engine.memory.tiles import tile_mlp
    from whet.engine.weights.linear import FrozenLinear, freeze_linears
    from whet.methods.layers.fuse import fuse
    from whet.methods.layers.group import LoraGroup
    from whet.methods.layers.member import GroupMember

    net = nets.network(kind)
    before = contents(net)
    shapes = [(type(module), set(vars(module))) for module in decoder_layers(net)[0].modules()]
    freeze_linears(net, "int8")
    model = nets.adapted(net)
    fuse(model, compute=torch.float32, fp8=True)
    compile_layers(net)
    checkpoint_layers(net)
    nets.loss_of(nets.made(kind), nets.ids()).backward()  # a second model of the family is trained beside it
    assert differences(before) == []
    others = [m for m in decoder_layers(net)[0].modules() if not type(m).__module__.startswith(("peft", "torch"))]
    ours = [m for m in others if type(m).__module__.startswith("whet")]
    assert all(isinstance(m, FrozenLinear | LoraGroup | GroupMember) for m in ours)
    assert {type(m) for m in others if m not in ours} <= {found for found, _ in shapes}
    tile_mlp(net, 8)
    assert differences(before) == []


def test_a_changed_class_would_be_seen() -> None:
    class Layer(torch.nn.Module):
        def forward(self) -> None: ...

    before = contents(Layer())
    assert differences(before) == []
    Layer.forward = lambda self: None  # type: ignore[method-assign]
    assert differences(before) == ["Layer.forward"]
