"""whet beside its peers on one GPU: speed, memory, time to the first step; JSON per case, a table and a plot.

    python bench/gpu.py --list                                  # the cases and their processes
    python bench/gpu.py --out bench/results/h100 --only qwen06b-512,qwen4b-2048 --minutes 9
    python bench/gpu.py --out bench/results/h100 --plot         # the table and the plot of what lies there

One sitting: every system of a case runs on the same machine one after the other, each in a process of its own (the
peers through bench/peers.py, whet through `whet bench speed`), on the same shared checkpoint and the same shape. Each
peer runs in its default and in its best settings; the opponent is the fastest, chosen afterwards. With --repeats 2 the
second round runs in reverse order, so that a clock that drifts hurts both. What fails is recorded with the end of its
error and the rest goes on; what the --minutes did not allow is named. A case's file is written after every process.
Gives up the peers' own trainers, which cost them more than the plain loop here. The cases: gpu_cases.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from gpu_cases import BENCH, CASES, Case, System, command
from gpu_report import line, show

ROOT = BENCH.parent
LEAST_SECONDS = 45  # what a process is taken to need before one of its case has been timed
ERROR_CHARACTERS = 1500
PACKAGES = {
    "whet", "torch", "triton", "transformers", "peft", "bitsandbytes", "unsloth", "unsloth_zoo", "trl", "xformers",
    "torchao", "liger_kernel", "accelerate",
}  # fmt: skip
SMI = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.draw,memory.used"


@dataclass(frozen=True)
class Done:
    """How a process ended: exit code (None: stopped at its limit), what it printed, how long it took."""

    code: int | None
    output: str
    error: str
    seconds: float


def execute(command: list[str], environment: dict[str, str], limit_seconds: float) -> Done:
    """Run one process; at its limit it is ended together with the compilers that it started."""
    start = time.monotonic()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
        start_new_session=True, cwd=ROOT,
    )  # fmt: skip
    code: int | None
    try:
        output, error = process.communicate(timeout=limit_seconds)
        code = process.returncode
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        output, error = process.communicate()
        code, error = None, f"{error}\nstopped after {limit_seconds:.0f} s"
    return Done(code, output, error, time.monotonic() - start)


def parsed(output: str) -> dict[str, Any] | None:
    """The JSON object in a process's output: after RESULT, the whole, or the last line that is one."""
    lines = [line.removeprefix("RESULT").strip() for line in output.splitlines()]
    for text in (output, *reversed(lines)):
        if text.lstrip().startswith("{"):
            with contextlib.suppress(json.JSONDecodeError):
                found = json.loads(text)
                return found if isinstance(found, dict) else None
    return None


