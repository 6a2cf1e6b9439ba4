"""What Python gives in place of files: dicts, rows of any library, loaded models, callbacks; and a quiet terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import tasks
import tiny

import whet
from whet.base.errors import UserError
from whet.engine.load import open as opening
from whet.given import rows_of, settings_of, write_rows
from whet.runs import Run

ROWS = [{"prompt": f"question {index}", "completion": "the quick brown fox"} for index in range(8)]


def settings(model: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(model), "base": {"device": "cpu", "storage": "fp32", "compute": "fp32"},
        "method": {"name": "lora", "r": 4}, "data": {"dataset": ROWS, "val_size": 2},
        "train": {"max_steps": 2, "learning_rate": 0.01}, "output_dir": str(out), **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return whet.train(settings(model_dir, tmp_path_factory.mktemp("api") / "run"))


def test_a_dict_trains_as_the_file_does(run: Run, model_dir: Path, tmp_path: Path) -> None:
    file = tiny.write_rows(tmp_path / "rows.jsonl", ROWS)
    same = whet.train(None, **settings(model_dir, tmp_path / "run", data={"dataset": str(file), "val_size": 2}))
    assert same.metrics.read_text(encoding="utf-8") == run.metrics.read_text(encoding="utf-8")


def test_the_same_rows_find_the_run_and_others_do_not(run: Run, model_dir: Path) -> None:
    began = run.metrics.stat().st_mtime_ns
    again = whet.train(settings(model_dir, run.path))
    assert (again.path, again.metrics.stat().st_mtime_ns) == (run.path, began)
    (rows,) = run.path.with_name("run.rows").glob("*")
    assert [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()] == ROWS
    with pytest.raises(UserError, match="another recipe"):
        whet.train(settings(model_dir, run.path, data={"dataset": ROWS[:7], "val_size": 2}))


class FakeFrame:
    """What whet asks of a pandas DataFrame."""

    def to_dict(self, orient: str) -> list[dict[str, Any]]:
        assert orient == "records"
        return [{"text": "a", "label": np.int64(1), "note": float("nan")}, {"text": "b", "label": np.float64(0.5)}]


class FakeClasses:
    def int2str(self, number: int) -> str:
        return ("no", "yes")[number]


class FakeDataset:
    """What whet asks of a datasets.Dataset."""

    features: ClassVar[dict[str, Any]] = {"text": object(), "label": FakeClasses()}

    def __iter__(self) -> Any:
        yield {"text": "a", "label": 1}
        yield {"text": "b", "label": -1}


FakeFrame.__module__, FakeDataset.__module__ = "pandas.core.frame", "datasets.arrow_dataset"


def test_rows_of_other_libraries_become_plain_rows(tmp_path: Path) -> None:
    def written(value: Any) -> list[dict[str, Any]]:
        rows = rows_of(value, "data.dataset")
        assert rows is not None
        file = write_rows(rows, tmp_path / "run", "data.dataset")
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

    assert written(FakeFrame()) == [{"text": "a", "label": 1}, {"text": "b", "label": 0.5}]
    assert written(FakeDataset()) == [{"text": "a", "label": "yes"}, {"text": "b", "label": -1}]
    assert written(({"text": np.array(["x", "y"]), "n": np.float32(2)},)) == [{"text": ["x", "y"], "n": 2.0}]
    pa = pytest.importorskip("pyarrow", reason="needs pyarrow")
    assert written(pa.Table.from_pylist(ROWS)) == ROWS
    for library, name, make in (("pandas", "DataFrame", None), ("datasets", "Dataset", "from_list")):
        module = pytest.importorskip(library, reason=f"{library} is not installed") if has(library) else None
        if module is not None:
            given = getattr(module, name)
            assert written(given(ROWS) if make is None else getattr(given, make)(ROWS)) == ROWS


def has(library: str) -> bool:
    from importlib.util import find_spec

    return find_spec(library) is not None


@pytest.mark.parametrize(
    ("value", "row"),
    [
        ([], None), ([{"text": "a"}, "b"], 2), ([{"text": object()}], 1), ([{"text": "a"}, {"text": b"bytes"}], 2),
        (3, None), ({"text": ["a"]}, None), (object(), None),
    ],
)  # fmt: skip
def test_what_are_no_rows_is_said(value: Any, row: int | None, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        settings_of({"data.dataset": value, "output_dir": str(tmp_path / "run")})
    assert (caught.value.row, caught.value.fix != "") == (row, True)
    assert not list(tmp_path.rglob("*.jsonl")), "nothing is written"


def test_no_setting_is_guessed_from_an_object(tmp_path: Path) -> None:
    for value in (object(), float("nan"), print):
        with pytest.raises(UserError, match="a setting is text"):
            settings_of({"train.learning_rate": value})
    assert settings_of({"train": {"learning_rate": np.float64(0.5)}, "output_dir": Path("a")}) == [
        'train={"learning_rate": 0.5}', 'output_dir="a"',
    ]  # fmt: skip


def test_a_loaded_model_is_the_base_by_content(run: Run, model_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, tokenizer = AutoModelForCausalLM.from_pretrained(str(model_dir)), tasks.tokenizer(model_dir)
    changes = {"model": model, "tokenizer": tokenizer}
    own = whet.train(settings(model_dir, tmp_path / "run"), **changes)
    assert own.metrics.read_text(encoding="utf-8") == run.metrics.read_text(encoding="utf-8")
    assert not any("lora" in name for name, _ in model.named_modules()), "the object is as it was"
    (first,) = tmp_path.glob("run.base-*")
    whet.train(settings(model_dir, tmp_path / "run"), **changes)
    model.lm_head.weight.data.add_(0.1)
    settings_of({"model": model, "tokenizer": tokenizer, "output_dir": str(tmp_path / "run")})
    assert len([*tmp_path.glob("run.base-*")]) == 2, f"{first} is of another content"
    with pytest.raises(UserError, match="comes with its tokenizer"):
        settings_of({"model": model})


def test_callbacks_get_every_record(model_dir: Path, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    run = whet.train(settings(model_dir, tmp_path / "run"), callbacks=[seen.append])
    assert seen == run.lines("metrics.jsonl")
    assert [record["kind"] for record in seen] == ["train", "eval"] * 2
    with pytest.raises(UserError, match="a callback is a function"):
        whet.train(settings(model_dir, tmp_path / "other"), callbacks=["wandb"])  # type: ignore[list-item]


def test_a_handle_stays_loaded(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    loads, load = [], opening.load_model
    monkeypatch.setattr(opening, "load_model", lambda *given: loads.append(given) or load(*given))
    talk = [
        {"role": "user", "content": "question 1"}, {"role": "assistant", "content": "fox"},
        {"role": "user", "content": "question 2"},
    ]  # fmt: skip
    with whet.open(run) as handle:
        said = handle.chat("question 1", max_new_tokens=4)
        longer = handle.chat(talk, max_new_tokens=4)
        rows = handle.predict([talk, "question 1"], max_new_tokens=4)
    assert len(loads) == 1
    assert [row["text"] for row in rows] == [longer, said]
    assert (
        whet.chat(run, "question 1", max_new_tokens=4)
        == said
        == whet.chat(str(run.path), "question 1", max_new_tokens=4)
    )
    assert whet.chat(run, talk, max_new_tokens=4) == longer
    with pytest.raises(RuntimeError, match="let go"):
        handle.chat("more")
    for wrong in ([], talk[:2], [{"role": "user"}]):
        with pytest.raises(UserError):
            whet.chat(run, wrong)


def test_a_handle_of_labels_predicts_and_does_not_chat(tmp_path: Path) -> None:
    run = tasks.make_run("bert", "classification", tasks.save_model("bert", tmp_path / "bert"), tmp_path)
    with whet.open(run.path) as handle:
        assert handle.predict("a text", top=1)[0]["label"] in tasks.NAMES
        with pytest.raises(UserError, match="does not write"):
            handle.chat("a text")


def test_other_libraries_are_quiet_in_python_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    run = tasks.make_run("bert", "classification", tasks.save_model("bert", tmp_path / "bert"), tmp_path)
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    capfd.readouterr()
    whet.predict(run, ["a"])
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "")
