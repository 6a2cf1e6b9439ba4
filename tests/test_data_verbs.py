"""`whet data judge` and `whet data augment` from the command line, against a server on this machine.

What they write is whole or not there, says where it comes from, is read back by training, and costs nothing twice.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_endpoint import Fake, Say, serving

import whet
from whet import cli
from whet.data.judge.added import refused_beside
from whet.data.judge.endpoint import Endpoint
from whet.data.judge.output import replies_beside

KEY = "sk-test-Z9y8X7w6V5u4T3s2R1q0"
Answer = Callable[[dict[str, Any], int], Say]
WORDS = ["amber", "birch", "cedar", "delta", "ember", "flint", "grove", "heath", "inlet", "jetty", "knoll", "lagoon"]


@pytest.fixture(autouse=True)
def _place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("SCORE_KEY", KEY)
    monkeypatch.chdir(tmp_path)


def question(n: int) -> str:
    return f"parcel {n}: " + " ".join(WORDS[(n * (k + 3) + k * k + n // 12) % 12] for k in range(8))


def write(name: str, rows: list[dict[str, Any]]) -> str:
    Path(name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return name


def chats(count: int) -> str:
    return write("rows.jsonl", [{"prompt": question(n), "completion": f"answer {n}"} for n in range(count)])


def number_in(request: dict[str, Any]) -> int:
    found = re.search(r"parcel (\d+)", request["messages"][1]["content"])
    assert found
    return int(found[1])


def score(request: dict[str, Any], before: int) -> Say:
    number = number_in(request)
    return Say(json.dumps({"score": 1 + number % 5, "reason": f"row {number} is what it is"}))


def paraphrase(request: dict[str, Any], before: int) -> Say:
    asked = json.loads(request["messages"][1]["content"])
    polite = "혹시 괜찮으시다면 알려 주세요. " if "어디" in asked["text"] else "Please, if you can, "
    texts = [f"{polite * (n + 1)}{asked['text']}" for n in range(asked["n"])]
    return Say(json.dumps({"paraphrases": texts}))


def run(verb: str, target: str, fake: Fake | str, *more: str) -> int:
    url = fake if isinstance(fake, str) else fake.base_url
    return cli.run(["data", verb, target, *more, "--endpoint", url, "--model", "judge-1"])


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines()]


def test_every_row_to_learn_from_gets_a_line_that_says_who_judged_it(capsys: pytest.CaptureFixture[str]) -> None:
    path = chats(20)
    with serving(score) as fake:
        assert run("judge", path, fake, "--json", "--least", "3", "--api-key-env", "SCORE_KEY") == 0
        out, err = capsys.readouterr()
        assert len(fake.asked) == 20
        assert fake.keys == [f"Bearer {KEY}"] * 20
        host = fake.base_url.removeprefix("http://").removesuffix("/v1")
    found = json.loads(out)
    assert found["scores"] == {"rows": dict.fromkeys("12345", 4), "unjudged": 0}
    assert (found["rows"], found["asked"], found["rows_below"]) == (20, 20, 8)
    assert [one["row"] for one in found["worst"][:4]] == [1, 6, 11, 16]
    assert "judging rows" in err
    made = lines("scores.jsonl")
    assert [(one["row"], one["score"], one["file"]) for one in made] == [(n + 1, 1 + n % 5, path) for n in range(20)]
    for one in made:
        assert (one["model"], one["rubric"], one["endpoint"]) == ("judge-1", "quality", host)
        assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", one["date"])
        assert re.fullmatch("[0-9a-f]{16}", one["id"])
        assert len(one["prompt_sha256"]) == 64
    assert not any(KEY.encode() in file.read_bytes() for file in Path().iterdir())


@pytest.mark.parametrize("verb", ["judge", "augment"])
def test_a_second_run_asks_nothing_and_writes_the_same(verb: str) -> None:
    path, out = chats(12), "scores.jsonl" if verb == "judge" else "added.jsonl"
    with serving(score if verb == "judge" else paraphrase) as fake:
        assert run(verb, path, fake) == 0
        first, asked = Path(out).read_bytes(), len(fake.asked)
        assert asked == 12
    Path(out).unlink()
    with serving(score) as other:  # another host: what is kept says who gave it
        assert run(verb, path, other, *(["--offline"] if verb == "judge" else [])) == 0
        os.environ.pop("HF_HUB_OFFLINE", None)
        assert other.asked == []
    assert Path(out).read_bytes() == first


@pytest.mark.parametrize("verb", ["judge", "augment"])
def test_what_breaks_off_leaves_the_replies_and_goes_on(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    path, good = chats(16), score if verb == "judge" else paraphrase
    refusal = Say(status=401, body=b"no more credit")
    with serving(lambda request, before: good(request, before) if number_in(request) < 6 else refusal) as fake:
        assert run(verb, path, fake, "--jobs", "1") == 2
    err = capsys.readouterr().err
    assert "status 401" in err
    assert "--api-key-env" in err
    out = Path("scores.jsonl" if verb == "judge" else "added.jsonl")
    assert {file.name for file in Path().iterdir()} == {path, replies_beside(out).name}
    with serving(good) as fake:
        assert run(verb, path, fake) == 0
        assert len(fake.asked) == 10
    assert len(lines(out.name)) == (16 if verb == "judge" else 32)


def unused_address() -> str:
    with socket.socket() as line:
        line.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{line.getsockname()[1]}/v1"


BAD: dict[str, tuple[Any, list[str], str]] = {
    "nobody there": (None, [], "--endpoint"),
    "no such name": ("http://no-such-host.invalid/v1", [], "--endpoint"),
    "no address": ("localhost:8000/v1", [], "--endpoint"),
    "401": (Say(status=401), [], "--api-key-env"),
    "404": (Say(status=404), [], "--endpoint"),
    "malformed": (Say("I would say four out of five"), [], "--model"),
    "no completion": (Say(body=b"<html>"), [], "--model"),
    "no key": (Say("{}"), ["--api-key-env", "NOT_SET_ANYWHERE"], "--api-key-env"),
    "offline": (Say("{}"), ["--offline"], "--endpoint"),
}


@pytest.mark.parametrize("verb", ["judge", "augment"])
@pytest.mark.parametrize("case", BAD)
def test_a_bad_endpoint_is_one_error_and_nothing_is_written(
    case: str, verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    say, words, field = BAD[case]
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # so that what --offline sets is undone
    path = chats(24 if case == "malformed" else 3)
    with serving(lambda request, before: say) as fake:
        url = fake.base_url if isinstance(say, Say) else say or unused_address()
        assert run(verb, path, url, "--json", *words) == 2
    out, err = capsys.readouterr()
    assert list(json.loads(out)) == ["error"]
    assert json.loads(out)["error"]["field"] == field
    assert err.count("error:") == 1
    assert "fix:" in err
    assert "base_url" not in err
    assert [file.name for file in Path().iterdir()] == [path]


@pytest.mark.parametrize("verb", ["judge", "augment"])
def test_the_data_are_never_written_over(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(
        "rows.jsonl", [{"prompt": question(n), "completion": "a", "score": 3, "origin": "x"} for n in range(3)]
    )
    before = Path(path).read_bytes()
    with serving(score if verb == "judge" else paraphrase) as fake:
        assert run(verb, path, fake, "--out", path) == 2
        assert fake.asked == []
    assert "would overwrite the data" in capsys.readouterr().err
    assert Path(path).read_bytes() == before


def test_only_what_would_be_learned_is_sent(capsys: pytest.CaptureFixture[str]) -> None:
    """Not what is held out, kept for a test, repeated, or blocked; and placeholders instead of personal data."""
    rows = [{"prompt": question(n), "completion": f"write to a{n}@example.com"} for n in range(40)]
    path = write("rows.jsonl", [*rows, rows[3]])
    recipe = Path("r.yaml")
    recipe.write_text(
        f"data:\n  dataset: {path}\n  val_size: 10\n  test_size: 5\n  personal: redact\n  duplicates: drop\n"
    )
    for verb, answer in (("judge", score), ("augment", paraphrase)):
        with serving(answer) as fake:
            assert run(verb, str(recipe), fake) == 0
            assert len(fake.asked) == len({number_in(one) for one in fake.asked}) == 25
            assert "@example.com" not in json.dumps(fake.asked)
            assert verb == "augment" or "[EMAIL]" in json.dumps(fake.asked)
    capsys.readouterr()


def test_augmented_rows_say_where_they_come_from_and_refusals_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    path = chats(10)

    def answer(request: dict[str, Any], before: int) -> Say:
        text = json.loads(request["messages"][1]["content"])["text"]
        near = text.replace("parcel", "parsel")
        return Say(json.dumps({"paraphrases": [f"Kindly tell me about this: {text}", near]}))

    with serving(answer) as fake:
        assert run("augment", path, fake, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["sources"], found["rows"], found["refused"]) == (10, 10, 10)
    assert found["reasons"] == {"it repeats the source or another paraphrase": 10}
    assert found["refused_file"] == str(refused_beside(Path("added.jsonl")))
    assert [(one["row"], one["kind"]) for one in lines(found["refused_file"])] == [
        (n, "paraphrase") for n in range(1, 11)
    ]
    for n, row in enumerate(lines("added.jsonl")):
        assert row["prompt"] == [{"role": "user", "content": f"Kindly tell me about this: {question(n)}"}]
        assert row["completion"] == [{"role": "assistant", "content": f"answer {n}"}]
        assert {"id", "group", "model", "endpoint", "date", "prompt", "prompt_sha256"} <= set(row["origin"])
        assert (row["origin"]["file"], row["origin"]["row"]) == (path, n + 1)


USER = {"role": "user", "content": "parcel 1: where is it?"}
SAID = {"role": "assistant", "content": "on its way"}
TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "find", "arguments": {"id": 1}}}
SHAPES: dict[str, dict[str, Any]] = {
    "system": {"messages": [{"role": "system", "content": "be short"}, USER, SAID]},
    "reasoning": {"messages": [USER, {**SAID, "reasoning_content": "let me see"}]},
    "weights": {"messages": [USER, {**SAID, "weight": 0}, USER, SAID]},
    "tools": {
        "messages": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]},
                     {"role": "tool", "content": "{}", "name": "find", "tool_call_id": "c"}, SAID],
        "tools": [TOOL],
    },
    "turns in a prompt": {"prompt": [USER, SAID, USER], "completion": [SAID]},
    "korean": {"instruction": "parcel 1: 어디에 있나요? ☀️", "output": "가는 중"},
    "text": {"text": "parcel 1: " + "a long story, " * 4 + "the end"},
    "label": {"text": "parcel 1: is late", "label": "delay"},
    "number": {"text": "parcel 1: is late", "text_pair": "and wet", "label": 2},
    "labels": {"text": "parcel 1: is late", "label": ["delay", "wet"]},
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_every_shape_come_back_as_they_were(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    from whet.data.batch.ledger import Ledger
    from whet.data.collect import collect, fingerprints
    from whet.data.config import Data

    path = write("rows.jsonl", [SHAPES[shape]] * 2)
    with serving(paraphrase) as fake:
        assert run("augment", path, fake, "--json", "--copies", "1") == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 2
    data = Data(dataset=path, val_size=0, added_dataset="added.jsonl")
    own, _, added, _ = collect(data, Path("store"), Ledger(files=fingerprints(data))).train
    assert added.id == lines("added.jsonl")[0]["origin"]["id"]
    assert (added.tools, added.label, added.text_pair) == (own.tools, own.label, own.text_pair)
    assert added.completion_from == own.completion_from or shape == "korean"
    if own.messages is None:
        assert added.text == f"Please, if you can, {own.text}"
        return
    assert added.messages is not None
    last = max(n for n, message in enumerate(own.messages) if message.role == "user")
    for n, (one, other) in enumerate(zip(own.messages, added.messages, strict=True)):
        assert (one == other) == (n != last)


def test_a_writer_that_loses_a_field_is_seen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Planted: the label stays behind. Reading back finds it, and no file appears."""
    from whet.data.judge import added

    path, whole = write("rows.jsonl", [SHAPES["label"], {**SHAPES["label"], "label": "other"}]), added.row_of
    monkeypatch.setattr(added, "row_of", lambda *a, **k: {**whole(*a, **k), "label": "delay"})
    with serving(paraphrase) as fake:
        assert run("augment", path, fake) == 1
    assert "would be read as another one" in capsys.readouterr().err
    assert not Path("added.jsonl").exists()


