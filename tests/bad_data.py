"""Data files that must be refused, one kind of damage each, and the words without which the refusal is of no use.

Used twice: by `test_bad_data.py` on the reading functions and by the test of the command line.
"""

from __future__ import annotations

import gzip
import json
import lzma
from dataclasses import dataclass


@dataclass(frozen=True)
class BadFile:
    """name + suffix make the file's name. mentions: each occurs in the message. row: what the error's row must be."""

    name: str
    suffix: str
    content: bytes
    mentions: tuple[str, ...]
    row: int | None


GOOD = b'{"prompt": "1 + 1?", "completion": "2"}\n'
USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}


def rows(*values: object) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def chats(*turns: object) -> bytes:
    """A good conversation, then one of `turns`: the complaint is about row 2."""
    return rows({"messages": [USER, ANSWER]}, {"messages": list(turns)})


ENCODING = [
    BadFile(
        "latin1", ".jsonl", GOOD + b'{"prompt": "caf\xe9", "completion": "x"}\n', ("invalid UTF-8", "offset 55"), 2
    ),
    BadFile("cp949", ".jsonl", GOOD * 2 + '{"prompt": "안녕"}\n'.encode("cp949"), ("offset 92", "0xbe", "iconv"), 3),
    BadFile("utf16", ".jsonl", GOOD.decode().encode("utf-16"), ("UTF-16", "iconv"), None),
    BadFile("cut_character", ".txt", "안녕".encode()[:-1], ("invalid UTF-8", "offset 3", "line 1"), None),
    BadFile("bad_byte_in_array", ".json", b"[" + GOOD + b',{"prompt": "\xff"}]', ("offset 54", "line 2"), None),
    BadFile("encoded_surrogate", ".jsonl", b'{"prompt": "\xed\xa0\x80", "completion": "x"}\n', ("UTF-8", "0xed"), 1),
    BadFile(
        "escaped_surrogate",
        ".jsonl",
        GOOD + b'{"prompt": "a\\ud83d", "completion": "x"}\n',
        ("surrogate", "ud83d", "prompt"),
        2,
    ),
    BadFile("surrogate_key", ".jsonl", b'{"a\\udc00": 1}\n', ("surrogate", "\\udc00"), 1),
    BadFile("nul", ".jsonl", GOOD + b'{"prompt": "a", "completion": "b\\u0000"}\n', ("NUL", "completion"), 2),
    BadFile("nul_in_text", ".txt", b"one\0two", ("NUL", "text"), 1),
]

CONTAINER = [
    BadFile("zero_bytes", ".jsonl", b"", ("empty", "0 bytes"), None),
    BadFile("blank_lines", ".jsonl", b"\n\n  \n", ("no rows",), None),
    BadFile("blank_text", ".txt", b" \n", ("no rows",), None),
    BadFile("empty_array", ".json", b"[]", ("no rows",), None),
    BadFile(
        "lfs_pointer",
        ".jsonl",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n",
        ("git-lfs pointer", "git lfs pull"),
        None,
    ),
    BadFile(
        "lfs_pointer_packed", ".jsonl.xz", b"version https://git-lfs.github.com/spec/v1\n", ("git-lfs pointer",), None
    ),
    BadFile("web_page", ".jsonl", b"<!DOCTYPE html>\n<html></html>\n", ("web page", "raw link"), None),
    BadFile("unknown_suffix", ".xlsx", b"PK\x03\x04", ("unknown kind of file", ".xlsx", ".jsonl"), None),
    BadFile("no_suffix", "", GOOD, ("unknown kind of file", "(none)"), None),
    BadFile("plain_named_gz", ".jsonl.gz", GOOD, ("gzip data", "remove .gz"), None),
    BadFile("xz_named_gz", ".jsonl.gz", lzma.compress(GOOD), ("xz data", "gzip data", "ends in .xz"), None),
    BadFile("gz_named_plain", ".jsonl", gzip.compress(GOOD), ("gzip data", "ends in .gz"), None),
    BadFile("parquet_named_plain", ".json", b"PAR1\x15\x04", ("Parquet",), None),
    BadFile("zip_named_plain", ".txt", b"PK\x03\x04....", ("zip archive", "unpack"), None),
    BadFile("gz_cut", ".jsonl.gz", gzip.compress(GOOD * 999)[:-12], (".gz data", "cut off", "download"), None),
    BadFile("xz_cut", ".jsonl.xz", lzma.compress(GOOD * 999)[:-40], (".xz data", "cut off", "download"), None),
    BadFile("gz_bit_flipped", ".jsonl.gz", gzip.compress(GOOD)[:-8] + b"\0" * 8, (".gz data", "damaged"), None),
    BadFile("xz_garbage_inside", ".jsonl.xz", lzma.compress(GOOD)[:20] + b"\xaa" * 60, (".xz data", "damaged"), None),
    BadFile("gz_of_nothing", ".jsonl.gz", gzip.compress(b""), ("no rows",), None),
]

