"""The language of a row, and rows in two of them."""

from __future__ import annotations

import time

import pytest

from whet.data.detect.language import LanguageMix, language, languages

CASES = [
    ("안녕하세요, 오늘 날씨가 좋네요", "ko"),
    ("GPU 사용법을 알려 주세요", "ko"),
    ("PyTorch로 fine-tuning 하는 방법", "ko"),
    ("ㅋㅋㅋㅋ", "ko"),
    ("한국(韓國)의 역사", "ko"),
    ("https://example.com/a/b/c/long/path 이거 봐", "ko"),
    ("`pip install torch` 명령을 쓰세요", "ko"),
    ("What is the capital of Korea?", "en"),
    ("Hello", "en"),
    ("I don’t know why it's so", "en"),
    ("The café is closed", "en"),
    ("Seoul 서울", "ko"),
    ("今日は天気がいいですね", "ja"),
    ("カタカナ", "ja"),
    ("今天天气很好，我们去公园吧", "zh"),
    ("Привет, как дела?", "cyrillic"),
    ("Українська мова", "cyrillic"),
    ("¿Dónde está la biblioteca? No lo sé", "latin_other"),
    ("Ich weiß nicht, was das ist", "latin_other"),
    ("Je ne sais pas ce que c'est dans la maison", "latin_other"),
    ("Người Việt Nam", "latin_other"),
    ("مرحبا كيف حالك اليوم", "other"),
    ("สวัสดีครับ", "other"),
    ("नमस्ते दुनिया", "other"),
    ("1234 5678", "digits"),
    ("3 + 4 = 7", "digits"),
    ("٣٤٥", "digits"),
    ("", "none"),
    ("  \n", "none"),
    ("?!…", "none"),
    ("🙂🙂", "none"),
    ("def f(x):\n    return x + 1\n\nimport os\nclass A:\n    pass", "code"),
    ("#include <stdio.h>\nint main() {\n  return 0;\n}", "code"),
    ("function f() { return 1; }", "code"),
    ("SELECT a FROM b;\nINSERT INTO c;", "code"),
]


@pytest.mark.parametrize(("text", "expected"), CASES)
def test_language(text: str, expected: str) -> None:
    assert language(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("안녕하세요 반갑습니다. This is a sentence in English too.", {"ko", "en"}),
        ("Translate into Korean: 오늘은 날씨가 아주 좋습니다 그렇죠", {"ko", "en"}),
        ("今日は良い天気です。오늘은 날씨가 좋습니다. 산책하러 갈까요?", {"ko", "ja"}),
        ("PyTorch로 모델을 학습시키는 방법을 자세히 알려 주세요", {"ko"}),
        ("BTS 최고!", {"ko"}),
        ("The word 안녕 means hello in the Korean language", {"en"}),
    ],
)
def test_mixed_rows(text: str, expected: set[str]) -> None:
    assert set(languages(text)) == expected


def test_shares() -> None:
    mix = LanguageMix()
    for row, text in enumerate(
        ["안녕하세요"] * 97 + ["Hello there"] * 2 + ["안녕하세요 여러분 and this is how it was"], 1
    ):
        mix.add(text, "f", row)
    found = mix.as_dict()
    assert found["shares"] == {"ko": 0.98, "en": 0.02} or found["shares"] == {"ko": 0.97, "en": 0.03}
    assert sum(found["mixed"].values()) == 1
    assert found["examples"][0]["row"] == 100


def test_a_guess_by_ascii_alone_would_be_seen() -> None:
    wrong = sum(("en" if text.isascii() else "ko") != expected for text, expected in CASES)
    assert wrong > 15


@pytest.mark.parametrize("unit", ["안녕 ", "word ", "<a", "`", "1", "``", "a@"])
def test_long_texts_cost_no_more(unit: str) -> None:
    start = time.process_time()
    for _ in range(10):
        languages(unit * 300_000)
    assert time.process_time() - start < 0.5