def test_the_same_verbs_in_python_take_an_endpoint() -> None:
    data = {"data.dataset": chats(4), "data.val_size": 0}
    with serving(score) as fake:
        asked = {"base_url": fake.base_url, "model": "judge-1", "concurrency": 2}
        found = whet.judge(endpoint=asked, least=3, out="s.jsonl", **data)
        assert whet.judge(endpoint=Endpoint(**asked), out="s.jsonl", **data)["rows"] == found["rows"] == 4
        assert len(fake.asked) == 4
    assert len(lines("s.jsonl")) == 4
    with serving(paraphrase) as fake:
        asked = {"base_url": fake.base_url, "model": "judge-1"}
        assert whet.augment(endpoint=asked, copies=1, out="a.jsonl", **data)["rows"] == len(lines("a.jsonl")) == 4
        with pytest.raises(whet.UserError, match="an endpoint has no such setting") as refused:
            whet.augment(endpoint=asked | {"base_ulr": "x"}, **data)
    assert refused.value.fix == "write base_url"


@pytest.mark.parametrize("words", [["check"], ["judge"], ["augment"]])
def test_help_has_an_example(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.run(["data", *words, "--help"])
    assert stop.value.code == 0
    assert f"example:\n  whet data {words[0]} " in capsys.readouterr().out


@pytest.mark.parametrize("words", [["check", "--rubric", "harm"], ["judge", "--html", "x"], ["judge", "--least", "6"],
                                   ["judge"], ["augment", "--copies", "0"]], ids=" ".join)  # fmt: skip
def test_words_of_another_verb_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["data", words[0], chats(2), *words[1:]]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "fix:      " in said
