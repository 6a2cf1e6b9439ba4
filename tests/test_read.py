"""Good files of every kind come out whole and in order; what they mean is one shape whatever they were written in."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import tracemalloc
from itertools import chain, islice
from pathlib import Path

import pytest

from whet.base.errors import UserError
from whet.data.format.standardise import Dropped, Example, Format, recognise, standardise
from whet.data.read.read import Record, read_files, sha256

SHARED = Path(__file__).parents[2] / "shared" / "data"
ROWS = [{"text": "one"}, {"text": "둘 🙂"}, {"text": "three\u2028still three\u0085"}]
QA = {"prompt": "question", "completion": "answer"}


def jsonl(rows: list[dict], end: str = "\n", ascii: bool = False) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=ascii) + end for row in rows).encode()


def values(*paths: Path | str) -> list[dict]:
    return [record.value for record in read_files([str(path) for path in paths])]


def examples(rows: list[dict], columns: dict[str, str] | None = None) -> list[Example]:
    records = [Record(row, "f", index) for index, row in enumerate(rows, 1)]
    return list(standardise(records, recognise(records, columns or {}), columns or {}))


def turns(row: dict, columns: dict[str, str] | None = None) -> list[tuple[str, str]]:
    (example,) = examples([row], columns)
    assert example.messages is not None
    assert example.text is None
    return [(message.role, message.content) for message in example.messages]


def load(path: str, columns: dict[str, str] | None = None) -> tuple[Format, list[Example], Dropped]:
    dropped = Dropped()
    records = read_files([path])
    head = list(islice(records, 100))
    found = recognise(head, columns or {})
    return found, list(standardise(chain(head, records), found, columns or {}, empty="drop", dropped=dropped)), dropped


# Reading.


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plain.jsonl", jsonl(ROWS)),
        ("escaped.jsonl", jsonl(ROWS, ascii=True)),
        ("no_last_newline.jsonl", jsonl(ROWS).rstrip()),
        ("crlf.jsonl", jsonl(ROWS, "\r\n")),
        ("bom.jsonl", b"\xef\xbb\xbf" + jsonl(ROWS)),
        ("upper.JSONL", jsonl(ROWS)),
        ("array.jsonl", b"\xef\xbb\xbf\n" + json.dumps(ROWS, indent=1).encode()),
        ("packed.jsonl.gz", gzip.compress(jsonl(ROWS))),
        ("packed.jsonl.xz", lzma.compress(jsonl(ROWS))),
        ("two_streams.jsonl.gz", gzip.compress(jsonl(ROWS[:1])) + gzip.compress(jsonl(ROWS[1:]))),
        ("array.json", json.dumps(ROWS).encode()),
        ("indented.json", b"\xef\xbb\xbf" + json.dumps(ROWS, indent=2, ensure_ascii=False).encode()),
        ("lines.json", b"\xef\xbb\xbf\n" + jsonl(ROWS)),
        ("inside.json", json.dumps({"version": 1, "data": ROWS}, indent=2).encode()),
        ("inside_one_line.json", json.dumps({"data": ROWS}).encode()),
        ("packed.json.xz", lzma.compress(json.dumps(ROWS).encode())),
    ],
    ids=lambda value: value if isinstance(value, str) else "content",  # packed bytes hold the time
)
def test_the_same_rows_come_out_of_every_container(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert values(path) == ROWS


def test_row_is_the_line_in_jsonl_and_the_index_in_an_array(tmp_path: Path) -> None:
    lines, array = tmp_path / "a.jsonl", tmp_path / "a.json"
    lines.write_bytes(b'\n{"text": "a"}\n\n{"text": "b"}\n')
    array.write_bytes(b'\n[\n{"text": "a"},\n\n{"text": "b"}]')
    assert [(r.file, r.row) for r in read_files([str(lines)])] == [(str(lines), 2), (str(lines), 4)]
    assert [(r.file, r.row) for r in read_files([str(array)])] == [(str(array), 1), (str(array), 2)]


def test_a_lone_object_in_json_is_one_row(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    path = tmp_path / "a.json"
    path.write_text(json.dumps(row, indent=2))
    assert values(path) == [row], "its turns are not rows"


def test_a_text_file_is_one_document_unchanged(tmp_path: Path) -> None:
    text = "첫 줄\r\n\n둘째 문단\u2028 🙂\n"
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert values(path) == [{"text": text}]


def test_words_that_look_like_json_constants_are_only_words(tmp_path: Path) -> None:
    rows = [{"text": "NaN and Infinity \\ud83d 🙂", "n": 1e3}]
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(rows, ascii=True))
    assert values(path) == rows


def test_directories_and_globs_are_sorted_and_hidden_files_left_out(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.json", "c.jsonl.xz", ".hidden.jsonl", "README.md"):
        content = jsonl([{"text": name}])
        (tmp_path / name).write_bytes(lzma.compress(content) if name.endswith("xz") else content)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "d[1].jsonl").write_bytes(jsonl([{"text": "d"}]))
    assert [v["text"] for v in values(tmp_path)] == ["a.json", "b.jsonl", "c.jsonl.xz"]
    assert [v["text"] for v in values(tmp_path / "*.jsonl*")] == ["b.jsonl", "c.jsonl.xz"]
    assert [v["text"] for v in values(f"{tmp_path}/**/d*")] == ["d"]
    assert [v["text"] for v in values(tmp_path / "deep" / "d[1].jsonl")] == ["d"], "a name is not taken for a pattern"
    assert [v["text"] for v in values(tmp_path / "b.jsonl", tmp_path / "a.json")] == ["b.jsonl", "a.json"]


def test_jsonl_is_streamed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl([{"text": "x" * 10_000}]) * 2000, compresslevel=1))
    tracemalloc.start()
    count = sum(1 for _ in read_files([str(path)]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 2000
    assert peak < 4_000_000, "of 20 MB"


def test_sha256_is_of_the_bytes_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(content := gzip.compress(jsonl(ROWS)))
    assert sha256(str(path)) == hashlib.sha256(content).hexdigest()


# Standardising.

EXCHANGE = [("user", "q"), ("assistant", "a")]
TURNS = [{"role": role, "content": content} for role, content in EXCHANGE]


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("alpaca", {"instruction": "q", "output": "a"}),
        ("alpaca", {"instruction": "q", "input": "", "output": "a", "text": "rendered", "system": None, "history": []}),
        ("alpaca", {"instruction": "", "input": "q", "output": "a"}),
        ("messages", {"messages": TURNS}),
        ("messages", {"conversations": TURNS, "id": 7, "tools": None}),
        ("messages", {"conversation": TURNS}),
        ("messages", {"messages": [{"role": r, "content": [{"type": "text", "text": c}]} for r, c in EXCHANGE]}),
        ("messages", {"messages": [{"role": "user", "content": "q"}, {**TURNS[1], "weight": 1, "loss_weight": 1.0}]}),
        ("sharegpt", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}),
        ("sharegpt", {"messages": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]}),
        ("prompt_completion", {"prompt": "q", "completion": "a"}),
        ("prompt_completion", {"prompt": TURNS[:1], "completion": TURNS[1:]}),
    ],
)
def test_every_format_comes_to_the_same_example(name: str, row: dict) -> None:
    assert recognise([Record(row, "f", 1)], {}).name == name
    assert turns(row) == EXCHANGE
    assert examples([row])[0].id == examples([{"prompt": "q", "completion": "a"}])[0].id


def test_alpaca_with_everything() -> None:
    row = {"instruction": "q", "input": "x\ny", "output": "a", "system": "s", "history": [["q0", "a0"], ["q1", "a1"]]}
    assert turns(row) == [
        ("system", "s"),
        *(("user", "q0"), ("assistant", "a0"), ("user", "q1"), ("assistant", "a1")),
        *(("user", "q\n\nx\ny"), ("assistant", "a")),
    ]


def test_a_system_field_beside_turns_comes_first_and_content_is_not_changed() -> None:
    row = {"system": "s", "messages": [{"role": "assistant", "content": " hi \n"}, *TURNS]}
    assert turns(row) == [("system", "s"), ("assistant", " hi \n"), *EXCHANGE]
    with pytest.raises(UserError, match=r"messages\[0\]: two system messages"):
        turns({"system": "s", "messages": [{"role": "system", "content": "t"}, *TURNS]})


def test_text() -> None:
    (example,) = examples([{"text": " raw\n", "source": 1}])
    assert (example.text, example.messages) == (" raw\n", None)
    assert recognise([Record({"text": "a", "source": 1}, "f", 1)], {}).reason == "fields text; ignored: source"


def test_a_text_with_a_label_is_for_classification_unless_something_else_is_asked_for() -> None:
    row = {"text": "a", "label": 1}
    (example,) = examples([row])
    assert (example.text, example.label, example.text_pair) == ("a", 1, None)
    assert recognise([Record(row, "f", 1)], {}).reason == "fields text, label"
    assert recognise([Record(row, "f", 1)], {}, "text").reason == "fields text; ignored: label"
    assert recognise([Record(row, "f", 1)], {"prompt": "text", "completion": "label"}).name == "prompt_completion"
    assert recognise([Record({**row, "messages": TURNS}, "f", 1)], {}).name == "messages"


def test_columns_rename_and_errors_speak_the_files_names() -> None:
    row = {"question": "q", "answer": "a", "prompt": "not this"}
    assert turns(row, QA) == EXCHANGE
    found = recognise([Record(row, "f", 1)], QA)
    assert found.reason == "fields prompt (from question), completion (from answer)"
    assert turns({"dialogue": TURNS, "conversations": "not this"}, {"messages": "dialogue"}) == EXCHANGE
    with pytest.raises(UserError, match=r"row 2, field answer: wrong kind"):
        examples([row, {**row, "answer": 4}], QA)
    with pytest.raises(UserError, match=r"data\.columns\.prompt=question"):
        examples([row], {**QA, "prompt": "qeustion"})
    with pytest.raises(UserError, match=r"data\.columns\.completion\?"):
        examples([row], {"prompt": "question", "completoin": "answer"})


def test_columns_and_a_name_settle_a_doubt() -> None:
    row = {"instruction": "q", "output": "a", "prompt": "p", "completion": "c"}
    with pytest.raises(UserError, match="several formats"):
        examples([row])
    assert turns(row, {"instruction": "instruction"}) == EXCHANGE
    assert recognise([Record(row, "f", 1)], {}, "prompt_completion").name == "prompt_completion"
    assert recognise([Record({**row, "text": "t"}, "f", 1)], {}, "text").needed == ("text",)
    with pytest.raises(UserError, match="do not fit sharegpt"):
        recognise([Record(row, "f", 1)], {}, "sharegpt")


def test_ids_depend_on_content_alone_and_on_all_of_it() -> None:
    def ids(*rows: dict) -> list[str]:
        return [example.id for example in examples(list(rows))]

    same = ids({"prompt": "q", "completion": "a", "id": 1}, {"prompt": "q", "completion": "a", "id": 2})
    assert same[0] == same[1] == hashlib.sha256(b"user\0q\0assistant\0a").hexdigest()[:16]
    assert (
        len(
            set(
                ids(
                    {"prompt": "q", "completion": "a"},
                    {"prompt": "qa", "completion": "a"},
                    {"prompt": "q", "completion": "aa"},
                )
            )
        )
        == 3
    )


def test_blank_answers_are_dropped_only_when_asked_and_then_counted() -> None:
    rows = [{"question": "q", "answer": answer} for answer in ("a", " \n", "", "b")]
    records = [Record(row, "f", index) for index, row in enumerate(rows, 1)]
    found, dropped = recognise(records, QA), Dropped()
    with pytest.raises(UserError, match=r"f, row 2, field answer: nothing to learn"):
        list(standardise(records, found, QA))
    kept = list(standardise(records, found, QA, empty="drop", dropped=dropped))
    assert [example.row for example in kept] == [1, 4]
    assert [(file, row) for file, row, _ in dropped.rows] == [("f", 2), ("f", 3)]
    assert "answer" in dropped.rows[0][2]
    with pytest.raises(UserError, match="every row is blank"):
        list(standardise(records[1:3], found, QA, empty="drop", dropped=Dropped()))
    with pytest.raises(UserError, match="wrong kind"):
        list(standardise([Record({"question": "q", "answer": None}, "f", 1)], found, QA, empty="drop", dropped=dropped))
    with pytest.raises(AssertionError):
        next(standardise(records, found, QA, empty="drop"))


# Real data, where it is at hand.

real = pytest.mark.skipif(not SHARED.exists(), reason="needs the shared data beside the checkout")


@real
@pytest.mark.parametrize(
    ("path", "columns", "name", "count"),
    [
        ("instruction/gsm8k_train.jsonl.xz", QA, "prompt_completion", 7473),
        ("instruction/korean_chatbot.jsonl.xz", QA, "prompt_completion", 11823),
        (
            "classification/banking77_test.jsonl.xz",
            {"prompt": "text", "completion": "label"},
            "prompt_completion",
            3080,
        ),
        ("formats/alpaca_en_demo.json", {}, "alpaca", 999),
        ("formats/identity.json", {}, "alpaca", 91),
        ("formats/v1_sft_demo.jsonl", {}, "messages", 500),
        ("formats/glaive_toolcall_en_demo.json", {}, "sharegpt", 300),
        ("formats/reason_tool_use_demo_50.jsonl", {}, "messages", 50),
        ("formats/c4_demo.jsonl", {}, "text", 300),
        ("formats/wiki_demo.txt", {}, "text", 1),
        ("pretrain/ko_judgments.jsonl.xz", {}, "text", 2442),
        ("general/*/*.json", {}, "alpaca", 5886),
    ],
)
def test_real_files(path: str, columns: dict[str, str], name: str, count: int) -> None:
    found, loaded, dropped = load(str(SHARED / path), columns)
    assert (found.name, len(loaded), len(dropped)) == (name, count, 0)


@real
def test_real_files_with_blank_rows_count_them() -> None:
    _, loaded, dropped = load(str(SHARED / "classification/nsmc_test.jsonl.xz"))
    assert len(loaded) + len(dropped) == 50_000
    assert len(dropped) == 3


@real
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dpo_en_demo.json", "preference data"),
        ("kto_en_demo.json", "boolean feedback"),
    ],
)
def test_real_preferences_are_refused_until_it_is_said_what_to_learn(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load(str(SHARED / "formats" / name))
