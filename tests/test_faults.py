"""A part of the proof in faults/: some operations of each command that writes fail, each in one of five ways.

`make faults` tries all of them.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator

import pytest
from faults.proof import COMMANDS, FAULTS, Proof, places

# The rest does the same steps over again, on another model or other rows.
TRIED = [
    name for name in COMMANDS if name not in ("train, whole model", "merge, nf4", "eval, other rows", "predict, table")
]

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("gcc") is None, reason="needs gcc and Linux to make file operations fail"
)


@pytest.fixture(scope="module")
def proof(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proof]:
    started = Proof(tmp_path_factory.mktemp("faults"))
    yield started
    started.close()


@pytest.mark.parametrize("name", TRIED)
def test_what_a_fault_leaves_is_whole_or_absent_and_the_same_command_goes_on(name: str, proof: Proof) -> None:
    operations, _, _ = proof.reference(name)
    assert len(operations) > (1 if name == "rename" else 9), "the shim sees what the command writes"
    faults, number = [*FAULTS], TRIED.index(name)
    fault = faults[number % len(faults)]
    met = places(operations, fault)
    at = met[-1] if number % 2 else met[len(met) // 2]
    assert proof.problem(name, fault, at) is None, (fault, at)


def test_a_half_written_output_would_be_seen(proof: Proof, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: another content counts as the new one."""
    operations, old, new = proof.reference("data check")
    monkeypatch.setitem(proof.references, "data check", (operations, old, new | {"page.html": b"half"}))
    assert "page.html" in str(proof.problem("data check", "kill", len(operations)))
