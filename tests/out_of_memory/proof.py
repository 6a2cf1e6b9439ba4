"""Memory runs out at every allocation of every phase of every command that computes with a model: the command goes on
with the same result, or ends with one clear error, after which the same command does what it would have done.

    python tests/out_of_memory/proof.py                  16 allocations of each phase, spread over it: N/N
    CASES=all python tests/out_of_memory/proof.py        all of them, in both ways: days
    python tests/out_of_memory/proof.py train bench      these commands

An allocation is an operator that returns a new tensor, seen by a TorchDispatchMode on the CPU. A fault fails one of
them, or that one and all that follow in the phase. What a run that went on has to equal, bit by bit, is a run that was
told beforehand to change its layout in the same step, without any fault; `test_out_of_memory.py` holds that against
runs whose recipe asks for the final layout.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

import safetensors.torch  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes  # noqa: E402

from whet import cli, speed  # noqa: E402
from whet.engine.answer.generate import DecoderSession  # noqa: E402
from whet.engine.answer.losses import LossSession  # noqa: E402
from whet.evaluation import run as evaluating  # noqa: E402
from whet.ship import merge as merging  # noqa: E402
from whet.ship import predict as predicting  # noqa: E402
from whet.training import checkpoint, launch, run  # noqa: E402
from whet.training.held_out import HeldOut  # noqa: E402
from whet.training.launch import Launcher  # noqa: E402
from whet.training.loop import Loop  # noqa: E402

RIGHT_OPEN = safetensors.safe_open
ONCE, STAYS = "once", "from there on"


class Failing(TorchDispatchMode):
    """Counts allocations, and fails allocation `at` (None: none), and with `stays` all after it."""

    def __init__(self, at: int | None = None, *, stays: bool = False) -> None:
        super().__init__()
        self.at, self.stays, self.count = at, stays, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _allocates(func) and not _without_memory((*args, *kwargs.values())):
            self.count += 1
            if self.at is not None and (self.count == self.at or (self.stays and self.count > self.at)):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. (planted)")
        return func(*args, **kwargs)


def _allocates(func: Any) -> bool:
    """Whether an operator returns a tensor that is nobody's yet."""
    schema = func._schema
    return any("Tensor" in str(one.type) and one.alias_info is None for one in schema.returns)


def _without_memory(values: tuple[Any, ...]) -> bool:
    """Whether tensors or devices among the arguments are those of shapes alone."""
    flat = [inner for value in values for inner in (value if isinstance(value, list | tuple) else (value,))]
    return any(
        (isinstance(one, torch.Tensor) and one.device.type == "meta")
        or (isinstance(one, torch.device) and one.type == "meta")
        for one in flat
    )


@dataclass(frozen=True)
class Phase:
    """A part of a command: the calls of `owner.name`, of which call `call` (from 0) is looked at."""

    owner: Any
    name: str
    call: int = 0


def settings(**more: Any) -> dict[str, Any]:
    usual: dict[str, Any] = {
        "train__max_steps": 3, "train__save_steps": 2, "train__eval_steps": 2, "data__val_size": 4, "method__r": 2,
        "train__per_device_train_batch_size": 2, "method__lora_dropout": 0.1, "train__seed": 3,
    }  # fmt: skip
    return tiny.settings("model", Path("rows.jsonl"), Path("new"), **usual | more)


