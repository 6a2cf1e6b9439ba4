"""The benchmark beside busy processes runs: one turn of each kind, and its summary."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
OPTIONS = ["--rounds", "1", "--seconds", "0.1", "--busy", "0", "1", "--settings", "OMP_NUM_THREADS=1"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("busy")


def test_training_and_answers_are_measured_with_and_without_company(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    command = [sys.executable, str(ROOT / "bench" / "busy.py"), *OPTIONS, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text(encoding="utf-8"))
    for work in ("train", "answer"):
        turns = found["turns"][work]
        assert [(turn["busy"], turn["tokens_per_second"] > 0) for turn in turns] == [(0, True), (1, True)]
        assert set(found["summary"][work]["OMP_NUM_THREADS=1"]) == {"0 busy", "1 busy"}


def test_ratios_are_of_the_same_round(bench: Any) -> None:
    speeds = {("default", 0): (100, 200), ("default", 1): (10, 40), ("whet", 0): (90, 220), ("whet", 1): (60, 110)}
    records = [
        {"setting": name, "busy": count, "round": at, "tokens_per_second": speed}
        for (name, count), pair in speeds.items()
        for at, speed in enumerate(pair)
    ]
    found = bench.summary(records)
    assert found["default"]["1 busy"] == {"tokens_per_second": 25, "of_idle": 0.15, "of_default": 1.0}
    assert found["whet"]["0 busy"]["of_default"] == 1.0
    assert found["whet"]["1 busy"] == {"tokens_per_second": 85, "of_idle": 0.583, "of_default": 4.375}


def test_the_setting_of_whet_is_what_its_command_sets(bench: Any) -> None:
    assert bench.environment_of("whet") == {"GOMP_SPINCOUNT": "10000"}
    assert bench.environment_of("default") == {}
    assert bench.environment_of("A=1,B=2") == {"A": "1", "B": "2"}