class Session:
    """One sitting: the time that is left, where things lie, how a process is run, what was left out."""

    def __init__(self, options: argparse.Namespace, run: Callable[..., Done]) -> None:
        self.options, self.run = options, run
        self.end = time.monotonic() + 60 * options.minutes
        self.scratch: Path = options.scratch
        self.longest: dict[str, float] = {}
        self.left_out: list[str] = []

    def environment(self, kind: str, more: dict[str, str]) -> dict[str, str]:
        found = os.environ | {"WHET_SCRATCH": str(self.scratch), "HF_HUB_OFFLINE": "1"} | more
        if kind != "whet" and self.options.peers_path:
            found["PYTHONPATH"] = os.pathsep.join(filter(None, [self.options.peers_path, found.get("PYTHONPATH")]))
        return found

    def shown(self, text: str) -> str:
        """Without this machine's paths."""
        names = {self.options.out: "OUT", self.options.peers_path: "PEERS", self.scratch: "$WHET_SCRATCH"}
        for path, name in (names | {sys.executable: "python", f"{ROOT}/": ""}).items():
            text = text.replace(str(path), name) if path else text
        return text

    def call(self, case_name: str, task: list[str], kind: str, more: dict[str, str]) -> dict[str, Any] | None:
        """What a process found, or why it failed; None when there is no time left to start it."""
        left = self.end - time.monotonic()
        if left < self.longest.get(case_name, LEAST_SECONDS):
            return None
        before = gpu_state()
        done = self.run(task, self.environment(kind, more), min(left, self.options.limit_seconds))
        self.longest[case_name] = max(self.longest.get(case_name, 0.0), done.seconds)
        row = {"wall_seconds": round(done.seconds, 1), "gpu_before": before, "gpu_after": gpu_state()}
        row |= {"command": self.shown(" ".join([*(f"{k}={v}" for k, v in more.items()), shlex.join(task)]))}
        found = parsed(done.output) if done.code == 0 else None
        if found is None:
            text = f"exit {done.code}\n{(done.error.strip() or done.output.strip())[-ERROR_CHARACTERS:]}"
            return row | {"failed": self.shown(text)}
        return row | {key: self.shown(value) if isinstance(value, str) else value for key, value in found.items()}

    def prepare(self, case: Case) -> str | None:
        """Make the case's checkpoint; why it failed, or None."""
        if (self.scratch / case.config).exists():
            return None
        self.scratch.mkdir(parents=True, exist_ok=True)
        task = [sys.executable, str(BENCH / "peers.py"), "checkpoint", str(BENCH / "configs" / f"{case.config}.json")]
        done = self.run(task, self.environment("peft", {}), max(1.0, self.end - time.monotonic()))
        return None if done.code == 0 else self.shown(f"no checkpoint: {done.error.strip()[-ERROR_CHARACTERS:]}")

    def measure(self, name: str, case: Case) -> Iterator[dict[str, Any]]:
        """The rows of a case as they come."""
        failed = self.prepare(case)
        systems = [s for s in case.systems if self.options.systems in ("all", "whet" if s.kind == "whet" else "peers")]
        parts = [part for part in self.options.named.split(";") if part]
        systems = [s for s in systems if not parts or any(part in s.name for part in parts)][: self.options.first]
        for turn in range(self.options.repeats):
            for system in systems[:: -1 if turn % 2 else 1]:
                for cache, more in self.caches(name, case, system):
                    label = f"{system.name}{cache}"
                    task = command(case, system, self.scratch, self.options.warm, self.options.steps)
                    found = {"failed": failed} if failed else self.call(name, task, system.kind, more)
                    if found is None:
                        self.left_out.append(f"{name}: {label}")
                        continue
                    yield found | {"name": label, "system": system.kind, "repeat": turn, "date": now()}

    def caches(self, name: str, case: Case, system: System) -> list[tuple[str, dict[str, str]]]:
        """(end of the row's name, environment): one, or for the first step empty and filled compile caches."""
        if not case.first_step:
            return [("", system.environment)]
        folder = self.scratch / "caches" / f"{name} {system.name}".replace(" ", "-").replace(",", "")
        shutil.rmtree(folder, ignore_errors=True)
        warm_file_cache(self.scratch / case.config)
        places = {
            "TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "XDG_CACHE_HOME": "xdg",
            "UNSLOTH_COMPILE_LOCATION": "unsloth", "CUDA_CACHE_PATH": "cuda",
        }  # fmt: skip
        more = system.environment | {key: str(folder / place) for key, place in places.items()}
        return [(", empty caches", more), (", filled caches", more)]


