"""A part of the proof in faults/: some operations of each command that writes fail, each in one of five ways.

`make faults` tries all of them.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator

import pytest
from faults.proof import COMMANDS, FAULTS, Proof

TRIED = 1  # operation of each command, each with another fault: all five occur

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("gcc") is None, reason="needs gcc and Linux to make file operations fail"
)


@pytest.fixture(scope="module")
def proof(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proof]:
    started = Proof(tmp_path_factory.mktemp("faults"))
    yield started
    started.close()


@pytest.mark.parametrize("name", COMMANDS)
def test_what_a_fault_leaves_is_whole_or_absent_and_the_same_command_goes_on(name: str, proof: Proof) -> None:
    operations, _ = proof.reference(name)
    assert operations > 10, "the shim sees what the command writes"
    chosen = [1 + number * (operations - 1) // (TRIED + 1) for number in range(1, TRIED + 1)]
    first = [*COMMANDS].index(name)
    names = [*FAULTS]
    faults = [names[(first + number) % len(names)] for number in range(TRIED)]
    for fault, at in zip(faults, chosen, strict=True):
        assert proof.problem(name, fault, at) is None, (fault, at)


def test_a_half_written_output_would_be_seen(proof: Proof, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: another content counts as the new one."""
    operations, new = proof.reference("data check")
    monkeypatch.setitem(proof.references, "data check", (operations, new | {"page.html": b"half"}))
    assert "page.html" in str(proof.problem("data check", "kill", operations))
