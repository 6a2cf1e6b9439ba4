"""Files and directories that are there whole or not at all, and what a disk that refuses says."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

from whet import cli
from whet.base.disk import disk_fault
from whet.base.errors import UserError
from whet.base.files import (
    hidden_beside,
    hidden_directory,
    sweep,
    whole_directory,
    whole_file,
    write_bytes,
    write_text,
)

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_the_umask_whatever_a_library_chose(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        with whole_directory(tmp_path / "d") as directory:
            (directory / "secret").touch(mode=0o600)
            (directory / "in").mkdir()
            (directory / "in" / "deeper").touch(mode=0o600)
        write_bytes(tmp_path / "f", b"x")
    finally:
        os.umask(before)
    files = [tmp_path / "d" / "secret", tmp_path / "d" / "in" / "deeper", tmp_path / "f"]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~mask}
    assert (tmp_path / "d").stat().st_mode & 0o777 == 0o777 & ~mask


def test_a_directory_replaces_nothing_unless_it_is_told_to(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    with whole_directory(tmp_path / "d") as directory:  # an empty one makes way
        (directory / "a").touch()
    with pytest.raises(OSError, match="not empty"), whole_directory(tmp_path / "d") as directory:
        (directory / "b").touch()
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["a"]
    with whole_directory(tmp_path / "d", replace=True) as directory:
        (directory / "b").touch()
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_a_name_as_long_as_the_file_system_takes_is_written(tmp_path: Path) -> None:
    for name in ("x" * 255, "배" * 85, "x"):
        write_text(tmp_path / name, "text")
        assert (tmp_path / name).read_text(encoding="utf-8") == "text"
    with whole_directory(tmp_path / ("d" * 255)) as directory:
        (directory / "a").touch()
    assert len(list(tmp_path.iterdir())) == 4


def test_what_a_killed_process_left_goes_and_what_another_one_is_writing_stays(tmp_path: Path) -> None:
    hold = (
        "import sys, os; from pathlib import Path; from whet.base.files import hidden_directory\n"
        "with hidden_directory(Path(sys.argv[1])) as d: (d / 'a').touch(); print(d, flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / "out")], env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    theirs = Path(process.stdout.readline().strip())
    with hidden_directory(tmp_path / "out"):
        assert theirs.is_dir()
    sweep(tmp_path)
    assert theirs.is_dir()
    process.kill()
    process.wait()
    with hidden_directory(tmp_path / "other"):
        assert theirs.is_dir(), "of another output: not ours to judge"
    with hidden_directory(tmp_path / "out"):
        assert not theirs.exists()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_of_a_file_goes_when_the_file_is_written_again(tmp_path: Path) -> None:
    left, other = hidden_beside(tmp_path / "rows.jsonl"), hidden_beside(tmp_path / "other.jsonl")
    for path in (left, other):
        path.touch()
    with whole_file(tmp_path / "rows.jsonl") as file:
        assert not left.exists()
        file.write("a\n")
        with whole_file(tmp_path / "rows.jsonl") as second:  # what is being written is no leftover
            second.write("b\n")
        assert (tmp_path / "rows.jsonl").read_bytes() == b"b\n"
    assert (tmp_path / "rows.jsonl").read_bytes() == b"a\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["rows.jsonl", other.name])
    with pytest.raises(UnicodeEncodeError), whole_file(tmp_path / "rows.jsonl") as file:
        file.write("c\n\ud800")
    assert (tmp_path / "rows.jsonl").read_bytes() == b"a\n"
    assert len(list(tmp_path.iterdir())) == 2


def test_hidden_names_do_not_meet(tmp_path: Path) -> None:
    assert len({hidden_beside(tmp_path / "a") for _ in range(50)}) == 50


def test_a_failure_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "f", "old")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("whet.base.files.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(tmp_path / "f", "new")
    assert (tmp_path / "f").read_text(encoding="utf-8") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


# what is said


@pytest.mark.parametrize(
    "number", ["ENOSPC", "EDQUOT", "EACCES", "EPERM", "EROFS", "EIO", "ENAMETOOLONG", "ELOOP", "EXDEV", "ENOTDIR"]
)
def test_a_refusal_of_the_disk_is_one_clear_error(number: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    code = getattr(errno, number)

    def refuse(*_: Any) -> None:
        raise OSError(code, os.strerror(code), "/the/place")

    monkeypatch.setattr("whet.api.capabilities", refuse)
    monkeypatch.setattr("whet.methods.all.capability_rows", refuse)
    assert cli.run(["methods", "--json"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: /the/place: ")
    assert "fix:" in said.err
    assert json.loads(said.out)["error"]["file"] == "/the/place"


def test_libraries_in_rust_say_it_as_text() -> None:
    error = disk_fault(Exception("Error while serializing: I/O error: No space left on device (os error 28)"), "/there")
    assert isinstance(error, UserError)
    assert str(error).startswith("/there: no space is left on the disk")
    assert disk_fault(ValueError("28 is no number")) is None
    assert disk_fault(ConnectionResetError(errno.ECONNRESET, "reset")) is None


def run_whet(place: Path, shell: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    return subprocess.run(
        ["bash", "-c", f"W='{sys.executable} -m whet'; {shell}"], env=environment, cwd=place, text=True,
        capture_output=True, check=False,
    )  # fmt: skip


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize(
    ("shell", "code", "said"),
    [
        ("$W methods --json > /dev/full", 2, "standard output: no space is left"),
        ("$W methods --json >&-", 2, "standard output is closed"),
        ("$W methods >&-", 0, ""),
        ("$W methods --json 2>&- >/dev/null", 0, ""),
        ("$W nothing 2>&-", 2, ""),
        ("set -o pipefail; $W schema --json | head -c 1", 0, ""),
    ],
)
def test_a_standard_output_that_cannot_be_written_is_no_failure_of_whet(
    shell: str, code: int, said: str, tmp_path: Path
) -> None:
    done = run_whet(tmp_path, shell)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert not any(word in done.stderr for word in ("Traceback", "whet itself failed", "Exception ignored"))


def test_a_terminal_of_ascii_shows_other_characters_by_number(tmp_path: Path) -> None:
    tiny.write_rows(tmp_path / "k.jsonl", [{"instruction": "안녕", "input": "", "output": "반갑습니다 😀"}] * 2)
    done = run_whet(tmp_path, "$W data check k.jsonl --show 1")
    assert done.returncode == 0, done.stderr
    assert "\\ubc18" in done.stdout + done.stderr
    done = run_whet(tmp_path, "$W data check k.jsonl --json")
    json.loads(done.stdout)
