"""Words of a block list are found as people mean them, all at once, and never inside other words."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from whet.base.errors import UserError
from whet.data.detect.blocklist import Blocked, BlockList, without_blocked
from whet.data.example import Example, Message
from whet.data.removed import Removed

Make = Callable[..., BlockList]


@pytest.fixture
def blocklist(tmp_path: Path) -> Make:
    def make(*lines: str) -> BlockList:
        (tmp_path / "words.txt").write_text("\n".join(lines), encoding="utf-8")
        return BlockList.read([str(tmp_path / "words.txt")])

    return make


LINES = ("# insults", "ass", "Bad Word", "바보", "멍청이 같은", "c++", "schön", "ab", "abc", "re:\\bfoo\\d+", "", "  ")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("you ass!", ["ass"]),
        ("ASS", ["ass"]),
        ("a class of glass", []),
        ("assassin", []),
        ("a bad   word\there", ["bad word"]),
        ("a bad\nword", ["bad word"]),
        ("bad words", []),
        ("이 바보야", ["바보"]),
        ("왕바보같은", ["바보"]),
        ("바보와 ass는", ["바보", "ass"]),
        ("ass같은", ["ass"]),
        ("멍청이  같은 녀석", ["멍청이 같은"]),
        ("멍청이", []),
        ("I like C++.", ["c++"]),
        ("xc++", []),
        ("Schön!", ["schön"]),
        ("scho\u0308n", ["schön"]),
        ("바\u1107\u1169", ["바보"]),
        ("ａｓｓ", ["ass"]),
        ("ab", ["ab"]),
        ("abc", ["abc"]),
        ("abcd", []),
        ("foo12 foo", ["re:\\bfoo\\d+"]),
        ("insults", []),
        ("", []),
    ],
)  # fmt: skip
def test_words(blocklist: Make, text: str, found: list[str]) -> None:
    assert sorted(blocklist(*LINES).find(text)) == sorted(found)


def test_a_search_for_parts_of_words_would_be_seen() -> None:
    assert "ass" in "a class of glass"  # what `in` would call a hit, and the table above does not


@pytest.mark.parametrize(
    ("line", "says"),
    [("re:(", "not a regular expression"), ("re:a*", "matches every text"), ("x" * 201, "too long"), ("#", "no word")],
)  # fmt: skip
def test_bad_lists_are_refused(blocklist: Make, line: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as refused:
        blocklist("" if line.startswith("#") else "good", line) if not line.startswith("#") else blocklist(line)
    assert refused.value.file
    assert refused.value.row == (None if line.startswith("#") else 2)


@pytest.mark.parametrize("content", [None, b"\xb9\xd9\xba\xb8"])
def test_files_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "w.txt").write_bytes(content)
    with pytest.raises(UserError, match="cannot be read"):
        BlockList.read([str(tmp_path / "w.txt")])


def test_an_expression_that_runs_away_is_an_error(blocklist: Make) -> None:
    with pytest.raises(UserError, match="takes over") as refused:
        blocklist("re:^(a|a|aa)+$").find("a" * 60 + "!")
    assert refused.value.row == 1


def test_every_message_counts_and_what_is_dropped_is_noted(blocklist: Make) -> None:
    def example(row: int, question: str, answer: str) -> Example:
        return Example(f"{row:016x}", (Message("user", question), Message("assistant", answer)), None, "f", row)

    rows = [
        example(1, "hi", "hello"),
        example(2, "바보야", "네"),
        example(3, "a", "you ass"),
        Example("0" * 16, None, "ab", "f", 4),
    ]
    for action, kept in (("report", [1, 2, 3, 4]), ("drop", [1])):
        seen, noted = Blocked(), list[Removed]()
        out = list(without_blocked(rows, blocklist(*LINES), action, seen, noted.append))  # type: ignore[arg-type]
        assert [one.row for one in out] == kept
        assert (seen.rows, seen.words) == (3, {"바보": 1, "ass": 1, "ab": 1})
        assert [one.row for one in noted] == ([2, 3, 4] if action == "drop" else [])


def test_the_time_hardly_grows_with_the_list(blocklist: Make) -> None:
    text = "이 영화는 정말 재미있었고 배우들의 연기도 훌륭했습니다 what a film " * 20

    def seconds(words: int) -> float:
        made = blocklist(*(f"{first}{n}단어" for n in range(words // 4) for first in "가이정w"))
        start = time.process_time()
        for _ in range(20):
            assert made.find(text) == []
        return time.process_time() - start

    few, many = seconds(100), seconds(20_000)
    assert many < 20 * few + 0.2
