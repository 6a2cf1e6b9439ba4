"""What is known before any model library is imported: missing files, missing models, and runs that are finished."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

from whet import api
from whet.base.files import hidden_beside
from whet.recipe import Parsed
from whet.runs import Run, finished_run

SCRIPT = (
    "import sys; from whet.cli import run; code = run(sys.argv[1:]); "
    "heavy = {'torch', 'transformers', 'peft'} & set(sys.modules); sys.exit(f'imported {heavy}' if heavy else code)"
)
Make = Callable[..., Parsed]


def whet_alone(*words: str) -> subprocess.CompletedProcess[str]:
    """`whet WORDS` in a process of its own, which fails where a library of models was imported."""
    command = [sys.executable, "-c", SCRIPT, *words]
    return subprocess.run(command, env=os.environ.copy(), capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("early")


@pytest.fixture(scope="module")
def made(model_dir: Path, data_file: Path, place: Path) -> Make:
    return lambda **changes: tiny.recipe(model_dir, data_file, place / "run", **{"train__max_steps": 2} | changes)


@pytest.fixture(scope="module")
def run(made: Make) -> Run:
    return api.train_parsed(made())


def test_a_finished_run_is_known(made: Make, run: Run) -> None:
    found = finished_run(made())
    assert found is not None
    assert found.path == run.path
    assert finished_run(made(train__logging_steps=7)) is not None, "it changes the log alone"


@pytest.mark.parametrize("changes", [
    {"train__max_steps": 3}, {"train__learning_rate": 0.123}, {"method__r": 3}, {"method": "ia3"}, {"train__seed": 9},
], ids=str)  # fmt: skip
def test_another_recipe_is_not_the_finished_run(changes: dict[str, object], made: Make, run: Run) -> None:
    assert finished_run(made(**changes)) is None


def test_what_was_given_then_and_is_left_open_now_is_another_recipe(
    model_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    given = tiny.recipe(model_dir, data_file, tmp_path / "run", train__max_steps=1, train__learning_rate=0.001)
    api.train_parsed(given)
    assert finished_run(given) is not None
    left_open = tiny.recipe(model_dir, data_file, tmp_path / "run", train__max_steps=1, train__learning_rate=None)
    assert finished_run(left_open) is None


def test_a_finished_run_without_its_report_gets_it(made: Make, run: Run) -> None:
    """Killed between the mark of the end and the report, or after more steps, with the report of the shorter run."""
    report = [run.path / "loss.png", run.path / "report.html"]
    whole = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    for file in report:
        left = hidden_beside(file)
        file.rename(left)
        api.train_parsed(made())
        assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == whole
        ended = (run.path / "finished.json").stat().st_mtime_ns
        file.write_bytes(b"of fewer steps")
        os.utime(file, ns=(ended - 1, ended - 1))
        api.train_parsed(made())
        assert file.read_bytes() == whole[file]
    report[1].unlink()
    assert api.already_trained(made()) is not None  # what the command asks
    assert report[1].read_bytes() == whole[report[1]]
    times = [file.stat().st_mtime_ns for file in report]
    api.train_parsed(made())
    assert [file.stat().st_mtime_ns for file in report] == times, "left alone"


def test_an_unfinished_run_is_not_done(made: Make, run: Run, tmp_path: Path) -> None:
    (run.path / "finished.json").rename(tmp_path / "finished.json")
    try:
        assert finished_run(made()) is None
    finally:
        (tmp_path / "finished.json").rename(run.path / "finished.json")


def test_nothing_is_imported_for_a_finished_run(model_dir: Path, data_file: Path, place: Path, run: Run) -> None:
    words = tiny.words(tiny.settings(model_dir, data_file, place / "run", train__max_steps=2))
    recipe = place / "recipe.yaml"
    recipe.write_text("model: builtin:tiny\n", encoding="utf-8")
    done = whet_alone("train", str(recipe), *words)
    assert done.returncode == 0, done.stderr
    assert "finished (2 steps): nothing to do" in " ".join(done.stderr.split())


@pytest.mark.parametrize(("words", "named"), [
    (["data.dataset=nothing_here.jsonl"], "nothing_here.jsonl"),
    (["data.eval_dataset=nothing_here.csv"], "nothing_here.csv"),
    (["data.blocklist=nothing_here.txt"], "nothing_here.txt"),
    (["model.path=./no_such_model"], "no_such_model"),
], ids=["data", "held out", "block list", "model"])  # fmt: skip
def test_what_is_not_there_is_said_before_anything_is_imported(words: list[str], named: str, place: Path) -> None:
    recipe = place / "missing.yaml"
    recipe.write_text("data: builtin:support_tickets\noutput_dir: never\n", encoding="utf-8")
    done = whet_alone("train", str(recipe), *words)
    assert done.returncode == 2, done.stderr
    assert named in done.stderr
    assert "fix:" in done.stderr
    assert not Path("never").exists()
