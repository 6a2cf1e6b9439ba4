"""The confusion chart: which form it takes, that it says what was counted, and that hostile names cannot act."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from whet.evaluation.label_metrics import details
from whet.report import page
from whet.report.confusion import STRONGEST, STYLE, confusion

HOSTILE = "<script>alert(1)</script>\" onmouseover='x' & \x1b[31m \u202eleft \ud800"
PAGE_CSS = (Path(page.__file__).parent / "page.css").read_text(encoding="utf-8")


class Cells(HTMLParser):
    """(role, classes, style, text) of each element with a role; fails on a tag that is closed out of order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: set[str] = set()
        self.attributes: set[str] = set()
        self.found: list[tuple[str, str, str, str]] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.open.append(tag)
        self.names.add(tag)
        self.attributes |= set(given)
        if "role" in given:
            self.found.append((given["role"], given.get("class", ""), given.get("style", ""), ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.found:
            *rest, text = self.found[-1]
            self.found[-1] = (*rest, text + data)  # type: ignore[assignment]


def drawn(rows: int, classes: int, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    expected = rng.integers(0, classes, rows)
    predicted = np.where(rng.random(rows) < 0.7, expected, rng.integers(0, classes, rows))
    return details(predicted, expected, [f"class {n}" for n in range(classes)])


def check_matrix(html: str, counts: list[list[int]]) -> None:
    """Every count in its place, right ones on the diagonal alone, shade by the share of the row."""
    body = [cell for cell in Cells(html).found if cell[0] == "cell"]
    size = len(counts)
    assert len(body) == size * (size + 1)
    for row, line in enumerate(counts):
        cells = body[row * (size + 1) : (row + 1) * (size + 1)]
        assert [int(cell[3].replace(",", "")) for cell in cells[:-1]] == line
        for column, (count, cell) in enumerate(zip(line, cells[:-1], strict=True)):
            assert cell[1] == ("none" if not count else "right" if row == column else "wrong")
            if count:
                assert float(re.fullmatch(r"--share:(.+)%", cell[2])[1]) == pytest.approx(
                    STRONGEST * count / sum(line), abs=0.06
                )
        assert cells[-1][3] == (page.score_text(line[row] / sum(line), True) if sum(line) else "–")


@pytest.mark.parametrize("classes", [2, 3, 20])
def test_up_to_twenty_classes_are_a_matrix(classes: int) -> None:
    found = drawn(4000, classes)
    html = confusion(found)
    check_matrix(html, found["confusion"])
    assert "<table" not in html
    right = sum(found["confusion"][n][n] for n in range(classes))
    assert f"{right:,} of 4,000 right" in html


def test_a_planted_fault_is_seen() -> None:
    found = drawn(500, 4)
    turned = [list(line) for line in zip(*found["confusion"], strict=True)]
    assert turned != found["confusion"]
    with pytest.raises(AssertionError):
        check_matrix(confusion({**found, "confusion": turned}), found["confusion"])
    with pytest.raises(AssertionError):
        check_matrix(confusion(found).replace('class="wrong"', 'class="right"'), found["confusion"])


def test_a_class_without_rows_has_no_share() -> None:
    found = details([0, 0, 2], [0, 0, 0], ["a", "b", "c"])
    html = confusion(found)
    check_matrix(html, [[2, 0, 1], [0, 0, 0], [0, 0, 0]])
    assert html.count(">–<") == 2


@pytest.mark.parametrize("classes", [21, 77, 150])
def test_more_classes_are_a_table_of_the_most_frequent(classes: int) -> None:
    found = drawn(8000, classes)
    html = confusion(found)
    assert html.count("<tr>") == 1 + 20
    assert 'role="table"' not in html
    first = found["most_confused"][0]
    row = f'{first["reference"]}</td><td class="" data-label="Taken for">{first["predicted"]}<'
    assert row in html
    assert html.index(row) == min(html.index(f">{n['reference']}</td>") for n in found["most_confused"]) + 1
    if classes <= 100:
        rows = sum(found["confusion"][found["names"].index(first["reference"])])
        assert page.score_text(first["rows"] / rows, True) in html
    else:
        assert ">–</td>" in html


def test_the_table_ends_at_twenty_whatever_the_record_holds() -> None:
    listed = [{"reference": f"a{n}", "predicted": "b", "rows": 99 - n} for n in range(50)]
    html = confusion({"names": ["a0", "b"], "most_confused": listed})
    assert re.findall(r">(a\d+)<", html) == [f"a{n}" for n in range(20)]
    assert "the 20 most frequent" in html


def test_without_a_mistake_many_classes_draw_nothing() -> None:
    same = np.arange(30)
    assert confusion(details(same, same, [str(n) for n in same])) == ""


@pytest.mark.parametrize(
    "damaged",
    [
        {},
        {"names": "ab", "confusion": [[1]]},
        {"names": ["a", "b"], "confusion": [[1, 2], [3]]},
        {"names": ["a", "b"], "confusion": [[1, 2], [3, None]]},
        {"names": ["a", "b"], "confusion": [[1, 2], [3, -1]]},
        {"names": ["a", "b"], "confusion": [[1, None, 2], ["x", 3, 4]]},
        {"names": ["a", "b"], "confusion": [[1, 2], [3, 0.5]]},
        {"names": ["a", "b"], "confusion": [[1, 2], [3, float("nan")]]},
        {"names": ["a", "b"], "confusion": [[1, 2], [3, 4], "x"], "most_confused": 3},
        {"names": ["a", 1], "confusion": [[1, 2], [3, 4]]},
        {"names": ["a", "b"], "confusion": [[0, 0], [0, 0]], "most_confused": [{}, 1, {"reference": "a", "rows": "x"}]},
        {"names": [], "confusion": []},
    ],
)
def test_damaged_records_draw_what_is_left_of_them(damaged: dict[str, Any]) -> None:
    html = confusion(damaged)
    Cells(html)
    assert 'role="table"' not in html or damaged["confusion"][:2] == [[1, 2], [3, 4]]
    assert "<tr>" not in html


def test_hostile_names_cannot_act() -> None:
    names = [HOSTILE, "가" * 500 + '"', *map(str, range(23))]
    expected = np.arange(25).repeat(2)
    for classes in (3, 25):
        index = np.minimum(expected, classes - 1)
        html = confusion(details((index + 1) % classes, index, names[:classes]))
        seen = Cells(html)
        assert not seen.names & {"script", "img"}
        assert seen.attributes <= {"class", "style", "role", "title", "tabindex", "aria-label", "data-label", "scope"}
        assert "\x1b" not in html
        assert "\u202e" not in html
        html.encode("utf-8")
        assert "more characters" in html


def colours(css: str) -> dict[str, tuple[float, ...]]:
    found = re.findall(r"--([\w-]+): #([0-9a-f]{6});", css)
    return {name: tuple(int(value[i : i + 2], 16) / 255 for i in (0, 2, 4)) for name, value in found}


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """WCAG 2 contrast of two sRGB colours."""

    def light(colour: tuple[float, ...]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((light(one), light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def lowest_contrast(theme: dict[str, tuple[float, ...]], strongest: float) -> float:
    return min(
        contrast(theme["ink"], tuple(s * a + (1 - s) * b for a, b in zip(theme[name], theme["wash"], strict=True)))
        for name in ("accent", "bad")
        for s in np.linspace(0, strongest, 21)
    )


def test_counts_can_be_read_on_every_shade_of_both_themes() -> None:
    light, dark, *_ = re.findall(r":root \{(.*?)\}", PAGE_CSS, re.DOTALL)
    assert "var(--share), var(--wash)" in STYLE
    for theme in (colours(light), colours(dark)):
        assert lowest_contrast(theme, STRONGEST / 100) > 4.5
        assert lowest_contrast(theme, 1.0) < 4.5  # at full strength it could not be read


def test_the_style_needs_nothing_from_elsewhere() -> None:
    assert "url(" not in STYLE
    assert set(re.findall(r"var\(--([\w-]+)\)", STYLE)) <= {*colours(PAGE_CSS), "share"}
    assert "</" not in STYLE
