"""Data that change while they are read, or between start and resume, are refused; memory does not follow the file."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from whet.base.errors import UserError
from whet.base.extras import EXTRAS
from whet.data.read.read import check_unchanged, fingerprint, read_files
from whet.data.read.unpack import WatchedFile

ROW = b'{"text": "a"}\n'
MANY = 50_000  # rows of a file that no buffer holds


def of(path: Path) -> dict[str, str | int]:
    content = path.read_bytes()
    return {"path": str(path), "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def lines(path: Path) -> None:
    path.write_bytes(ROW * MANY)


def packed(path: Path) -> None:
    import gzip

    path.write_bytes(gzip.compress(ROW * 10) + gzip.compress(ROW * 10))


def array(path: Path) -> None:
    path.write_text(json.dumps([{"text": "a"}] * 10))


def lines_in_json(path: Path) -> None:
    path.write_bytes(ROW * 10)


def cells(path: Path) -> None:
    path.write_bytes(b"text\n" + b"a\n" * MANY)


def columns(path: Path) -> None:
    from pyarrow import parquet, table

    parquet.write_table(table({"text": ["a"] * MANY}), path, row_group_size=10_000)


WRITERS = {
    "a.jsonl": lines,
    "a.jsonl.gz": packed,
    "a.json": array,
    "b.json": lines_in_json,
    "a.csv": cells,
    "a.txt": lambda path: path.write_text("a"),
    "a.parquet": columns,
}


def write(name: str, folder: Path) -> Path:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow", reason="needs the extra data")
    WRITERS[name](folder / name)
    return folder / name


@pytest.mark.parametrize("name", WRITERS)
def test_the_hash_is_taken_while_reading(name: str, tmp_path: Path) -> None:
    path, found = write(name, tmp_path), []
    records = read_files([str(path)], found)
    next(records)
    assert found == [], "not before the end"
    for _ in records:
        pass
    assert found == [of(path)] == fingerprint([str(path)])


def test_what_was_hashed_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    for place in places:
        place.write_bytes(ROW)
    paths, found = [str(place) for place in places], []
    list(read_files(paths[:1], found))
    opened: list[Path] = []
    real = WatchedFile.fingerprint
    monkeypatch.setattr(WatchedFile, "fingerprint", lambda self: opened.append(self.path) or real(self))
    assert fingerprint(paths, found) == [of(place) for place in places]
    assert opened == places[1:]


def grow(path: Path) -> None:
    with path.open("ab") as stream:
        stream.write(ROW)


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 14)


def rewrite(path: Path) -> None:
    content = path.read_bytes()
    time.sleep(0.02)
    path.write_bytes(content.replace(b"a", b"b"))


def replace(path: Path) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(path.read_bytes())
    other.replace(path)


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("change", [grow, shorten, rewrite, replace, remove], ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_a_change_while_reading_is_refused(name: str, change: Callable[[Path], None], tmp_path: Path) -> None:
    path = write(name, tmp_path)
    records = read_files([str(path)])
    next(records)
    change(path)
    with pytest.raises(UserError, match="changed while it was read") as caught:
        for _ in records:
            pass
    assert caught.value.file == str(path)


def test_without_the_check_two_states_would_be_one_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("a.jsonl", tmp_path)
    monkeypatch.setattr(WatchedFile, "changed", lambda self: None)
    records = read_files([str(path)])
    next(records)
    rewrite(path)
    assert {record.value.popitem() for record in records} == {("text", "a"), ("text", "b")} or sys.platform == "win32"


def test_a_change_between_start_and_resume_names_both_hashes(tmp_path: Path) -> None:
    path, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    path.write_bytes(ROW)
    other.write_bytes(ROW * 2)
    paths = [str(path), str(other)]
    recorded = json.loads(json.dumps(fingerprint(paths)))
    check_unchanged(recorded, fingerprint(paths))
    old = of(path)["sha256"]
    path.write_bytes(ROW * 3)
    with pytest.raises(UserError, match="changed since the start") as caught:
        check_unchanged(recorded, fingerprint(paths))
    assert str(old) in str(caught.value)
    assert str(of(path)["sha256"]) in str(caught.value)
    assert caught.value.file == str(path)
    path.write_bytes(ROW)
    check_unchanged(recorded, fingerprint(paths))
    with pytest.raises(UserError, match="no longer among"):
        check_unchanged(recorded, fingerprint(paths[:1]))
    with pytest.raises(UserError, match="was not among"):
        check_unchanged(recorded[:1], fingerprint(paths))
    with pytest.raises(UserError, match="another order"):
        check_unchanged(recorded, fingerprint(paths[::-1]))


def test_files_that_only_moved_are_the_same_data(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(ROW)
    recorded = fingerprint([str(path)])
    check_unchanged(recorded, fingerprint([str(path.rename(tmp_path / "b.jsonl"))]))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv.gz", "a.jsonl.zst", "a.parquet", "a.arrow"])
def test_memory_does_not_follow_the_file(name: str, tmp_path: Path) -> None:
    """A file of 200 MB of text (packed: far less on disk), of which a few rows or two batches are held at a time."""
    path, count, text = tmp_path / name, 20_000, "x" * 10_000
    big(path, count, text)
    pool = None
    if name.endswith(("parquet", "arrow")):
        pool = importlib.import_module("pyarrow").default_memory_pool()
        before = pool.bytes_allocated()
    tracemalloc.start()
    held = rows = 0
    for record in read_files([str(path)]):
        rows += 1
        assert record.value["text"] == text
        if pool and rows % 500 == 1:
            held = max(held, pool.bytes_allocated() - before)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == count
    limit = 8_000_000 if pool is None else 60_000_000  # a batch of 1000 rows is 10 MB; two are held, in two forms
    assert peak < limit
    assert held < limit


def big(path: Path, count: int, text: str) -> None:
    import gzip

    row = json.dumps({"text": text}).encode() + b"\n"
    cell = text.encode() + b"\n"
    if path.suffix in (".parquet", ".arrow"):
        pytest.importorskip("pyarrow", reason="needs the extra data")
        import pyarrow as pa
        from pyarrow import ipc, parquet

        part = pa.table({"text": [text] * 1000})
        if path.suffix == ".parquet":
            with parquet.ParquetWriter(path, part.schema, use_dictionary=False) as writer:
                for _ in range(count // 1000):
                    writer.write_table(part)
            return
        with ipc.new_stream(str(path), part.schema) as stream:
            for _ in range(count // 1000):
                stream.write_table(part)
    elif path.suffix == ".zst":
        pytest.importorskip("backports.zstd", reason="needs the extra data")
        from backports import zstd

        path.write_bytes(zstd.compress(row * count))
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(b"text\n" + cell * count, compresslevel=1))
    else:
        path.write_bytes(row * count if path.suffix == ".jsonl" else b"text\n" + cell * count)


@pytest.mark.parametrize(("name", "module"), [("a.parquet", "pyarrow"), ("a.jsonl.zst", "backports.zstd")])
def test_an_absent_package_is_named_with_its_extra(
    name: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name.endswith("zst") and sys.version_info >= (3, 14):
        pytest.skip("Python brings it")
    path = tmp_path / name
    path.write_bytes(b"PAR1" if name.endswith("parquet") else b"\x28\xb5\x2f\xfd....")
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(EXTRAS, module.partition(".")[0], "data")
    with pytest.raises(UserError, match=r"pip install 'whet\[data\]'"):
        list(read_files([str(path)]))


@pytest.mark.slow
def test_a_million_short_rows_in_under_15_seconds(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "What is 1 plus 2?", "completion": "It is 3, of course."}\n' * 1_000_000)
    start = time.process_time()
    assert sum(1 for _ in read_files([str(path)])) == 1_000_000
    assert time.process_time() - start < 15
