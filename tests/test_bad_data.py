"""Every bad file is refused with one `UserError` that says where and what to do, before anything is handed out."""

from __future__ import annotations

import json
import random
from itertools import chain, islice
from pathlib import Path

import pytest
from bad_data import BAD_DATA, GOOD, UNDECIDED, BadFile

from whet.base.errors import UserError
from whet.cli import run
from whet.data.format.standardise import Example, recognise, standardise
from whet.data.read.read import read_files, sha256


def read_all(path: Path) -> list[Example]:
    records = read_files([str(path)])
    head = list(islice(records, 100))
    return list(standardise(chain(head, records), recognise(head, {}), {}))


@pytest.mark.parametrize("bad", [*BAD_DATA, *UNDECIDED], ids=lambda bad: bad.name)
def test_a_bad_file_is_refused_with_its_place_and_a_fix(bad: BadFile, tmp_path: Path) -> None:
    path = tmp_path / (bad.name + bad.suffix)
    path.write_bytes(bad.content)
    with pytest.raises(UserError) as caught:
        read_all(path)
    error, message = caught.value, str(caught.value)
    assert error.file == str(path)
    assert error.row == bad.row
    assert error.fix
    for words in bad.mentions:
        assert words in message.replace(str(path), ""), "the name of the file says nothing"
    assert len(message) < 1200, "one screen"
    assert message.isprintable() or message.replace("\n", "").isprintable()
    message.encode()


