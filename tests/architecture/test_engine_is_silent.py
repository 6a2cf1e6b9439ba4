"""The engine prints nothing: its notices are returned, and the caller tells them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENGINE = sorted((ROOT / "whet" / "engine").rglob("*.py"))
SPEAKERS = ("whet.base.console", "rich", "logging", "warnings")


def speech(source: str) -> list[str]:
    """Imports, anywhere in a file, of what talks to a person, and writes to a stream of the process."""
    found = []
    for node in ast.walk(ast.parse(source)):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        found += [name for name in modules if f"{name}.".startswith(tuple(f"{one}." for one in SPEAKERS))]
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stdout.write", "sys.stderr.write"):
            found.append(ast.unparse(node.func))
    return found


@pytest.mark.parametrize("path", ENGINE, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_engine_prints_nothing(path: Path) -> None:
    assert speech(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "fault",
    [
        "from whet.base.console import say",
        "from whet.base import console",
        "import whet.base.console as quiet",
        "def late():\n    from whet.base.console import Progress",
        "from rich.console import Console",
        "print('done')",
        "import sys\nsys.stderr.write('done')",
    ],
)
def test_a_planted_import_would_be_seen(fault: str) -> None:
    assert speech(fault)


def test_other_imports_are_not_speech() -> None:
    assert speech("from whet.base.errors import UserError\nimport richness") == []
