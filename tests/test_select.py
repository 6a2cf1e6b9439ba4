"""Every setting of sides, cleaning and mixing does what it says to real files, and lists what it leaves out."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from whet import cli
from whet.base.errors import UserError
from whet.data.config import Data
from whet.data.prepare import Prepared, prepare
from whet.engine.config import Model
from whet.engine.load.load import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(Model(path="builtin:tiny"))


def chat(question: str, answer: str = "yes", **more: Any) -> dict[str, Any]:
    return {"prompt": question, "completion": answer, **more}


def write(place: Path, name: str, rows: list[dict[str, Any]]) -> str:
    path = place / name
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def made(tokenizer: Any, dataset: Any, **settings: Any) -> Prepared:
    return prepare(Data(dataset=dataset, **({"val_size": 0} | settings)), tokenizer, 256)


def asked(examples: Any) -> list[str]:
    return [example.messages[0].content for example in examples]


def reasons(found: Prepared) -> Counter[str]:
    return Counter(row["reason"] for row in found.ledger.dropped)


LONG = "how do I change the address of my second account before the end of the month"


def test_repeated_rows_are_dropped_where_that_is_asked_for(tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        chat("one"),
        chat("ONE  "),
        chat("one", "no"),
        chat(LONG),
        chat(LONG.replace("second", "secund")),
        chat("two"),
    ]
    path = write(tmp_path, "rows.jsonl", rows)
    kept = made(tokenizer, path)
    assert len(kept.train) == 6
    exact = made(tokenizer, path, duplicates="drop")
    assert asked(exact.train_examples) == ["one", "one", LONG, LONG.replace("second", "secund"), "two"]
    assert [row["row"] for row in exact.ledger.dropped] == [2]
    near = made(tokenizer, path, duplicates="drop_near")
    assert asked(near.train_examples) == ["one", "one", LONG, "two"]
    assert sum(reasons(near).values()) == 2
    assert near.ledger.rows_read == 6


def test_questions_that_are_held_out_leave_what_is_learned(tokenizer: Any, tmp_path: Path) -> None:
    own = write(tmp_path, "own.jsonl", [chat("one"), chat("two"), chat(LONG), chat("four")])
    held = write(tmp_path, "held.jsonl", [chat(" One", "no"), chat(LONG.replace("month", "mohth"))])
    test = write(tmp_path, "test.jsonl", [chat("four")])
    sides = {"eval_dataset": held, "test_dataset": test}
    assert asked(made(tokenizer, own, **sides).train_examples) == ["one", "two", LONG, "four"]
    assert asked(made(tokenizer, own, **sides, leakage="drop").train_examples) == ["two", LONG]
    near = made(tokenizer, own, **sides, leakage="drop_near")
    assert asked(near.train_examples) == ["two"]
    assert asked(near.held_out) == [" One", LONG.replace("month", "mohth")]
    assert sum(reasons(near).values()) == 3


def test_a_group_stays_on_one_side(tokenizer: Any, tmp_path: Path) -> None:
    rows = [chat(f"question {n}", customer=f"c{n % 12}") for n in range(120)]
    path = write(tmp_path, "rows.jsonl", rows)

    def split_groups(found: Prepared) -> int:
        sides = [{int(text.split()[1]) % 12 for text in asked(side)} for side in (found.train_examples, found.held_out)]
        return len(sides[0] & sides[1])

    assert split_groups(made(tokenizer, path, val_size=0.3, group="customer")) == 0
    assert split_groups(made(tokenizer, path, val_size=0.3)) > 0  # without it, groups are torn
    with pytest.raises(UserError, match="no such column") as caught:
        made(tokenizer, path, val_size=0.3, group="custmer")
    assert (caught.value.row, caught.value.fix) == (1, "data.group=customer")


def test_near_duplicates_stay_on_one_side(tokenizer: Any, tmp_path: Path) -> None:
    words = ["alpha", "bravo", "cargo", "delta", "eagle", "fancy", "grape", "hotel", "igloo", "jumbo", "karma", "lemon"]
    rows = []
    for n in range(60):
        text = " ".join(words[(n * 7 + k * k * 5 + n * k) % 12] for k in range(12)) + f" number {n}"
        rows += [chat(text), chat(text.replace("number", "numbar"))]
    path = write(tmp_path, "rows.jsonl", rows)

    def torn(found: Prepared) -> int:
        sides = [
            {text.replace("numbar", "number") for text in asked(side)}
            for side in (found.train_examples, found.held_out)
        ]
        return len(sides[0] & sides[1])

    grouped = made(tokenizer, path, val_size=0.25, group="near_duplicates")
    assert torn(grouped) == 0
    assert 0 < len(grouped.held_out) < 120
    assert torn(made(tokenizer, path, val_size=0.25)) > 0


def test_strata_have_their_share(tokenizer: Any, tmp_path: Path) -> None:
    import task_nets

    rows = [{"text": f"text {n}", "label": "rare" if n % 10 == 0 else "usual"} for n in range(200)]
    path = write(tmp_path, "rows.jsonl", rows)
    data = Data(dataset=path, val_size=0.2, stratify=True)
    found = prepare(data, task_nets.tokenizer("Bert"), 64, None, "classification")
    counts = Counter(example.label for example in found.held_out)
    assert abs(counts["rare"] - 4) <= 1
    assert abs(counts["usual"] - 36) <= 1


def test_test_rows_are_nobodys_but_the_tests(tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path, "rows.jsonl", [chat(f"question {n}") for n in range(100)])
    found = made(tokenizer, path, val_size=10, test_size=20)
    sides = [set(asked(side)) for side in (found.train_examples, found.held_out, found.test_examples)]
    assert [len(side) for side in sides] == [70, 10, 20]
    assert len(sides[0] | sides[1] | sides[2]) == 100
    assert len(found.test) == found.ledger.rows_test == 20
    without = made(tokenizer, path, val_size=10)
    assert set(asked(without.held_out)) == sides[1]  # asking for a test later moves no held-out row


def test_sources_get_their_weights(tokenizer: Any, tmp_path: Path) -> None:
    large = write(tmp_path, "large.jsonl", [chat(f"large {n}") for n in range(90)])
    small = write(tmp_path, "small.jsonl", [chat(f"small {n}") for n in range(10)])
    found = made(tokenizer, [large, small], weights={large: 1.0, small: 1.0})
    counts = Counter(text.split()[0] for text in asked(found.train_examples))
    assert counts == {"large": 50, "small": 50}
    assert set(Counter(text for text in asked(found.train_examples) if text.startswith("small")).values()) == {5}
    assert any("comes 5.0 times" in note for note in found.ledger.mixture["notes"])
    assert len(made(tokenizer, [large, small]).train) == 100
    with pytest.raises(UserError, match="no weight"):
        made(tokenizer, [large, small], weights={large: 1.0})
    with pytest.raises(UserError, match="no such source"):
        made(tokenizer, [large, small], weights={large: 1.0, small: 1.0, "x": 1.0})


def test_general_rows_are_mixed_in_and_never_held_out(tokenizer: Any, tmp_path: Path) -> None:
    own = write(tmp_path, "own.jsonl", [chat(f"own {n}") for n in range(90)])
    general = write(tmp_path, "general.jsonl", [chat(f"general {n}") for n in range(50)] + [chat("own 3")])
    held = write(tmp_path, "held.jsonl", [chat("general 7"), chat("own 3")])
    found = made(tokenizer, own, eval_dataset=held, replay_dataset=general, replay=0.25)
    counts = Counter(text.split()[0] for text in asked(found.train_examples))
    assert counts == {"own": 90, "general": 30}
    assert "general 7" not in asked(found.train_examples)
    assert asked(found.held_out) == ["general 7", "own 3"]
    assert found.ledger.replay["share"] == 0.25
    split = made(tokenizer, own, val_size=0.3, replay_dataset=general)
    assert all(text.startswith("own") for text in asked(split.held_out))


def test_personal_data_are_replaced_or_dropped(tokenizer: Any, tmp_path: Path) -> None:
    rows = [chat("write to minji.kim@example.com please"), chat("전화는 010-1234-5678로 주세요"), chat("hello")]
    path = write(tmp_path, "rows.jsonl", rows)
    assert "minji.kim@example.com" in asked(made(tokenizer, path).train_examples)[0]
    redacted = made(tokenizer, path, personal="redact")
    assert asked(redacted.train_examples)[0] == "write to [EMAIL] please"
    assert "010" not in asked(redacted.train_examples)[1]
    assert redacted.ledger.rows_redacted == 2
    dropped = made(tokenizer, path, personal="drop")
    assert asked(dropped.train_examples) == ["hello"]
    assert dropped.ledger.rows_read == 3
    assert len(dropped.ledger.dropped) == 2
    assert "minji" not in json.dumps(dropped.ledger.dropped)


def test_blocked_words_drop_their_rows(tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path, "rows.jsonl", [chat("a bad word"), chat("a badge"), chat("나쁜말입니다"), chat("fine")])
    words = tmp_path / "words.txt"
    words.write_text("# a remark\nbad\n나쁜말\n", encoding="utf-8")
    found = made(tokenizer, path, blocklist=str(words))
    assert asked(found.train_examples) == ["a badge", "fine"]
    assert len(found.ledger.dropped) == 2


def test_short_rows_come_first_in_the_first_epoch(tokenizer: Any, tmp_path: Path) -> None:
    from whet.data.batch.batches import Cut
    from whet.data.batch.make import make_batches

    path = write(tmp_path, "rows.jsonl", [chat(f"q{n} " + "word " * (n * 37 % 60)) for n in range(60)])

    def lengths(order: Any, epoch: int) -> list[int]:
        data = Data(dataset=path, val_size=0, order=order, padding_free=True)
        rows = prepare(data, tokenizer, 256).train
        batches: Any = make_batches(rows, data, seed=0, cut=Cut(6))
        return [batches.step(epoch * 10 + step)[0].tokens for step in range(10)]

    first = lengths("short_first", 0)
    assert first == sorted(first)
    assert lengths("random", 0) != sorted(lengths("random", 0))
    assert lengths("short_first", 1) == lengths("random", 1)
    with pytest.raises(UserError, match="one length"):
        made(tokenizer, path, order="short_first", packing=True)


def test_preferred_answers_are_learned_where_that_is_asked_for(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(4)]
    path = write(tmp_path, "rows.jsonl", rows)
    with pytest.raises(UserError, match="which answer is better"):
        made(tokenizer, path)
    found = made(tokenizer, path, preference="chosen")
    assert [example.answer for example in found.train_examples] == [f"good {n}" for n in range(4)]
    assert len(found.ledger.dropped) == 4
    both = made(tokenizer, path, preference="check")
    assert len(both.train) == 8


@pytest.mark.parametrize(
    ("settings", "field"),
    [({"eval_dataset": "SAME", "val_size": 0.3}, "data.val_size"), ({"group": "prompt"}, "data.group"),
     ({"stratify": True}, "data.stratify"), ({"val_size": 0.5, "test_size": 0.5}, "data.test_size"),
     ({"val_size": 1.5}, "data.val_size"), ({"eval_dataset": "TEXT"}, "data.eval_dataset"),
     ({"replay_dataset": "TEXT"}, "data.replay_dataset")],
    ids=str,
)  # fmt: skip
def test_settings_that_cannot_take_effect_are_refused(
    settings: dict[str, Any], field: str, tokenizer: Any, tmp_path: Path
) -> None:
    path = write(tmp_path, "rows.jsonl", [chat(f"question {n}") for n in range(10)])
    text = write(tmp_path, "text.jsonl", [{"text": "raw text"}] * 3)
    places = {"SAME": path, "TEXT": text}
    with pytest.raises(UserError) as caught:
        made(tokenizer, path, **{name: places.get(str(value), value) for name, value in settings.items()})
    assert caught.value.field == field


def test_the_check_finds_it_all_and_strict_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [chat(f"a question about parcel number {n} in the north", f"It left on day {n}.") for n in range(30)]
    faulty = [rows[3], chat(LONG, "It is done."), chat(LONG.replace("second", "secund"), "It is done."),
              chat(rows[5]["prompt"], "No idea."), chat("mail to a.b@example.com", "It is sent.")]  # fmt: skip
    path, clean = write(tmp_path, "rows.jsonl", rows + faulty), write(tmp_path, "clean.jsonl", rows)
    page, left = tmp_path / "page.html", tmp_path / "left.jsonl"
    assert cli.run(["data", "check", path, "--json", "--html", str(page), "--removed", str(left)]) == 0
    found = json.loads(capsys.readouterr().out)
    quality = found["quality"]
    assert quality["duplicates"]["exact_rows"] == 1
    assert quality["duplicates"]["near_rows"] >= 1
    assert quality["contradictions"]["rows"] == 2
    assert quality["personal"]["kinds"] == {"email": 1}
    assert "<html" in page.read_text(encoding="utf-8")
    assert "a.b@example.com" not in json.dumps(quality["personal"])
    assert left.read_text(encoding="utf-8") == ""
    assert cli.run(["data", "check", path, "--strict", "--fast"]) == 2
    assert "--strict allows none" in capsys.readouterr().err
    assert cli.run(["data", "check", clean, "--strict", "--fast"]) == 0
    assert cli.run(["data", "check", clean, "--html", str(tmp_path / "new" / "folder" / "page.html")]) == 0
