"""The benchmark of data preparation: the same rows on both sides, a fair opponent, and a fault in either is seen."""

from __future__ import annotations

import argparse
import importlib
import json
import lzma
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PLAIN = ["정말 재미있다", "  ", "별로", "so-so 👍"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    sys.modules.pop("data", None)
    module = importlib.import_module("data")
    sys.modules.pop("data", None)
    return module


@pytest.fixture
def rows(bench: Any, tmp_path: Path) -> Path:
    source = tmp_path / "nsmc_train.jsonl.xz"
    with lzma.open(source, "wt", encoding="utf-8") as file:
        for number, text in enumerate(PLAIN):
            file.write(json.dumps({"id": number, "text": text, "label": number % 2}) + "\n")
    assert bench.write_rows(source, tmp_path, 100) == 3
    return tmp_path


def test_both_shapes_hold_the_same_rows(bench: Any, rows: Path) -> None:
    shapes = [(rows / f"{name}.jsonl").read_text(encoding="utf-8") for name in ("messages", "completions")]
    messages, completions = ([json.loads(line) for line in text.splitlines()] for text in shapes)
    assert [row["messages"] for row in messages] == [row["prompt"] + row["completion"] for row in completions]
    assert [row["messages"][0]["content"] for row in messages] == [PLAIN[0], PLAIN[2], PLAIN[3]]
    assert [row["messages"][1]["content"] for row in messages] == ["부정", "부정", "긍정"]
    assert bench.write_rows(rows / "nsmc_train.jsonl.xz", rows, 2) == 2


def seen(bench: Any, rows: list[tuple[list[int], list[int]]]) -> Any:
    found = bench.Seen()
    for ids, learned in rows:
        found.add(ids, learned)
    return found


def test_sums_do_not_depend_on_the_order_and_see_every_fault(bench: Any) -> None:
    rows = [([1, 2, 3], [0, 0, 1]), ([4, 5], [0, 1]), ([4, 5], [0, 1])]
    right = seen(bench, rows)
    assert vars(seen(bench, rows[::-1])) == vars(right)
    assert (right.rows, right.tokens, right.learned) == (3, 7, 3)
    shifted = seen(bench, [([1, 2, 3], [0, 1, 0]), *rows[1:]])
    assert shifted.ids_sum == right.ids_sum
    assert shifted.masks_sum != right.masks_sum
    for fault in ([([1, 3, 2], [0, 0, 1]), *rows[1:]], rows[:2], [*rows, rows[0]], [([1], [0]), ([2, 3], [0, 1])]):
        assert seen(bench, fault).ids_sum != right.ids_sum


def run(seconds: float, ids: int = 7, masks: int = 9, **more: Any) -> dict[str, Any]:
    shown = {"rows": 3, "tokens": 7, "learned": 3, "ids_sum": ids, "masks_sum": masks, "peak_bytes": 1 << 20}
    return {"seconds": seconds, "cpu_seconds": seconds, "reading_seconds": 1.0, **shown, **more}


def summarised(bench: Any, found: dict[str, list[dict[str, Any]]]) -> Any:
    options = argparse.Namespace(rows=3, max_length=64, repeats=2)
    return bench.summary(options, {name: {} for name in found}, found)


def test_the_opponent_is_the_fastest_peer_and_its_reading_is_not_counted(bench: Any) -> None:
    found = {
        "whet": [run(2.0), run(4.0)], "whet cached": [run(0.1), run(0.1)],
        "trl a": [run(12.0), run(12.0)], "trl b": [run(8.0), run(10.0)], "trl c": [{"failed": "x"}, run(0.001)],
    }  # fmt: skip
    result = summarised(bench, found)
    assert result["opponent"] == "trl b"
    assert result["ratio"] == 3.0
    assert result["ratio_with_both_reading"] == pytest.approx(10 / 3, abs=0.01)
    assert result["ratio_by_repeat"] == [4.0, 2.5]


def test_other_tokens_are_refused(bench: Any) -> None:
    with pytest.raises(AssertionError, match="same tokens"):
        summarised(bench, {"whet": [run(1.0)], "trl a": [run(2.0, ids=8)]})


@pytest.mark.parametrize("cores", [1, 2, 8])
def test_every_loss_runs_with_one_and_with_all_processors(bench: Any, cores: int) -> None:
    chosen = bench.systems(cores)
    peers = [(s["loss"], s["processes"]) for name, s in chosen.items() if name.startswith("trl")]
    assert sorted(peers) == sorted(
        (loss, count) for loss in ("assistant_only_loss", "completion_only_loss") for count in {1, cores}
    )
    assert chosen["whet cached"]["after"] == "whet"


def test_whet_prepares_the_rows_in_a_process_of_its_own(bench: Any, rows: Path) -> None:
    job = {"rows": str(rows), "tokenizer": str(ROOT / "whet" / "builtin" / "tiny"), "max_length": 128}
    found = bench.call(sys.executable, "whet", job | {"settings": {}, "out": str(rows / "run")}, str(rows / "cache"))
    assert "failed" not in found, found
    assert found["rows"] == 3
    assert found["packed_rows"] == 1
    assert found["cpu_seconds"] > 0
    assert 0 < found["learned"] < found["tokens"]
    assert found["peak_bytes"] > 1 << 20 or not Path("/proc/self/smaps_rollup").exists()
    assert "torch" in found["versions"]


def test_a_worker_that_fails_says_why(bench: Any, rows: Path) -> None:
    job = {"rows": str(rows / "none"), "tokenizer": str(ROOT / "whet" / "builtin" / "tiny"), "max_length": 128}
    found = bench.call(sys.executable, "whet", job | {"settings": {}, "out": str(rows / "run")}, "off")
    assert "messages.jsonl" in found["failed"]
