"""What other processes on the same cores cost whet on a CPU, by how its waiting threads wait.

    python bench/busy.py                        # writes bench/results/cpu/busy.json
    python bench/busy.py --nice -15             # as root on a machine that others use, so that idle means something

One process for each setting and each kind of work (`whet train` on the support tickets; answers of the built-in model)
stays up for the whole measurement and works in turns of a few seconds, one process at a time, in an order that turns
round: without company, beside one process that computes without end, beside four. A figure is the median over rounds of
tokens per second of a turn, and of its ratio to the same round's turn of the default, or of the same setting without
company. A turn counts whole steps (or answers), also where the first of them takes longer than the turn. Nothing is
pinned. Load that others make goes into all turns alike; how many cores it took before each stands in the result. With
--nice the measurement, a session of its own, has that priority while a turn lasts (autogroup(7); a kernel without it
refuses), and a turn is followed by a pause as long as it was.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from whet.cli import WAITING

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "bench" / "results" / "cpu" / "busy.json"
NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")  # what decides about threads that wait
SETTINGS = ("default", "whet", "OMP_WAIT_POLICY=PASSIVE", "OMP_NUM_THREADS=1")
SPIN = "while True: pass"
QUESTIONS = [f"Ticket {n}: my order has not arrived and nobody answers." for n in range(4)]
say = partial(print, file=sys.stderr, flush=True)


def turns(work: Callable[[], int]) -> None:
    """Answer each line of stdin, a number of seconds, with what was done in them, until it ends."""
    for line in sys.stdin:
        seconds, tokens, cpu, start = float(line), 0, time.process_time(), time.perf_counter()
        while (took := time.perf_counter() - start) < seconds:
            tokens += work()
        print(json.dumps({"tokens": tokens, "seconds": took, "cpu": time.process_time() - cpu}), flush=True)


def work_train(folder: str) -> None:
    """Train as `whet train recipes/quickstart.yaml` does; the callback after each step waits for turns."""
    import whet

    seen, due = 0, Turn()

    def step(record: dict[str, Any]) -> None:
        nonlocal seen
        due.done(record["tokens"] - seen)
        seen = record["tokens"]

    whet.train(
        ROOT / "recipes" / "quickstart.yaml", callbacks=[step],
        **{"train.num_train_epochs": 1000, "train.eval_steps": 10**6, "base.device": "cpu", "output_dir": folder},
    )  # fmt: skip


class Turn:
    """The same as `turns` for work that calls: the time from one line of stdin to the first step that ends late."""

    def __init__(self) -> None:
        self.warm, self.until = 3, 0.0

    def done(self, tokens: int) -> None:
        """Note a step; between two turns, wait for the next one."""
        if self.warm:
            self.warm -= 1
            if self.warm:
                return
            print("ready", flush=True)
        else:
            self.tokens += tokens
            if (took := time.perf_counter() - self.start) < self.until:
                return
            cpu = time.process_time() - self.cpu
            print(json.dumps({"tokens": self.tokens, "seconds": took, "cpu": cpu}), flush=True)
        line = sys.stdin.readline()
        if not line:
            os._exit(0)  # the measurement is over; the run is of no use
        self.until, self.tokens, self.cpu, self.start = float(line), 0, time.process_time(), time.perf_counter()


def work_answer(folder: str) -> None:
    """Four questions at once to the built-in model, 16 tokens each."""
    import whet

    model = whet.open("builtin:tiny")

    def ask() -> int:
        model.predict(QUESTIONS, max_new_tokens=16)
        return 16 * len(QUESTIONS)

    ask()
    print("ready", flush=True)
    turns(ask)


def environment_of(setting: str) -> dict[str, str]:
    """What a setting puts into the environment: nothing, what the command line of whet puts there, or itself."""
    if setting == "whet":
        return dict([WAITING])
    return {} if setting == "default" else dict(part.split("=") for part in setting.split(","))  # pyright: ignore


WORK = {"train": work_train, "answer": work_answer}


@contextmanager
def priority(nice: int) -> Iterator[None]:
    """Run the session of this process, which is all that is measured, ahead of others for a while."""
    group = Path("/proc/self/autogroup")
    if nice:
        group.write_text(str(nice))
    try:
        yield
    finally:
        if nice:
            group.write_text("0")


@contextmanager
def worker(work: str, setting: dict[str, str]) -> Iterator[Callable[[float], dict[str, Any]]]:
    """A process that works in turns; gives the function that asks for one."""
    kept = {name: value for name, value in os.environ.items() if name not in NAMES}
    env = kept | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)} | setting
    with tempfile.TemporaryDirectory() as folder, Path(folder, "log").open("w") as log:
        command = [sys.executable, __file__, "--worker", work, "--folder", f"{folder}/run"]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log, "text": True}
        with subprocess.Popen(command, env=env, **pipes) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            asking, answers = process.stdin, process.stdout

            def turn(seconds: float) -> dict[str, Any]:
                asking.write(f"{seconds}\n")
                asking.flush()
                return json.loads(answers.readline())

            if answers.readline() != "ready\n":
                sys.exit(Path(folder, "log").read_text()[-2000:])
            yield turn
            process.kill()


@contextmanager
def company(count: int) -> Iterator[None]:
    """So many processes that compute without end."""
    with ExitStack() as stack:
        for _ in range(count):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", SPIN]))
            stack.callback(process.kill)
        time.sleep(0.3 if count else 0.0)
        yield


def others() -> float:
    """CPU seconds a second that all processes take, over half a second in which this one waits."""

    def busy() -> tuple[int, float]:
        fields = [int(n) for n in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        return sum(fields) - fields[3] - fields[4], time.perf_counter()

    (before, start), _ = busy(), time.sleep(0.5)
    after, end = busy()
    return (after - before) / os.sysconf("SC_CLK_TCK") / (end - start)


def measure(options: argparse.Namespace, work: str, settings: dict[str, dict[str, str]]) -> list[dict[str, Any]]:
    """One record for each turn, in the order in which they were."""
    found = []
    with ExitStack() as stack:
        asked = {name: stack.enter_context(worker(work, setting)) for name, setting in settings.items()}
        for at in range(options.rounds):
            for count in options.busy[:: -1 if at % 2 else 1]:
                order = list(settings)[at % len(settings) :] + list(settings)[: at % len(settings)]
                for name in order:
                    foreign = others()
                    with priority(options.nice), company(count):
                        turn = asked[name](options.seconds)
                    time.sleep(turn["seconds"] if options.nice else 0.0)
                    speed = turn["tokens"] / turn["seconds"]
                    found.append(
                        {"round": at, "busy": count, "setting": name, "tokens_per_second": round(speed, 1),
                         "seconds": round(turn["seconds"], 2), "cpu_seconds": round(turn["cpu"], 2),
                         "cores_of_others": round(foreign, 2)}
                    )  # fmt: skip
                    say(f"{work} round {at} busy {count} {name:24} {speed:8,.0f} tok/s  others {foreign:.2f}")
    return found


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """By setting and company: speed, its part of the speed without company, its ratio to the default's; medians."""
    by = {(r["setting"], r["busy"], r["round"]): r["tokens_per_second"] for r in records}
    found: dict[str, Any] = {}
    for name in dict.fromkeys(r["setting"] for r in records):
        for count in sorted({r["busy"] for r in records}):
            speeds = {at: v for (n, c, at), v in by.items() if (n, c) == (name, count)}
            entry = {"tokens_per_second": statistics.median(speeds.values())}
            for what, key in (("of_idle", (name, 0)), ("of_default", ("default", count))):
                ratios = [v / by[key[0], key[1], at] for at, v in speeds.items() if by.get((key[0], key[1], at))]
                if ratios:
                    entry[what] = round(statistics.median(ratios), 3)
            found.setdefault(name, {})[f"{count} busy"] = entry
    return found


