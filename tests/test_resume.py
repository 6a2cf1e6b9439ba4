"""Continuing a run: what is restored, what is refused, and what happens to damaged checkpoints.

Kills from outside are in test_kill.py; here a run is cut off inside the process, and one part of the restoring at a
time is broken on purpose to show that the comparison would see it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from sampled import sampled
from tiny import final_bytes

from whet.base.errors import UserError
from whet.data.batch.batches import Batches
from whet.recipe import Parsed
from whet.runs import Run
from whet.settings import Train
from whet.training import checkpoint
from whet.training import finish as finish_module
from whet.training import run as run_module
from whet.training.loop import Loop
from whet.training.observers import MetricsLog
from whet.training.optim import build_optimiser
from whet.training.resume import Checkpoints
from whet.training.run import train
from whet.training.state import State

ROOT = Path(__file__).parents[1]
SHORT: dict[str, Any] = {
    "train__max_steps": 8, "train__save_steps": 2, "train__eval_steps": 4, "data__val_size": 4,
    "train__per_device_train_batch_size": 2, "method__lora_dropout": 0.1, "train__save_total_limit": 3,
}  # fmt: skip

Make = Callable[..., Parsed]


class Killed(BaseException):
    """Stands for a kill inside this process."""


def killed_before(parsed: Parsed, step: int, part: str = "_step") -> None:
    """Train until `part` of the loop, or of what comes after it, is about to begin with `step` steps done."""
    with pytest.MonkeyPatch.context() as patch:
        owner: Any = {"finish": run_module, "_summary": finish_module}.get(part, Loop)
        whole = getattr(owner, part)

        def cut(*args: Any) -> Any:
            state = next(arg.state if isinstance(arg, Loop) else arg for arg in args if isinstance(arg, Loop | State))
            if state.step == step:
                raise Killed
            return whole(*args)

        patch.setattr(owner, part, cut)
        with pytest.raises(Killed):
            train(parsed)


@pytest.fixture(scope="module")
def whole(model_dir: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of the uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return final_bytes(train(tiny.recipe(model_dir, data_file, out, **SHORT)).path)


@pytest.mark.parametrize("step", sampled(range(8), (0, 3, 4, 7)))
def test_cut_off_before_any_step_it_ends_with_the_same_bytes(step: int, recipe: Make, whole: dict[str, bytes]) -> None:
    killed_before(recipe(**SHORT), step)
    assert final_bytes(train(recipe(**SHORT)).path) == whole


@pytest.mark.parametrize("part", ["_evaluate", "_save", "finish", "_summary"])
def test_cut_off_before_any_part_it_ends_with_the_same_bytes(part: str, recipe: Make, whole: dict[str, bytes]) -> None:
    killed_before(recipe(**SHORT), 8, part)
    assert final_bytes(train(recipe(**SHORT)).path) == whole


@pytest.mark.parametrize(
    "changes",
    sampled(
        [{"base__storage": "nf4"}, {"train__optim": "adafactor"}, {"train__optim": "sgd"},
         {"data__padding_free": False}, {"data__packing": True},
         {"train__gradient_accumulation_steps": 3, "train__logging_steps": 3}],
        lambda changes: {"base__storage", "data__packing", "train__logging_steps"} & changes.keys(),
    ),
    ids=lambda changes: ",".join(map(str, changes.values())),
)  # fmt: skip
def test_other_settings_continue_to_the_bit_as_well(changes: dict[str, Any], recipe: Make) -> None:
    settings = SHORT | changes
    expected = final_bytes(train(recipe("whole", **settings)).path)
    killed_before(recipe(**settings), 5)
    assert final_bytes(train(recipe(**settings)).path) == expected


def nothing(*_: Any) -> None:
    """What a forgotten restore does."""


MUTATIONS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "random numbers": lambda patch: patch.setattr(checkpoint, "restore_random_state", nothing),
    "optimiser": lambda patch: patch.setattr(checkpoint, "_unflatten", nothing),
    "weights": lambda patch: patch.setattr(checkpoint, "load_weights", nothing),
    "place in the data": lambda patch: _shift(patch),
    "metrics": lambda patch: patch.setattr(MetricsLog, "begin", nothing),
}


def _shift(patch: pytest.MonkeyPatch) -> None:
    """The sampler is one step further, and the check of the next batch is blind."""
    right = Batches.step
    patch.setattr(Batches, "step", lambda self, index: right(self, index + 1))
    patch.setattr(Checkpoints, "_next_batch", lambda self, state: state.next_batch)


@pytest.mark.parametrize("fault", MUTATIONS)
def test_forgetting_to_restore_a_part_is_seen(
    fault: str, recipe: Make, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SHORT
    if fault == "random numbers":  # the dropout of plain LoRA asks no generator, that of DoRA does
        settings = SHORT | {"method__use_dora": True}
        whole = final_bytes(train(recipe("whole", **settings)).path)
    killed_before(recipe(**settings), 6, "_save")  # with the lines of steps 5 and 6, and the checkpoint of step 4
    MUTATIONS[fault](monkeypatch)
    assert final_bytes(train(recipe(**settings)).path) != whole


def test_a_sampler_that_is_off_by_one_is_refused(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    killed_before(recipe(**SHORT), 5)
    right = Batches.step
    monkeypatch.setattr(Batches, "step", lambda self, index: right(self, index + 1))
    with pytest.raises(UserError, match="next batch"):
        train(recipe(**SHORT))


def test_a_finished_run_says_so_and_is_left_alone(recipe: Make, capfd: pytest.CaptureFixture[str]) -> None:
    run = train(recipe(**SHORT))
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in run.path.rglob("*")}
    capfd.readouterr()
    train(recipe(**SHORT))
    assert "finished (8 steps): nothing to do" in " ".join(capfd.readouterr().err.split())
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in run.path.rglob("*")} == before


def test_an_early_stop_that_is_cut_off_does_not_train_on(recipe: Make) -> None:
    """The checkpoint of the last step is there, the end is not."""
    settings = SHORT | {
        "train__max_steps": 40, "train__eval_steps": 1, "train__save_steps": 1, "train__learning_rate": 0.5,
        "train__early_stopping_patience": 2, "train__lr_scheduler_type": "constant",
    }  # fmt: skip
    run = train(recipe("whole", **settings))
    assert run.finished is not None
    assert run.finished["stopped"] == "early_stopping"
    assert run.finished["steps"] < 40
    killed_before(recipe(**settings), run.finished["steps"], "finish")
    again = train(recipe(**settings))
    assert again.finished is not None
    assert again.finished["stopped"] == "early_stopping"
    assert final_bytes(again.path) == final_bytes(run.path)


def damaged(run: Path, step: int, how: Callable[[bytes], bytes], name: str = "model.safetensors") -> Path:
    path = run / "checkpoints" / f"step-{step}" / name
    path.write_bytes(how(path.read_bytes()))
    return path


def flip(content: bytes) -> bytes:
    """One bit, near the end: in the tensors, where no parser looks."""
    changed = bytearray(content)
    changed[-5] ^= 4
    return bytes(changed)


def unnumbered(content: bytes) -> bytes:
    """A manifest as it was before formats had numbers."""
    return json.dumps({key: value for key, value in json.loads(content).items() if key != "format"}).encode()


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str, str]] = {
    "truncated": (lambda content: content[:-100], "model.safetensors", "bytes instead of"),
    "one bit": (flip, "model.safetensors", "does not match its sha256"),
    "one bit of the moments": (flip, "optimizer.safetensors", "does not match its sha256"),
    "torn manifest": (lambda content: content[: len(content) // 2], "manifest.json", "manifest is damaged"),
    "older format": (unnumbered, "manifest.json", "another version of whet wrote it (format 1;"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_passed_over_and_kept(
    kind: str, recipe: Make, whole: dict[str, bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    how, name, words = DAMAGE[kind]
    killed_before(recipe(**SHORT), 6)
    killed_before(recipe(**SHORT), 6)
    place = damaged(tmp_path / "run", 6, how, name)
    content = place.read_bytes()
    capfd.readouterr()
    killed_before(recipe(**SHORT), 5)
    said = " ".join(capfd.readouterr().err.split())
    assert "step-6 is not used" in said
    assert words in said
    assert "after step 4 of 8" in said
    assert place.read_bytes() == content
    assert final_bytes(train(recipe(**SHORT)).path) == whole


def test_a_missing_file_of_a_checkpoint_is_noticed(recipe: Make, tmp_path: Path, whole: dict[str, bytes]) -> None:
    killed_before(recipe(**SHORT), 7)
    (tmp_path / "run/checkpoints/step-6/random.safetensors").unlink()
    assert final_bytes(train(recipe(**SHORT)).path) == whole


def test_pruning_never_leaves_only_a_damaged_checkpoint(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimiser = build_optimiser(Train(optim="sgd", learning_rate=0.1), list(model.parameters()))
    identity = checkpoint.Identity("r", "d")
    for step in (8, 10):
        checkpoint.save(tmp_path, step, model, optimiser, {}, identity)
    (tmp_path / "step-10" / "model.safetensors").write_bytes(b"")
    assert checkpoint.latest(tmp_path, identity)[0] == tmp_path / "step-8"
    checkpoint.save(tmp_path, 9, model, optimiser, {}, identity)
    checkpoint.prune(tmp_path, 9, 1, [])
    assert checkpoint.latest(tmp_path, identity)[0] == tmp_path / "step-9"


@pytest.mark.parametrize("cut", [5, 1], ids=["after a checkpoint", "before the first checkpoint"])
def test_changed_data_are_refused_with_both_hashes(
    cut: int, model_dir: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    records = tiny.rows()
    data = tiny.write_rows(tmp_path / "rows.jsonl", records)
    settings = SHORT | {"data__val_size": 0.05, "data__eval_dataset": str(data)}
    before = tiny.recipe(model_dir, data, tmp_path / "run", **settings)
    killed_before(before, cut)
    old = json.loads((tmp_path / "run/data.json").read_text(encoding="utf-8"))["files"][0]["sha256"]
    tiny.write_rows(data, [record | {"output": record["output"].replace("fox", "dog")} for record in records])
    with pytest.raises(UserError) as caught:
        train(before)
    assert "changed since the start" in caught.value.problem
    assert old in str(caught.value.expected)
    assert caught.value.found is not None
    assert re.search("[0-9a-f]{64}", caught.value.found)
    assert old not in caught.value.found
    tiny.write_rows(data, records)
    assert train(before).finished is not None


def test_other_rows_of_the_same_files_are_refused(recipe: Make, tmp_path: Path) -> None:
    """As another version of a tokenizer or of whet would make them: no file changed, and the tokens did."""
    before = recipe(**SHORT)
    killed_before(before, 5)
    place = tmp_path / "run/data.json"
    found = json.loads(place.read_text(encoding="utf-8"))
    place.write_text(json.dumps(found | {"sha256": "0" * 64}), encoding="utf-8")
    with pytest.raises(UserError, match="training rows have changed") as caught:
        train(before)
    assert found["sha256"][:16] in str(caught.value.found)
    assert "0" * 16 in str(caught.value.expected)
    place.write_text(json.dumps(found), encoding="utf-8")
    assert train(before).finished is not None


def test_another_recipe_is_refused_with_the_field(recipe: Make) -> None:
    killed_before(recipe(**SHORT), 5)
    with pytest.raises(UserError) as caught:
        train(recipe(**SHORT | {"train__learning_rate": 0.001}))
    assert caught.value.field == "train.learning_rate"


def test_what_a_killed_write_left_behind_is_swept(recipe: Make, tmp_path: Path, whole: dict[str, bytes]) -> None:
    killed_before(recipe(**SHORT), 5)
    for name in ("checkpoints/.step-6.77.tmp", "checkpoints/.step-4.77.old", ".adapter.77.tmp"):
        (tmp_path / "run" / name).mkdir()
        (tmp_path / "run" / name / "model.safetensors").write_bytes(b"half")
    (tmp_path / "run/.finished.json.77.tmp").write_text("{", encoding="utf-8")
    run = train(recipe(**SHORT))
    assert final_bytes(run.path) == whole
    assert [path.name for path in run.path.rglob(".*")] == []


def test_each_line_of_metrics_stands_once(recipe: Make) -> None:
    for step, part in ((3, "_step"), (5, "_step"), (6, "_save")):
        killed_before(recipe(**SHORT), step, part)
    run = train(recipe(**SHORT))
    lines = [(line["kind"], line["step"]) for line in run.lines("metrics.jsonl")]
    assert len(lines) == len(set(lines))
    assert [step for kind, step in lines if kind == "train"] == list(range(1, 9))
    assert [step for kind, step in lines if kind == "eval"] == [4, 8]


def _command(settings: list[str]) -> subprocess.Popen[str]:
    empty = Path(next(word for word in settings if word.startswith("output_dir=")).partition('"')[2].rstrip('"'))
    file = empty.with_suffix(".yaml")
    file.write_text("train: {seed: 0}\n", encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, "-m", "whet", "train", str(file), *settings], cwd=ROOT, text=True, stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_ctrl_c_ends_with_130_and_leaves_a_run_that_continues(model_dir: Path, data_file: Path, tmp_path: Path) -> None:
    long = SHORT | {"train__max_steps": 120, "train__save_steps": 120, "train__eval_steps": 120}
    settings = tiny.words(tiny.settings(model_dir, data_file, tmp_path / "run", **long))
    process = _command(settings)
    metrics = tmp_path / "run/metrics.jsonl"
    deadline = time.monotonic() + 900
    while not (metrics.is_file() and metrics.stat().st_size > 300):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=900)
    assert process.returncode == 130, said
    assert "the same command continues" in " ".join(said.split())
    saved = list((tmp_path / "run/checkpoints").glob("step-*"))
    assert len(saved) == 1
    assert 0 < int(saved[0].name.split("-")[1]) < 120
    run = train(tiny.recipe(model_dir, data_file, tmp_path / "run", **long))
    expected = train(tiny.recipe(model_dir, data_file, tmp_path / "whole", **long))
    assert final_bytes(run.path) == final_bytes(expected.path)


def test_a_run_survives_being_read_while_it_writes(recipe: Make) -> None:
    """A torn last line, as a reader of a running training meets it, is left out."""
    run: Run = train(recipe(**SHORT))
    with run.metrics.open("a", encoding="utf-8") as file:
        file.write('{"kind": "train", "st')
    assert len(run.lines("metrics.jsonl")) == 10
