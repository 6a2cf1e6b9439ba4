"""A run whose logs were deleted or cut, whose checkpoints are damaged or oddly named, goes on and says what is lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import tiny
from test_resume import killed_before

from whet.recipe import Parsed
from whet.runs import Run
from whet.training import checkpoint
from whet.training.observers import MetricsLog
from whet.training.run import train
from whet.training.state import EvaluationReport, State, StepReport

LOGS = ("metrics", "timing")


def report(step: int) -> StepReport:
    return StepReport(step, 0.1 * step, 1.0, 0.1, 1.0, 10 * step, 5 * step, 10, 0.1, 0.1 * step, 1000)


def log(place: Path, state: State, steps: Sequence[int]) -> State:
    """Log steps from a state on; returns the state that a checkpoint after them would hold."""
    observer = MetricsLog(place / "metrics.jsonl", place / "timing.jsonl", logging_steps=1)
    observer.begin(state, 100)
    for step in steps:
        observer.step_done(report(step))
        observer.evaluated(EvaluationReport(step, 0.0, 2.0, 5))
    after = State(step=max(steps, default=state.step))
    observer.before_save(after)
    observer.close()
    return after


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_bytes().splitlines()]


LOSSES: dict[str, tuple[Callable[[bytes], bytes | None], list[int]]] = {
    "deleted": (lambda text: None, []),
    "emptied": (lambda text: b"", []),
    "cut between lines": (lambda text: text[: text.index(b"\n") + 1], [1]),
    "cut in a line": (lambda text: text[: text.index(b"\n") + 9], [1]),
    "as it was": (lambda text: text, [1, 2, 3]),
}


@pytest.mark.parametrize("name", LOGS)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_log_that_lost_lines_goes_on_whole(
    loss: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = log(tmp_path, State(), [1, 2, 3])
    path = tmp_path / f"{name}.jsonl"
    change, kept = LOSSES[loss]
    left = change(path.read_bytes())
    path.unlink() if left is None else path.write_bytes(left)
    log(tmp_path, state, [4, 5])
    assert b"\0" not in path.read_bytes()
    assert sorted({*kept, 4, 5}) == sorted(set(steps_in(path)))
    said = " ".join(capsys.readouterr().err.split())
    assert (f"{name}.jsonl was cut or changed: lines of steps up to 3 are missing" in said) == (loss != "as it was")


@pytest.mark.parametrize("name", LOGS)
def test_an_older_checkpoint_takes_a_log_that_lost_lines_back_to_its_own_step(name: str, tmp_path: Path) -> None:
    """Its offset points behind lines of later steps now."""
    older = log(tmp_path, State(), [1, 2, 3])
    (tmp_path / f"{name}.jsonl").unlink()
    log(tmp_path, older, [4, 5, 6])
    log(tmp_path, older, [4])
    assert set(steps_in(tmp_path / f"{name}.jsonl")) == {4}


def test_lines_that_are_no_records_are_passed_over(tmp_path: Path) -> None:
    """Such as the NUL bytes with which an older version filled up."""
    log(tmp_path, State(), [1, 2])
    text = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(b"\0" * 50 + b"\n[3]\n" + text + b'{"step": 3')
    found = Run(tmp_path, None).lines("metrics.jsonl")  # type: ignore[arg-type]
    assert [line["step"] for line in found] == [1, 1, 2, 2]


@pytest.fixture(scope="module")
def stopped(model_dir: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with four checkpoints, cut off before its end; the second held-out loss is the lowest."""
    place = tmp_path_factory.mktemp("stopped")
    parsed = tiny.recipe(
        model_dir, data_file, place / "run", train__max_steps=4, train__save_steps=1, train__eval_steps=1,
        train__save_total_limit=9, data__val_size=4, train__load_best_model_at_end=True,
    )  # fmt: skip
    losses = iter([4.0, 1.0, 3.0, 2.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("whet.training.held_out.HeldOut.measure", lambda *_: (next(losses), 9))
        killed_before(parsed, 4, "finish")
    return place


@pytest.fixture
def again(stopped: Path, model_dir: Path, data_file: Path, tmp_path: Path) -> Parsed:
    shutil.copytree(stopped / "run", tmp_path / "run")
    return tiny.recipe(
        model_dir, data_file, tmp_path / "run", train__max_steps=4, train__save_steps=1, train__eval_steps=1,
        train__save_total_limit=9, data__val_size=4, train__load_best_model_at_end=True,
    )  # fmt: skip


def damaged(run: Path, step: int) -> None:
    path = run / "checkpoints" / f"step-{step}" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def test_the_best_checkpoint_is_kept(again: Parsed) -> None:
    run = train(again)
    assert (run.finished or {})["kept_step"] == 2


@pytest.mark.parametrize(("steps", "kept"), [((2,), 4), ((1, 3), 2)])
def test_a_best_checkpoint_that_is_damaged_gives_way_to_the_next_best(
    steps: tuple[int, ...], kept: int, again: Parsed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in steps:
        damaged(tmp_path / "run", step)
    run = train(again)
    assert (run.finished or {})["kept_step"] == kept
    said = " ".join(capsys.readouterr().err.split())
    assert ("step 2, the lowest held-out loss, is not used: model.safetensors does not match" in said) == (2 in steps)


MANIFESTS = ["[]", "[1, 2]", "3", "null", "{}", '{"files": []}', '{"files": {"a": 3}, "format": 2}', "{", "\0",
             '{"files": {}, "format": 2}', '{"files": null, "format": 2}']  # fmt: skip


@pytest.mark.parametrize("text", MANIFESTS)
def test_a_manifest_that_is_none_is_named_and_passed_over(text: str, tmp_path: Path) -> None:
    (tmp_path / "step-3").mkdir()
    (tmp_path / "step-3" / "manifest.json").write_text(text, encoding="utf-8")
    found, complaints = checkpoint.latest(tmp_path, checkpoint.Identity("r", "d"))
    assert found is None
    assert len(complaints) == 1
    assert complaints[0].startswith("step-3 is not used: ")


def test_odd_names_among_the_checkpoints_are_named_and_left_alone(
    again: Parsed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run" / "checkpoints"
    for name in ("step-", "step-x", "step-²", "step-٣", "step-1.5", "step--1", "step-007", "step-" + "9" * 30, "notes"):
        (folder / name).mkdir()
    (folder / "step-9").write_text("mine", encoding="utf-8")
    run = train(again)
    assert (run.finished or {})["kept_step"] == 2
    assert (folder / "step-9").read_text(encoding="utf-8") == "mine"
    assert (folder / "step-007").is_dir()
    assert "step-9 is not used: it has no manifest" in capsys.readouterr().err
