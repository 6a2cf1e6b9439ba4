"""The GPU benchmark's own logic, without a GPU, torch or a peer: processes are played by a function."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from whet import arguments
from whet.recipe import parse
from whet.speed import check_used

BENCH = Path(__file__).parents[1] / "bench"
SPEEDS = {"whet": 60_000, "unsloth": 5_000, "peft": 5_200}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    module = importlib.import_module("gpu")
    monkeypatch.setattr(module, "gpu_state", lambda: "NVIDIA H100 80GB HBM3, 580")
    return module


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("peers")


def kind(command: list[str]) -> str:
    return "whet" if "whet" in command else command[command.index(next(c for c in command if "peers.py" in c)) + 1]


def player(gpu: Any, calls: list[tuple[list[str], dict[str, str]]]) -> Callable[..., Any]:
    """A process runner: PEFT fails, the others report a speed; checkpoints appear when asked for."""

    def run(command: list[str], environment: dict[str, str], limit_seconds: float) -> Any:
        calls.append((command, environment))
        system, scratch = kind(command), Path(environment["WHET_SCRATCH"])
        if system == "checkpoint":
            (scratch / Path(command[-1]).stem).mkdir()
            return gpu.Done(0, "", "", 2.0)
        if system == "peft":
            error = f"Traceback ...\n  File {scratch}/x.py\ntorch.OutOfMemoryError: CUDA out of memory"
            return gpu.Done(1, "", error, 3.0)
        found = {
            "tokens_per_second": SPEEDS[system], "median_seconds": 0.2, "peak_allocated_gib": 3.5,
            "first_step_seconds": 9.0, "new_key": 1,
        }  # fmt: skip
        text = json.dumps(found, indent=1) if system == "whet" else f"Unsloth: hello\nRESULT {json.dumps(found)}\nbye"
        return gpu.Done(0, text, "warnings", 5.0)

    return run


def bench(gpu: Any, tmp_path: Path, *more: str) -> tuple[Path, list[tuple[list[str], dict[str, str]]]]:
    calls: list[tuple[list[str], dict[str, str]]] = []
    out = tmp_path / "out"
    assert gpu.main(["--out", str(out), "--scratch", str(tmp_path / "scratch"), *more], player(gpu, calls)) == 0
    return out, calls


def test_a_case_is_measured_written_shown_and_drawn(gpu: Any, tmp_path: Path, capsys: Any) -> None:
    out, calls = bench(gpu, tmp_path, "--only", "qwen06b-512", "--peers-path", "/some/peers")
    assert kind(calls[0][0]) == "checkpoint"
    assert sum(kind(command) == "checkpoint" for command, _ in calls) == 1
    found = json.loads((out / "qwen06b-512.json").read_text())
    assert found["device"].startswith("NVIDIA H100")
    assert found["versions"]["python"]
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["whet fp8"]["new_key"] == 1
    assert rows["whet fp8"]["wall_seconds"] == 5.0
    assert "--rows 2 --length 512" in rows["whet fp8"]["command"]
    failed = rows["PEFT 16-bit, keep all"]
    assert "CUDA out of memory" in failed["failed"]
    assert "exit 1" in failed["failed"]
    assert str(tmp_path / "scratch") not in json.dumps(found["rows"])
    shown = capsys.readouterr().out
    assert "12.00" in shown  # 60,000 against the best peer's 5,000
    assert "failed: torch.OutOfMemoryError" in shown
    assert (out / "gpu.png").read_bytes().startswith(b"\x89PNG")


def test_peers_alone_see_their_folder_and_their_settings(gpu: Any, tmp_path: Path) -> None:
    _, calls = bench(gpu, tmp_path, "--only", "qwen06b-512", "--peers-path", "/some/peers")
    for command, environment in calls:
        assert environment.get("PYTHONPATH", "").startswith("/some/peers") == (kind(command) != "whet")
    assert sum("UNSLOTH_BLOCK_CUDAGRAPHS" in environment for _, environment in calls) == 1


def test_systems_can_be_chosen_and_added_to_what_is_there(gpu: Any, tmp_path: Path) -> None:
    out, calls = bench(gpu, tmp_path, "--only", "qwen4b-2048", "--systems", "peers")
    assert {kind(command) for command, _ in calls} == {"checkpoint", "unsloth"}
    out, calls = bench(gpu, tmp_path, "--only", "qwen4b-2048", "--systems", "whet", "--append")
    assert {kind(command) for command, _ in calls} == {"whet"}
    found = json.loads((out / "qwen4b-2048.json").read_text())
    assert len(found["rows"]) == len(gpu.CASES["qwen4b-2048"].systems)
    gpu.gpu_state = lambda: "NVIDIA H200, 580"
    with pytest.raises(SystemExit, match="give another --out"):
        bench(gpu, tmp_path, "--only", "qwen4b-2048", "--append")


def test_rounds_turn_around_and_count_by_their_median(gpu: Any, tmp_path: Path) -> None:
    out, calls = bench(gpu, tmp_path, "--only", "qwen4b-2048", "--repeats", "2")
    commands = [command for command, _ in calls[1:]]
    assert commands == commands[::-1]
    case = json.loads((out / "qwen4b-2048.json").read_text())
    for row, figure in zip([r for r in case["rows"] if r["name"] == "whet fp8"], (10, 30), strict=True):
        row["tokens_per_second"] = figure
    assert importlib.import_module("gpu_report").medians(case)["whet fp8"]["figure"] == 20


def test_the_first_step_is_read_with_empty_and_filled_caches(gpu: Any, tmp_path: Path, capsys: Any) -> None:
    out, calls = bench(gpu, tmp_path, "--only", "llama8b-first-step", "--systems", "whet")
    names = [row["name"] for row in json.loads((out / "llama8b-first-step.json").read_text())["rows"]]
    assert names[:2] == ["whet fp8, empty caches", "whet fp8, filled caches"]
    assert all(command[-4:] == ["0", "--steps", "1", "--json"] for command, _ in calls[1:])
    assert calls[1][1]["TRITON_CACHE_DIR"] == calls[2][1]["TRITON_CACHE_DIR"] != calls[3][1]["TRITON_CACHE_DIR"]
    assert "9.0" in capsys.readouterr().out


def test_what_the_time_does_not_allow_is_named(gpu: Any, tmp_path: Path, capsys: Any) -> None:
    out, calls = bench(gpu, tmp_path, "--only", "qwen4b-2048", "--minutes", "0.1")
    assert [kind(command) for command, _ in calls] == ["checkpoint"]
    assert len(json.loads((out / "qwen4b-2048.json").read_text())["left_out"]) == len(gpu.CASES["qwen4b-2048"].systems)


def test_a_checkpoint_that_cannot_be_made_fails_the_rows_and_not_the_run(gpu: Any, tmp_path: Path) -> None:
    def run(*_: Any) -> Any:
        return gpu.Done(1, "", "No space left on device", 1.0)

    gpu.main(["--out", str(tmp_path), "--scratch", str(tmp_path / "s"), "--only", "qwen4b-2048"], run)
    rows = json.loads((tmp_path / "qwen4b-2048.json").read_text())["rows"]
    assert all("No space left" in row["failed"] for row in rows)


def test_an_unknown_case_is_refused_with_the_known_ones(gpu: Any, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--only", "qwen"])
    assert "llama8b-2048" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("output", "found"),
    [
        ('noise\nRESULT {"a": 1}\nmore', {"a": 1}),
        ('{\n "a": 1\n}\n', {"a": 1}),
        ('{"a": 0}\n{"a": 1}\n', {"a": 1}),
        ("RESULT {broken", None),
        ("", None),
    ],
)
def test_results_are_found_in_the_output(gpu: Any, output: str, found: Any) -> None:
    assert gpu.parsed(output) == found


def test_processes_end_with_their_error_or_at_their_limit(gpu: Any) -> None:
    done = gpu.execute([sys.executable, "-S", "-c", "import sys; sys.exit('broke')"], {}, 30)
    assert (done.code, done.error.strip()) == (1, "broke")
    done = gpu.execute([sys.executable, "-S", "-c", "import time; time.sleep(60)"], {}, 0.5)
    assert done.code is None
    assert "stopped after" in done.error


def test_every_command_is_one_that_whet_or_the_peers_script_takes(gpu: Any, peers: Any, tmp_path: Path) -> None:
    for case in gpu.CASES.values():
        assert (BENCH / "configs" / f"{case.config}.json").is_file()
        for system in case.systems:
            task = gpu.command(case, system, tmp_path, 5, 15)
            if system.kind == "whet":
                words = arguments.parser_of_words().parse_args(task[3:])
                parsed = parse(None, words.overrides)
                check_used(parsed.recipe.method, parsed.origins)
                assert (words.rows, words.length) == (system.rows or case.rows, case.length)
            else:
                options = peers.arguments(task[2:])
                assert options.steps == (1 if case.first_step else 15)
                assert (options.lengths is None) == (case.lengths is None)


@pytest.mark.parametrize("packing", ["flat", "rows", "sorted", "padded"])
def test_documents_stay_whole_and_within_the_budget(peers: Any, packing: str) -> None:
    lengths = json.loads((BENCH / "lengths" / "gsm8k.json").read_text())
    task = ["unsloth", "x", "8", "2048", "1", "off", "4", "--lengths", str(BENCH / "lengths" / "gsm8k.json")]
    batches = peers.layout(peers.arguments([*task, "--packing", packing]), 20)
    assert len(batches) == 20
    for batch in batches:
        assert batch["tokens"] == sum(map(sum, batch["rows"])) <= 8 * 2048
        assert batch["tokens"] > 0.95 * 8 * 2048
        assert max(map(sum, batch["rows"])) <= batch["width"]
    seen = sorted(n for batch in batches for row in batch["rows"] for n in row)
    assert not set(seen) - set(lengths)
    slots = sum(len(batch["rows"]) * batch["width"] for batch in batches)
    waste = 1 - sum(batch["tokens"] for batch in batches) / slots
    assert waste < {"flat": 1e-9, "rows": 0.01, "sorted": 0.06, "padded": 0.7}[packing]


def test_speed_counts_real_tokens_of_the_median_step(peers: Any) -> None:
    found = peers.figures([100, 100, 200], [1.0, 2.0, 1.0])
    assert found["tokens_per_second"] == 100
    assert found["tokens_per_second_in_all"] == 100
    assert found["median_seconds"] == 1.0
    assert peers.process_age() > 0
