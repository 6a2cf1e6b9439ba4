"""Every file operation of every command that writes is made to fail once: what stands there is whole or absent, and the
same command goes on.

`make faults` runs all of it (EVERY=5: each fifth) and prints N/N for each command; test_faults.py runs a part. A fault
is a kill in front of the operation, an input or output error, a disk that is full from there on, a write of half its
bytes, or a rename to another file system. Afterwards the command, undisturbed, has to end with the bytes of one that
never was disturbed.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

import tiny  # noqa: E402

FAULTS = {"kill": -1, "error": errno.EIO, "full disk": errno.ENOSPC, "short write": -2, "other disk": errno.EXDEV}
STAYS = ("full disk", "other disk")
KILLED = -signal.SIGKILL
ON_THE_DAY = {"timing.jsonl", "finished.json", "state.json", "manifest.json"}  # they hold times: never twice the same


@dataclass(frozen=True)
class Command:
    """A command, run in a copy of the world. outputs: files and directories that are old, whole and new, or absent;
    final: those that have to be there with the bytes of an undisturbed run when the command has gone on."""

    words: list[str]
    outputs: tuple[str, ...]
    final: tuple[str, ...]


def trained(*more: str) -> list[str]:
    values = tiny.settings("model", Path("rows.jsonl"), Path("new"), train__max_steps=2, train__save_steps=1,
                           data__val_size=3, method__r=2)  # fmt: skip
    return ["train", "recipe.yaml", *tiny.words(values), *more]


CHECKPOINTS = ("new/checkpoints/step-1", "new/checkpoints/step-2")
COMMANDS = {
    "train": Command(trained(), (*CHECKPOINTS, "new/adapter"), (*CHECKPOINTS, "new/adapter", "new/metrics.jsonl")),
    "merge": Command(["merge", "run", "out"], ("out",), ("out", "run/results/merge.json")),
    "compose": Command(["adapters", "compose", "out", "run", "run"], ("out",), ("out",)),
    "data check": Command(["data", "check", "rows.jsonl", "--html", "page.html", "--removed", "removed.jsonl"],
                          ("page.html", "removed.jsonl"), ("page.html", "removed.jsonl")),
    "eval": Command(["eval", "run"], ("run/results/evaluation.json", "run/results/predictions.jsonl", "run/adapter"),
                    ("run/results/evaluation.json", "run/results/predictions.jsonl")),
}  # fmt: skip


class Proof:
    """The server with the shim, the world that every case copies, and what undisturbed commands leave."""

    def __init__(self, place: Path) -> None:
        self.place = place.resolve()
        library = self.place / "shim.so"
        subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", library, HERE / "shim.c", "-ldl"], check=True)
        environment = os.environ | {
            "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1", "LD_PRELOAD": str(library),
            "WHET_CACHE": "off", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "server.py")], env=environment, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert self._line() == "ready"
        self.world = self.place / "world"
        self._make_world()
        self.references: dict[str, tuple[int, dict[str, Any]]] = {}

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(900)

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def _make_world(self) -> None:
        self.world.mkdir()
        tiny.save_model(tiny.llama(hidden_size=32, intermediate_size=32, num_hidden_layers=1), self.world / "model")
        tiny.write_rows(self.world / "rows.jsonl", tiny.rows(8))
        (self.world / "recipe.yaml").write_text("seed: 0\n", encoding="utf-8")
        for name in ("page.html", "removed.jsonl"):
            text = "<!doctype html>old" if name == "page.html" else '{"reason": "old"}\n'
            (self.world / name).write_text(text, encoding="utf-8")
        assert self.run(self.world, trained("output_dir=run"))[0] == 0, self.log()

    def run(self, place: Path, words: list[str], fault: str | None = None, at: int = 0) -> tuple[int, int]:
        """(exit status, file operations below `place`) of a command, perhaps with a fault in operation `at`."""
        order = {"words": words, "place": str(place), "kind": FAULTS[fault] if fault else 0, "at": at,
                 "stay": fault in STAYS, "log": str(self.place / "log")}  # fmt: skip
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        said = json.loads(self._line())
        return said["status"], said["operations"]

    def log(self) -> str:
        return (self.place / "log").read_text(encoding="utf-8", errors="replace")[-3000:]

    def case(self) -> Path:
        place = self.place / "case"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.world, place)
        return place

    def reference(self, name: str) -> tuple[int, dict[str, Any]]:
        """(operations, contents of outputs) of an undisturbed command."""
        if name not in self.references:
            command, place = COMMANDS[name], self.case()
            status, operations = self.run(place, command.words)
            assert status == 0, self.log()
            outputs = {*command.outputs, *command.final}
            self.references[name] = operations, {output: content(place / output) for output in outputs}
        return self.references[name]

    def problem(self, name: str, fault: str, at: int) -> str | None:
        """What is wrong after a fault in operation `at` of a command, or None."""
        command, (_, new) = COMMANDS[name], self.reference(name)
        place = self.case()
        status, _ = self.run(place, command.words, fault, at)
        said = self.log()
        if status not in ((KILLED,) if fault == "kill" else (0, 2)):
            return f"exit status {status}: {said}"
        if status == 2 and ("error: " not in said or "fix: " not in said):
            return f"no clear error: {said}"
        for output in command.outputs:
            there = content(place / output)
            if there not in (None, content(self.world / output), new[output]):
                return f"{output} is neither old nor new nor absent"
        status, _ = self.run(place, command.words)
        if status != 0:
            return f"the same command ends with {status}: {self.log()}"
        wrong = [output for output in command.final if content(place / output) != new[output]]
        left = [str(path.relative_to(place)) for path in place.rglob(".*")]
        if wrong or left:
            return f"after the same command: {wrong} differ, {left} are left behind"
        return None


def content(path: Path) -> Any:
    """The bytes of a file, or of all files of a directory, where those of the day are only there; None for nothing."""
    if path.is_dir():
        files = {str(one.relative_to(path)): one for one in path.rglob("*") if one.is_file()}
        return {name: b"" if one.name in ON_THE_DAY else one.read_bytes() for name, one in files.items()}
    return path.read_bytes() if path.is_file() else None


def cases(operations: int, every: int = 1, first: int = 1) -> Iterator[tuple[str, int]]:
    """(fault, operation), each fault from another operation on where only some are tried."""
    for number, fault in enumerate(FAULTS):
        yield from ((fault, at) for at in range(first + number % every, operations + 1, every))


def prove(proof: Proof, name: str, every: int = 1) -> bool:
    """Try the faults of a command and print how many it survived; returns whether all."""
    operations, _ = proof.reference(name)
    tried = passed = 0
    for fault, at in cases(operations, every):
        problem = proof.problem(name, fault, at)
        tried, passed = tried + 1, passed + (problem is None)
        if problem:
            print(f"{name}, {fault} in operation {at}: {problem}", flush=True)
    kept = f"{passed}/{tried} faults: whole or absent, and the same command goes on"
    print(f"{name}: {operations} file operations, {kept}", flush=True)
    return passed == tried


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        proof = Proof(Path(place))
        try:
            whole = [prove(proof, name, int(os.environ.get("EVERY", "1"))) for name in (sys.argv[1:] or COMMANDS)]
        finally:
            proof.close()
    sys.exit(not all(whole))


if __name__ == "__main__":
    main()
