"""What needs no model starts at once: reading recipes and listing methods bring in neither torch nor what stands on it.

Each case runs in a process of its own, which fails when a heavy library was imported in it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "peft", "datasets", "pyarrow", "matplotlib")
CHECK = f"import sys; found = [name for name in {HEAVY} if name in sys.modules]; sys.exit(' '.join(found) or 0)"


def imported(code: str, tmp_path: Path) -> str:
    """What heavy libraries `code` brought in, or how it failed; empty for none."""
    words = [sys.executable, "-c", f"{code}\n{CHECK}"]
    done = subprocess.run(words, check=False, capture_output=True, text=True, cwd=tmp_path)
    return "" if done.returncode == 0 else done.stderr.strip() or "failed"


@pytest.mark.parametrize("module", ["whet", "whet.cli", "whet.api", "whet.recipe", "whet.runs", "whet.methods.all"])
def test_importing_a_room_brings_in_no_torch(module: str, tmp_path: Path) -> None:
    assert imported(f"import {module}", tmp_path) == ""


def test_recipes_of_every_method_are_read_without_torch(tmp_path: Path) -> None:
    code = (
        "from whet.methods.all import METHODS\nfrom whet.recipe import parse\n"
        "for name in METHODS:\n"
        "    words = ['model.path=m', 'data.dataset=d.jsonl', f'method.name={name}']\n"
        "    assert parse(None, words).recipe.method.name == name"
    )
    assert imported(code, tmp_path) == ""


@pytest.mark.parametrize(
    "words",
    [["methods"], ["methods", "--json"], ["schema"], ["init", "lora"], ["init", "qlora"], ["init", "full"], ["-h"]],
    ids=" ".join,
)
def test_verbs_that_need_no_model_bring_in_no_torch(words: list[str], tmp_path: Path) -> None:
    code = (
        "import io, contextlib\nfrom whet.cli import run\n"
        "with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):\n"
        f"    assert run({words}) == 0\n"
        "assert out.getvalue()"
    )
    assert imported(code, tmp_path) == ""


def test_a_heavy_import_would_be_seen(tmp_path: Path) -> None:
    assert imported("import torch", tmp_path) == "torch"
