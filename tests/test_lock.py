"""One process writes in a run directory at a time; a dead one keeps nobody out, and one elsewhere is believed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from whet import cli
from whet.base.errors import UserError
from whet.base.lock import FILE, DirectoryLock
from whet.recipe import Parsed
from whet.training.run import train

ROOT = Path(__file__).parents[1]
HOLD = "import sys; from pathlib import Path; from whet.base.lock import DirectoryLock; " \
       "lock = DirectoryLock(Path(sys.argv[1])); lock.take(); print('held', flush=True); sys.stdin.read()"  # fmt: skip


@contextmanager
def another_process(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory)], env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_another_process_is_named_with_host_and_start(tmp_path: Path) -> None:
    with another_process(tmp_path) as process, pytest.raises(UserError) as caught:
        DirectoryLock(tmp_path).take()
    assert f"process {process.pid} on {socket.gethostname()}, since 20" in str(caught.value)


def test_a_process_that_was_killed_keeps_nobody_out(tmp_path: Path) -> None:
    with another_process(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / FILE).is_file()
    with DirectoryLock(tmp_path) as lock:
        lock.take()
        assert json.loads((tmp_path / FILE).read_text(encoding="utf-8"))["process"] == os.getpid()
    assert not (tmp_path / FILE).exists()


def test_a_later_process_with_the_number_of_a_dead_one_is_not_taken_for_it(tmp_path: Path) -> None:
    """Process 1 runs, and has never held this lock."""
    said = {"host": socket.gethostname(), "process": 1, "began": "1", "started": "2026-01-01T00:00:00Z"}
    (tmp_path / FILE).write_text(json.dumps(said), encoding="utf-8")
    with DirectoryLock(tmp_path) as lock:
        lock.take()


@pytest.mark.parametrize("text", ["", "[]", "{", "\0\0", '{"host": 3}'])
def test_a_file_that_says_nothing_keeps_nobody_out(text: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(text, encoding="utf-8")
    lock = DirectoryLock(tmp_path)
    if "host" in text:
        with pytest.raises(UserError):
            lock.take()
    else:
        lock.take()
    lock.release()


def test_another_host_is_believed_and_the_error_says_what_to_remove(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(json.dumps({"host": "node7", "process": 12, "started": "now"}), encoding="utf-8")
    with pytest.raises(UserError, match="process 12 on node7") as caught:
        DirectoryLock(tmp_path).take()
    assert str(tmp_path / FILE) in caught.value.fix
    assert (tmp_path / FILE).is_file()


def test_two_threads_are_two_owners(tmp_path: Path) -> None:
    said: list[str] = []

    def other() -> None:
        try:
            DirectoryLock(tmp_path).take()
        except UserError as error:
            said.append(str(error))

    with DirectoryLock(tmp_path) as lock:
        lock.take()
        lock.take()  # again by the same owner: nothing happens
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert len(said) == 1
        with another_held(tmp_path):  # looking has not let go of it
            pass


@contextmanager
def another_held(directory: Path) -> Iterator[None]:
    """Show that another process cannot take the lock now."""
    process = subprocess.run(
        [sys.executable, "-c", HOLD, str(directory)], env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert process.returncode != 0
    assert f"process {os.getpid()}" in process.stderr
    yield


def test_training_writes_nothing_where_another_process_trains(
    recipe: Callable[..., Parsed], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with another_process(run):
        with pytest.raises(UserError, match="another process is writing"):
            train(recipe(train__max_steps=1))
        assert [path.name for path in run.iterdir()] == [FILE]
    train(recipe(train__max_steps=1, data__val_size=4))
    assert not (run / FILE).exists()
    with another_process(run):
        assert cli.run(["eval", str(run)]) == 2
        assert "another process is writing" in capsys.readouterr().err
        train(recipe(train__max_steps=1, data__val_size=4))  # finished: nothing is written, nothing to wait for
