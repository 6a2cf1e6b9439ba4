"""Rows and files that are hostile or say something else than they seem to: one clear error, or a defined right result."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from whet.base.errors import UserError
from whet.cli import run
from whet.data.batch.ledger import Ledger
from whet.data.collect import Sides, collect
from whet.data.config import Data
from whet.data.format.recognise import recognise
from whet.data.format.standardise import Dropped, standardise
from whet.data.labels import alike, encode_texts, separates, task_of
from whet.data.named_files import fingerprints
from whet.data.read import unpack
from whet.data.read.files import files_of
from whet.data.read.read import read_files
from whet.recipe import parse

PAIR = '{"prompt": "a", "completion": "b"}\n'
CLASSES = "text,label\n" + "".join(f"row {n},{'x' if n % 2 else 'y'}\n" for n in range(8))


def packed(pack: Callable[[bytes], bytes]) -> bytes:
    return pack(PAIR.encode() * 30_000)


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("a.jsonl", PAIR)
    return out.getvalue()


# name: suffix, content, overrides, words that the error has to hold.
REFUSED: dict[str, tuple[str, str | bytes | Callable[[], bytes], tuple[str, ...], tuple[str, ...]]] = {
    "gzip_bomb": (".jsonl.gz", lambda: packed(gzip.compress), (), ("unpacks to over 100 times",)),
    "xz_bomb": (".jsonl.xz", lambda: packed(lzma.compress), (), ("unpacks to over 100 times",)),
    "bz2_bomb": (".jsonl.bz2", lambda: packed(bz2.compress), (), ("unpacks to over 100 times",)),
    "bomb_of_an_array": (".json.gz", lambda: gzip.compress(b"[" + b'{"text":"a"},' * 60_000 + b"1]"), (), ("unpacks",)),
    "bomb_of_a_table": (".csv.gz", lambda: gzip.compress(b"text,label\n" + b"a,b\n" * 200_000), (), ("unpacks",)),
    "bomb_of_a_text": (".txt.gz", lambda: gzip.compress(b"a" * 1_000_000), (), ("unpacks",)),
    "endless_line": (".jsonl", b'{"text": "' + b"a" * 1_000_000, (), ("a line of over",)),
    "endless_cell": (".csv", b'text,label\n"' + b"a" * 1_000_000, (), ("over",)),
    "zip": (".jsonl", zipped, (), ("a zip archive",)), "pickle": (".jsonl", b"\x80\x04\x95abc", (), ("pickle",)),
    "empty": (".jsonl", b"", (), ("empty",)), "blank": (".jsonl", b"\n\n", (), ("no rows",)),
    "number": (".jsonl", "3\n", (), ("must be a JSON object",)), "null": (".jsonl", "null\n", (), ("JSON object",)),
    "deep": (".jsonl", '{"text": ' + "[" * 100_000 + "\n", (), ("nested too deeply",)),
    "digits": (".jsonl", '{"text": ' + "9" * 6000 + "}\n", (), ("a number too long",)),
    "nan": (".jsonl", '{"text": NaN}\n', (), ("not a JSON number",)),
    "infinite": (".jsonl", '{"text": "a", "label": Infinity}\n', (), ("not a JSON number",)),
    "surrogate": (".jsonl", '{"text": "\\ud800"}\n', (), ("surrogate",)),
    "nul": (".jsonl", '{"prompt": "a\\u0000", "completion": "b"}\n', (), ("NUL",)),
    "twice": (".jsonl", '{"text": "a", "text": "b"}\n', (), ("duplicate key",)),
    "latin": (".jsonl", b'{"text": "caf\xe9"}\n', (), ("UTF-8",)),
    "utf16": (".jsonl", PAIR.encode("utf-16"), (), ("UTF-16",)),
    "web_page": (".jsonl", "<!DOCTYPE html><html>", (), ("web page",)),
    "lfs": (".jsonl", "version https://git-lfs.github.com/spec/v1\n", (), ("git-lfs",)),
    "python": (".jsonl", "{'text': 'a'}\n", (), ("single quotes",)),
    "comma": (".jsonl", '{"text": "a"},\n', (), ("trailing comma",)),
    "cut": (".jsonl", '{"text": "a', (), ("ends in the middle",)),
    "cut_gzip": (".jsonl.gz", gzip.compress(PAIR.encode() * 99)[:-20], (), ("cut off",)),
    "wrong_gzip": (".jsonl.gz", PAIR, (), ("not what the file's name says",)),
    "flipped_gzip": (".jsonl.gz", gzip.compress(PAIR.encode())[:-6] + b"abcdef", (), ("damaged",)),
    "escape_as_field": (".jsonl", '{"\\u001b[2J": "a"}\n', (), ("do not fit",)),
    "huge_names": (".jsonl", json.dumps({"x" * 100_000: "a"}) + "\n", (), ("do not fit",)),
    "many_names": (".jsonl", json.dumps({f"f{n}": 1 for n in range(20_000)}) + "\n", (), ("do not fit",)),
    "role": (".jsonl", '{"messages": [{"role": "root", "content": "a"}]}\n', (), ("unknown role",)),
    "escape_as_role": (".jsonl", '{"messages": [{"role": "\\u001b]0;x\\u0007", "content": "a"}]}\n', (), ("unknown role",)),
    "no_answer": (".jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n', (), ("no assistant turn",)),
    "two_users": (".jsonl", '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}, '
                  '{"role": "assistant", "content": "c"}]}\n', (), ("two user turns",)),
    "late_system": (".jsonl", '{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}, '
                    '{"role": "assistant", "content": "c"}]}\n', (), ("system message is not the first",)),
    "tool_alone": (".jsonl", '{"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}, '
                   '{"role": "assistant", "content": "c"}]}\n', (), ("tool",)),
    "images": (".jsonl", '{"prompt": "a", "completion": "b", "images": ["x.png"]}\n', (), ("images",)),
    "blank_answer": (".jsonl", '{"prompt": "a", "completion": " "}\n', (), ("nothing to learn", "data.empty=drop")),
    "equal_sides": (".jsonl", '{"prompt": "a", "chosen": "b", "rejected": "b"}\n', ("data.preference=chosen",),
                    ("both answers are the same",)),
    "preference": (".jsonl", '{"prompt": "a", "chosen": "b", "rejected": "c"}\n', ("data.preference=error",),
                   ("data.preference=chosen",)),
    "all_invalid": (".jsonl", '{"prompt": 1, "completion": "b"}\n' * 3, ("data.invalid=drop",), ("no row keeps",)),
    "names_as_values": (".csv", CLASSES, ("model.task=regression",), ("this is no value to learn",)),
    "decimal_comma": (".csv", 'text,label\na,"3,5"\nb,1\n', ("model.task=regression",), ("decimal comma", "3.5")),
    "values_as_text": (".csv", "text,label\na,3.5\nb,1\n", (), ("model.task=regression", "model.task=classification")),
    "not_a_value": (".csv", "text,label\na,nan\nb,1\n", ("model.task=regression",), ("no value to learn",)),
    "endless_value": (".csv", "text,label\na,1e999\nb,1\n", ("model.task=regression",), ("no value to learn",)),
    "one_label": (".csv", "text,label\na,x\nb,x\n", (), ("same label",)),
    "mixed_labels": (".jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": "x"}\n', (), ("several kinds",)),
    "unnamed_index": (".csv", ",text,label\nfirst,a,x\nsecond,b,y\n", (), ("column 1", "has no name")),
    "two_unnamed": (".csv", ",,label\n0,a,x\n1,b,y\n", (), ("has no name",)),
    "name_twice": (".csv", "text,text\na,b\n", (), ("one name",)),
    "semicolons": (".csv", "text;label\na;b\n", (), ("semicolons",)),
    "too_many_cells": (".csv", "text,label\na,b,c\n", (), ("too many cells",)),
    "open_quote": (".csv", 'text,label\n"a,b\n', (), ("not closed",)),
    "unknown_kind": (".exe", b"MZ", (), ("unknown kind of file",)),
    "no_such_column": (".jsonl", PAIR, ("data.columns.prompt=question",), ("no row has the field question",)),
    "no_such_group": (".jsonl", PAIR * 3, ("data.group=who", "data.val_size=0.5"), ("no such column",)),
    "all_held_out": (".jsonl", PAIR, ("data.val_size=1",), ("no row is left",)),
    "scores_alone": (".jsonl", PAIR, ("data.least_score=3",), ("no effect without data.scores",)),
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(unpack, "UNPACKED_AT_LEAST", 200_000)  # so that the bombs may be small
    for reader in ("jsonl", "table"):
        monkeypatch.setattr(f"whet.data.read.{reader}.MAX_ROW_BYTES", 400_000)
    return tmp_path


@pytest.mark.parametrize("name", REFUSED)
def test_hostile_data_is_refused(name: str, place: Path) -> None:
    """Before a tokenizer or a model is opened; the command line turns every such error into exit code 2."""
    suffix, content, overrides, mentions = REFUSED[name]
    content = content() if callable(content) else content
    path = place / f"bad{suffix}"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError) as caught:
        read(path, *overrides)
    message = str(caught.value)
    assert all(words in message for words in mentions), message
    assert caught.value.fix
    assert len(message) < 2000
    assert not any(character in message for character in "\x1b\x07\u202e\r")


def read(path: Path, *overrides: str) -> Sides:
    """The sides of the rows in a file and their task, as far as they are known without a tokenizer."""
    usual = ["data.val_size=0", "data.preference=check"]
    recipe = parse(None, [f"data.dataset={json.dumps(str(path))}", *usual, *overrides]).recipe
    ledger = Ledger(files=fingerprints(recipe.data))
    sides = collect(recipe.data, path.parent / "examples", ledger, numbers=recipe.model.task == "regression")
    if sides.kind.name == "classification":
        task_of(sides.train, [], recipe.model.task)
    ledger.rows_train = ledger.supervised_tokens = len(sides.train)
    ledger.gate()
    return sides


@pytest.mark.parametrize("name", ["gzip_bomb", "role", "values_as_text"])
def test_the_command_ends_with_code_2(name: str, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    suffix, content, overrides, mentions = REFUSED[name]
    content = content() if callable(content) else content
    (place / f"bad{suffix}").write_bytes(content.encode() if isinstance(content, str) else content)
    assert run(["data", "check", f"bad{suffix}", "--fast", *overrides]) == 2
    out, message = capfd.readouterr()
    assert out == ""
    assert all(words in message for words in mentions)


def test_a_table_of_more_rows_than_bytes_is_refused(place: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"text": pa.DictionaryArray.from_arrays(np.zeros(300_000, np.int8), ["a"])})
    pq.write_table(table, "rows.parquet")
    with pa.OSFile("rows.arrow", "wb") as sink, pa.ipc.new_file(sink, pa.schema([("text", pa.null())])) as writer:
        writer.write_batch(pa.record_batch({"text": pa.nulls(1 << 20)}))
    for name in ("rows.parquet", "rows.arrow"):
        with pytest.raises(UserError, match="unpacks to over 100 times its size"):
            read(place / name)


def test_a_packed_file_of_usual_rows_is_read() -> None:
    unpack.check_growth(8 << 20, 1, "small files may be anything")
    unpack.check_growth(900 << 20, 10 << 20, "rows pack well")


def links(place: Path) -> None:
    (place / "a.jsonl").write_text(PAIR)
    os.link(place / "a.jsonl", place / "hard.jsonl")
    (place / "soft.jsonl").symlink_to("a.jsonl")
    (place / "folder").mkdir()
    (place / "folder" / "a.jsonl").symlink_to("../a.jsonl")
    (place / "other.jsonl").write_text(PAIR.replace('"a"', '"c"'))


TWICE = {
    "list": ["a.jsonl", "a.jsonl"], "hard_link": ["a.jsonl", "hard.jsonl"], "soft_link": ["a.jsonl", "soft.jsonl"],
    "glob": ["a.jsonl", "a*.jsonl"], "globs": ["[ab].jsonl", "a.*"], "folder": ["folder", "a.jsonl"],
    "dotted": ["a.jsonl", "./a.jsonl"], "through": ["a.jsonl", "folder/../a.jsonl"], "one_glob": ["*.jsonl"],
}  # fmt: skip


@pytest.mark.parametrize("name", TWICE)
def test_a_file_that_is_named_twice_is_refused(name: str, place: Path) -> None:
    links(place)
    with pytest.raises(UserError, match="named twice"):
        read(place / "a.jsonl", f"data.dataset={json.dumps(TWICE[name])}")


@pytest.mark.parametrize("setting", ["replay_dataset", "added_dataset"])
def test_a_file_that_is_learned_from_twice_is_refused(setting: str, place: Path) -> None:
    links(place)
    with pytest.raises(UserError, match="named twice"):
        read(place / "a.jsonl", f"data.{setting}=hard.jsonl")


@pytest.mark.parametrize("setting", ["eval_dataset", "test_dataset"])
def test_a_file_that_is_learned_and_held_out_is_said(setting: str, place: Path) -> None:
    links(place)
    data = Data(dataset="a.jsonl", **{setting: "soft.jsonl"})
    ledger = Ledger(files=fingerprints(data))
    collect(data, place / "examples", ledger)
    assert f"is learned from (data.dataset) and measured on (data.{setting})" in ledger.notes[0]


# name: file, content, overrides, a sentence that is said.
SAID: dict[str, tuple[str, str, tuple[str, ...], str]] = {
    "pos_and_pos_": ("a.csv", CLASSES + "more,x \n", (), "'x' and 'x ' are two classes that read alike"),
    "case": ("a.csv", CLASSES + "more,X\n", (), "two classes that read alike"),
    "intent": ("a.csv", "text,intent\na,x\nb,y\nc,x\nd,y\n", (), "data.columns.label=intent learns it as a label"),
    "tag": ("a.jsonl", '{"instruction": "a", "output": "b", "tag": true}\n{"instruction": "c", "output": "d", "tag": false}\n',
            (), "answers marked false are learned too"),
    "dropped": ("a.jsonl", PAIR + '{"prompt": 3, "completion": "b"}\n', ("data.invalid=drop",), "1 rows are dropped"),
    "pandas": ("a.csv", ",text,label\n" + "".join(f"{n},row {n},{'xy'[n % 2]}\n" for n in range(8)), (), "2 labels"),
    "tokenizer": ("a.jsonl", PAIR, ("model.path=builtin:tiny",), "rows to learn from"),
}  # fmt: skip


@pytest.mark.parametrize("name", SAID)
def test_what_is_probably_not_meant_is_said(name: str, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file, content, overrides, sentence = SAID[name]
    (place / file).write_text(content)
    assert run(["data", "check", file, "--fast", *overrides]) == 0
    said = "".join(capfd.readouterr())
    assert sentence in said
    assert ("tokens as builtin:tiny counts" in said) == (name != "tokenizer")


def test_folders_below_are_said(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    (place / "rows" / "more").mkdir(parents=True)
    (place / "rows" / "a.jsonl").write_text(PAIR)
    (place / "rows" / "more" / "b.jsonl").write_text(PAIR)
    files_of(str(place / "rows"))
    assert "1 data files in folders below it are left out, more/b.jsonl for one" in caplog.text


def tool(name: str, **kinds: str) -> dict[str, Any]:
    properties = {key: {"type": kind} for key, kind in kinds.items()}
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


def calling(name: str, arguments: Any, *tools: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    turns = [
        {"role": "user", "content": "q", "tool_calls": None},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    return {"messages": turns, "tools": list(tools)}


WEATHER, MAIL = tool("weather", city="string"), tool("mail", to="string", body="string")
NESTED = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {
    "where": {"type": "object", "properties": {"year": {"type": "integer"}}},
    "all": {"type": "array", "items": {"type": "object", "properties": {"id": {"type": "string"}}}}}}}}  # fmt: skip
UNIONS: dict[str, tuple[list[dict[str, Any]], list[Any], int]] = {
    "two_tools": ([calling("weather", {"city": "Oslo"}, WEATHER), calling("mail", {"to": "x", "body": "y"}, MAIL)],
                  [{"city": "Oslo"}, {"to": "x", "body": "y"}], 0),
    "meant": ([calling("weather", {"city": "Oslo"}, WEATHER), calling("mail", {"to": "x", "body": None}, MAIL)],
              [{"city": "Oslo"}, {"to": "x", "body": None}], 1),
    "nested": ([calling("weather", {"city": "Oslo"}, WEATHER),
                calling("find", {"where": {"year": 1}, "all": [{"id": "a"}]}, NESTED)],
               [{"city": "Oslo"}, {"where": {"year": 1}, "all": [{"id": "a"}]}], 0),
    "undefined": ([calling("weather", {"city": "Oslo"}), calling("mail", {"to": "x"})], [{"city": "Oslo"}, {"to": "x"}], 0),
    "json": ([calling("weather", '{"city": "Oslo", "to": null}', WEATHER)], [{"city": "Oslo", "to": None}], 0),
    "both_tools": ([calling("weather", {"city": "Oslo"}, WEATHER, MAIL), calling("mail", {"to": "x", "body": "y"}, WEATHER, MAIL)],
                   [{"city": "Oslo"}, {"to": "x", "body": "y"}], 0),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["parquet", "arrow", "jsonl"])
@pytest.mark.parametrize("name", UNIONS)
def test_nulls_that_columns_put_in_are_absent(name: str, kind: str, place: Path) -> None:
    """In JSONL nothing was put in, and nothing is taken out."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows, expected, meant = UNIONS[name]
    path = place / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    records, dropped = list(read_files([str(path)])), Dropped()
    examples = list(standardise(records, recognise(records, {}), {}, dropped=dropped))
    assert [one.messages[1].tool_calls[0]["function"]["arguments"] for one in examples if one.messages] == expected
    assert "null" not in "".join(one.tools or "" for one in examples)
    assert dropped.nulls.meant == (0 if kind == "jsonl" else meant)


def test_values_in_text_are_values_of_a_regression(place: Path) -> None:
    (place / "a.csv").write_text("text,label\na,3.5\nb, 1\nc,-2e-1\nd,.5\n")
    data = Data(dataset=str(place / "a.csv"), val_size=0)
    sides = collect(data, place / "examples", Ledger(files=fingerprints(data)), numbers=True)
    assert [one.label for one in sides.train] == [3.5, 1.0, -0.2, 0.5]


def test_a_pair_has_a_separator_also_where_the_tokenizer_has_none() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(Path(__file__).parents[2] / "whet" / "builtin" / "tiny"))
    assert not separates(tokenizer)
    (pair,) = encode_texts(tokenizer, ["one"], ["two"])
    assert tokenizer.decode(pair).startswith("one\n\ntwo")
    assert list(alike(["a", "b", "c"])) == []
