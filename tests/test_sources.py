"""Directories, saved data sets and hub data sets: which files are meant, that nothing is left out or read twice."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from whet.base.errors import UserError
from whet.data.read import layout
from whet.data.read.files import SUFFIXES, TEXT, data_files
from whet.data.read.hub import hub_files
from whet.data.read.layout import choose
from whet.data.read.read import _COLUMN_READERS, _READERS, fingerprint, read_files
from whet.data.read.unpack import PACKINGS

CARD = """---
configs:
- config_name: main
  default: true
  data_files:
  - split: train
    path: data/main/tr*.csv
  - split: test
    path: ["data/main/te-?.csv"]
- config_name: other
  data_dir: extra
  data_files: "**/*.csv"
---
# A data set
"""


def fill(folder: Path, names: list[str], card: str = "") -> Path:
    """Files with one row, which holds their name."""
    for name in names:
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(f"text\n{name}\n" if name.endswith("csv") else json.dumps({"text": name}) + "\n")
    if card:
        (folder / "README.md").write_text(card)
    return folder


def texts(path: Path | str) -> list[str]:
    return [record.value["text"] for record in read_files([str(path)])]


def test_every_suffix_has_a_reader() -> None:
    plain = {suffix for suffix in SUFFIXES if not suffix.endswith(tuple(PACKINGS))}
    assert plain == _READERS.keys() | _COLUMN_READERS.keys()


LAYOUTS = [
    (["a.csv", "b.jsonl"], "", "", ["a.csv", "b.jsonl"]),
    (["train.csv"], "", "", ["train.csv"]),
    (["data/train-00000-of-00002.csv", "data/train-00001-of-00002.csv"], "", "", "all"),
    (["data/train_sft-00000-of-00001.csv", "data/test_sft-00000-of-00001.csv"], "", "train_sft",
     ["data/train_sft-00000-of-00001.csv"]),
    (["train.csv", "test.csv"], "", "test", ["test.csv"]),
    (["my_train_1.csv", "my-val.csv", "eval.csv"], "", "validation", ["my-val.csv"]),
    (["train/a.csv", "train/b.csv", "dev/a.csv"], "", "train", ["train/a.csv", "train/b.csv"]),
    (["data/main/tr1.csv", "data/main/tr2.csv", "data/main/te-1.csv", "extra/x/y.csv"], CARD, "main/train",
     ["data/main/tr1.csv", "data/main/tr2.csv"]),
    (["data/main/tr1.csv", "data/main/te-1.csv", "extra/x/y.csv"], CARD, "test", ["data/main/te-1.csv"]),
    (["data/main/tr1.csv", "data/main/te-1.csv", "extra/x/y.csv", "extra/z.csv"], CARD, "other/",
     ["extra/x/y.csv", "extra/z.csv"]),
]  # fmt: skip


@pytest.mark.parametrize(("names", "card", "choice", "expected"), LAYOUTS)
def test_a_directory_in_the_layout_of_the_hub(
    names: list[str], card: str, choice: str, expected: list[str] | str, tmp_path: Path
) -> None:
    fill(tmp_path, names, card)
    expected = names if expected == "all" else list(expected)
    assert texts(f"{tmp_path}#{choice}" if choice else tmp_path) == expected


@pytest.mark.parametrize(("names", "card", "choice", "expected"), LAYOUTS)
def test_the_library_datasets_means_the_same_files(
    names: list[str], card: str, choice: str, expected: list[str] | str, tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the library datasets")
    fill(tmp_path, names, card)
    if len({Path(name).suffix for name in names}) > 1:
        pytest.skip("datasets reads one kind of file at a time")
    config, _, split = choice.rpartition("/")
    builder = datasets.load_dataset_builder(str(tmp_path), config or None, cache_dir=str(tmp_path / ".cache"))
    found = [Path(file).relative_to(tmp_path).as_posix() for file in builder.config.data_files[split or "train"]]
    assert sorted(found) == sorted(names if expected == "all" else expected)


@pytest.mark.parametrize(
    ("names", "card", "choice", "words"),
    [
        (["train.csv", "test.csv"], "", "", ("several splits", "train, test", "#t")),
        (["train.csv", "test.csv"], "", "tset", ("no such split", "#test")),
        (["train.csv", "faq.csv"], "", "", ("others to none", "train.csv and faq.csv", "#train")),
        (["a.csv"], "", "x/train", ("no configurations", "x")),
        (["data/main/tr1.csv", "data/main/te-1.csv", "extra/y.csv"], CARD, "third/", ("no such configuration",)),
        (["data/main/tr1.csv", "extra/y.csv"], CARD, "main/train", ("no file fits a pattern", "te-?.csv")),
        (["a.csv"], "---\nconfigs: 7\n---\n", "", ("not a list of mappings",)),
        (["a.csv"], "---\nconfigs: [\n---\n", "", ("not YAML",)),
        (["rows.csv", "rows.jsonl"], "", "", ("one name in two formats", "rows.csv and rows.jsonl")),
        (["rows.csv", "notes.md"], "", "", ("beside plain text", "rows.csv and notes.md")),
        (["deep/rows.csv", "deep/notes.txt"], "", "", ("beside plain text",)),
        ([], "# only about it\n", "", ("no data files", "README.md")),
        (["a.pdf"], "", "", ("no data files", "a.pdf")),
    ],
)
def test_what_could_be_meant_in_two_ways_is_refused(
    names: list[str], card: str, choice: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    fill(tmp_path, names, card)
    with pytest.raises(UserError) as caught:
        texts(f"{tmp_path}#{choice}" if choice else tmp_path)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert caught.value.fix


def test_without_the_check_the_test_rows_would_be_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["train.csv", "test.csv"]
    with pytest.raises(UserError):
        choose(names, {}, None, None, "here")
    monkeypatch.setattr(layout, "_WORDS", {})
    assert "test.csv" in choose(names, {}, None, None, "here")


def test_unknown_kinds_are_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path, ["a.csv", "b.xlsx", "LICENSE", ".hidden.csv"], "# about\n")
    with caplog.at_level(logging.WARNING):
        assert texts(tmp_path) == ["a.csv"]
    assert "b.xlsx" in caplog.text
    assert "LICENSE" not in caplog.text


def test_a_readme_cannot_point_outside(tmp_path: Path) -> None:
    fill(tmp_path, ["secret.csv", "set/a.csv"])
    for pattern in ("../secret.csv", str(tmp_path / "secret.csv"), "**/../../secret.csv"):
        (tmp_path / "set" / "README.md").write_text(f"---\nconfigs:\n- data_files: '{pattern}'\n---\n")
        with pytest.raises(UserError, match="no file fits"):
            texts(tmp_path / "set")


# Data sets saved by the library `datasets`.


def saved(folder: Path, splits: bool) -> Path:
    datasets = pytest.importorskip("datasets", reason="needs the library datasets")
    made = {name: datasets.Dataset.from_dict({"text": [f"{name} {n}" for n in range(5)]}) for name in ("train", "test")}
    if splits:
        datasets.DatasetDict(made).save_to_disk(str(folder), num_shards={"train": 2, "test": 1})
    else:
        made["train"].save_to_disk(str(folder), num_shards=2)
    return folder


def test_a_saved_data_set(tmp_path: Path) -> None:
    assert texts(saved(tmp_path / "set", splits=False)) == [f"train {n}" for n in range(5)]
    both = saved(tmp_path / "both", splits=True)
    assert texts(f"{both}#test") == [f"test {n}" for n in range(5)]
    with pytest.raises(UserError, match="several splits"):
        texts(both)
    with pytest.raises(UserError, match="no such split"):
        texts(f"{both}#third")


def test_a_shard_that_is_missing_is_not_passed_over(tmp_path: Path) -> None:
    folder = saved(tmp_path / "set", splits=False)
    (folder / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(UserError, match="No such file"):
        texts(folder)


@pytest.mark.parametrize("name", ["../../secret.arrow", "/etc/passwd", ".hidden", 7])
def test_a_saved_list_cannot_point_outside(name: object, tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(UserError, match="not the name of a file"):
        texts(tmp_path)


# The hub: a server on this machine that knows the two routes which are needed.

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    folder: Path
    requests: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.requests.append(path)
        if path == "/api/datasets/o/n/revision/main":
            self.answer(json.dumps({"id": "o/n", "sha": COMMIT, "siblings": []}).encode())
        elif path == f"/api/datasets/o/n/tree/{COMMIT}":
            names = sorted(p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file())
            sizes = [(self.folder / name).stat().st_size for name in names]
            rows = [{"type": "file", "path": n, "size": s, "oid": n} for n, s in zip(names, sizes, strict=True)]
            self.answer(json.dumps(rows).encode())
        elif path.startswith(start := f"/datasets/o/n/resolve/{COMMIT}/"):
            self.answer((self.folder / path.removeprefix(start)).read_bytes())
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()

    def answer(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hash(content):x}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., type[Hub]]:
    """Starts a hub that has the data set o/n in a folder, with an empty cache."""
    from huggingface_hub import constants

    def start(folder: Path) -> type[Hub]:
        handler = type("Here", (Hub,), {"folder": folder, "requests": []})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        return handler

    return start


def test_a_hub_data_set_is_fetched_once_and_read_offline_after(
    hub: Callable[..., type[Hub]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["data/main/tr1.csv", "data/main/tr2.csv", "data/main/te-1.csv", "extra/y.csv"]
    server = hub(fill(tmp_path / "set", [*names, "n.py"], CARD))
    records = list(read_files(["hub:o/n#main/train"]))
    assert [record.value["text"] for record in records] == names[:2]
    assert [record.file for record in records] == [f"hub:o/n@{COMMIT[:12]}/{name}" for name in names[:2]]
    assert not [path for path in server.requests if path.endswith(("n.py", "te-1.csv", "y.csv"))], "nothing unneeded"
    assert [entry["path"] for entry in fingerprint(["hub:o/n#train"])] == [record.file for record in records]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    server.requests.clear()
    assert texts("hub:o/n#main/train") == names[:2]
    with pytest.raises(UserError, match="offline"):
        texts("hub:o/n#test")
    with pytest.raises(UserError, match="not in the local cache"):
        texts("hub:o/other")
    assert server.requests == []


def test_a_cache_that_lost_a_file_is_not_read_in_part(
    hub: Callable[..., type[Hub]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub(fill(tmp_path / "set", ["train/a.csv", "train/b.csv"]))
    (_, place), _ = hub_files("hub:o/n", SUFFIXES, frozenset(TEXT))
    place.unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="only in part"):
        texts("hub:o/n")


def test_text_beside_rows_on_the_hub_is_about_them(
    hub: Callable[..., type[Hub]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub(fill(tmp_path / "set", ["a.csv", "terms.txt", "docs/more.md"]))
    assert texts("hub:o/n") == ["a.csv"]
    assert "terms.txt" in caplog.text


def test_a_script_is_never_fetched(hub: Callable[..., type[Hub]], tmp_path: Path) -> None:
    server = hub(fill(tmp_path / "set", ["n.py"], "# about\n"))
    with pytest.raises(UserError, match=r"made by a script[\s\S]*refs/convert/parquet"):
        texts("hub:o/n")
    assert not [path for path in server.requests if path.endswith(".py")]


@pytest.mark.parametrize("spec", ["hub:", "hub:a b", "hub:@main", "hub:o/n/x", "hub:../..", "hub:o/n@"])
def test_a_name_that_is_none(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="not the name of a hub data set"):
        read_files([spec])


def test_the_hub_says_that_there_is_none(hub: Callable[..., type[Hub]], tmp_path: Path) -> None:
    hub(tmp_path)
    with pytest.raises(UserError, match="no such data set"):
        texts("hub:o/misspelt")


def test_the_hubs_own_parquet_copies() -> None:
    names = ["main/train/0000.parquet", "main/train/0001.parquet", "main/test/0000.parquet", "b/train/0000.parquet"]
    assert layout.converted(names, "main", "train", "hub:o/n") == names[:2]
    with pytest.raises(UserError, match="several configurations"):
        layout.converted(names, None, None, "hub:o/n")


def test_data_files_are_where_the_bytes_lie(tmp_path: Path) -> None:
    fill(tmp_path, ["train.csv", "test.csv"])
    assert data_files(f"{tmp_path}#test") == [tmp_path / "test.csv"]
    shutil.rmtree(tmp_path)
