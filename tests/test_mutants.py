"""The table of careless edits stays alive: each edit still has its place, exactly once, and its tests are there."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest
from mutants import run
from mutants.mutant import Mutant

TESTS = Path(__file__).parent
MUTANTS = run.table()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_an_edit_has_its_place_and_makes_another_program(mutant: Mutant) -> None:
    text = (TESTS.parent / "whet" / mutant.file).read_text(encoding="utf-8")
    edited = run.planted(text, mutant)
    assert ast.dump(ast.parse(edited)) != ast.dump(ast.parse(text)), "not only other white space or comments"
    files = [word for word in run.split(mutant.tests) if word.startswith("tests/")]
    assert files
    assert all((TESTS.parent / name.partition("::")[0]).is_file() for name in files)
    assert mutant.breaks


def test_no_edit_is_listed_twice_and_every_room_has_some() -> None:
    assert Counter(mutant.name for mutant in MUTANTS).most_common(1)[0][1] == 1
    assert Counter((mutant.file, mutant.old, mutant.new) for mutant in MUTANTS).most_common(1)[0][1] == 1
    assert all(run.table(room) for room in run.ROOMS)


def test_an_edit_without_its_place_is_refused() -> None:
    mutant = Mutant("x", "x.py", "a = 1", "a = 2", "nothing", "test_x.py")
    assert run.planted("a = 1\n", mutant) == "a = 2\n"
    for text in ("", "a = 1\na = 1\n"):
        with pytest.raises(ValueError, match="times in"):
            run.planted(text, mutant)