SYNTAX = [
    BadFile("list_row", ".jsonl", GOOD + b"[1, 2]\n", ("JSON object", "list of 2"), 2),
    BadFile("string_row", ".jsonl", GOOD + b'"hello"\n', ("JSON object", "string 'hello'"), 2),
    BadFile("null_row", ".jsonl", GOOD + b"null\n", ("JSON object", "null"), 2),
    BadFile("array_of_strings", ".json", b'["a", "b"]', ("JSON object", "string 'a'"), 1),
    BadFile("scalar_file", ".json", b"42", ("JSON object", "number 42"), None),
    BadFile(
        "nan",
        ".jsonl",
        GOOD + b'{"prompt": "a", "meta": {"score": [1, NaN]}}\n',
        ("not a JSON number", "meta.score[1]", "nan"),
        2,
    ),
    BadFile("infinity", ".jsonl", b'{"prompt": "a", "score": -Infinity}\n', ("not a JSON number", "score", "-inf"), 1),
    BadFile(
        "duplicate_key",
        ".jsonl",
        GOOD + b'{"prompt": "a", "prompt": "b", "completion": "c"}\n',
        ("duplicate key", "field prompt"),
        2,
    ),
    BadFile("comma_after_object", ".jsonl", b'{"text": "a"},\n{"text": "b"}\n', ("trailing comma",), 1),
    BadFile("comma_inside_object", ".jsonl", GOOD + b'{"prompt": "a",}\n', ("trailing comma", "column"), 2),
    BadFile("comma_in_array", ".json", b'[{"text": "a"}, ]', ("trailing comma",), 2),
    BadFile("truncated_line", ".jsonl", GOOD + b'{"prompt": "1 + 1?", "compl', ("truncated", "again"), 2),
    BadFile("truncated_array", ".json", b"[" + GOOD + b"," + GOOD, ("cut off", "end of file"), 2),
    BadFile("truncated_in_item", ".json", b"[" + GOOD + b',{"prompt": "a"', ("the JSON ends",), 2),
    BadFile("missing_comma", ".json", b"[" + GOOD + GOOD + b"]", ("broken", "a comma"), 1),
    BadFile("after_array", ".json", b"[" + GOOD + b"] true", ("after the end", "true"), 1),
    BadFile("two_objects_on_a_line", ".jsonl", b'{"text": "a"}{"text": "b"}\n', ("several objects",), 1),
    BadFile("words_after_object", ".jsonl", GOOD + b'{"text": "a"} # note\n', ("text after the object", "# note"), 2),
    BadFile("python_dict", ".jsonl", b"{'prompt': 'a', 'completion': 'b'}\n", ("single quotes", "json.dumps"), 1),
    BadFile("raw_tab", ".jsonl", GOOD + b'{"text": "a\tb"}\n', ("control character", "\\t"), 2),
    BadFile("several_lines", ".jsonl", b'{\n  "text": "a"\n}\n', ("several lines", ".json file"), 1),
    BadFile(
        "too_deep", ".jsonl", GOOD + b'{"text": ' + b"[" * 99_999 + b"]" * 99_999 + b"}\n", ("nested too deeply",), 2
    ),
    BadFile("endless_number", ".jsonl", b'{"text": ' + b"9" * 5000 + b"}\n", ("a number too long", "as a string"), 1),
    BadFile(
        "two_lists",
        ".json",
        rows({"train": [{"text": "a"}], "test": [{"text": "b"}]}),
        ("several lists", "train, test"),
        None,
    ),
]

FORMAT = [
    BadFile(
        "unknown_fields",
        ".jsonl",
        rows({"question": "a", "answer": "b"}),
        ("question, answer", "data.columns.prompt=question data.columns.completion=answer", "sharegpt"),
        1,
    ),
    BadFile("misspelt_field", ".jsonl", rows({"instruction": "a", "ouput": "b"}), ("data.columns.output=ouput",), 1),
    BadFile("no_fields", ".jsonl", rows({}), ("empty object",), 1),
    BadFile(
        "two_formats",
        ".jsonl",
        rows({"instruction": "a", "output": "b", "prompt": "c", "completion": "d"}),
        ("several formats", "alpaca, prompt_completion", "data.columns"),
        1,
    ),
    BadFile(
        "field_missing_later",
        ".jsonl",
        GOOD + rows({"prompt": "a", "completoin": "b"}),
        ("completion is missing", "did you mean the field completoin"),
        2,
    ),
    BadFile(
        "other_format_later", ".jsonl", GOOD * 150 + rows({"text": "a"}), ("prompt is missing", "fields text"), 151
    ),
]

