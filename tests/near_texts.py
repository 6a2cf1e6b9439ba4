"""Generated sentences, English and Korean by turns, and damaged copies of texts at the limit of what is near."""

from __future__ import annotations

import random
import re

from rapidfuzz.distance import Levenshtein

from whet.data.detect.duplicates import normalised

ENGLISH = re.findall(
    r"\w+",
    "how why when where can could should i you we they my your the a this that card account money transfer payment "
    "refund top up cash machine exchange rate fee charge pending declined cancelled missing wrong new lost stolen "
    "phone app pin code limit country currency does did not work arrive show take long today yesterday still please",
)
KOREAN = re.findall(
    r"\w+",
    "이 영화 정말 진짜 너무 배우 연기 감독 스토리 재미있다 지루하다 최고의 최악의 명작 시간이 아깝다 다시 보고 싶은 "
    "감동적인 음악이 좋았다 그냥 그랬다 기대했는데 실망 눈물이 난다 아이들과 함께 극장에서 추천합니다 결말이",
)


def sentences(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    made = []
    for index in range(count):
        words = ENGLISH if index % 2 else KOREAN
        made.append(" ".join(draw.choice(words) for _ in range(draw.randint(4, 24))))
    return made


def damaged(text: str, edits: int, draw: random.Random) -> str:
    """`text` after so many insertions, deletions and substitutions at random places."""
    letters = list(text)
    for place in sorted(draw.sample(range(len(letters)), edits), reverse=True):
        kind = draw.randrange(3)
        letters[place : place + (kind != 0)] = [] if kind == 1 else [draw.choice("aeinrst가나다라마")]
    return "".join(letters)


def planted(texts: list[str], seed: int) -> tuple[list[str], list[int]]:
    """(copies at the very limit of what counts as near, index of each one's original)."""
    draw = random.Random(seed)
    copies, originals = [], []
    for index, text in enumerate(texts):
        copy = damaged(text, len(text) // 10, draw)
        one, other = normalised(text), normalised(copy)
        if one != other and Levenshtein.distance(one, other) <= 0.1 * max(len(one), len(other)):
            copies.append(copy)
            originals.append(index)
    assert len(copies) > 0.5 * len(texts)
    return copies, originals
