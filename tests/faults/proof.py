"""Every file operation of every command that writes is made to fail once: what stands there is whole or absent, and the
same command goes on.

`make faults` runs all of it (EVERY=5: each fifth) and prints N/N for each command; test_faults.py runs a part. A fault
is a kill in front of the operation, an input or output error, a disk that is full from there on, a write of half its
bytes, or a rename to another file system. Afterwards the command, undisturbed, has to end with the bytes of one that
never was disturbed.

The undisturbed command says of each operation what it is, and a fault is tried where it can be met: a full disk at what
takes room, half a write at writes, another disk at renames and links. Elsewhere a fault that stays would first be met
by a later operation, which is tried anyway, and one that passes not at all.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

import tiny  # noqa: E402
from fake_endpoint import Say, serving  # noqa: E402

FAULTS = {"kill": -1, "error": errno.EIO, "full disk": errno.ENOSPC, "short write": -2, "other disk": errno.EXDEV}
MEET = {"full disk": "cwsmg", "short write": "w", "other disk": "r"}  # letters of shim.c; the others: all
STAYS = ("full disk", "other disk")
KILLED = -signal.SIGKILL
ON_THE_DAY = {"timing.jsonl", "finished.json", "state.json", "manifest.json"}  # they hold times: never twice the same
DATE = re.compile(rb'"date": "[^"]*"')  # of a reply
ENDPOINT = "{endpoint}"


@dataclass(frozen=True)
class Command:
    """A command, run in a copy of the world. outputs: files and directories that are old, whole and new, or absent, `*`
    for any name; final: those that have to be there with the bytes of an undisturbed run when the command has gone on.

    needs: what of the extras lies in the copy too; online: it asks an endpoint; once: what it has done it refuses to do
    again (the adapter is gone, or has its new name).
    """

    words: list[str]
    outputs: tuple[str, ...]
    final: tuple[str, ...]
    needs: tuple[str, ...] = ()
    online: bool = False
    once: bool = False


def trained(*more: str, **changes: Any) -> list[str]:
    usual: dict[str, Any] = {"train__max_steps": 2, "train__save_steps": 1, "data__val_size": 3, "method__r": 2}
    values = tiny.settings("model", Path("rows.jsonl"), Path("new"), **usual | changes)
    return ["train", "recipe.yaml", *tiny.words(values), *more]


def asked(verb: str, out: str) -> list[str]:
    return ["data", verb, "rows.jsonl", "--endpoint", ENDPOINT, "--model", "m", "--jobs", "1", "--out", out]


def steps(run: str, *numbers: int) -> tuple[str, ...]:
    return tuple(f"{run}/checkpoints/step-{number}" for number in numbers)


COMMANDS = {
    "train": Command(trained(), (*steps("new", 1, 2), "new/adapter", "new/loss.png"),
                     (*steps("new", 1, 2), "new/adapter", "new/metrics.jsonl", "new/loss.png")),
    "train, killed before": Command(
        trained("output_dir=killed"), (*steps("killed", 1, 2), "killed/adapter"),
        (*steps("killed", 1, 2), "killed/adapter", "killed/metrics.jsonl"), needs=("killed",)),
    "train, more steps": Command(
        trained("output_dir=run", "train.max_steps=4"), (*steps("run", 1, 2, 3, 4), "run/adapter", "run/recipe.yaml"),
        (*steps("run", 1, 2, 3, 4), "run/adapter", "run/recipe.yaml", "run/metrics.jsonl", "run/loss.png")),
    "train, whole model": Command(
        trained(method__name="full"), (*steps("new", 1, 2), "new/model"),
        (*steps("new", 1, 2), "new/model", "new/metrics.jsonl")),
    "merge": Command(["merge", "run", "out"], ("out",), ("out", "run/results/merge.json")),
    "merge, nf4": Command(["merge", "packed", "out"], ("out",), ("out", "packed/results/merge.json"),
                          needs=("packed",)),
    "compose": Command(["adapters", "compose", "out", "run", "run"], ("out",), ("out",)),
    "rename": Command(["adapters", "rename", "alone", "named"], ("alone", "named"), ("alone", "named"),
                      needs=("alone",), once=True),
    "delete": Command(["adapters", "delete", "alone"], ("alone",), ("alone",), needs=("alone",), once=True),
    "data check": Command(["data", "check", "rows.jsonl", "--html", "page.html", "--removed", "removed.jsonl"],
                          ("page.html", "removed.jsonl"), ("page.html", "removed.jsonl")),
    "data judge": Command(asked("judge", "scores.jsonl"), ("scores.jsonl",),
                          ("scores.jsonl", "scores.jsonl.replies"), online=True),
    "data augment": Command(asked("augment", "added.jsonl"), ("added.jsonl", "added-refused.jsonl"),
                            ("added.jsonl", "added-refused.jsonl", "added.jsonl.replies"), online=True),
    "eval": Command(["eval", "run"], ("run/results/evaluation.json", "run/results/predictions.jsonl", "run/adapter"),
                    ("run/results/evaluation.json", "run/results/predictions.jsonl")),
    "eval, other rows": Command(["eval", "run", "--data", "rows.jsonl"], ("run/results/data-*", "run/adapter"),
                                ("run/results/data-*",)),
    "predict": Command(["predict", "run", "rows.jsonl", "--out", "answers.jsonl", "--max-new-tokens", "8"],
                       ("answers.jsonl",), ("answers.jsonl",)),
    "predict, table": Command(["predict", "run", "rows.jsonl", "--out", "answers.csv", "--max-new-tokens", "8"],
                              ("answers.csv",), ("answers.csv",)),
}  # fmt: skip
OLD = {  # what stands where a command writes, as an earlier one would have left it
    "page.html": "<!doctype html>old", "removed.jsonl": '{"reason": "old"}\n',
    "answers.jsonl": '{"row": 1, "text": "old"}\n', "answers.csv": "row,prompt,text\n1,old,old\n",
    "scores.jsonl": '{"score": 1, "rubric": "quality", "prompt_sha256": "0"}\n',
}  # fmt: skip


def said(request: dict[str, Any], _: int) -> Say:
    """A model's reply: a score that is the same for the same row, or paraphrases of its text."""
    question = json.loads(request["messages"][1]["content"])
    if isinstance(question, dict):
        words = [f"{'Well, ' * (number + 1)}{question['text']}" for number in range(question["n"])]
        return Say(json.dumps({"paraphrases": words}))
    return Say(json.dumps({"score": 1 + len(str(question)) % 5, "reason": "as it is"}))