def main() -> None:
    """Measure, print a table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", default=list(WORK), choices=WORK)
    parser.add_argument("--settings", nargs="+", default=SETTINGS, help="default, whet, NAME=VALUE[,NAME=VALUE]")
    parser.add_argument("--busy", nargs="+", type=int, default=[0, 1, 4], help="how many other processes compute")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=3.0, help="the least length of a turn")
    parser.add_argument("--nice", type=int, default=0, help="priority while a turn lasts; below 0 takes root")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--worker", choices=WORK, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        WORK[options.worker](options.folder)
        return
    from torch import __version__
    from torch.cpu import get_capabilities

    if options.nice and os.getsid(0) != os.getpid():
        os.setsid()
    settings = {name: environment_of(name) for name in options.settings}
    records = {work: measure(options, work, settings) for work in options.work}
    result = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), "command": f"python {' '.join(sys.argv)}",
        "cpu": get_capabilities().get("cpu_name", "CPU"), "cores": len(os.sched_getaffinity(0)), "torch": __version__,
        "nice": options.nice, "load_after": round(os.getloadavg()[0], 2), "settings": settings,
        "summary": {work: summary(found) for work, found in records.items()}, "turns": records,
    }  # fmt: skip
    for work, found in result["summary"].items():
        for name, entry in found.items():
            say(f"{work:7} {name:24} " + "  ".join(f"{count}: {line}" for count, line in entry.items()))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
