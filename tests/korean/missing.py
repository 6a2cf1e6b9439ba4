"""Print what the Korean catalogue lacks, as JSON ready to be filled, and what it has too much.

    python tests/korean/missing.py                  texts without an entry, by file of the catalogue
    python tests/korean/missing.py --merge FILE     put a filled file of that form in, and drop what is stale
    python tests/korean/missing.py --tree FOLDER    the same for another checkout: FOLDER is its root

A text that people never read, or that is the same in every language (a command, a value), goes into `scope.json`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from texts import OTHERS, RECIPES, Text, collect, unnamed

HERE = Path(__file__).resolve()
Rooms = dict[str, dict[str, str]]


def entries(root: Path) -> Rooms:
    """The catalogue below a checkout, by file."""
    return {path.stem: json.loads(path.read_text("utf-8")) for path in sorted((root / "builtin/korean").glob("*.json"))}


def missing(wanted: Mapping[str, Text], rooms: Rooms) -> Rooms:
    """Texts that stand in no file, or in a wrong one, by file; the value says where they come from."""
    found: Rooms = defaultdict(dict)
    for english, text in wanted.items():
        if english not in rooms.get(text.room, {}):
            found[text.room][english] = " ".join([text.place, *text.values])
    return dict(found)


def stale(wanted: Mapping[str, Text], rooms: Rooms) -> list[str]:
    """Entries whose English no longer exists, with their file. Texts of other libraries are not looked for."""
    return [
        f"{room}: {english}"
        for room, texts in rooms.items()
        if room != OTHERS
        for english in texts
        if english not in wanted or wanted[english].room != room
    ]


def homeless(rooms: Rooms, root: Path) -> list[str]:
    """Files of the catalogue that are named after no room of whet, and hold no texts of all rooms."""
    names = {path.stem for path in root.glob("*") if path.is_dir() or path.suffix == ".py"}
    return sorted(rooms.keys() - names - {OTHERS, RECIPES, "found", "parts", "tables"})


def faults(wanted: Mapping[str, Text], rooms: Rooms) -> list[str]:
    """What is wrong with entries: other places than the English has, no Hangul, or files that are not sorted."""
    found = [f"{room}.json is not sorted" for room, texts in rooms.items() if list(texts) != sorted(texts)]
    for room, texts in rooms.items():
        for english, korean in texts.items():
            here = set(re.findall(r"\{(\d+)\}", english))
            there = set(re.findall(r"\{(\d+)(?::words)?\}", korean))
            optional = {str(number) for number in wanted[english].optional} if english in wanted else set()
            if there - here or here - there - optional:
                found.append(f"{room}: {english}: places {sorted(here)} became {sorted(there)}")
            if not re.search("[가-힣]", korean) and not _is_only_places(english, korean):
                found.append(f"{room}: {english}: no Korean")
    return found


def _is_only_places(english: str, korean: str) -> bool:
    """True for a template of which nothing but its values and signs is left, such as "{0} of {1}" for {1}/{0}."""
    return bool(_letters(english)) and not _letters(korean) and "{" in english


def _letters(text: str) -> str:
    return re.sub(r"\{\d+(:words)?\}|[^A-Za-z가-힣]", "", text)


def merge(filled: Rooms, wanted: Mapping[str, Text], root: Path) -> None:
    """Write every entry that is wanted into its file, sorted."""
    rooms = entries(root)
    known = {english: korean for texts in rooms.values() for english, korean in texts.items()}
    known |= {english: korean for texts in filled.values() for english, korean in texts.items()}
    made: Rooms = defaultdict(dict, {OTHERS: rooms.get(OTHERS, {})})
    for english, text in wanted.items():
        if english in known:
            made[text.room][english] = known[english]
    folder = root / "builtin/korean"
    for path in folder.glob("*.json"):
        path.unlink()
    for room, texts in made.items():
        (folder / f"{room}.json").write_text(
            json.dumps(dict(sorted(texts.items())), ensure_ascii=False, indent=1) + "\n"
        )


def main() -> None:
    """Run the command line above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--merge", type=Path, metavar="FILE")
    parser.add_argument("--tree", type=Path, default=HERE.parents[2], metavar="FOLDER")
    words = parser.parse_args()
    root = words.tree / "whet"
    wanted = collect(root)
    if words.merge:
        merge(json.loads(words.merge.read_text("utf-8")), wanted, root)
    rooms = entries(root)
    lacking = missing(wanted, rooms)
    print(json.dumps(lacking, ensure_ascii=False, indent=1))
    for line in [
        *(f"stale: {one}" for one in stale(wanted, rooms)),
        *(f"wrong: {one}" for one in faults(wanted, rooms)),
        *(f"no room: {one}.json" for one in homeless(rooms, root)),
        *(f"not through phrase: {one}" for one in unnamed(root)),
    ]:
        print(line)
    print(f"{len(wanted) - sum(map(len, lacking.values()))} of {len(wanted)} texts")


if __name__ == "__main__":
    main()