class Proof:
    """The server with the shim, the world that every case copies, and what undisturbed commands leave."""

    def __init__(self, place: Path) -> None:
        self.place = place.resolve()
        self.world, self.extras = self.place / "world", self.place / "extras"
        self.references: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {}
        with ExitStack() as opened:
            self.endpoint = opened.enter_context(serving(said)).base_url
            self._start()
            opened.callback(self._stop)
            self._make_world()
            self.opened = opened.pop_all()

    def _start(self) -> None:
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

    def close(self) -> None:
        self.opened.close()

    def _stop(self) -> None:
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
        for name, text in OLD.items():
            (self.world / name).write_text(text, encoding="utf-8")
        assert self.run(self.world, trained("output_dir=run"))[0] == 0, self.log()

    def _extra(self, name: str) -> Path:
        """A run that was killed between its checkpoints, a run on a packed base, or an adapter that stands alone."""
        if (self.extras / name).exists():
            return self.extras / name
        place, at = self.case(), 60
        if name == "alone":
            shutil.copytree(place / "run" / "adapter", place / name)
        elif name == "packed":
            assert self.run(place, trained("output_dir=packed", base__storage="nf4"))[0] == 0, self.log()
        else:
            while not (place / name / "checkpoints" / "step-1").exists():
                shutil.rmtree(place / name, ignore_errors=True)
                at += 20
                assert self.run(place, trained(f"output_dir={name}"), "kill", at)[0] == KILLED
            assert not (place / name / "checkpoints" / "step-2").exists()
        return Path(shutil.copytree(place / name, self.extras / name))

    def run(
        self, place: Path, words: list[str], fault: str | None = None, at: int = 0, online: bool = False
    ) -> tuple[int, str]:
        """(exit status, a letter for each operation below `place`) of a command, perhaps with a fault in `at`."""
        words = [self.endpoint if word == ENDPOINT else word for word in words]
        order = {"words": words, "place": str(place), "kind": FAULTS[fault] if fault else 0, "at": at,
                 "stay": fault in STAYS, "log": str(self.place / "log"), "online": online}  # fmt: skip
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self._line())
        return answer["status"], answer["operations"]

    def log(self) -> str:
        return (self.place / "log").read_text(encoding="utf-8", errors="replace")[-3000:]

    def case(self, needs: tuple[str, ...] = ()) -> Path:
        place, extras = self.place / "case", [self._extra(name) for name in needs]
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.world, place)
        for extra in extras:
            shutil.copytree(extra, place / extra.name)
        return place

    def reference(self, name: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
        """(operations, contents of outputs before, and after) of an undisturbed command."""
        if name not in self.references:
            command, place = COMMANDS[name], self.case(COMMANDS[name].needs)
            before = {path: content(path) for path in place.rglob("*")}
            status, operations = self.run(place, command.words, online=command.online)
            assert status == 0, self.log()
            outputs = named(place, (*command.outputs, *command.final))
            old = {output: before.get(place / output) for output in outputs}
            self.references[name] = operations, old, {output: content(place / output) for output in outputs}
        return self.references[name]

    def problem(self, name: str, fault: str, at: int) -> str | None:
        """What is wrong after a fault in operation `at` of a command, or None."""
        command, (_, old, new) = COMMANDS[name], self.reference(name)
        place = self.case(command.needs)
        status, _ = self.run(place, command.words, fault, at, command.online)
        log = self.log()
        if status not in ((KILLED,) if fault == "kill" else (0, 2)):
            return f"exit status {status}: {log}"
        if status == 2 and ("error: " not in log or "fix: " not in log):
            return f"no clear error: {log}"
        for output in named(place, command.outputs):
            if content(place / output) not in (None, old.get(output), new.get(output)):
                return f"{output} is neither old nor new nor absent"
        done = command.once and all(content(place / output) == new[output] for output in command.final)
        status, _ = self.run(place, command.words, online=command.online)
        if status != 0 and not (done and status == 2):
            return f"the same command ends with {status}: {self.log()}"
        final = {*named(place, command.final), *(output for output in new if is_named(output, command.final))}
        wrong = [output for output in sorted(final) if content(place / output) != new.get(output)]
        left = [str(path.relative_to(place)) for path in place.rglob(".*")]
        if wrong or left:
            return f"after the same command: {wrong} differ, {left} are left behind"
        return None


def named(place: Path, patterns: tuple[str, ...]) -> list[str]:
    """The outputs that the patterns name, below `place`; a name without `*` also where nothing stands."""
    found = [str(path.relative_to(place)) for pattern in patterns if "*" in pattern for path in place.glob(pattern)]
    return [*found, *(pattern for pattern in patterns if "*" not in pattern)]


def is_named(output: str, patterns: tuple[str, ...]) -> bool:
    return any(Path(output).match(pattern) for pattern in patterns)


def content(path: Path) -> Any:
    """The bytes of a file, or of all files of a directory, where those of the day are only there; None for nothing."""
    if path.is_dir():
        files = {str(one.relative_to(path)): one for one in path.rglob("*") if one.is_file()}
        return {name: content(one) for name, one in files.items()}
    if not path.is_file():
        return None
    return b"" if path.name in ON_THE_DAY else DATE.sub(b"", path.read_bytes())


def places(operations: str, fault: str) -> list[int]:
    """The operations, counted from 1, that can meet a fault."""
    return [at for at, letter in enumerate(operations, 1) if letter in MEET.get(fault, letter)]


def cases(operations: str, every: int = 1) -> Iterator[tuple[str, int]]:
    """(fault, operation), each fault from another operation on where only some are tried."""
    for number, fault in enumerate(FAULTS):
        yield from ((fault, at) for at in places(operations, fault)[number % every :: every])


def prove(proof: Proof, name: str, every: int = 1) -> bool:
    """Try the faults of a command and print how many it survived; returns whether all."""
    operations, _, _ = proof.reference(name)
    tried: dict[str, int] = dict.fromkeys(FAULTS, 0)
    passed = 0
    for fault, at in cases(operations, every):
        problem = proof.problem(name, fault, at)
        tried[fault], passed = tried[fault] + 1, passed + (problem is None)
        if problem:
            print(f"{name}, {fault} in operation {at} ({operations[at - 1]}): {problem}", flush=True)
    total, each = sum(tried.values()), ", ".join(f"{fault} {count}" for fault, count in tried.items())
    kept = f"{passed}/{total} faults ({each}): whole or absent, and the same command goes on"
    print(f"{name}: {len(operations)} file operations, {kept}", flush=True)
    return passed == total


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