TRAIN = ["train", "recipe.yaml", *tiny.words(settings())]
COMMANDS: dict[str, tuple[list[str], dict[str, Phase]]] = {
    "train": (TRAIN, {
        "load": Phase(run, "build"), "first step": Phase(Launcher, "launch"),
        "largest batch": Phase(Launcher, "try_largest"), "later step": Phase(Launcher, "launch", 2),
        "evaluation": Phase(HeldOut, "measure"), "save": Phase(Loop, "_save"), "finish": Phase(run, "finish"),
    }),
    "train, continued": (TRAIN, {"resume": Phase(Launcher, "with_room"), "step": Phase(Launcher, "launch")}),
    "eval": (["eval", "run", "--json"], {
        "load": Phase(evaluating, "open_answerer"), "loss": Phase(LossSession, "losses"),
        "generate": Phase(DecoderSession, "answer"),
    }),
    "predict": (["predict", "run", "rows.jsonl", "--out", "answers.jsonl", "--max-new-tokens", "4"], {
        "load": Phase(predicting, "open_predictor"), "generate": Phase(DecoderSession, "answer"),
    }),
    "chat": (["chat", "run", "--message", "Which one?", "--json", "--max-new-tokens", "4"], {
        "generate": Phase(DecoderSession, "stream"),
    }),
    "merge": (["merge", "run", "out"], {
        "load": Phase(merging, "open_answerer"), "live answers": Phase(merging, "_judge"),
        "fold": Phase(merging, "_write_candidate"), "compare": Phase(merging, "_judged"),
    }),
    "merge, nf4": (["merge", "packed", "out"], {
        "load": Phase(merging, "open_answerer"), "live answers": Phase(merging, "_judge"),
        "fold": Phase(merging, "_write_candidate"), "compare": Phase(merging, "_judged"),
    }),
    "bench": (["bench", "speed", "model", "base.device=cpu", "base.storage=fp32", "base.compute=fp32",
               "--rows", "4", "--length", "24", "--warm", "1", "--steps", "2", "--json"], {
        "load": Phase(speed, "_arranged"), "first step": Phase(Launcher, "launch"),
        "later step": Phase(Launcher, "launch", 2),
    }),
}  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit status, what it said and answered, the allocations of its phase, and its outputs."""

    status: int
    said: str
    answered: str
    allocations: int
    outputs: dict[str, Any]


class FailingFiles:
    """The same for the files of a checkpoint, which a GPU's tensors are copied to the host for, one after another."""

    def __init__(self, at: int | None, stays: bool) -> None:
        self.at, self.stays, self.count = at, stays, 0
        self.undo = contextlib.ExitStack()

    def __enter__(self) -> FailingFiles:
        right = checkpoint.save_file

        def save(*args: Any) -> None:
            self.count += 1
            if self.at is not None and (self.count == self.at or (self.stays and self.count > self.at)):
                raise torch.OutOfMemoryError("CUDA out of memory. (planted)")
            right(*args)

        self.undo.enter_context(patch.object(checkpoint, "save_file", save))
        return self

    def __exit__(self, *_: object) -> None:
        self.undo.close()