VALUE = [
    BadFile(
        "number", ".jsonl", GOOD + rows({"prompt": "a", "completion": 4}), ("completion", "number 4", "a string"), 2
    ),
    BadFile("null", ".jsonl", GOOD + rows({"prompt": None, "completion": "b"}), ("prompt", "null", "a string"), 2),
    BadFile(
        "nested",
        ".jsonl",
        rows({"instruction": "a", "output": {"text": "b"}}),
        ("output", "object with fields text"),
        1,
    ),
    BadFile("boolean", ".jsonl", rows({"instruction": "a", "input": False, "output": "b"}), ("input", "false"), 1),
    BadFile(
        "blank_answer",
        ".jsonl",
        GOOD + rows({"prompt": "a", "completion": " \n"}),
        ("nothing to learn", "completion", "data.empty=drop"),
        2,
    ),
    BadFile(
        "bad_history",
        ".jsonl",
        rows({"instruction": "a", "output": "b", "history": [["c"]]}),
        ("history[0]", "list of 1"),
        1,
    ),
    BadFile(
        "mixed_prompt",
        ".jsonl",
        rows({"prompt": "a", "completion": [ANSWER]}),
        ("completion[0]", "not supported yet"),
        1,
    ),
]

TURNS = [
    BadFile("no_turns", ".jsonl", chats(), ("field messages", "list of 0", "{role, content}"), 2),
    BadFile("turns_as_string", ".jsonl", rows({"messages": "hi"}), ("field messages", "string 'hi'"), 1),
    BadFile("turn_as_string", ".jsonl", chats(USER, "hello"), ("messages[1]", "string 'hello'"), 2),
    BadFile(
        "other_turn_fields",
        ".jsonl",
        rows({"messages": [{"speaker": "A", "line": "hi"}]}),
        ("messages[0]", "speaker, line", "{role, content}"),
        1,
    ),
    BadFile("no_content", ".jsonl", chats(USER, {"role": "assistant"}), ("messages[1].content", "no such field"), 2),
    BadFile(
        "null_content",
        ".jsonl",
        chats(USER, {"role": "assistant", "content": None}),
        ("messages[1].content", "null"),
        2,
    ),
    BadFile(
        "blank_turn",
        ".jsonl",
        chats(USER, {"role": "assistant", "content": ""}),
        ("messages[1].content", "nothing to learn"),
        2,
    ),
    BadFile(
        "misspelt_role",
        ".jsonl",
        chats(USER, {"role": "assistent", "content": "a"}),
        ("messages[1].role", "did you mean assistant"),
        2,
    ),
    BadFile(
        "sharegpt_role",
        ".jsonl",
        rows({"conversations": [{"from": "humans", "value": "a"}]}),
        ("conversations[0].from", "human"),
        1,
    ),
    BadFile(
        "tool_role",
        ".jsonl",
        chats(USER, {"role": "tool", "content": "4"}, ANSWER),
        ("messages[1]", "a tool turn after a user turn"),
        2,
    ),
    BadFile("role_number", ".jsonl", chats({"role": 1, "content": "hi"}, ANSWER), ("messages[0].role", "number 1"), 2),
    BadFile(
        "tool_calls",
        ".jsonl",
        chats(USER, {**ANSWER, "tool_calls": [{"id": "1"}]}),
        ("messages[1].tool_calls", "object with fields id", "arguments"),
        2,
    ),
    BadFile(
        "image_part",
        ".jsonl",
        chats({"role": "user", "content": [{"type": "image"}]}, ANSWER),
        ("messages[0].content[0]", "type image"),
        2,
    ),
    BadFile(
        "part_without_text",
        ".jsonl",
        chats({"role": "user", "content": [{"type": "text"}]}, ANSWER),
        ("messages[0].content[0]", "null"),
        2,
    ),
    BadFile("weight", ".jsonl", chats(USER, {**ANSWER, "weight": 2}), ("messages[1].weight", "number 2", "loss_on"), 2),
    BadFile("no_answer", ".jsonl", chats(USER), ("no assistant turn", "nothing to learn"), 2),
    BadFile(
        "ends_with_user", ".jsonl", chats(USER, ANSWER, USER), ("ends with a user turn", "remove the last turn"), 2
    ),
    BadFile("two_users", ".jsonl", chats(USER, USER, ANSWER), ("two user turns in a row", "messages[1]"), 2),
    BadFile(
        "two_systems",
        ".jsonl",
        chats({**USER, "role": "system"}, {**USER, "role": "system"}, USER, ANSWER),
        ("two system messages", "messages[1]"),
        2,
    ),
    BadFile(
        "late_system", ".jsonl", chats(USER, {**USER, "role": "system"}, ANSWER), ("not the first", "messages[1]"), 2
    ),
]

# Refused until data.preference says what to learn; a check of the data reads both sides.
UNDECIDED = [
    BadFile(
        "preference",
        ".jsonl",
        rows({"prompt": "a", "chosen": "b", "rejected": "c"}),
        ("preference data", "rejected"),
        1,
    ),
    BadFile("feedback", ".jsonl", rows({"messages": [USER, ANSWER], "label": True}), ("boolean feedback", "label"), 1),
]

BAD_DATA: list[BadFile] = [*ENCODING, *CONTAINER, *SYNTAX, *FORMAT, *VALUE, *TURNS]
