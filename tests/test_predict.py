"""`whet predict`: reads what training reads, answers every kind of run, writes tables, spoils no input."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tasks
import tiny
import torch

import whet
from whet.base.errors import UserError
from whet.cli import run as command
from whet.engine.load import open as opening
from whet.runs import Run
from whet.ship.chat import open_chat
from whet.ship.predict import labelled, open_predictor
from whet.ship.questions import Asks, in_file
from whet.training.run import train

TEXTS = ['plain, with a comma and "quotes"', "두 줄\n로 된 글", "=1+1 a formula", "the quick brown fox"]


@pytest.fixture(scope="module")
def labels_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A classifier whose text stands in the column `review`."""
    place = tmp_path_factory.mktemp("labels")
    records = [{"review": row["text"], "stars": row["label"]} for row in tasks.rows("classification")]
    columns = {"data__columns": {"text": "review", "label": "stars"}}
    model = tasks.save_model("bert", tmp_path_factory.mktemp("bert"))
    return tasks.make_run("bert", "classification", model, place, records=records, **columns)


@pytest.fixture(scope="module")
def chat_run(model_dir: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("chat") / "run"
    return train(tiny.recipe(model_dir, data_file, out, train__max_steps=2))


def in_format(suffix: str, rows: list[dict[str, Any]], place: Path) -> Path:
    """The same rows in a file of each kind that training reads."""
    file = place / f"new{suffix}"
    if suffix in (".csv", ".tsv"):
        with file.open("w", encoding="utf-8", newline="") as out:
            table = csv.DictWriter(out, rows[0], delimiter="\t" if suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    elif suffix == ".parquet":
        pa = pytest.importorskip("pyarrow", reason="needs pyarrow")
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), file)
    elif suffix == ".json":
        file.write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")
    elif suffix == "":
        file.mkdir()
        tiny.write_rows(file / "part.jsonl", rows)
    else:
        tiny.write_rows(file, rows)
    return file


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet", ""])
@pytest.mark.parametrize("column", ["review", "text"])
def test_a_file_of_any_kind_is_answered_as_the_texts_in_it(
    suffix: str, column: str, labels_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = in_format(suffix, [{column: text, "stars": "unknown"} for text in TEXTS], tmp_path)
    assert command(["predict", str(labels_run.path), str(file)]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = whet.predict(labels_run, TEXTS)
    assert [one["label"] for one in found] == [one["label"] for one in expected]
    assert len({one["probability"] for one in found}) > 1, "the answers tell the rows apart"


def test_other_suffixes_are_refused_before_a_model_is_loaded(
    labels_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "load_model", lambda *_: pytest.fail("a model was loaded"))
    for name, content in (("a.xyz", "one\n"), ("a.csv", 'review\ngood\n""\n'), ("a.csv", "other\nx\n")):
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert command(["predict", str(labels_run.path), str(tmp_path / name)]) == 2


def test_the_likeliest_classes_are_named_first(labels_run: Run) -> None:
    every = whet.predict(labels_run, TEXTS)
    two = whet.predict(labels_run, TEXTS, top=2)
    for all_classes, best in zip(every, two, strict=True):
        ranked = sorted(all_classes["probabilities"].items(), key=lambda pair: -pair[1])
        assert list(best["probabilities"].items()) == ranked[:2]
        assert ranked[0][0] == best["label"]
    import numpy as np

    many = labelled(labels_run.task, np.array([[0.0, 3.0, 1.0]], np.float32), top=9)
    assert list(many[0]["probabilities"]) == [tasks.NAMES[i] for i in (1, 2, 0)]


def test_answers_stand_in_a_table_beside_their_texts(
    labels_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = in_format(".json", [{"review": text} for text in TEXTS], tmp_path), tmp_path / "out.csv"
    assert command(["predict", str(labels_run.path), str(file), "--out", str(out), "--top", "2"]) == 0
    assert capsys.readouterr().out == ""
    table = list(csv.DictReader(io.StringIO(out.read_text(encoding="utf-8"))))
    expected = whet.predict(labels_run, TEXTS, top=2)
    assert [row["text"] for row in table] == TEXTS
    for row, one in zip(table, expected, strict=True):
        (_, _), (second, share) = one["probabilities"].items()
        assert (row["label"], row["label_2"], float(row["probability_2"])) == (one["label"], second, share)
    assert command(["predict", str(labels_run.path), str(file), "--csv"]) == 0
    plain = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["label"] for row in plain] == [row["label"] for row in table]


def test_an_input_is_never_written_over(labels_run: Run, tmp_path: Path) -> None:
    file = in_format(".csv", [{"review": text} for text in TEXTS], tmp_path)
    (tmp_path / "link.csv").hardlink_to(file)
    (tmp_path / "soft.csv").symlink_to(file)
    before = file.read_bytes()
    for out in (file, tmp_path / "link.csv", tmp_path / "soft.csv", labels_run.path / "recipe.csv"):
        assert command(["predict", str(labels_run.path), str(file), "--out", str(out)]) == 2
    assert command(["predict", str(labels_run.path), str(tmp_path), "--out", str(file)]) == 2, "one of a directory"
    assert command(["predict", str(labels_run.path), str(file), "--out", str(tmp_path / "out.xls")]) == 2
    assert file.read_bytes() == before
    old = in_format(".jsonl", [{"row": 1, "review": TEXTS[0]}], tmp_path)  # looks like answers, and is the input
    assert command(["predict", str(labels_run.path), str(old), "--out", str(old)]) == 2
    assert "review" in old.read_text(encoding="utf-8")


def test_a_failure_leaves_no_half_of_a_file(labels_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from whet.ship.predict import Predictor

    file, out = in_format(".csv", [{"review": text} for text in TEXTS], tmp_path), tmp_path / "out.jsonl"
    old = '{"row": 1, "label": "old"}\n'
    out.write_text(old, encoding="utf-8")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Predictor, "answers", stop)
    assert command(["predict", str(labels_run.path), str(file), "--out", str(out)]) == 130
    assert out.read_text(encoding="utf-8") == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.csv", "out.jsonl"]


ASKED = "Question 3: answer it."
CHAT_ROWS: list[dict[str, Any]] = [
    {"instruction": ASKED, "input": "", "output": "not read"},
    {"instruction": ASKED},
    {"prompt": ASKED, "completion": "not read"},
    {"prompt": [{"role": "user", "content": ASKED}]},
    {"messages": [{"role": "user", "content": ASKED}, {"role": "assistant", "content": "not read"}]},
    {"messages": [{"role": "user", "content": ASKED}]},
    {"conversations": [{"from": "human", "value": ASKED}]},
    {"text": ASKED},
]


@pytest.mark.parametrize("row", CHAT_ROWS, ids=lambda row: "-".join(row))
def test_a_chat_run_answers_rows_of_every_format_as_a_chat_does(
    row: dict[str, Any], chat_run: Run, tmp_path: Path, said: str
) -> None:
    file, out = in_format(".jsonl", [row, {"text": "another"}], tmp_path), tmp_path / "out.jsonl"
    words = ["predict", str(chat_run.path), str(file), "--out", str(out), "--max-new-tokens", "6"]
    assert command(words) == 0
    first, _ = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert first["text"] == said
    assert first.get("cut") is True, "an unfinished text says so"


@pytest.fixture(scope="module")
def said(chat_run: Run) -> str:
    with open_chat(str(chat_run.path), max_new_tokens=6) as chat:
        return whet.chat(chat, ASKED)


def test_a_row_that_asks_nothing_is_named(chat_run: Run, tmp_path: Path) -> None:
    for number, bad in enumerate(({"answer": "x"}, {"text": " "}, {"messages": []}, {"prompt": 3})):
        file = tiny.write_rows(tmp_path / f"{number}.jsonl", [{"text": "fine"}, bad])  # type: ignore[list-item]
        with pytest.raises(UserError) as caught:
            list(in_file(str(file), Asks.of(chat_run)))
        assert (caught.value.file, caught.value.row) == (str(file), 2)


def test_python_takes_texts_messages_and_a_run(chat_run: Run, said: str) -> None:
    messages = [{"role": "user", "content": ASKED}]
    for rows in (ASKED, [ASKED], [messages], [{"messages": messages}]):
        (one,) = whet.predict(chat_run, rows, max_new_tokens=6)
        assert one["text"] == said
    assert whet.predict(chat_run.path, [], max_new_tokens=6) == []


def test_a_run_of_raw_text_goes_on_with_it(model_dir: Path, tmp_path: Path, recipe: Callable[..., Any]) -> None:
    data = tiny.write_rows(tmp_path / "raw.jsonl", [{"text": " ".join(tiny.ENGLISH[i:])} for i in range(8)])
    run = train(recipe(data__dataset=str(data), train__max_steps=1))
    (one,) = whet.predict(run, "the quick brown", max_new_tokens=4)
    with open_predictor(run) as predictor:
        tokenizer: Any = predictor.answerer.row_tokenizer.tokenizer
        ids = tokenizer("the quick brown", add_special_tokens=False).input_ids
        for _ in range(4):
            logits = predictor.answerer.opened.answering(input_ids=torch.tensor([ids]), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
    assert tokenizer.decode(ids[-4:]) == one["text"]


def test_an_encoder_decoder_takes_the_rows_it_was_trained_on(tmp_path: Path) -> None:
    rows = tasks.rows("seq2seq")
    run = tasks.make_run("t5", "seq2seq", tasks.save_model("t5", tmp_path / "t5"), tmp_path)
    found = whet.predict(run, rows[:3], max_new_tokens=5)
    assert found == whet.predict(run, [row["prompt"] for row in rows[:3]], max_new_tokens=5)