@pytest.mark.parametrize("bad", BAD_DATA, ids=lambda bad: bad.name)
def test_data_check_refuses_it_with_exit_code_2(
    bad: BadFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / (bad.name + bad.suffix)
    path.write_bytes(bad.content)
    monkeypatch.chdir(tmp_path)
    assert run(["data", "check", str(path)]) == 2
    out, message = capfd.readouterr()
    head = message.splitlines()[0]
    assert head.startswith(f"error: {path}" + (f", row {bad.row}" if bad.row else ""))
    assert "\n  fix:      " in message
    assert "Traceback" not in message
    assert out == ""
    assert all(words in message.replace(str(path), "") for words in bad.mentions)
    assert list(tmp_path.iterdir()) == [path], "nothing is written"


def test_data_check_accepts_the_filler_of_the_table(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "good.jsonl"
    path.write_bytes(GOOD * 3)
    assert run(["data", "check", str(path), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["rows_train"] == 3
    assert run(["data", "check", str(path), "data.columns.prompt=question"]) == 2, "a setting reaches the reader"


PLANTED = [
    ("duplicate_key", "read.jsonl._DECODER", json.JSONDecoder()),
    ("nan", "read.jsonl.check_leaves", lambda value: None),
    ("surrogate_key", "read.jsonl.check_leaves", lambda value: None),
    ("lfs_pointer", "read.unpack._LFS_POINTER", b"another format"),
    ("two_users", "format.single.conversation", lambda messages, key, offset=0: messages),
    ("ends_with_user", "format.single.conversation", lambda messages, key, offset=0: messages),
    ("weight", "format.turns.weight", lambda turn, names, role, where: None),
    ("blank_answer", "format.single.answer", lambda value, where, what="answer": value),
    ("tool_calls", "format.turns.tool_calls", lambda value, where: ()),
]


@pytest.mark.parametrize(("name", "where", "fault"), PLANTED, ids=lambda part: part if isinstance(part, str) else "")
def test_without_its_check_the_bad_file_would_not_be_refused_so(
    name: str, where: str, fault: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = next(bad for bad in BAD_DATA if bad.name == name)
    path = tmp_path / (bad.name + bad.suffix)
    path.write_bytes(bad.content)
    monkeypatch.setattr(f"whet.data.{where}", fault)
    message = ""
    try:
        read_all(path)
    except UserError as error:
        message = str(error).replace(str(path), "")
    assert not all(words in message for words in bad.mentions)


def test_damage_anywhere_is_read_or_refused_and_nothing_else(tmp_path: Path) -> None:
    """Bytes changed, cut and repeated at random places, and every JSON value in every place of a row."""
    chance = random.Random(0)
    odd = [
        None,
        True,
        0,
        1.5,
        "",
        "a",
        "\0",
        [],
        ["a"],
        [[]],
        [["a", "b"]],
        {},
        {"type": "text"},
        [{"type": "text"}],
        [{}],
    ]
    turn = {"role": "user", "content": "a", "from": "gpt", "value": "b", "weight": 1, "tool_calls": []}
    names = ["instruction", "input", "output", "history", "system", "prompt", "completion", "text", "messages", "label"]
    good: list[list[Example]] = []
    refused: list[UserError] = []
    for step in range(4000):
        row = {name: chance.choice([*odd, "a", "a"]) for name in chance.sample(names, 3)}
        row["conversations"] = [dict(chance.sample(sorted(turn.items()), 4), role=chance.choice(odd)) for _ in range(2)]
        kept = chance.sample(sorted(row), chance.randint(1, 4))
        content = bytearray(GOOD * (step % 3) + json.dumps({name: row[name] for name in kept}).encode() + b"\n")
        for _ in range(chance.choice([0, 0, 1, 3])):
            at = chance.randrange(len(content))
            content[at : at + chance.randint(0, 4)] = bytes(
                chance.choices(b'{}[]",:\\u0d8\n\xff\xed-N', k=chance.randint(0, 3))
            )
        path = tmp_path / chance.choice(["a.jsonl", "a.json", "a.txt"])
        path.write_bytes(content)
        try:
            good.append(read_all(path))
        except UserError as error:
            refused.append(error)
    assert all(error.file and Path(error.file).parent == tmp_path and error.fix for error in refused)
    assert all(example.text or example.messages for read in good for example in read)
    assert min(len(good), len(refused)) > 100, "or one of the two was not tried"


def test_the_table_has_one_entry_per_kind_and_its_filler_is_good(tmp_path: Path) -> None:
    assert len({bad.name for bad in BAD_DATA}) == len(BAD_DATA) >= 30
    path = tmp_path / "good.jsonl"
    path.write_bytes(GOOD * 3)
    assert len(read_all(path)) == 3, "or the entries built from it would be refused for another reason"


def test_a_missing_file_names_its_nearest_neighbour(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(GOOD)
    with pytest.raises(UserError, match=r"no such file[\s\S]*did you mean .*/train\.jsonl\?"):
        read_files([str(tmp_path / "trian.jsonl")])
    with pytest.raises(UserError, match="no directory"):
        read_files([str(tmp_path / "nowhere" / "train.jsonl")])


@pytest.mark.parametrize(
    "path", ["", "x" * 5000, "a\0b.jsonl", "/dev/null", "/dev/zero", "*.nothing", "[", "~nobody/x.json"]
)
def test_a_strange_path_is_refused(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        read_files([path])
    assert caught.value.fix


def test_a_directory_must_hold_data_of_one_kind(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no data files"):
        read_files([str(tmp_path)])
    (tmp_path / "notes.rst").write_text("x")
    with pytest.raises(UserError, match=r"found: +notes\.rst"):
        read_files([str(tmp_path)])
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "README.txt").write_text("About this data.")
    with pytest.raises(UserError, match=r"beside plain text[\s\S]*a\.jsonl and README\.txt"):
        read_files([str(tmp_path)])


def test_a_file_named_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD)
    with pytest.raises(UserError, match="twice"):
        read_files([str(path), str(tmp_path)])
    with pytest.raises(UserError, match="no data files were given"):
        read_files([])


def test_what_the_system_refuses_to_open_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD)
    records = read_files([str(path)])
    path.unlink()
    with pytest.raises(UserError, match="No such file") as caught:
        next(records)
    assert caught.value.file == str(path)
    with pytest.raises(UserError, match="cannot be read"):
        sha256(str(path))


@pytest.mark.parametrize(
    ("limit", "name"),
    [
        ("read.jsonl.MAX_ROW_BYTES", "a.jsonl"),
        ("read.table.MAX_ROW_BYTES", "a.csv"),
        ("read.text.MAX_WHOLE_BYTES", "a.json"),
        ("read.text.MAX_WHOLE_BYTES", "a.txt"),
    ],
)
def test_a_decompression_bomb_is_stopped(
    limit: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"whet.data.{limit}", 1000)
    path = tmp_path / name
    path.write_bytes(b'{"text": "' + b"a" * 1000 + b'"}')
    with pytest.raises(UserError, match="over 1000 bytes"):
        read_all(path)