def warm_file_cache(folder: Path) -> None:
    """Read every file once, so that loading is measured from memory and not from the disk's mood."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while file.read(1 << 26):
                pass


def gpu_state() -> str | None:
    """nvidia-smi's view of the first GPU; None where there is none."""
    try:
        smi = ["nvidia-smi", "-i", "0", f"--query-gpu={SMI}", "--format=csv,noheader"]
        done = subprocess.run(smi, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def versions(peers_path: str | None) -> dict[str, str]:
    """By package; the peers' folder counts before what is installed, as it does for them."""
    search = [*([peers_path] if peers_path else []), *sys.path]
    found: dict[str, str] = {"python": sys.version.split()[0]}
    for item in distributions(path=search):
        name = (item.name or "").replace("-", "_")
        if name in PACKAGES:
            found.setdefault(name, item.version)
    return found


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def kept(place: Path, device: str | None) -> list[dict[str, Any]]:
    """The rows of an earlier sitting on the same kind of machine."""
    if not place.exists():
        return []
    earlier = json.loads(place.read_text(encoding="utf-8"))
    if (earlier["device"] or "").split(",")[0] != (device or "").split(",")[0]:
        sys.exit(f"{place}: measured on {earlier['device']}, this is {device}: give another --out")
    return earlier["rows"]


def run_case(session: Session, name: str, case: Case, place: Path) -> None:
    """Measure a case; its JSON is written after every process."""
    device, options = gpu_state(), session.options
    old, rows = kept(place, device) if options.append else [], []
    head = {
        "case": name, "title": case.title, "date": now(), "device": device, "versions": versions(options.peers_path),
        "command": session.shown(shlex.join(["python", "bench/gpu.py", *options.given])), "config": case.config,
        "rows_length_accumulation": [case.rows, case.length, case.accumulation], "first_step": case.first_step,
        "lengths": case.lengths and case.lengths.stem,
    }  # fmt: skip

    def save() -> None:
        new = {row["name"] for row in rows}
        left_out = [text.partition(": ")[2] for text in session.left_out if text.startswith(f"{name}: ")]
        whole = head | {"rows": [*(row for row in old if row["name"] not in new), *rows], "left_out": left_out}
        place.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")

    for row in session.measure(name, case):
        rows.append(row)
        save()
        print(line(row), file=sys.stderr, flush=True)
    save()


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=BENCH / "results" / "gpu")
    parser.add_argument("--only", default=",".join(CASES), help="cases by name, with commas")
    parser.add_argument("--systems", choices=("whet", "peers", "all"), default="all")
    parser.add_argument("--first", type=int, help="only the first so many systems of a case: whet's and its opponent")
    parser.add_argument("--named", default="", help="only systems whose name has one of these parts, with semicolons")
    parser.add_argument("--minutes", type=float, default=600.0, help="start no process that would end after them")
    parser.add_argument("--limit-seconds", type=float, default=420.0, help="of one process")
    parser.add_argument("--warm", type=int, default=5)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=1, help="rounds; every other one in reverse order")
    parser.add_argument("--append", action="store_true", help="keep the rows in --out that are not measured again")
    parser.add_argument("--peers-path", help="folder with the peers' packages, put before PYTHONPATH for them alone")
    default = Path(os.environ.get("WHET_SCRATCH") or Path(tempfile.gettempdir()) / "whet-bench")
    parser.add_argument("--scratch", type=Path, default=default, help="for checkpoints (25 GB) and caches")
    parser.add_argument("--list", action="store_true", help="print the processes and start none")
    parser.add_argument("--plot", action="store_true", help="print and plot what lies in --out and start nothing")
    options = parser.parse_args(argv)
    options.given = argv
    if unknown := set(options.only.split(",")) - set(CASES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    return options


def main(argv: list[str], run: Callable[..., Done] = execute) -> int:
    options = arguments(argv)
    session = Session(options, run)
    chosen = {name: CASES[name] for name in options.only.split(",")}
    if options.list:
        for name, case in chosen.items():
            print(f"{name}: {case.title}")
            for system in case.systems:
                task = command(case, system, options.scratch, options.warm, options.steps)
                print(f"  {system.name:44} {session.shown(shlex.join(task))}")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    for name, case in {} if options.plot else chosen.items():
        print(name, file=sys.stderr, flush=True)
        run_case(session, name, case, options.out / f"{name}.json")
    show(options.out, CASES)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
