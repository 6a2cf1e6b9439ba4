"""Every odd file is refused with its place, or read as declared: none crashes, none loses a row without a word."""

from __future__ import annotations

import os
import random
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from odd_files import CSV, GOOD, NEEDS_PYARROW, READ, REFUSED, Odd, parquet

from whet.base.errors import UserError
from whet.cli import run
from whet.data.read.read import read_files

KINDS = [*REFUSED, *READ]


def written(odd: Odd, folder: Path) -> Path:
    if odd.suffix.endswith(NEEDS_PYARROW):
        pytest.importorskip("pyarrow", reason="needs the extra data")
    if odd.suffix.endswith(".zst") or odd.name == "zst_named_plain":
        pytest.importorskip("backports.zstd", reason="needs the extra data")
    path = folder / (odd.name + odd.suffix)
    path.write_bytes(odd.bytes())
    return path


@pytest.mark.parametrize("odd", REFUSED, ids=lambda odd: odd.name)
def test_it_is_refused_with_its_place_and_a_fix(odd: Odd, tmp_path: Path) -> None:
    path = written(odd, tmp_path)
    with pytest.raises(UserError) as caught:
        list(read_files([str(path)]))
    error, message = caught.value, str(caught.value).replace(str(path), "")
    assert (error.file, error.row) == (str(path), odd.row)
    assert error.fix
    assert [words for words in odd.mentions if words not in message] == [], message
    assert len(message) < 1200, "one screen"
    message.encode()


