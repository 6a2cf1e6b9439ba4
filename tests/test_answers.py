"""Answers that break what the others keep to are found, and a set that keeps to nothing is left alone."""

from __future__ import annotations

import json
import lzma
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from whet.data.detect.answers import Answers
from whet.data.example import Example, Message

SHARED = Path(__file__).parents[2] / "shared" / "data"
real = pytest.mark.skipif(not SHARED.exists(), reason="needs the shared data beside the checkout")

PROSE = "The {n} answer explains the whole matter in a calm and complete sentence, and then it adds one more remark."
KOREAN = "{n}번 답변은 이 문제를 처음부터 끝까지 차근차근 설명하고 나서 마지막에 한 가지를 덧붙입니다."
CODE = "Here is the code:\n\n```python\nprint({n})\n```"


def answers(pairs: Iterable[tuple[str, str]]) -> Answers:
    found = Answers()
    for row, (question, answer) in enumerate(pairs, 1):
        messages = (Message("user", question), Message("assistant", answer))
        found.add(Example(f"{row:016x}", messages, None, "f.jsonl", row))
    return found


def kinds(texts: list[str], question: str = "Tell me more about it, please") -> dict[int, str]:
    """Row -> kind of the finding."""
    return {one.row: one.kind for one in answers((question, text) for text in texts).findings()}


def usual(count: int = 200) -> list[str]:
    return [(PROSE, KOREAN)[n % 2].format(n=n) for n in range(count)]


LOOP = "I am happy to help you with that today. " * 20


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("...", "no_words"),
        ("--", "no_words"),
        ("ok", "too_short"),
        ("ab " * 3000 + "x.", "too_long"),
        ("As an AI language model, I have no opinion on this matter at all.", "refusal"),
        ("I'm sorry, but I can't assist with that request.", "refusal"),
        ("I cannot help with that.", "refusal"),
        ("저는 AI 언어 모델로서 개인적인 의견이 없습니다.", "refusal"),
        ("죄송하지만 그 질문에는 도와드릴 수 없습니다.", "refusal"),
        (LOOP, "repeated"),
        ("저는 정말로 그것을 아주 많이 좋아합니다 " * 30, "repeated"),
        ("这是一个很长的句子我们反复说同样的话因为模型坏了没有办法停下来。" * 20, "repeated"),
        ("Tell me more about it, please", "copy_of_question"),
        ("tell me  more about it,\nplease", "copy_of_question"),
        ("Here is the code:\n\n```python\nprint(1)\nprint(2)", "truncated"),
        ('{"name": "a", "items": [1, 2', "truncated"),
        ("The quetzal is no longer with us, and its memory serves as a reminder of the importance of", "truncated"),
        (
            "While there are many ways to buy it, most people begin with the oldest of them, which is Bitcoin",
            "truncated",
        ),
        ("이 문제는 여러 가지 방법으로 풀 수 있지만 대부분의 사람들은 가장 오래된 방법으로 시작하고", "truncated"),
        (
            "여러 가지 방법이 있지만 그중에서 가장 많이 쓰이는 것은 다음과 같고 이유는 아래와 같습니다 그리고",
            "truncated",
        ),
    ],
)
def test_one_bad_answer_among_good_ones(text: str, kind: str) -> None:
    assert kinds([*usual(), text]) == {201: kind}


@pytest.mark.parametrize(
    "text",
    [
        "Yes.",
        "42",
        "True",
        "네",
        "$1,200",
        "- one\n- two\n- three and four and five and six and seven and eight",
        "1. first of all the things that there are to be done today",
        "| a | b |\n|---|---|\n| one two three four | five six seven eight |",
        CODE.format(n=1),
        "def f(x):\n    return x",
        '{"name": "a", "items": [1, 2]}',
        "See the page of the project for more on all of this: https://example.com/more",
        "Nothing beats the love of a puppy, so get one as soon as you can #PuppyLove",
        '"A friend is someone who knows all about you and still loves you" - Elbert Hubbard',
        "It is what it is, and that is all there is to say about it ㅋㅋ",
        "La la la, la la la, we sing a song, la la la, la la la, all day long.",
        "| x | y |\n" + "\n".join(f"| {n} | {n * n} |" for n in range(100)),
        "\n".join(f"{n} x 7 = {n * 7}" for n in range(1, 60)),
        "As an AI assistant, diplomacy forms a part of my work with people of all kinds.",
        "I'm sorry to hear that you lost your card. We will send you a new one today.",
        "I can't believe it was so easy to do in the end, so thank you very much.",
        "죄송합니다, 고객님. 바로 새 카드를 보내 드리겠습니다. 조금만 기다려 주세요.",
        "AI assistants are programs that answer questions and help people with their work.",
        "```\ncode\n```\nand then a last line that ends as it should end here.",
        "Dear Sir,\n\nThank you for the letter of last week.\n\nYours,\nJane",
    ],
)
def test_good_answers_of_another_kind_are_left_alone(text: str) -> None:
    assert kinds([*usual(), text]) == {}


