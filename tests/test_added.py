"""Scores, added rows and benchmarks: what they take out of what is learned, what never crosses, what is listed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from whet import cli
from whet.base.errors import UserError
from whet.data import cache, prepare
from whet.data.config import Data
from whet.data.prepare import Prepared
from whet.data.sides import added as added_module
from whet.data.sides import select
from whet.data.sides.added import ASKED, SOURCE_ASKED, SOURCE_GONE, SOURCE_HELD_OUT
from whet.engine.config import Model
from whet.engine.load.load import load_tokenizer

WORDS = ["amber", "birch", "cedar", "delta", "ember", "flint", "grove", "heath", "inlet", "jetty", "knoll", "lagoon"]
Make = Callable[..., Prepared]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(Model(path="builtin:tiny"))


@pytest.fixture
def made(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.chdir(tmp_path)
    return lambda dataset="rows.jsonl", **settings: prepare.prepare(
        Data(dataset=dataset, **({"val_size": 0} | settings)), tokenizer, 256
    )


def question(n: int) -> str:
    return f"parcel {n}: " + " ".join(WORDS[(n * (k + 3) + k * k + n // 12) % 12] for k in range(8))


def chat(text: str, answer: str = "yes", **more: Any) -> dict[str, Any]:
    return {"prompt": text, "completion": answer, **more}


def write(name: str, rows: list[dict[str, Any]]) -> str:
    Path(name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return name


def asked(examples: Any) -> list[str]:
    return [example.messages[0].content for example in examples]


def reasons(found: Prepared) -> Counter[str]:
    return Counter(row["reason"] for row in found.ledger.dropped)


def everything_is_accounted_for(found: Prepared) -> None:
    ledger = found.ledger
    assert ledger.rows_read == ledger.rows_train + ledger.rows_eval + ledger.rows_test + len(ledger.dropped)


# -- scores -----------------------------------------------------------------------------------------------------------


def scores(found: Prepared, of: Callable[[int], int | None], name: str = "scores.jsonl", **more: Any) -> str:
    lines = [
        {"id": example.id, "score": of(n), "reason": "r", "rubric": "quality", "model": "judge-1", **more}
        for n, example in enumerate(found.train_examples)
    ]
    return write(name, lines)


def test_rows_below_the_score_are_not_learned_from_and_are_listed(made: Make) -> None:
    write("rows.jsonl", [chat(question(n), f"SECRET {n}") for n in range(20)])
    whole = made()
    name = scores(whole, lambda n: None if n == 7 else 1 + n % 5)
    found = made(scores=name, least_score=3)
    left = [n for n in range(20) if n == 7 or 1 + n % 5 >= 3]
    assert asked(found.train_examples) == [question(n) for n in left]
    assert set(reasons(found)) == {"score 1 of 5 is below 3 (quality, by judge-1)",
                                   "score 2 of 5 is below 3 (quality, by judge-1)"}  # fmt: skip
    assert [row["row"] for row in found.ledger.dropped] == [n + 1 for n in range(20) if n not in left]
    assert found.ledger.scores == {"rubric": "quality", "model": "judge-1", "rows_below": 8, "rows_unjudged": 1}
    assert "SECRET" not in json.dumps(found.ledger.dropped)
    everything_is_accounted_for(found)


def test_the_held_out_rows_need_no_score(made: Make) -> None:
    write("rows.jsonl", [chat(question(n)) for n in range(40)])
    split = made(val_size=10)
    found = made(val_size=10, scores=scores(split, lambda n: 5 - n % 2 * 3), least_score=3)
    assert asked(found.held_out) == asked(split.held_out)
    assert (len(found.train), len(split.train)) == (15, 30)


def test_every_row_is_scored_before_sources_are_mixed(made: Make) -> None:
    """With weights, other rows move up for those that go; none of them may be one that nobody looked at."""
    write("a.jsonl", [chat(question(n)) for n in range(30)])
    write("b.jsonl", [chat(question(n)) for n in range(30, 40)])
    both = ["a.jsonl", "b.jsonl"]
    name = scores(made(both), lambda n: 1 if n < 10 else 5)
    found = made(both, scores=name, least_score=2, weights={"a.jsonl": 1.0, "b.jsonl": 1.0})
    assert not set(asked(found.train_examples)) & {question(n) for n in range(10)}
    assert found.ledger.mixture["sources"]["a.jsonl"]["available"] == 20


def line(n: int = 0, **changes: Any) -> str:
    whole = {"id": f"{n:016x}", "score": 4, "reason": "r", "rubric": "quality", "model": "m", **changes}
    return json.dumps(whole) + "\n"


@pytest.mark.parametrize(
    ("text", "says", "row"),
    [
        (line(1) + line(2), "scores of other rows", 1),
        ("OURS", "never judged", 2),
        ("{}\n", "not a line of scores", 1),
        (line(score=6), "not a line of scores", 1),
        (line(score=0), "not a line of scores", 1),
        (line(score="4"), "not a line of scores", 1),
        (line(score=True), "not a line of scores", 1),
        (line(id="00"), "not a line of scores", 1),
        (line(id="-" + "0" * 15), "not a line of scores", 1),
        (line(rubric=None), "not a line of scores", 1),
        (line() + "half a li", "not a line of scores", 2),
        (line() + line(1) + line(score=2), "two scores", 3),
        (line() + line(score=None), "two scores", 2),
        (line() + line(1, rubric="harm"), "several judges or rubrics", 2),
        (line() + line(1, model="n"), "several judges or rubrics", 2),
        ("", "no scores", None),
        (None, "No such file", None),
    ],
)
def test_scores_that_are_not_of_these_rows_are_refused(
    made: Make, text: str | None, says: str, row: int | None
) -> None:
    write("rows.jsonl", [chat(question(n)) for n in range(5)])
    if text == "OURS":
        ours = scores(made(), lambda n: 4)
        text = "".join(Path(ours).read_text().splitlines(keepends=True)[:1])
    if text is not None:
        Path("scores.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=says) as caught:
        made(scores="scores.jsonl", least_score=3)
    assert caught.value.row == row
    assert caught.value.fix


@pytest.mark.parametrize("settings", [{"scores": "scores.jsonl"}, {"least_score": 3}], ids=str)
def test_half_a_setting_is_refused(made: Make, settings: dict[str, Any]) -> None:
    write("rows.jsonl", [chat(question(1))])
    Path("scores.jsonl").write_text(line())
    with pytest.raises(UserError, match="has no effect without"):
        made(**settings)


# -- added rows -------------------------------------------------------------------------------------------------------


def paraphrases(found: Prepared) -> list[dict[str, Any]]:
    """One of every row of every side, with its source, as nobody should write it: training must sort them out."""
    every = [*found.train_examples, *found.held_out, *found.test_examples]
    return [
        chat(f"kindly say what became of that one: {example.messages[0].content[::-1]}", "yes",  # type: ignore[index]
             origin={"group": example.id})
        for example in every
    ]  # fmt: skip


def crossed(found: Prepared) -> set[str]:
    """Questions of the held-out sides that an added row paraphrases: counted here from the texts alone."""
    shown = {text.partition("one: ")[2][::-1] for text in asked(found.train_examples) if "one: " in text}
    return shown & set(asked([*found.held_out, *found.test_examples]))


@pytest.mark.parametrize(
    "settings", [{"val_size": 0.3, "test_size": 0.2}, {"val_size": 12}, {"val_size": 0.3, "group": "customer"},
                 {"eval_dataset": "other.jsonl"}], ids=str)  # fmt: skip
def test_added_rows_are_only_learned_from_and_never_cross(made: Make, settings: dict[str, Any]) -> None:
    write("rows.jsonl", [chat(question(n), customer=f"c{n % 9}") for n in range(60)])
    write("other.jsonl", [chat(question(n)) for n in range(50, 80)])
    plain = made(**settings)
    found = made(**settings, added_dataset=write("added.jsonl", paraphrases(plain)))
    assert asked(found.held_out) == asked(plain.held_out), "held-out rows stay as they are"
    assert asked(found.test_examples) == asked(plain.test_examples)
    assert crossed(found) == set()
    own = len(plain.train) if "eval_dataset" not in settings else 50
    assert found.ledger.added["rows"] == own > 20
    assert len(found.train) == len(plain.train) + own
    assert set(reasons(found)) <= {SOURCE_HELD_OUT, SOURCE_ASKED}
    assert sum(found.ledger.added["left_out"].values()) == len(found.ledger.dropped)
    everything_is_accounted_for(found)


def test_an_added_row_that_crosses_would_be_seen(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: nobody looks at the sources. The same check goes red."""
    write("rows.jsonl", [chat(question(n)) for n in range(60)])
    name = write("added.jsonl", paraphrases(made(val_size=0.3)))
    assert crossed(made(val_size=0.3, added_dataset=name)) == set()
    monkeypatch.setattr(added_module, "faults", lambda added, *_: np.full(len(added), "", object))
    assert len(crossed(made(val_size=0.3, added_dataset=name))) > 10