@pytest.mark.parametrize("odd", REFUSED, ids=lambda odd: odd.name)
def test_data_check_refuses_it_with_exit_code_2(
    odd: Odd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = written(odd, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert run(["data", "check", str(path)]) == 2
    out, message = capfd.readouterr()
    assert message.startswith(f"error: {path}" + (f", row {odd.row}" if odd.row else ""))
    assert "\n  fix:      " in message
    assert "Traceback" not in message
    assert out == ""
    assert list(tmp_path.iterdir()) == [path], "nothing is written"


@pytest.mark.parametrize("odd", READ, ids=lambda odd: odd.name)
def test_it_is_read_as_declared(odd: Odd, tmp_path: Path) -> None:
    assert [record.value for record in read_files([str(written(odd, tmp_path))])] == odd.rows


def test_the_tables_are_large_and_have_one_entry_per_kind() -> None:
    from bad_data import BAD_DATA, CONTAINER, ENCODING, SYNTAX

    names = [odd.name for odd in KINDS] + [bad.name for bad in BAD_DATA]
    assert len(set(names)) == len(names)
    assert len(REFUSED) + len(ENCODING) + len(CONTAINER) + len(SYNTAX) >= 60
    assert all((odd.rows is None) == bool(odd.mentions) for odd in KINDS), "each says which it is"


PLANTED: list[tuple[str, str, object]] = [
    ("swallowed_rows", "read.table._SWALLOWED", {",": 999}),
    ("one_name_twice", "read.table._check_header", lambda names, delimiter, file, line: None),
    ("semicolons", "read.table._check_header", lambda names, delimiter, file, line: None),
    ("after_quote", "read.table._TO_CLOSING_QUOTE", re.compile(r'[^"]*"[^,\n]*')),
    ("json_in_txt", "read.text._is_json", lambda text: False),
    ("web_page_txt", "read.unpack._WEB_PAGE", ("\0",)),
    ("gz_in_gz", "read.unpack._MAGIC", {}),
    ("utf16_without_mark", "read.unpack._not_text", lambda head: None),
    ("stream_without_end", "read.arrow._END_OF_STREAM", b""),
    ("parquet_not_utf8", "read.arrow._is_valid", lambda column: True),
    ("parquet_nan", "read.arrow._has_floats", lambda kind: False),
    ("parquet_bytes", "read.arrow._refuse", lambda kind, path, file: kind),
]


@pytest.mark.parametrize(("name", "where", "fault"), PLANTED, ids=lambda part: part if isinstance(part, str) else "")
def test_without_its_check_it_would_not_be_refused_so(
    name: str, where: str, fault: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = next(odd for odd in REFUSED if odd.name == name)
    path = written(odd, tmp_path)
    monkeypatch.setattr(f"whet.data.{where}", fault)
    message = ""
    try:
        list(read_files([str(path)]))
    except (UserError, UnicodeDecodeError) as error:
        message = str(error).replace(str(path), "")
    assert not all(words in message for words in odd.mentions)


# Paths that are no plain files.


def fifo(place: Path) -> None:
    os.mkfifo(place)


def loop(place: Path) -> None:
    place.symlink_to(place.name)


def broken(place: Path) -> None:
    place.symlink_to("gone.jsonl")


def device(place: Path) -> None:
    place.symlink_to("/dev/zero")


def listening(place: Path) -> None:
    socket.socket(socket.AF_UNIX).bind(os.path.relpath(place))  # the length of such a path is limited


@pytest.mark.parametrize("make", [fifo, loop, broken, device, listening], ids=lambda make: make.__name__)
def test_what_is_no_plain_file_is_refused_alone_and_in_a_directory(
    make: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "b.jsonl"
    make(place)
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    for path in (place, tmp_path, tmp_path / "*.jsonl"):
        with pytest.raises(UserError, match=r"not a regular file|leads nowhere"):
            read_files([str(path)])
        assert run(["data", "check", str(path)]) == 2


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
def test_no_permission_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD)
    path.chmod(0)
    root = os.geteuid() == 0
    for folder in (tmp_path, *tmp_path.parents[:2]) if root else ():
        folder.chmod(0o755)
    if root:
        os.seteuid(65534)
    try:
        with pytest.raises(UserError, match="Permission denied") as caught:
            list(read_files([str(path)]))
    finally:
        if root:
            os.seteuid(0)
    assert caught.value.file == str(path)


def test_a_type_that_changes_late_is_an_error_with_its_row(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD * 5000 + b'{"prompt": "a", "completion": 2}\n')
    assert run(["data", "check", str(path)]) == 2
    message = capfd.readouterr().err
    assert message.startswith(f"error: {path}, row 5001, field completion")
    assert "number 2" in message


def test_cells_are_never_of_another_type_however_late_they_look_so(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"prompt,completion\n" + b"7,8\n" * 5000 + b"x,\n")
    assert {type(cell) for record in read_files([str(path)]) for cell in record.value.values()} == {str}


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.parquet", "a.arrow"])
def test_damage_anywhere_is_read_or_refused_and_nothing_else(name: str, tmp_path: Path) -> None:
    """Bytes changed, cut out and repeated at random places."""
    if name.endswith(NEEDS_PYARROW):
        pytest.importorskip("pyarrow", reason="needs the extra data")
    chance = random.Random(name)
    good = {
        "a.csv": CSV * 3 + b'"x ""y"" z","two\nlines"\n',
        "a.tsv": b'prompt\tcompletion\n"x ""y"""\tb\nc\td\n',
        "a.jsonl": GOOD * 3,
        "a.parquet": parquet({"text": ["one", "둘", None] * 9, "n": [[1.5], [], None] * 9})(),
        "a.arrow": next(odd for odd in READ if odd.name == "stream").bytes(),
    }[name]
    path, read, refused = tmp_path / name, [], []
    for _ in range(400):
        content = bytearray(good)
        for _ in range(chance.choice([1, 1, 3])):
            at = chance.randrange(len(content))
            content[at : at + chance.randint(0, 4)] = bytes(
                chance.choices(b'",\t\r\n\xff\xed\0a', k=chance.randint(0, 3))
            )
        path.write_bytes(content)
        try:
            read.append(sum(1 for _ in read_files([str(path)])))
        except UserError as error:
            refused.append(error)
    assert all(read)
    assert refused
    assert all(error.file == str(path) and error.fix for error in refused)
