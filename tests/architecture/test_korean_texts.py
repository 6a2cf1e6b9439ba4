"""Every text that a person can be shown has its Korean, with the same places, and no entry has lost its English."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "korean"))

from missing import entries, faults, homeless, missing, stale  # noqa: E402
from texts import Text, collect, unnamed  # noqa: E402

REMEDY = "python tests/korean/missing.py prints what to fill in"


@pytest.fixture(scope="module")
def wanted() -> dict[str, Text]:
    return collect()


def test_every_text_has_its_korean_and_nothing_is_stale(wanted: dict[str, Text]) -> None:
    rooms = entries(ROOT / "whet")
    assert len(wanted) > 2300, "the texts are no longer found"
    assert sum(text.room == "report" for text in wanted.values()) > 250
    assert sum(text.room == "recipes" for text in wanted.values()) > 35
    assert missing(wanted, rooms) == {}, REMEDY
    assert stale(wanted, rooms) == [], REMEDY
    assert faults(wanted, rooms) == [], REMEDY
    assert homeless(rooms, ROOT / "whet") == [], "the room of a text has another name now"


def test_every_text_of_a_page_is_named(tmp_path: Path) -> None:
    assert unnamed(ROOT / "whet") == [], "phrase(text) shows it in Korean too"
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "page.py").write_text(PAGE)
    assert [one.partition(": ")[2] for one in unnamed(tmp_path)] == [
        "<p>Alone</p>", '<b class="some class">{0}</b> rows', "no markup here", "Rows of {0}",
    ]  # fmt: skip
    assert {text.english for text in collect(tmp_path).values() if text.place.startswith("report")} >= {
        "Named", "{0} named", "One", "Rows of {0}",
    }  # fmt: skip


PAGE = '''
_NAMES = {"one": "One"}


def page(count: int, name: str) -> str:
    """Neither is this one."""
    named = phrase("Named") + phrase("{0} named", count) + phrase(_NAMES[name])
    body = "<p>Alone</p>"
    body += f'<b class="some class">{count}</b> rows'
    body += "no markup here"
    return f'<div class="card wide"><h2 title="{name}">{named}</h2>{body}</div>' + title(f"Rows of {name}")
'''


SOURCE = '''
"""A docstring is not shown."""
from whet.base.errors import UserError

_LINES = {"short": "a row without end"}


def check(kind: str, name: str, rows: int) -> None:
    """Neither is this one."""
    if name == "two words":
        raise ValueError("our own mistake")
    why = f"{rows:,} rows of {name}" if rows else "no rows at all"
    raise UserError("no such " + kind + f" in {name}", f"write {name}" if kind else "remove it", expected="text",
                    found=f"{rows} row{'s' if rows > 1 else ''}")
'''


@pytest.fixture
def planted(tmp_path: Path) -> dict[str, Text]:
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "file.py").write_text(SOURCE)
    return collect(tmp_path)


def test_texts_of_a_file_are_found_as_templates(planted: dict[str, Text]) -> None:
    assert {text.english: text.room for text in planted.values() if text.place != "scope.json"} == {
        "a row without end": "room",
        "no such {0} in {1}": "room",
        "{0} rows of {1}": "room",
        "no rows at all": "room",
        "write {0}": "room",
        "remove it": "room",
        "{0} row{1}": "found",
    }
    assert planted["{0} row{1}"].optional == {1}, "a plural's ending has no Korean"


def test_a_missing_a_stale_and_a_wrong_entry_are_seen(planted: dict[str, Text]) -> None:
    only = {english: text for english, text in planted.items() if text.place != "scope.json"}
    korean = {text.english: f"한글 {' '.join(f'{{{n}}}' for n in range(len(text.values)))}" for text in only.values()}
    rooms = {"found": {"{0} row{1}": korean.pop("{0} row{1}")}, "room": dict(sorted(korean.items()))}
    assert (missing(only, rooms), stale(only, rooms), faults(only, rooms)) == ({}, [], [])
    gone = rooms["room"].pop("remove it")
    assert list(missing(only, rooms)["room"]) == ["remove it"]
    rooms["room"]["remove that"] = gone
    assert stale(only, rooms) == ["room: remove that"]
    rooms["room"] = dict(sorted(rooms["room"].items()))
    for wrong, what in (("write it", "no Korean"), ("쓰세요", "places"), ("{0} {1} 쓰세요", "places")):
        rooms["room"]["write {0}"] = wrong
        assert any(what in fault for fault in faults(only, rooms)), wrong
    rooms["found"]["{0} row{1}"] = "{0}행"
    assert not any("row{1}" in fault for fault in faults(only, rooms))