def test_an_added_row_of_a_held_out_text_stops_the_run_whatever_let_it_in(
    made: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("rows.jsonl", [chat(question(n)) for n in range(10)])
    write("held.jsonl", [chat(question(20))])

    def everything(added: Any, *rest: Any) -> Any:
        rest[-1].added = {}
        return added

    monkeypatch.setattr(select, "admitted", everything)
    with pytest.raises(AssertionError, match="an added row is held out"):
        made(eval_dataset="held.jsonl", added_dataset=write("added.jsonl", [chat(question(20))]))


def test_why_an_added_row_is_left_out(made: Make) -> None:
    """Its source is held out; the question of its source is, nearly; its own question is, nearly; it has no source."""
    write("rows.jsonl", [chat(question(n)) for n in range(10)] + [chat(question(30).replace("parcel", "parsel"))])
    write("held.jsonl", [chat(question(20)), chat(question(30), "no")])
    plain = made(eval_dataset="held.jsonl")
    ids = [example.id for example in plain.train_examples]
    rows = [
        chat("in other words, one", origin={"group": ids[0]}),
        chat("in other words, two", origin={"group": plain.held_out[0].id}),
        chat("in other words, three", origin={"group": ids[10]}),
        chat(question(20).replace("parcel", "parsel"), origin={"group": ids[1]}),
        chat("in other words, five", origin={"group": "0" * 16}),
        chat("in other words, six"),
        chat(question(20).replace("parcel", "parsel")),
    ]
    found = made(eval_dataset="held.jsonl", added_dataset=write("added.jsonl", rows))
    assert asked(found.train_examples)[11:] == ["in other words, one", "in other words, six"]
    assert [(row["row"], row["reason"]) for row in found.ledger.dropped] == [
        (2, SOURCE_HELD_OUT), (3, SOURCE_ASKED), (4, ASKED), (5, SOURCE_GONE), (7, ASKED),
    ]  # fmt: skip
    assert [note[:13] for note in found.ledger.added["notes"]] == ["2 added rows ", "1 added rows "]


def test_the_system_message_does_not_hide_a_question(made: Make) -> None:
    write("rows.jsonl", [chat(question(n)) for n in range(5)])
    write("held.jsonl", [chat(question(20), system="You answer questions about parcels.")])
    found = made(eval_dataset="held.jsonl", added_dataset=write("added.jsonl", [chat(question(20))]))
    assert reasons(found) == {ASKED: 1}


def test_an_origin_may_be_written_as_text(made: Make) -> None:
    """As a table holds it: the source is still known."""
    write("rows.jsonl", [chat(question(n)) for n in range(10)])
    held = made(val_size=3).held_out[0]
    rows = [chat("in other words", origin=json.dumps({"group": held.id}))]
    assert reasons(made(val_size=3, added_dataset=write("added.jsonl", rows))) == {SOURCE_HELD_OUT: 1}


@pytest.mark.parametrize("origin", [{}, {"group": 5}, {"group": "xyz"}, {"group": None}], ids=str)
def test_an_origin_without_a_source_is_refused(made: Make, origin: dict[str, Any]) -> None:
    write("rows.jsonl", [chat(question(1))])
    with pytest.raises(UserError, match="does not name its source") as caught:
        made(added_dataset=write("added.jsonl", [chat("a"), chat("b", origin=origin)]))
    assert (caught.value.row, caught.value.field) == (2, "origin.group")


def test_added_rows_keep_to_the_settings_of_all_rows(made: Make) -> None:
    write("rows.jsonl", [chat(question(n)) for n in range(6)])
    Path("words.txt").write_text("blocked\n")
    rows = [
        chat(question(2)),
        chat(question(20)),
        chat("a blocked word"),
        chat("mail a@example.com"),
        chat(question(4)),
    ]
    name = write("added.jsonl", rows)
    found = made(added_dataset=name, duplicates="drop", blocklist="words.txt", personal="redact", stratify=False)
    assert asked(found.train_examples)[6:] == [question(20), "mail [EMAIL]"]
    assert reasons(found)["repeats an earlier row"] == 2
    everything_is_accounted_for(found)
    with pytest.raises(UserError, match="another kind") as caught:
        made(added_dataset=write("text.jsonl", [{"text": "raw"}]))
    assert caught.value.field == "data.added_dataset"


def test_replay_is_a_share_of_all_that_is_learned(made: Make) -> None:
    write("rows.jsonl", [chat(question(n)) for n in range(6)])
    write("general.jsonl", [chat(f"general {n}") for n in range(50)])
    added = write("added.jsonl", [chat(question(n)) for n in range(20, 26)])
    found = made(added_dataset=added, replay_dataset="general.jsonl", replay=0.25)
    assert Counter(text.split()[0] for text in asked(found.train_examples)) == {"parcel": 12, "general": 4}


# -- benchmarks -------------------------------------------------------------------------------------------------------


@pytest.fixture
def benches(made: Make) -> dict[str, str]:
    """Four tests of other shapes than the data: each holds question 3 as it is, and question 5 nearly."""
    near = question(5).replace("parcel", "parsel")
    rows = [chat(question(n), system="You are a clerk.") for n in range(10)]
    write("rows.jsonl", rows)
    texts = [question(3).upper(), near, question(77)]
    return {
        "math": write("math.jsonl", [{"question": text, "answer": "#### 4", "choices": ["a"]} for text in texts]),
        "chat": write("chat.jsonl", [{"messages": [{"role": "user", "content": text},
                                                   {"role": "assistant", "content": "no"}]} for text in texts]),
        "label": write("label.jsonl", [{"text": text, "label": "x"} for text in texts]),
        "pairs": write("pairs.jsonl", [{"prompt": t, "chosen": "a", "rejected": "b"} for t in texts]),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["math", "chat", "label", "pairs"])
def test_rows_of_a_benchmark_are_counted_and_dropped(
    kind: str, made: Make, benches: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    name = benches[kind]
    kept = made(benchmarks=name)
    assert (len(kept.train), kept.ledger.rows_read) == (10, 10), "a benchmark is no data"
    assert kept.ledger.benchmarks[name]["rows"] == (6 if kind == "pairs" else 3)
    assert kept.ledger.benchmarks[name]["rows_learned"] == 1
    drop, near = made(benchmarks=name, leakage="drop"), made(benchmarks=name, leakage="drop_near")
    assert set(asked_of(kept)) - set(asked_of(drop)) == {question(3)}
    assert set(asked_of(kept)) - set(asked_of(near)) == {question(3), question(5)}
    assert reasons(drop) == {f"its question stands in {name}": 1}
    assert (near.ledger.benchmarks[name]["dropped"], near.ledger.benchmarks[name]["rows_learned"]) == (2, 0)
    everything_is_accounted_for(near)
    assert cli.run(["data", "check", "rows.jsonl", "--benchmark", name, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["quality"]["benchmarks"]
    assert [(one["between"], one["exact"], one["near"]) for one in found] == [(["train", name], 1, 1)]
    assert cli.run(["data", "check", "rows.jsonl", "--benchmark", name, "--strict", "--fast"]) == 2
    assert f"whose question stands in {name}: 1 (data.leakage=drop)" in capsys.readouterr().out
    assert cli.run(["data", "check", "rows.jsonl", "data.leakage=drop_near", "--benchmark", name, "--strict"]) == 2
    assert f"nearly a question of {name}" not in capsys.readouterr().out


def asked_of(found: Prepared) -> list[str]:
    return [example.messages[1].content for example in found.train_examples]  # type: ignore[index]


def test_a_comparison_with_the_system_message_would_be_seen(
    made: Make, benches: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: whole prompts are compared. A benchmark has no system message, so its rows pass, and the count is 0."""
    whole = select.Wording
    monkeypatch.setattr(select, "Wording", lambda rows, part: whole(rows, "asked" if part == "user" else part))
    assert made(benchmarks=benches["math"]).ledger.benchmarks["math.jsonl"]["rows_learned"] == 0


def test_several_benchmarks_by_name_from_recipe_and_command_line(
    made: Make, benches: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    page = Path("page.html")
    words = ["data", "check", "rows.jsonl", "--json", "--fast", "--html", str(page), "data.benchmarks=[math.jsonl]"]
    words = [*words[:3], *words[-1:], *words[3:-1]]
    assert cli.run([*words, "--benchmark", "label.jsonl", "--benchmark", "chat.jsonl"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["benchmarks"]) == ["math.jsonl", "label.jsonl", "chat.jsonl"]
    assert [one["exact"] for one in found["quality"]["benchmarks"]] == [1, 1, 1]
    assert "label.jsonl" in page.read_text(encoding="utf-8")
    both = made(benchmarks=["math.jsonl", "label.jsonl"], leakage="drop")
    assert [both.ledger.benchmarks[name]["dropped"] for name in ("math.jsonl", "label.jsonl")] == [1, 0]
    assert made(benchmarks=["math.jsonl"], added_dataset=write("more.jsonl", [chat(question(77))]),
                leakage="drop").ledger.added["rows"] == 0  # fmt: skip
    general = write("general.jsonl", [chat(question(77)), chat("general")])
    mixed = made(benchmarks=["math.jsonl"], replay_dataset=general, replay=0.5, leakage="drop")
    assert question(77) not in asked(mixed.train_examples)
    with pytest.raises(UserError, match="named twice"):
        made(benchmarks=["math.jsonl", "math.jsonl"])


@pytest.mark.parametrize(
    ("rows", "says"),
    [([{"question": 5, "choices": []}], "no text"), ([{"a": "b"}], "do not fit"), (None, "no such file")],
    ids=["number", "strange", "absent"],
)
def test_a_benchmark_that_asks_nothing_is_refused(made: Make, rows: Any, says: str) -> None:
    write("rows.jsonl", [chat(question(1))])
    if rows:
        write("bench.jsonl", rows)
    with pytest.raises(UserError, match=says):
        made(benchmarks="bench.jsonl")


def test_rows_of_a_benchmark_that_cannot_be_read_are_counted(made: Make) -> None:
    from whet.data.check import warnings

    write("rows.jsonl", [chat(question(n)) for n in range(3)])
    found = made(benchmarks=write("bench.jsonl", [chat(question(1), ""), chat(question(2))]))
    assert found.ledger.benchmarks["bench.jsonl"]["not_compared"] == 1
    assert any("1 rows of bench.jsonl" in one for one in warnings(found))


# -- the cache --------------------------------------------------------------------------------------------------------


SETTINGS: dict[str, dict[str, Any]] = {
    "scores": {"scores": "scores.jsonl", "least_score": 3},
    "added": {"added_dataset": "added.jsonl"},
    "benchmark": {"benchmarks": "bench.jsonl", "leakage": "drop"},
}


def change(kind: str, made: Make) -> None:
    if kind == "scores":
        path = Path("scores.jsonl")
        path.write_text(path.read_text().replace('"score": 5', '"score": 1', 1))
    elif kind == "added":
        write("added.jsonl", [chat(question(31))])
    else:
        write("bench.jsonl", [{"question": question(4)}])


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_cache_is_never_of_another_file(
    kind: str, made: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither with the change, nor (planted) where the hash of the file is left out, which the test would see."""
    monkeypatch.setenv("WHET_CACHE", "off")
    write("rows.jsonl", [chat(question(n)) for n in range(10)])
    scores(made(), lambda n: 5)
    write("added.jsonl", [chat(question(30))])
    write("bench.jsonl", [{"question": question(3)}])
    monkeypatch.setenv("WHET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "KEEP_SECONDS", 0.0)
    settings = SETTINGS[kind]
    first, again = made(**settings), made(**settings)
    assert asked(first.train_examples) == asked(again.train_examples)
    assert first.ledger.as_dict() == again.ledger.as_dict()
    assert {name: list(rows) for name, rows in first.benchmarks.items()} == {
        name: list(rows) for name, rows in again.benchmarks.items()
    }
    assert len(list((tmp_path / "cache" / "data").iterdir())) == 1
    change(kind, made)
    changed = made(**settings)
    assert asked(changed.train_examples) != asked(first.train_examples)
    whole = prepare.fingerprints
    with monkeypatch.context() as patch:
        patch.setenv("WHET_CACHE", str(tmp_path / "planted"))
        patch.setattr(
            prepare, "name_of", lambda parts: cache.name_of(parts | {"files": whole(Data(dataset="rows.jsonl"))})
        )
        stale = made(**settings)
        undo: dict[str, Callable[[], Any]] = {
            "scores": lambda: scores(made(), lambda n: 5),
            "added": lambda: write("added.jsonl", [chat(question(30))]),
            "benchmark": lambda: write("bench.jsonl", [{"question": question(3)}]),
        }
        undo[kind]()
        assert asked(made(**settings).train_examples) == asked(stale.train_examples)
    assert asked(made(**settings).train_examples) == asked(first.train_examples)


def test_scores_that_change_while_they_are_read_are_refused(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    write("rows.jsonl", [chat(question(n)) for n in range(4)])
    name = scores(made(), lambda n: 5)
    read = select.read_scores

    def late(path: str) -> Any:
        scores(made(), lambda n: 4)
        return read(path)

    monkeypatch.setattr(select, "read_scores", late)
    with pytest.raises(UserError, match="changed"):
        made(scores=name, least_score=3)


def test_a_missing_list_of_words_is_one_error(made: Make) -> None:
    write("rows.jsonl", [chat(question(1))])
    with pytest.raises(UserError, match="No such file"):
        made(blocklist="words.txt")
