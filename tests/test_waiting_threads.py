"""Threads that wait sleep soon: the command sets it before OpenMP reads it, and keeps what the user has set."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPINS = re.compile(r"GOMP_SPINCOUNT = '(\d+)'")
# main() as a start script calls it, then what a worker process of it sees, then torch.
SCRIPT = """
import subprocess, sys
from whet.cli import main
try:
    main(["init", "lora"])
except SystemExit:
    pass
assert "torch" not in sys.modules
subprocess.run([sys.executable, "-c", "import os; print('worker', os.environ.get('GOMP_SPINCOUNT'))"])
import torch
"""


def started(command: list[str], **said: str) -> str:
    """What a process writes to both streams, with OpenMP's own list of its settings as it read them."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    env |= {"OMP_DISPLAY_ENV": "verbose", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | said
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    return done.stdout


def spins(text: str) -> int:
    """The tries of a waiting thread in GNU OpenMP's own words; another OpenMP has none."""
    if "GOMP_" not in text:
        pytest.skip("torch brings another OpenMP")
    (count,) = set(SPINS.findall(text))
    return int(count)


def test_the_command_and_its_workers_wait_asleep() -> None:
    text = started([sys.executable, "-c", SCRIPT])
    assert spins(text) == 10_000
    assert "worker 10000" in text


@pytest.mark.parametrize(("said", "expected"), [
    ({"GOMP_SPINCOUNT": "77"}, 77),
    ({"OMP_WAIT_POLICY": "PASSIVE"}, 0),
    ({"OMP_WAIT_POLICY": "ACTIVE"}, 30_000_000_000),
], ids=str)  # fmt: skip
def test_what_the_user_has_set_stays(said: dict[str, str], expected: int) -> None:
    assert spins(started([sys.executable, "-c", SCRIPT], **said)) == expected


@pytest.mark.parametrize(("said", "expected"), [
    ({}, "expandable_segments:True None"),
    ({"PYTORCH_ALLOC_CONF": "backend:native"}, "backend:native None"),
    ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, "None backend:native"),
], ids=str)  # fmt: skip
def test_memory_of_a_gpu_grows_in_segments_unless_the_user_says_otherwise(said: dict[str, str], expected: str) -> None:
    names = '("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")'
    script = (
        "import os\nfrom whet import cli\ntry:\n    cli.main(['--version'])\nexcept SystemExit:\n    pass\n"
        f"print('found', *(os.environ.get(name) for name in {names}))"
    )
    assert f"found {expected}" in started([sys.executable, "-c", script], **said)


def test_python_m_starts_as_the_command_does() -> None:
    assert spins(started([sys.executable, "-m", "whet", "doctor"])) == 10_000
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert scripts == {"whet": "whet.cli:main"}


def test_importing_whet_leaves_the_environment_to_the_program_and_the_page_says_what_to_set() -> None:
    text = started([sys.executable, "-c", "import whet, os; whet.train; print('set', 'GOMP_SPINCOUNT' in os.environ)"])
    assert "set False" in text
    for page in ("python.md", "python.ko.md"):
        assert "GOMP_SPINCOUNT=10000" in (ROOT / "docs" / page).read_text(encoding="utf-8")
