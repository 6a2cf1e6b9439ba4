"""The experiment `bench/same_loss.py`: its verdict on planted values, its report, and the check that rows are new."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from whet.recipe import parse

BENCH = Path(__file__).parents[1] / "bench"


def opened(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


same_loss, same_loss_data = opened("same_loss"), opened("same_loss_data")


def finals(*losses: float | None) -> dict[str, float | None]:
    return {str(seed): loss for seed, loss in enumerate(losses)}


def verdict(mode: dict[str, float | None], base: dict[str, float | None] | None = None) -> str:
    judged = same_loss.judge({"bf16": base or finals(2.0, 2.0, 2.0), "fast": mode}, "bf16")
    return judged["modes"]["fast"]["verdict"]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ((2.0, 2.0, 2.0), "pass"),
        ((2.005, 2.006, 2.0065), "pass"),  # 0.29 % above
        ((2.0065, 2.0065, 2.0065), "MISS"),  # 0.33 % above
        ((1.98, 1.98, 1.98), "MISS"),  # lower is not the same either
        ((2.0, 2.0, None), "failed"),
        ((2.0, 2.0, float("nan")), "failed"),
        ((2.0, 2.0), "failed"),
    ],
)
def test_a_mode_passes_within_three_thousandths(losses: tuple[float | None, ...], expected: str) -> None:
    assert verdict(finals(*losses)) == expected


def test_the_spread_of_the_seeds_widens_the_limit_and_nothing_else_does() -> None:
    wide = finals(1.98, 2.0, 2.02)
    assert verdict(finals(2.039, 2.039, 2.039), wide) == "pass"
    assert verdict(finals(2.041, 2.041, 2.041), wide) == "MISS"
    narrow = finals(2.0, 2.0, 2.0)
    assert verdict(finals(1.9, 2.0, 2.2), narrow) == "MISS", "a mode's own spread buys it nothing"


def test_differences_are_told_seed_by_seed() -> None:
    judged = same_loss.judge({"bf16": finals(2.0, 2.2), "fast": finals(2.02, 2.178)}, "bf16")
    assert judged["modes"]["fast"]["paired_percent"] == [1.0, -1.0]
    assert judged["modes"]["fast"]["difference"] == pytest.approx(-0.001)
    assert judged["modes"]["bf16"]["verdict"] == "reference"
    assert judged["seed_spread"] == pytest.approx(0.2)


def test_without_a_reference_nothing_passes() -> None:
    judged = same_loss.judge({"bf16": finals(2.0, None), "fast": finals(2.0, 2.0)}, "bf16")
    assert {found["verdict"] for found in judged["modes"].values()} == {"no reference"}


def fake_run(folder: Path, start: float) -> Path:
    folder.mkdir(parents=True)
    lines: list[dict[str, Any]] = []
    for step in range(1, 7):
        lines.append({"kind": "train", "step": step, "loss": start / step})
        if step % 2 == 0:
            lines.append({"kind": "eval", "step": step, "eval_loss": start - step / 10})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "environment.json").write_text(json.dumps({"storage": "nf4", "compute": "bfloat16"}))
    (folder / "finished.json").write_text(json.dumps({"peak_memory_bytes": 5, "tokens": 7}))
    return folder


def test_the_report_is_written_also_when_a_mode_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = {
        mode: {
            str(seed): same_loss.collect(fake_run(tmp_path / f"{mode}{seed}", start + 0.1 * seed)) for seed in (0, 1)
        }
        for mode, start in (("bf16", 3.0), ("nf4", 3.05), ("fp8", 3.5))
    }
    runs["nf4+fp8"] = {"0": runs["nf4"]["0"], "1": {"failed": "2: no such thing"}}
    same_loss.write(tmp_path / "tune.json", {"device": "none", "runs": runs})
    same_loss.write(tmp_path / "pretrain.json", {"steps": 3})
    out = tmp_path / "results" / "same_loss.json"
    same_loss.main(["report", "--work", str(tmp_path), "--data", str(tmp_path), "--out", str(out)])
    written = json.loads(out.read_text())
    verdicts = {mode: found["verdict"] for mode, found in written["modes"].items()}
    assert verdicts == {"bf16": "reference", "nf4": "pass", "fp8": "MISS", "nf4+fp8": "failed"}
    assert written["modes"]["fp8"]["seeds"]["1"]["curve"] == [[2, 3.4], [4, 3.2], [6, 3.0]]
    assert written["pretrain"] == {"steps": 3}
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "MISS" in printed
    assert "seed spread of bf16: 0.1000" in printed


def test_every_run_of_a_seed_differs_only_in_its_base(tmp_path: Path) -> None:
    options = same_loss.parsed(["tune", "--smoke", "--work", str(tmp_path), "--set", "train.warmup_ratio=0.5"])
    trees = {}
    for mode, settings in same_loss.modes_of(options).items():
        recipe = parse(None, same_loss.recipe(options, settings, 1, tmp_path / "run")).recipe
        assert (recipe.train.warmup_ratio, recipe.train.seed, recipe.method.r) == (0.5, 1, 16)  # type: ignore[union-attr]
        trees[mode] = {name: getattr(recipe, name) for name in ("model", "method", "data", "train")}
    assert len(trees) == 2
    assert trees["fp32"] == trees["nf4"]


def test_a_row_that_the_stream_holds_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(same_loss_data, "SCAN", 64)
    rows = [
        {"instruction": f"How many {thing} are left in the third box of the old shop?", "input": "", "output": "Nine."}
        for thing in ("apples", "pears", "stones")
    ]
    ids = [found.astype(np.uint16) for found in same_loss_data._ids_of([same_loss_data.row_text(row) for row in rows])]
    filler = np.random.default_rng(0).integers(100, 16384, 200).astype(np.uint16)
    stream = np.concatenate([filler[:56], ids[1], filler[56:]])  # across the edge of a scan
    known = same_loss_data.window_hashes_of(stream, [same_loss_data.row_text(row) for row in rows])
    kept = same_loss_data.unseen(rows[:2], known)
    assert rows[1] not in kept
    assert same_loss_data.unseen(rows, set()) == rows
    assert same_loss_data.window_hashes_of(filler, [same_loss_data.row_text(row) for row in rows]) == set()


def test_the_small_data_of_the_repository_are_whole(tmp_path: Path) -> None:
    facts = same_loss_data.build(None, tmp_path)
    stream = same_loss_data.read_tokens(tmp_path)
    assert len(stream) == facts["tokens"] > 5000
    assert stream.dtype == np.uint16
    assert stream[-1] == same_loss_data.END
    rows = {name: (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines() for name in facts["rows"]}
    assert {name: len(lines) for name, lines in rows.items()} == facts["rows"] == {"train": 128, "heldout": 32}
    assert set(rows["train"]).isdisjoint(rows["heldout"])
