"""Rows of every format become the same few shapes; what would change what is learned is honoured or refused."""

from __future__ import annotations

import json
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
from chats import CASES, TOOL_CASES

from whet.base.errors import UserError
from whet.data.example import Example, Message, from_json, to_json
from whet.data.format.standardise import Dropped, recognise, standardise
from whet.data.read.read import Record, read_files

SHARED = Path(__file__).parents[2] / "shared" / "data"
QUESTION, GOOD, BAD = "Is 7 prime?", "Yes.", "No."
U, A, R = (
    {"role": role, "content": text} for role, text in (("user", QUESTION), ("assistant", GOOD), ("assistant", BAD))
)
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def read(rows: list[dict], preference: Any = "error", **columns: str) -> tuple[list[Example], Dropped]:
    records, dropped = [Record(row, "f", index) for index, row in enumerate(rows, 1)], Dropped()
    found = recognise(records, columns)
    return list(standardise(records, found, columns, dropped=dropped, preference=preference)), dropped


def one(row: dict, **columns: str) -> Example:
    return read([row], **columns)[0][0]


def turns(example: Example) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in example.messages or ()]


# Tools and thinking.

ASKED = [
    Message("user", "q"),
    Message("assistant", "", tool_calls=(CALL,)),
    Message("tool", "1"),
    Message("assistant", "a"),
]
CALLS: dict[str, dict] = {
    "openai": {"messages": [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "a"}]},
    "arguments_as_a_string": {"messages": [
        {"role": "user", "content": "q"},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]},
        {"role": "tool", "content": "1"}, {"role": "assistant", "content": "a"}]},
    "function_call_field": {"messages": [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": '{"a": 1}'}},
        {"role": "function", "content": "1"}, {"role": "assistant", "content": "a"}]},
    "parts": {"messages": [
        {"role": "user", "content": [{"type": "text", "value": "q"}]},
        {"role": "assistant", "content": [{"type": "tool_call", "value": '{"name": "f", "arguments": {"a": 1}}'}]},
        {"role": "tool", "content": "1"}, {"role": "assistant", "content": "a"}]},
    "sharegpt": {"conversations": [
        {"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "1"}, {"from": "gpt", "value": "a"}]},
}  # fmt: skip


@pytest.mark.parametrize("shape", CALLS)
def test_tool_calls_come_to_one_shape_however_they_are_written(shape: str) -> None:
    found = one(CALLS[shape] | {"tools": json.dumps([{"name": "f", "parameters": {}}])})
    assert list(found.messages or ()) == ASKED
    assert json.loads(found.tools or "") == [TOOL]
    assert found.id == one(CALLS["openai"] | {"tools": [TOOL]}).id
    assert found.id != one(CALLS["openai"]).id, "tools are part of what a row says"


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_thinking_is_kept_apart_from_the_answer(name: str) -> None:
    found = one({"messages": [U, {**A, name: "7 has no divisors"}]})
    assert found.messages is not None
    assert found.messages[-1] == Message("assistant", GOOD, "7 has no divisors")
    parts = [{"type": "reasoning", "value": "7 has no divisors"}, {"type": "text", "value": GOOD}]
    assert one({"messages": [U, {"role": "assistant", "content": parts}]}) == found
    assert found.id != one({"messages": [U, A]}).id


def test_what_is_said_and_then_called_is_one_answer() -> None:
    row = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "look"},
           {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
           {"from": "observation", "value": "1"}, {"from": "gpt", "value": "a"}]  # fmt: skip
    found = one({"conversations": row})
    assert found.messages is not None
    assert found.messages[1] == Message("assistant", "look", tool_calls=(CALL,))


WRONG: dict[str, tuple[list[dict], str]] = {
    "uncalled_result": ([U, A, {"role": "tool", "content": "1"}, A], "nothing called"),
    "result_after_a_question": ([U, {"role": "tool", "content": "1"}, A], "a tool turn after a user turn"),
    "ends_with_a_result": ([U, {**A, "tool_calls": [CALL]}, {"role": "tool", "content": "1"}], "ends with a tool turn"),
    "call_without_a_name": ([U, {**A, "tool_calls": [{"id": "1"}]}], r"messages\[1\]\.tool_calls"),
    "broken_arguments": ([U, {**A, "tool_calls": [{"name": "f", "arguments": "{'a': 1}"}]}], "broken JSON in a string"),
    "arguments_with_nan": ([U, {**A, "tool_calls": [{"name": "f", "arguments": '{"a": NaN}'}]}], "not a JSON number"),
    "arguments_twice": ([U, {**A, "tool_calls": [{"name": "f", "arguments": '{"a": 1, "a": 2}'}]}], "twice"),
    "list_as_arguments": ([U, {**A, "tool_calls": [{"name": "f", "arguments": [1]}]}], "wrong kind"),
    "user_thinks": ([{**U, "reasoning": "hm"}, A], "reasoning in a user turn"),
    "two_thoughts": ([U, {**A, "reasoning": "x", "thinking": "y"}], "several fields"),
    "picture": ([U, {**A, "images": ["a.png"]}], "images: not supported yet"),
    "blank_with_thoughts": ([U, {**A, "content": " ", "reasoning": "x"}], "the answer is blank"),
    "weight_of_a_user": ([{**U, "weight": 1}, A], "a user turn is not learned"),
    "weight_over_one": ([U, {**A, "weight": 2}], "from 0 to 1"),
    "weights_that_differ": ([U, {**A, "weight": 1, "train": False}], "two weights"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_learned_as_it_stands_is_refused(name: str) -> None:
    messages, words = WRONG[name]
    with pytest.raises(UserError, match=words) as caught:
        one({"messages": messages})
    assert caught.value.fix
    assert (caught.value.file, caught.value.row) == ("f", 1)


def test_weights_are_kept_and_zero_and_false_are_the_same() -> None:
    def weights(**fields: object) -> list[float | None]:
        return [
            message.weight for message in one({"messages": [{**U, "loss_weight": 0}, {**A, **fields}]}).messages or ()
        ]

    assert weights() == weights(weight=None) == [None, None]
    assert weights(weight=0.25) == [None, 0.25]
    assert weights(train=False) == weights(loss_weight=0.0) == [None, 0]
    assert weights(train=True) == weights(weight=1) == [None, 1]


def test_an_answer_inside_a_prompt_is_not_learned() -> None:
    found = one({"prompt": [U, R, U], "completion": [A]})
    assert [message.weight for message in found.messages or ()] == [None, 0, None, None]
    assert found.completion_from == 3
    assert one({"system": "s", "prompt": "q", "completion": "a"}).completion_from == 2
    assert one({"messages": [U, A]}).completion_from is None


# Preferences.

PAIRS: dict[str, dict] = {
    "strings": {"prompt": QUESTION, "chosen": GOOD, "rejected": BAD},
    "question": {"question": QUESTION, "chosen": GOOD, "rejected": BAD},
    "instruction": {"instruction": QUESTION, "input": "", "chosen": GOOD, "rejected": BAD},
    "prompt_and_turns": {"prompt": [U], "chosen": [A], "rejected": [R]},
    "prompt_and_conversations": {"prompt": QUESTION, "chosen": [U, A], "rejected": [U, R]},
    "conversations": {"chosen": [U, A], "rejected": [U, R]},
    "messages_and_turns": {"messages": [U], "chosen": A, "rejected": R},
    "messages_and_strings": {"messages": [U], "chosen": GOOD, "rejected": BAD},
    "sharegpt": {"conversations": [{"from": "human", "value": QUESTION}], "chosen": {"from": "gpt", "value": GOOD},
                 "rejected": {"from": "gpt", "value": BAD}},
    "paragraphs": {"chosen": f"\n\nHuman: {QUESTION}\n\nAssistant: {GOOD}",
                   "rejected": f"\n\nHuman: {QUESTION}\n\nAssistant: {BAD}"},
}  # fmt: skip


@pytest.mark.parametrize("shape", PAIRS)
def test_pairs_come_to_one_shape(shape: str) -> None:
    found, dropped = read([PAIRS[shape]], "chosen")
    assert [turns(example) for example in found] == [[("user", QUESTION), ("assistant", GOOD)]]
    assert found[0].completion_from == 1
    assert found[0].id == one({"prompt": QUESTION, "completion": GOOD}).id
    assert dropped.rows == []
    assert [(file, row) for file, row, _ in dropped.answers] == [("f", 1)]
    both, _ = read([PAIRS[shape]], "check")
    assert [example.answer for example in both] == [GOOD, BAD]
    with pytest.raises(UserError, match=r"data\.preference") as caught:
        read([PAIRS[shape]])
    assert caught.value.row == 1


FEEDBACK: dict[str, dict] = {
    "messages": {"messages": [U, A], "label": True},
    "prompt": {"prompt": QUESTION, "completion": GOOD, "label": True},
    "alpaca": {"instruction": QUESTION, "output": GOOD, "kto_tag": True},
    "sharegpt": {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": GOOD}],
                 "kto_tag": True},
}  # fmt: skip


@pytest.mark.parametrize("shape", FEEDBACK)
def test_rows_marked_as_bad_are_left_out_and_listed(shape: str) -> None:
    label = "kto_tag" if "kto_tag" in FEEDBACK[shape] else "label"
    rows = [FEEDBACK[shape], FEEDBACK[shape] | {label: False}]
    found, dropped = read(rows, "chosen")
    assert [(example.row, example.answer) for example in found] == [(1, GOOD)]
    assert [(file, row) for file, row, _ in dropped.rows] == [("f", 2)]
    assert len(read(rows, "check")[0]) == 2
    with pytest.raises(UserError, match=r"data\.preference"):
        read(rows)
    with pytest.raises(UserError, match="no row is marked as good"):
        read(rows[1:], "chosen")
    with pytest.raises(UserError, match="true or false"):
        read([*rows, FEEDBACK[shape] | {label: "yes"}], "chosen")


def test_pairs_that_are_none_are_refused() -> None:
    for row, words in (
        ({"chosen": GOOD, "rejected": BAD}, "without its question"),
        ({"chosen": [A], "rejected": [R]}, "without its question"),
        ({"chosen": [U, A], "rejected": [{**U, "content": "other"}, R]}, "same question"),
        ({"prompt": "other", "chosen": [U, A], "rejected": [U, R]}, "does not hold the question"),
        ({"messages": [U, A], "chosen": GOOD, "rejected": BAD}, "does not end with a question"),
        ({"prompt": QUESTION, "chosen": GOOD}, "do not fit"),
        ({"prompt": QUESTION, "rejected": BAD}, "preference data without"),
    ):
        with pytest.raises(UserError, match=words):
            read([row], "chosen")


# Real files.


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared data beside the checkout")
@pytest.mark.parametrize(
    ("file", "name", "count", "left_out"),
    [
        ("alpaca_en_demo.json", "alpaca", 999, 0), ("identity.json", "alpaca", 91, 0),
        ("v1_sft_demo.jsonl", "messages", 500, 0), ("glaive_toolcall_en_demo.json", "sharegpt", 300, 0),
        ("reason_tool_use_demo_50.jsonl", "messages", 50, 0), ("dpo_en_demo.json", "preference", 300, 300),
        ("kto_en_demo.json", "feedback", 150, 150), ("wiki_demo.txt", "text", 1, 0), ("c4_demo.jsonl", "text", 300, 0),
    ],
)  # fmt: skip
def test_every_real_file_is_recognised_and_read_without_settings(
    file: str, name: str, count: int, left_out: int
) -> None:
    records = read_files([str(SHARED / "formats" / file)])
    head = list(islice(records, 100))
    found, dropped = recognise(head, {}), Dropped()
    examples = list(standardise(chain(head, records), found, {}, dropped=dropped, preference="chosen"))
    assert (found.name, len(examples), len(dropped.rows) + len(dropped.answers)) == (name, count, left_out)
    assert [from_json(to_json(example)) for example in examples] == examples
    if file.startswith(("glaive", "reason")):
        assert any(message.tool_calls for example in examples for message in example.messages or ())
    if file.startswith("reason"):
        assert all(example.messages and example.messages[-1].reasoning for example in examples)


# On disk and back.


def odd_examples() -> list[Example]:
    labels: list[Any] = [None, True, False, 0, 1, 1.0, 0.5, "1", "a", ("a", "b"), (0, 1, 1)]
    found = [Example("1" * 16, None, 'a\u2028\n"', "f", 3, label, "b" if label else None) for label in labels]
    found += [Example("2" * 16, tuple(messages), None, "ж\\.json", 1) for messages in CASES.values()]
    weighted = (Message("user", "q"), Message("assistant", "a", None, (CALL, CALL), weight=0.5),
                Message("tool", "1", name="f", tool_call_id="x"),
                Message("assistant", "b", "why", weight=0.0))  # fmt: skip
    return [*found, *TOOL_CASES.values(), Example("3" * 16, weighted, None, "f", 1, tools="[]", completion_from=3)]


def test_an_example_comes_back_from_disk_as_it_was() -> None:
    for example in odd_examples():
        line = to_json(example)
        again = from_json(line)
        assert again == example
        assert repr(again) == repr(example), "also where Python calls True and 1 equal"
        assert "\n" not in line


def test_a_reader_that_forgets_would_be_seen() -> None:
    """Without the label's type, the weight or the tools, examples differ."""
    from dataclasses import replace

    for example in odd_examples()[-1:]:
        assert replace(example, tools=None) != example
        assert json.loads(to_json(example)) != json.loads(to_json(replace(example, completion_from=None)))
