"""kill -9 at any moment, then the same command: the run ends with the same bytes as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from fork_server import PHASES
from sampled import sampled
from tiny import final_bytes

from whet.training.checkpoint import MANIFEST

ROOT = Path(__file__).parents[1]
STEPS = 24


class Server:
    """The fork server, and what is asked of it."""

    def __init__(self, place: Path) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.place = place
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fork_server.py"))], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def _say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def phase(self) -> str:
        """What the child is doing, or was doing last."""
        return PHASES[(self.place / "phase").read_bytes()[0]]

    def _start(self, settings: list[str], until: str, die_at: int | None) -> int:
        (self.place / "phase").write_bytes(b"\0")
        order = {"settings": settings, "until": until, "die_at": die_at, "phase": str(self.place / "phase")}
        self._say(json.dumps(order))
        return int(self._line())

    def _wait_for_steps(self, pid: int) -> None:
        while self.phase() == "start" and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.002)

    def run(
        self, settings: list[str], *, after: float | None = None, once_stepping: bool = False,
        die_at: int | None = None, until: str = "trained",
    ) -> tuple[int, str]:  # fmt: skip
        """(exit status, last phase); killed `after` seconds, from the start or from the first step on."""
        pid = self._start(settings, until, die_at)
        if after is not None:
            if once_stepping:
                self._wait_for_steps(pid)
            time.sleep(after)
            os.kill(pid, signal.SIGKILL)
        self._say("reap")
        return int(self._line()), self.phase()

    def measure(self, settings: list[str]) -> tuple[float, float]:
        """Seconds to the first step, and from there to the end, of a run that nobody disturbs."""
        began = time.perf_counter()
        pid = self._start(settings, "trained", None)
        self._wait_for_steps(pid)
        starting = time.perf_counter() - began
        self._say("reap")
        assert int(self._line()) == 0, self.log()
        return starting, time.perf_counter() - began - starting

    def log(self) -> str:
        return (self.place / "phase.log").read_text(encoding="utf-8")[-2000:]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("server"))
    yield started
    assert started.process.stdin is not None
    started.process.stdin.close()
    started.process.wait(900)


def leftovers(run: Path) -> list[str]:
    return sorted(path.name for path in run.rglob(".*"))


def written(model: Path, data: Path, out: Path, **changes: Any) -> list[str]:
    usual = {"train.max_steps": STEPS, "train.save_steps": 2, "train.eval_steps": 4, "data.val_size": 10,
             "train.per_device_train_batch_size": 2, "train.gradient_accumulation_steps": 2,
             "method.lora_dropout": 0.1}  # fmt: skip
    return tiny.words(tiny.settings(model, data, out, **(usual | changes)))


@pytest.mark.parametrize(("storage", "kills"), sampled([("fp32", 5), ("fp32", 20), ("nf4", 20)], [("fp32", 5)]))
def test_killed_at_random_moments_it_ends_with_the_same_bytes(
    storage: str, kills: int, server: Server, model_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    starting, stepping = server.measure(written(model_dir, data_file, whole, base__storage=storage))
    expected = final_bytes(whole)
    chance = random.Random(f"kills in {storage}")
    landed: Counter[str] = Counter()
    in_progress = runs = 0
    while sum(landed.values()) < kills:
        run = tmp_path / f"run{runs}"
        status = -signal.SIGKILL
        while status != 0:
            early = chance.random() < 0.15
            after = chance.uniform(0.0, starting) if early else chance.uniform(0.0, 0.4 * stepping)
            settings = written(model_dir, data_file, run, base__storage=storage)
            if sum(landed.values()) < kills:
                status, phase = server.run(settings, after=after, once_stepping=not early)
            else:
                status, phase = server.run(settings)
            assert status in (0, -signal.SIGKILL), server.log()
            if status != 0:
                landed[phase] += 1
                in_progress += (run / "metrics.jsonl").is_file() and not (run / "finished.json").is_file()
        found = final_bytes(run)
        assert found.keys() == expected.keys()
        assert [name for name in expected if found[name] != expected[name]] == []
        assert not leftovers(run / "checkpoints")
        runs += 1
    print(f"{storage}: {dict(landed)}, {runs} runs, {starting:.2f} s to start, {stepping:.2f} s to train")
    assert in_progress >= kills / 2, landed


@pytest.mark.parametrize(("first", "every"), sampled([(4, 12), (1, 1)], [(4, 12)]))
def test_killed_before_any_file_operation_of_starting_it_still_starts(
    first: int, every: int, server: Server, model_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    refused, operation = [], first - every
    status = -signal.SIGKILL
    while status != 0:
        operation += every
        settings = written(model_dir, data_file, tmp_path / f"run{operation}")
        status, _ = server.run(settings, die_at=operation, until="ready")
        assert status in (0, -signal.SIGKILL), server.log()
        if server.run(settings, until="ready")[0] != 0:
            refused.append(operation)
    assert operation > 5
    assert refused == [], server.log()


@pytest.mark.parametrize(("first", "every"), sampled([(30, 9), (12, 3)], [(30, 9)]))
def test_killed_before_any_file_operation_of_saving_and_finishing_it_ends_the_same(
    first: int, every: int, server: Server, model_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    """Every third operation, or every ninth; with one step, most of them belong to the checkpoint and to the end."""
    short = {"train.max_steps": 1, "train.eval_steps": 1}
    assert server.run(written(model_dir, data_file, tmp_path / "whole", **short))[0] == 0, server.log()
    expected = final_bytes(tmp_path / "whole")
    landed: Counter[str] = Counter()
    operation, status = first, -signal.SIGKILL
    while status != 0:
        run = tmp_path / f"run{operation}"
        settings = written(model_dir, data_file, run, **short)
        status, phase = server.run(settings, die_at=operation)
        if status != 0:
            assert status == -signal.SIGKILL, server.log()
            landed[phase] += 1
            assert server.run(settings)[0] == 0, (operation, server.log())
        assert final_bytes(run) == expected, operation
        assert not leftovers(run), (operation, leftovers(run))
        operation += every
    print(dict(landed))
    assert min(landed["save"], landed["finish"]) >= (3 if every == 3 else 1)


def test_whatever_is_there_after_a_kill_is_whole_or_says_that_it_is_not(
    server: Server, model_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    """A directory called step-N always has its manifest; half a save never gets that name."""
    settings = written(model_dir, data_file, tmp_path / "run")
    server.run(settings, die_at=60)
    for path in (tmp_path / "run" / "checkpoints").glob("step-*"):
        assert (path / MANIFEST).is_file()