def test_what_many_rows_do_is_no_fault() -> None:
    """No closing sign among chat lines, fences left open in a set of beginnings, copies in a set of repetitions."""
    chat = [f"well i think that number {n} is the one that you would like the most" for n in range(200)]
    assert kinds(chat) == {}
    assert kinds(["```python\nprint(1)"] * 50 + usual(50)) == {}
    assert {one.kind for one in answers((text, text) for text in usual()).findings()} == set()
    refusing = [f"As an AI language model, I cannot tell you about number {n}." for n in range(100)]
    assert kinds(refusing) == {}


def test_a_small_set_has_no_usual() -> None:
    assert kinds([*usual(20), "x" * 5, "a sentence of many words that has no sign at its end"]) == {}


FORMS: dict[str, tuple[list[str], str, str]] = {
    "json": ([json.dumps({"n": n}) for n in range(100)], "the answer is 5", "not JSON"),
    "fields": ([json.dumps({"a": n, "b": 1}) for n in range(100)], '{"a": 5}', "fields a, b"),
    "labels": (["positive", "negative"] * 100, "Positive!", "not one of the 2 answers"),
    "korean labels": (["긍정", "부정"] * 100, "긍정적", "not one of the 2 answers"),
    "end": ([f"We add {n} and {n}.\n#### {2 * n}" for n in range(100)], "We add 5 and 5.\nIt is 10.", '"####"'),
    "start": ([f"Answer: it is number {n} of them" for n in range(100)], "it is 5", '"Answer:"'),
    "thinking": ([f"<think>\nhm {n}\n</think>\nIt is {n}." for n in range(100)], "It is 5.", '"<think>"'),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_row_that_breaks_the_form(name: str) -> None:
    texts, odd, says = FORMS[name]
    found = list(answers(("q", text) for text in [*texts, odd]).findings())
    assert [(one.row, one.kind) for one in found] == [(len(texts) + 1, "format")]
    assert says in found[0].reason


@pytest.mark.parametrize("name", FORMS)
def test_without_a_common_form_there_is_none_to_break(name: str) -> None:
    texts, odd, _ = FORMS[name]
    mixed = [*texts[: len(texts) // 2], *usual(len(texts) // 2), odd]
    assert "format" not in kinds(mixed).values()


def test_counts_and_few_examples() -> None:
    found = answers(("q", text) for text in [*usual(400), *[""] * 30]).as_dict()
    assert found["kinds"] == {"empty": 30}
    assert len(found["examples"]) == 5
    assert found["answers"] == 430


def test_rows_without_an_answer_are_left_out() -> None:
    found = Answers()
    found.add(Example("0" * 16, None, "raw", "f", 1))
    found.add(Example("0" * 16, None, "text", "f", 2, label="x"))
    assert (len(found), list(found.findings()), found.as_dict()["kinds"]) == (0, [], {})


def test_rules_without_the_set_would_be_seen() -> None:
    """A full stop asked of everyone: what the set-wide share prevents."""
    chat = [f"well i think that number {n} is the one that you would like the most" for n in range(200)]
    assert sum(not text.endswith(".") for text in chat) == 200
    assert kinds(chat) == {}


def test_time_and_memory_grow_with_the_rows() -> None:
    def seconds(count: int) -> float:
        texts = usual(count)
        start = time.process_time()
        list(answers(("q", text) for text in texts).findings())
        return time.process_time() - start

    seconds(100)
    assert seconds(20_000) < 12 * seconds(4_000) + 0.1


@pytest.mark.parametrize("unit", ["a ", "{", "[", "```\n", "가", "#", "<think>", "\n"])
def test_a_long_answer_takes_no_longer_than_it_is(unit: str) -> None:
    start = time.process_time()
    kinds([unit * (400_000 // len(unit))])
    assert time.process_time() - start < 1.0


def rows(name: str) -> list[dict[str, Any]]:
    path = SHARED / name
    if path.suffix == ".xz":
        return [json.loads(line) for line in lzma.open(path, "rt", encoding="utf-8")]
    return json.loads(path.read_text(encoding="utf-8"))


@real
def test_rates_on_real_sets() -> None:
    """Each finding was read: all 19 of alpaca are right (5 cut off, 14 stock phrases of an AI model)."""
    alpaca = [(f"{r['instruction']}\n{r['input']}", r["output"]) for r in rows("formats/alpaca_en_demo.json")]
    found = Counter(one.kind for one in answers(alpaca).findings())
    assert found["truncated"] == 5
    assert set(found) <= {"truncated", "refusal"}
    math = answers((r["question"], r["answer"]) for r in rows("instruction/gsm8k_train.jsonl.xz"))
    assert list(math.findings()) == []
    assert math.usual() == ['last line beginning with "####"']
    chat = answers((r["question"], r["answer"]) for r in rows("instruction/korean_chatbot.jsonl.xz"))
    assert list(chat.findings()) == []
