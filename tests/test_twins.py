"""Each page for users has a Korean twin that shows the same: sections, blocks, code, links, names and numbers.

What is compared is what a translation keeps. A page that gains a paragraph, a row, a command, a setting or another
number turns its twin red until the twin has it too; only a sentence that is reworded within its paragraph does not.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Pages for those who work on whet; docs/glossary.ko.md is a list of words, and no twin.
ENGLISH_ONLY = {"docs/architecture.md", "docs/add-a-method.md", "docs/log.md", "docs/glossary.md", "CONTRIBUTING.md"}
ENGLISH = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
TWINS = [page for page in ENGLISH if not page.endswith(".ko.md") and page not in ENGLISH_ONLY]
SAID_OTHERWISE = {"11.5": "1,150", "24": "2,400"}  # millions, which Korean counts in ten thousands
LINK = re.compile(r"\]\(([^)\s]+)\)")
SPAN = re.compile(r"`([^`\n]+)`")
COMMENT = re.compile(r"(?m)(?<=\S) +# .*$")  # behind a command, in the language of the page
NUMBER = re.compile(r"(?<![\w.,])\d[\d,.]*(?:e[-+]?\d+)?")


def korean_of(page: str) -> str:
    return page.removesuffix(".md") + ".ko.md"


@dataclass(frozen=True)
class Section:
    """A heading of `level` and what stands below it, up to the next one.

    blocks: the kind of each block in order, code as it is. cells: the number of cells of each table row.
    """

    level: int
    blocks: tuple[str, ...]
    cells: tuple[int, ...]
    links: Counter[str]
    names: frozenset[str]
    numbers: frozenset[str]


def sections(text: str) -> list[Section]:
    """The sections of a page."""
    code: list[str] = []

    def taken(found: re.Match[str]) -> str:
        code.append(found[0])
        return f"~code {len(code) - 1}~"

    without_code = re.sub(r"(?ms)^```.*?^```$", taken, text)
    pieces = re.split(r"(?m)^(?=#+ )", without_code)[1:]
    return [_section(piece, code) for piece in pieces]


def _section(piece: str, code: list[str]) -> Section:
    blocks, cells = [], []
    for block in re.split(r"\n{2,}|\n(?=- |\||<!-- |~code )", piece.strip()):
        shown = re.fullmatch(r"~code (\d+)~", block.strip())
        kind = re.match(r"#+ |- |\||<!-- /?[\w-]+ -->|!\[|\*\*", block)
        blocks.append(COMMENT.sub("", code[int(shown[1])]) if shown else kind[0] if kind else "text")
        if block.startswith("|"):
            cells.append(len(re.findall(r"(?<!\\)\|", block)))
    prose = re.sub(r"~code \d+~", "", piece)
    names = frozenset(name.replace(".ko.md", ".md") for name in SPAN.findall(prose))
    numbers = frozenset(number.rstrip(".,") for number in NUMBER.findall(LINK.sub("", SPAN.sub("", prose))))
    links = Counter(link.replace(".ko.md", ".md") for link in LINK.findall(prose))
    level = len(piece) - len(piece.lstrip("#"))
    return Section(level, tuple(blocks), tuple(cells), links, names, numbers)


def differences(english: str, korean: str) -> list[str]:
    """What one text shows and the other does not, in words; the first difference of each section."""
    ours, theirs = sections(english), sections(korean)
    if [one.level for one in ours] != [one.level for one in theirs]:
        return [f"headings: {[one.level for one in ours]} and {[one.level for one in theirs]}"]
    return [difference for pair in zip(ours, theirs, strict=True) for difference in _difference(*pair)]


def _difference(ours: Section, theirs: Section) -> list[str]:
    wanted = {number for number in ours.numbers if SAID_OTHERWISE.get(number) not in theirs.numbers}
    parts = {
        "blocks": (ours.blocks, theirs.blocks),
        "cells": (ours.cells, theirs.cells),
        "links": (ours.links, theirs.links),
        "names in code": (sorted(ours.names - theirs.names), sorted(theirs.names - ours.names)),
    }
    found = [f"{ours.blocks[0]}: {name}: {one} and {other}" for name, (one, other) in parts.items() if one != other]
    missing = sorted(wanted - theirs.numbers)
    return found[:1] or ([f"numbers missing: {missing}"] if missing else [])


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", TWINS)
def test_a_page_for_users_has_a_twin_that_shows_the_same(page: str) -> None:
    assert (ROOT / korean_of(page)).exists(), "write its Korean twin, or name it in ENGLISH_ONLY"
    assert differences(read(page), read(korean_of(page))) == []


def test_every_korean_page_is_a_twin() -> None:
    korean = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.ko.md")} | {"README.ko.md"}
    assert korean - {"docs/glossary.ko.md"} == {korean_of(page) for page in TWINS}
    assert {page for page in ENGLISH_ONLY if not (ROOT / page).exists()} == set()


@pytest.mark.parametrize("page", TWINS)
def test_twins_name_each_other_at_their_top(page: str) -> None:
    for one, other, word in ((page, korean_of(page), "Korean"), (korean_of(page), page, "영어")):
        name = Path(other).name
        assert f"{word}: [{name}]({name})" in read(one)[:800].replace("\n", " "), one


@pytest.mark.parametrize("page", TWINS)
def test_a_korean_page_links_korean_pages(page: str) -> None:
    """But its own English page; and an English page links no Korean one but its own."""
    targets = [(ROOT / page).parent.joinpath(link.partition("#")[0]) for link in LINK.findall(read(korean_of(page)))]
    english = {path.resolve() for path in targets if path.suffix == ".md" and not path.name.endswith(".ko.md")}
    twins = {(ROOT / one).resolve() for one in TWINS}
    assert english & twins == {(ROOT / page).resolve()}
    assert {link for link in LINK.findall(read(page)) if ".ko.md" in link} == {Path(korean_of(page)).name}


def unused_words(text: str) -> list[str]:
    """The words of a Korean text that docs/glossary.ko.md says are not used, at the start of a word."""
    listed = read("docs/glossary.ko.md").partition("## 쓰지 않는 말")[2]
    words = re.findall(r"(?m)^\| ([가-힣 ]+) \| ", listed.partition("| --- | --- |")[2])
    assert len(words) > 5
    return [word for word in words if re.search(rf"(?<![가-힣]){word}", text)]


@pytest.mark.parametrize("page", TWINS)
def test_a_korean_page_uses_the_words_of_the_glossary(page: str) -> None:
    assert unused_words(read(korean_of(page))) == []


def test_a_word_that_is_not_used_would_be_seen() -> None:
    assert unused_words("이 과제는 층마다 다릅니다.") == ["과제", "층"]
    assert unused_words("계층과 데이터베이스는 다른 말입니다.") == []


PAGE = """# Title

First words of a page with `data.packing`, 4,096 tokens and a [link](data.md).

- one
- two

| a | b |
| --- | --- |
| 1 | x |

## Section

```
whet plan a.yaml
```
"""


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("## Section", "### Section", "headings"),
        ("## Section", "## Section\n\n## Another", "headings"),
        ("whet plan", "whet train", "blocks"),
        ("- two\n", "- two\n- three\n", "blocks"),
        ("- two\n", "- two\n\nA paragraph that is new.\n", "blocks"),
        ("| 1 | x |\n", "| 1 | x |\n| 2 | y |\n", "blocks"),
        ("| 1 | x |", "| 1 | x | y |", "cells"),
        ("(data.md)", "(tasks.md)", "links"),
        ("`data.packing`", "`data.padding_free`", "names in code"),
        ("4,096", "8,192", "numbers"),
    ],
)
def test_a_twin_that_falls_behind_would_be_seen(old: str, new: str, said: str) -> None:
    twin = PAGE.replace("(data.md)", "(data.ko.md)").replace("First words", "처음")
    assert differences(PAGE, twin) == []
    changed = PAGE.replace(old, new)
    assert changed != PAGE
    assert said in differences(changed, twin)[0]
