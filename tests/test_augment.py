"""Paraphrases keep what their answer depends on, know where they come from, and never stand on the other side."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_endpoint import Say, serving

from whet.base.errors import UserError
from whet.data.example import Example, Message
from whet.data.format.standardise import recognise, standardise
from whet.data.judge.augment import Origin, content_id, difference, paraphrased
from whet.data.judge.endpoint import Endpoint
from whet.data.read.read import Record
from whet.data.removed import Removed


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


def row(question: str, answer: str = "42", number: int = 1) -> Example:
    messages = (Message("system", "short"), Message("user", question), Message("assistant", answer))
    example = Example("", messages, None, "f.jsonl", number)
    return Example(content_id(example), messages, None, "f.jsonl", number)


Write = Callable[[str, int], list[str]]


def run(
    rows: list[Example], write: Write, tmp_path: Path, held_out: frozenset[str] = frozenset(), copies: int = 2
) -> tuple[list[tuple[Example, Origin]], list[Removed], int]:
    """(new rows with their origins, what was left out, questions that were asked)."""

    def answer(request: dict[str, Any], before: int) -> Say:
        asked = json.loads(request["messages"][1]["content"])
        return Say(json.dumps({"paraphrases": write(asked["text"], asked["n"])}))

    noted: list[Removed] = []
    with serving(answer) as fake:
        endpoint = Endpoint(base_url=fake.base_url, model="writer", pause_seconds=0.01, attempts=2, timeout_seconds=5.0)
        made = list(paraphrased(rows, endpoint, tmp_path / "r.jsonl", copies, held_out, noted.append))
        return made, noted, len(fake.asked)


def other_words(text: str, count: int) -> list[str]:
    return [f"{'Well, ' * (n + 1)}{text}" for n in range(count)]


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_new_rows_have_the_answer_and_the_group_of_their_source(tmp_path: Path, copies: int) -> None:
    rows = [row(f"How much is {n} and {n}?", str(2 * n), n) for n in range(1, 6)]
    made, noted, asked = run(rows, other_words, tmp_path, copies=copies)
    assert (len(made), noted, asked) == (5 * copies, [], 5)
    for place, (example, origin) in enumerate(made):
        source = rows[place // copies]
        assert example.answer == source.answer
        assert example.messages[0] == source.messages[0]  # type: ignore[index]
        assert (origin.group, origin.file, origin.row, origin.model) == (source.id, "f.jsonl", source.row, "writer")
        assert example.id == origin.id != source.id
        assert len(origin.prompt_sha256) == 64
        assert json.loads(origin.to_json())["group"] == source.id
    assert len({example.id for example, _ in made}) == len(made)
    again, _, asked = run(rows, other_words, tmp_path, copies=copies)
    assert (again, asked) == (made, 0)


def test_no_paraphrase_of_a_held_out_row_and_none_that_equals_one(tmp_path: Path) -> None:
    rows = [row("How are you?", "fine", n) for n in (1, 2)]
    with pytest.raises(AssertionError, match="never paraphrased"):
        run(rows, other_words, tmp_path, held_out=frozenset({rows[0].id}))
    twin = row("Well, How are you?", "fine")
    made, noted, _ = run(rows[:1], other_words, tmp_path, held_out=frozenset({twin.id}))
    assert [example.question[-1].content for example, _ in made] == ["Well, Well, How are you?"]
    assert [(one.kind, "held-out" in one.reason) for one in noted] == [("paraphrase", True)]


def test_groups_keep_paraphrases_on_the_side_of_their_source(tmp_path: Path) -> None:
    """What a split by groups needs: one group, one side. By their own ids they would be scattered."""
    from whet.data.sides.split import held_out

    rows = [row(f"Tell me about number {n}", number=n) for n in range(1, 40)]
    made, _, _ = run(rows, other_words, tmp_path)
    groups = held_out([origin.group for _, origin in made], 0.3)
    sides = dict(zip([one.id for one in rows], held_out([one.id for one in rows], 0.3), strict=True))
    assert all(side == sides[origin.group] for side, (_, origin) in zip(groups, made, strict=True))
    own = held_out([example.id for example, _ in made], 0.3)
    assert any(side != sides[origin.group] for side, (_, origin) in zip(own, made, strict=True))


USER = {"role": "user", "content": "u"}
SOURCE = "Pay 1,200 won to a@b.kr by 10:30, see `run()` and {name}"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("By 10:30 pay 1,200 won to a@b.kr; see `run()` and {name}", ""),
        ("By 10:30 pay 1,300 won to a@b.kr; see `run()` and {name}", "1,200 is missing"),
        ("By 10:30 pay 1,200 won to a@b.kr and c@d.kr; see `run()` and {name}", "c@d.kr is new"),
        ("By 11:30 pay 1,200 won to a@b.kr; see `run()` and {name}", "10:30 is missing"),
        ("By 10:30 pay 1,200 won to a@b.kr; see `stop()` and {name}", "`run()` is missing"),
        ("By 10:30 pay 1,200 won to a@b.kr; see `run()` and you", "{name} is missing"),
        ("By 10:30 pay 1,200 won to a@b.kr; see `run()` and {name} 2 times", "2 is new"),
        ("a@b.kr", "much shorter"),
        ("", "empty"),
        (SOURCE + " and so on" * 40, "longer"),
        ("10:30까지 a@b.kr로 1,200 원을 보내고 `run()` 그리고 {name} 참고해 주세요", "another language"),
    ],
)
def test_what_a_paraphrase_must_keep(text: str, fault: str) -> None:
    found = difference(SOURCE, text)
    assert (fault in found) if fault else (found == "")


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda text, n: [text] * n, "repeats the source"),
        (lambda text, n: [text.upper()] * n, "repeats the source"),
        (lambda text, n: [f"Well {text}"] * n, "repeats the source or another"),
        (lambda text, n: [text.replace("7", "8"), f"so, {text}"], "7 is missing"),
        (lambda text, n: [text], "no paraphrase"),
        (lambda text, n: [text, 5], "no paraphrase"),
        (lambda text, n: "text", "no paraphrase"),
    ],
)  # fmt: skip
def test_what_is_left_out_is_noted(tmp_path: Path, write: Write, reason: str) -> None:
    made, noted, _ = run([row("What is 7 plus 7?", "14")], write, tmp_path)
    assert len(made) < 2
    assert any(reason in one.reason for one in noted)
    assert all((one.file, one.row, one.kind) == ("f.jsonl", 1, "paraphrase") for one in noted)
    assert all("8 plus" not in example.question[-1].content for example, _ in made)


def test_texts_keep_their_label(tmp_path: Path) -> None:
    example = Example("0" * 16, None, "the card was declined", "f", 1, label="card")
    made, _, _ = run([example], other_words, tmp_path)
    assert [(new.text, new.label) for new, _ in made] == [
        ("Well, the card was declined", "card"),
        ("Well, Well, the card was declined", "card"),
    ]


@pytest.mark.parametrize("copies", [0, 4])
def test_too_many_copies_are_refused(tmp_path: Path, copies: int) -> None:
    with pytest.raises(UserError, match="too alike"):
        run([row("a")], other_words, tmp_path, copies=copies)


@pytest.mark.parametrize(
    "value",
    [
        {"prompt": "질문", "completion": "답"},
        {"text": "raw"},
        {"text": "a", "label": "x"},
        {"text": "a", "label": 1, "text_pair": "b"},
        {"messages": [{"role": "system", "content": "s"}, USER, {"role": "assistant", "content": "a"}]},
        {"messages": [USER, {"role": "assistant", "content": "a", "reasoning_content": "r"}]},
    ],
)
def test_an_id_is_the_one_that_reading_gives(value: dict[str, Any]) -> None:
    records = [Record(value, "f", 1)]
    (example,) = standardise(records, recognise(records, {}), {})
    assert content_id(example) == example.id