class UnwatchedFile:
    """safetensors' own file, whose tensors no mode can follow: torch takes an error in them for another one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.file = RIGHT_OPEN(*args, **kwargs)

    def __enter__(self) -> UnwatchedFile:
        self.file.__enter__()
        return self

    def __exit__(self, *args: Any) -> Any:
        return self.file.__exit__(*args)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.file, name)

        def unwatched(*args: Any) -> Any:
            with _disable_current_modes():
                return found(*args)

        return unwatched if callable(found) else found


@contextlib.contextmanager
def failing(phase: Phase, at: int | None, kind: str) -> Iterator[list[int]]:
    """Inside, memory runs out in the phase; yields a list that gets the allocations of the phase."""
    right, calls, counts = getattr(phase.owner, phase.name), [0], [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] != phase.call + 1:
            return right(*args, **kwargs)
        fails = FailingFiles if phase.name == "_save" else Failing
        with fails(at, stays=kind == STAYS) as mode:
            try:
                return right(*args, **kwargs)
            finally:
                counts[0] = mode.count

    with contextlib.ExitStack() as patched:
        patched.enter_context(patch.object(phase.owner, phase.name, wrapped))
        for module in (safetensors, safetensors.torch):
            patched.enter_context(patch.object(module, "safe_open", UnwatchedFile))
        yield counts


class Proof:
    """A world that every case copies, and what undisturbed commands leave in it."""

    def __init__(self, place: Path) -> None:
        self.place, self.world = place.resolve(), place.resolve() / "world"
        self.known: dict[Any, Ended] = {}
        self.world.mkdir(parents=True)
        config = tiny.llama(hidden_size=32, intermediate_size=32, num_hidden_layers=2, vocab_size=tiny.VOCABULARY)
        tiny.save_model(config, self.world / "model")
        tiny.write_rows(self.world / "rows.jsonl", tiny.rows(12))
        (self.world / "recipe.yaml").write_text("seed: 0\n", encoding="utf-8")
        for name, more in (("run", {}), ("packed", {"base__storage": "nf4"})):
            words = ["train", "recipe.yaml", *tiny.words(settings(**more)), f"output_dir={name}"]
            assert self._command(self.world, words)[0] == 0
        half = [*TRAIN, "train.max_steps=2", "output_dir=half"]
        assert self._command(self.world, half)[0] == 0

    def run(self, name: str, phase: Phase, at: int | None = None, kind: str = ONCE) -> Ended:
        """The command in a copy of the world, with a fault; twice where the first time ends with an error."""
        place = self._case(name)
        with failing(phase, at, kind) as counts, patch.object(launch, "TRIED_ON", ("cpu",)):
            status, said, answered = self._command(place, COMMANDS[name][0])
        return Ended(status, said, answered, counts[0], self._outputs(place, name, answered))

    def again(self, name: str) -> Ended:
        """The same command where the last one was, undisturbed."""
        with patch.object(launch, "TRIED_ON", ("cpu",)):
            status, said, answered = self._command(self.place / "case", COMMANDS[name][0])
        return Ended(status, said, answered, 0, self._outputs(self.place / "case", name, answered))

    def problem(self, name: str, part: str, at: int, kind: str) -> str | None:
        """What is wrong after a fault in allocation `at` of a phase, or None."""
        phase = COMMANDS[name][1][part]
        found = self.run(name, phase, at, kind)
        if found.status not in (0, 2) or (found.status == 0 and kind == STAYS and at == 1):
            return f"exit status {found.status}: {found.said[-1500:]}"
        if found.status == 2:
            problem = found.said.rpartition("error: ")[2].partition("\n")[0]
            parts = ("  found:", "  expected:", "  fix:")
            if found.said.count("error: ") != 1 or "memory" not in problem or not all(p in found.said for p in parts):
                return f"no clear error: {found.said[-1500:]}"
            found = self.again(name)
            if found.status != 0:
                return f"the same command ends with {found.status}: {found.said[-1500:]}"
        return self._differs(name, part, found)

    def _differs(self, name: str, part: str, found: Ended) -> str | None:
        wanted = self.reference(name, part, found)
        wrong = [key for key in {*wanted.outputs, *found.outputs} if wanted.outputs.get(key) != found.outputs.get(key)]
        return f"{sorted(wrong)} differ; it said {found.said[-800:]}" if wrong else None

    def reference(self, name: str, part: str, like: Ended) -> Ended:
        """What a command leaves that is told, without a fault, to change its layout as `like` did."""
        changes = json.dumps(like.outputs.get("changes", []))
        halved = like.said.count("the held-out loss is computed with")
        key = (name, part if changes != "[]" else "", changes, halved)
        if key not in self.known:
            place = self._case(name)
            with contextlib.ExitStack() as told:
                told.enter_context(patch.object(launch, "TRIED_ON", ("cpu",)))
                told.enter_context(_told(json.loads(changes), after_first=part == "largest batch"))
                told.enter_context(_halved(halved))
                # The operators run under the mode as well, so that nothing but the fault is another.
                told.enter_context(failing(COMMANDS[name][1][part], None, ONCE))
                status, said, answered = self._command(place, COMMANDS[name][0])
            assert status == 0, said
            self.known[key] = Ended(status, said, answered, 0, self._outputs(place, name, answered))
        return self.known[key]

    def _case(self, name: str) -> Path:
        place = self.place / "case"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.world, place)
        if name == "train, continued":
            shutil.copytree(place / "half", place / "new")
            recipe = place / "new" / "recipe.yaml"
            recipe.write_text(recipe.read_text().replace("output_dir: half", "output_dir: new"), encoding="utf-8")
        return place

    def _outputs(self, place: Path, name: str, answered: str) -> dict[str, Any]:
        """What the command left: bytes and values that do not depend on the day."""
        found: dict[str, Any] = {}
        files = {"train": ("new/metrics.jsonl", "new/adapter/adapter_model.safetensors"),
                 "eval": ("run/results/predictions.jsonl", "run/results/evaluation.json"),
                 "predict": ("answers.jsonl",), "merge": ("out/model.safetensors",)}  # fmt: skip
        for file in files.get(name.partition(",")[0], ()):
            path = place / file
            found[file] = path.read_bytes() if path.is_file() else None
        if name.startswith("train"):
            layout = place / "new" / "layout.json"
            facts = json.loads(layout.read_text()) if layout.is_file() else {}
            found["changes"] = facts.get("out_of_memory", [])
        if name == "chat":
            found["answer"] = answered
        if name == "bench" and answered.startswith("{"):
            facts = json.loads(answered)
            found |= {key: facts.get(key) for key in ("loss", "first_loss")}
            found["changes"] = facts.get("layout", {}).get("out_of_memory", [])
        if name.startswith("merge") and (place / "out" / "whet_merge.json").is_file():
            facts = json.loads((place / "out" / "whet_merge.json").read_text())
            found |= {key: facts.get(key) for key in ("chosen", "agreement", "kl", "held_out_loss", "prompts")}
        return found

    def _command(self, place: Path, words: list[str]) -> tuple[int, str, str]:
        """(exit status, stderr, stdout) of a command in `place`."""
        said, answered, before = io.StringIO(), io.StringIO(), Path.cwd()
        os.chdir(place)
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(answered), _new_consoles():
                status = cli.run(words)
        finally:
            os.chdir(before)
        return status, said.getvalue(), answered.getvalue()


@contextlib.contextmanager
def _new_consoles() -> Iterator[None]:
    """Consoles that write to the streams of the moment."""
    from whet.base import console

    with patch.object(console, "_consoles", {}):
        yield


@contextlib.contextmanager
def _told(changes: list[dict[str, Any]], *, after_first: bool) -> Iterator[None]:
    """Inside, a run cuts its steps as `changes` say, without a reason; after_first: once the first step is done."""
    right = Launcher.launch
    tried: Callable[..., Any] = Launcher.try_largest

    def launched(self: Launcher, index: int) -> Any:
        if not after_first:
            for _ in [change for change in changes if change["step"] == index + 1]:
                self.cut(index)
        return right(self, index)

    def try_largest(self: Launcher) -> None:
        for change in changes if after_first else ():
            self.cut(change["step"] - 1)
        tried(self)

    with patch.object(Launcher, "launch", launched), patch.object(Launcher, "try_largest", try_largest):
        yield


@contextlib.contextmanager
def _halved(times: int) -> Iterator[None]:
    """Inside, the held-out loss is computed with half as many rows, so many times, from the first one on."""
    right, done = HeldOut.measure, []

    def measure(self: HeldOut, *args: Any, **kwargs: Any) -> Any:
        while len(done) < times:
            done.append(self._halve())
        return right(self, *args, **kwargs)

    with patch.object(HeldOut, "measure", measure):
        yield


def places(count: int, every: int, first: int = 1) -> Iterator[tuple[int, str]]:
    """(allocation, kind of fault): each `every`th, the two kinds in turns; all of both for every = 1."""
    if every == 1:
        yield from ((at, kind) for kind in (ONCE, STAYS) for at in range(1, count + 1))
        return
    for number, at in enumerate(range(first, count + 1, every)):
        yield at, STAYS if number % 3 == 2 else ONCE


def prove(proof: Proof, name: str, part: str, cases: int | None = None) -> tuple[int, int]:
    """(passed, tried) of a phase, printed with what went wrong. cases: about how many, None: all."""
    plain = proof.run(name, COMMANDS[name][1][part])
    assert plain.status == 0, plain.said
    assert plain.allocations, f"{name}, {part}: nothing is seen to be allocated"
    count = plain.allocations
    tried, passed, began = 0, 0, time.perf_counter()
    for at, kind in places(count, 1 if cases is None else max(1, count // cases)):
        problem = proof.problem(name, part, at, kind)
        tried, passed = tried + 1, passed + (problem is None)
        if problem:
            print(f"{name}, {part}, allocation {at} {kind}: {problem}", flush=True)
    print(f"{name}, {part}: {count} allocations, {passed}/{tried} recover or end with one clear error "
          f"({time.perf_counter() - began:.0f} s)", flush=True)  # fmt: skip
    return passed, tried


def main() -> None:
    torch.set_num_threads(1)
    os.environ |= {"WHET_CACHE": "off", "HF_HUB_OFFLINE": "1", "WHET_LANG": "en"}
    asked, total = os.environ.get("CASES", "16"), [0, 0]
    cases = None if asked == "all" else int(asked)
    with tempfile.TemporaryDirectory() as place:
        proof = Proof(Path(place) / "proof")
        for name in sys.argv[1:] or COMMANDS:
            for part in COMMANDS[name][1]:
                total = [a + b for a, b in zip(total, prove(proof, name, part, cases), strict=True)]
    print(f"{total[0]}/{total[1]}")
    sys.exit(total[0] != total[1])


if __name__ == "__main__":
    main()
