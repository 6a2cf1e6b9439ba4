"""The CPU benchmark runs: its smallest case from end to end, with whet alone."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
TICKETS = ROOT / "examples" / "support_tickets"
OPTIONS = ["--only", "", "--steps", "2", "--warmup", "1", "--seeds", "1", "--threads", "1"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("cpu")


@pytest.fixture(scope="module")
def few_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps' worth of rows to learn from, and four that are held out."""
    folder = tmp_path_factory.mktemp("tickets")
    for name, count in (("train", 24), ("test", 4)):
        lines = (TICKETS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:count]), encoding="utf-8")
    return folder


def test_whet_alone_is_measured_and_judged(
    few_rows: Path, tmp_path: Path, bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Judging is a process of its own, as both workers are; training runs in this one, which has imported all."""
    call = bench.call

    def called(python: str, worker: str, job: dict[str, Any]) -> Any:
        if worker == "judge":
            return call(python, worker, job)
        place = Path(job["out"]) / "job.json"
        place.parent.mkdir(parents=True)
        place.write_text(json.dumps(job), encoding="utf-8")
        bench.work(worker, place)
        return json.loads(place.with_suffix(".out").read_text(encoding="utf-8"))

    monkeypatch.setattr(bench, "call", called)
    out = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["cpu.py", *OPTIONS, "--data", str(few_rows), "--out", str(out)])
    bench.main()
    found = json.loads(out.read_text(encoding="utf-8"))
    assert json.loads(capsys.readouterr().out) == found
    (run,) = found["systems"]["whet"]["seeds"]
    assert run["tokens_per_second"] == found["whet"] > 0
    assert run["step_ms_p10_p50_p90"][0] <= run["step_ms_p10_p50_p90"][2]
    assert found["held_out"]["whet"] < found["held_out"]["base"], "three steps are enough to learn the form"
    assert "opponent" not in found


def test_steps_are_those_that_whet_wrote_down(few_rows: Path, tmp_path: Path, bench: Any) -> None:
    """Three stamps after the first, tokens as in the rows; rows that are not the ones of the run are seen."""
    rows, _ = bench.whet_rows(0, 3, str(few_rows))
    job = {"seed": 0, "steps": 3, "data": str(few_rows), "out": str(tmp_path / "a"), "rows": rows}
    found = bench.work_whet(job)
    assert len(found["stamps"]) == 4
    assert found["stamps"] == sorted(found["stamps"])
    assert [len(ids) for ids, _ in found["steps"]] == [sum(len(ids) for ids, _ in rows[n : n + 8]) for n in (0, 8, 16)]
    other = [*rows[:-1], (rows[-1][0][:-1], rows[-1][1][:-1])]
    with pytest.raises(AssertionError, match="trained on something else"):
        bench.work_whet(job | {"rows": other, "out": str(tmp_path / "b")})


def test_a_peer_that_is_asked_for_must_be_there(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["cpu.py", "--only", "trl", "--peer-python", "/bin/false"])
    with pytest.raises(SystemExit, match="TRL is missing"):
        bench.main()
