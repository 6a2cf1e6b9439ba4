"""bench/oom.py as far as a CPU goes: its commands run, and its verdicts tell recovery from failure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))

from oom import Ended, verdict  # noqa: E402


def ended(status: int = 0, said: str = "", **more: Any) -> Ended:
    given: dict[str, Any] = {"numbers": {"loss": [2.0, 1.0]}, "answers": ["a", "b"]} | more
    return Ended(status, said, 1.0, given["numbers"], given["answers"], {})


CLEAR = (
    "error: rows.jsonl row 3: a row does not fit in memory\n  found:    9\n  expected: 4\n  fix:      close others\n"
)


@pytest.mark.parametrize(
    ("found", "ok", "how"),
    [(ended(), True, "it fitted"), (ended(said="out of memory in step 1: going on"), True, "recovered"),
     (ended(numbers={"loss": [2.01, 1.0]}), True, "it fitted"), (ended(numbers={"loss": [2.1, 1.0]}), False, ""),
     (ended(numbers={}), False, ""), (ended(answers=["a"]), False, ""), (ended(answers=["a", "c"]), True, ""),
     (ended(2, CLEAR), True, "one error"), (ended(2, "error: no such file\n  fix: x"), False, "no clear error"),
     (ended(2, CLEAR + CLEAR), False, "no clear error"), (ended(1, CLEAR), False, "exit status 1"),
     (ended(-9), False, "exit status -9")],
)  # fmt: skip
def test_verdicts(found: Ended, ok: bool, how: str) -> None:
    judged = verdict(found, ended())
    assert judged.ok is ok
    assert judged.how.startswith(how)


@pytest.mark.proof
def test_the_commands_run_on_a_cpu(tmp_path: Path) -> None:
    config = tiny.llama(hidden_size=32, intermediate_size=32, num_hidden_layers=1, vocab_size=16384)
    config.save_pretrained(tmp_path / "config")
    command = [
        sys.executable, str(ROOT / "bench" / "oom.py"), str(tmp_path / "out.json"), "--place", str(tmp_path / "place"),
        "--config", str(tmp_path / "config" / "config.json"), "--cpu", "--free", "1", "--when", "start", "--rows", "24",
        "--length", "128", "--verbs", "predict", "bench", "--set", "method.lora_dropout=0.0",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WHET_CACHE": "off"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout
    cases = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert [(case["verb"], case["ok"], case["how"]) for case in cases] == [
        (verb, True, "it fitted") for verb in ("predict", "bench")
    ]
