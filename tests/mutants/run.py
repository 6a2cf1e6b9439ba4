"""Plants careless edits one at a time and runs the tests that should notice: `python tests/mutants/run.py`.

Each job works on a copy of the tree of its own. First every set of tests runs without an edit: where that is red, its
mutants say nothing and are reported as invalid. Then each mutant is killed (a test failed), survived (all passed),
broken (the tests could not even be collected: such an edit proves nothing) or invalid. The exit code is 0 when all that
were planted were killed. Needs only pytest; a mutant takes as long as its tests, of which the first failure ends them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))

from mutants.mutant import Mutant  # noqa: E402 (its folder has to be found first)

ROOMS = ("template", "evaluation", "ship", "engine", "families", "training", "layout", "base", "korean")
COPIED = ("whet", "tests", "recipes", "examples", "docs", "bench", "pyproject.toml", "Makefile", "README.md",
          "README.ko.md", "CONTRIBUTING.md", "requirements.lock")  # fmt: skip
LONGEST_SECONDS = 600.0  # a mutant that loops for ever is noticed
EXIT = {0: "survived", 1: "killed"}  # pytest's exit codes; others: nothing was run
NOT_COLLECTED = re.compile(r"^ERROR tests/[^:\s]*\.py(?!::)", re.MULTILINE)  # it cannot be imported


def table(room: str | None = None) -> list[Mutant]:
    """The mutants of one room, or all."""
    rooms = ROOMS if room is None else (room,)
    return [mutant for name in rooms for mutant in importlib.import_module(f"mutants.{name}").MUTANTS]


def planted(text: str, mutant: Mutant) -> str:
    """`text` with the edit. ValueError unless its place is there exactly once."""
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.name}: the old text stands {text.count(mutant.old)} times in {mutant.file}")
    return text.replace(mutant.old, mutant.new)


def copy_tree(place: Path) -> Path:
    """What tests need of the tree, without caches."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, place / name, ignore=shutil.ignore_patterns("__pycache__", "runs", ".*"))
        elif source.is_file():
            shutil.copy(source, place / name)
    return place


def run_tests(tree: Path, tests: str) -> tuple[str, float, str]:
    """(killed, survived, broken or timeout; seconds; the last lines) of these tests in `tree`."""
    # Bytecode of an edit within the same second and of the same size would not be made anew.
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(tree)}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "-p", "no:cacheprovider", "-p", "no:warnings",
               "--tb=line", *split(tests)]  # fmt: skip
    began = time.perf_counter()
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=LONGEST_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return "timeout", time.perf_counter() - began, ""
    tail = "\n".join(done.stdout.splitlines()[-4:])
    outcome = "broken" if NOT_COLLECTED.search(done.stdout) else EXIT.get(done.returncode, "broken")
    return outcome, time.perf_counter() - began, tail


def split(tests: str) -> list[str]:
    """`test_a.py test_b.py -k 'x or y'` as arguments, files found below tests/."""
    import shlex

    return [f"tests/{word}" if word.endswith(".py") or ".py::" in word else word for word in shlex.split(tests)]


def judge(mutants: list[Mutant], jobs: int, *, baseline: bool) -> list[dict[str, Any]]:
    """A record of each mutant, in their order."""
    with tempfile.TemporaryDirectory(prefix="whet-mutants-") as scratch:
        trees: Queue[Path] = Queue()
        for number in range(jobs):
            place = Path(scratch) / str(number)
            place.mkdir()
            trees.put(copy_tree(place))

        def healthy(tests: str) -> tuple[str, bool]:
            tree = trees.get()
            outcome, seconds, tail = run_tests(tree, tests)
            trees.put(tree)
            if outcome != "survived":
                print(f"without an edit not green ({outcome}, {seconds:.0f} s): {tests}\n{tail}", flush=True)
            return tests, outcome == "survived"

        def planted_one(mutant: Mutant) -> dict[str, Any]:
            tree = trees.get()
            file = tree / "whet" / mutant.file
            text = file.read_text(encoding="utf-8")
            file.write_text(planted(text, mutant), encoding="utf-8")
            outcome, seconds, tail = run_tests(tree, mutant.tests)
            file.write_text(text, encoding="utf-8")
            trees.put(tree)
            outcome = "killed" if outcome == "timeout" else outcome
            first = next((line for line in tail.splitlines() if line.startswith(("FAILED", "ERROR"))), "")
            print(f"{outcome:9}{seconds:6.1f} s  {mutant.name}  {first}", flush=True)
            return {"name": mutant.name, "file": mutant.file, "outcome": outcome, "seconds": round(seconds, 1),
                    "breaks": mutant.breaks, "tail": tail}  # fmt: skip

        with ThreadPoolExecutor(jobs) as pool:
            sets = dict.fromkeys(mutant.tests for mutant in mutants)
            green = dict(pool.map(healthy, sets)) if baseline else dict.fromkeys(sets, True)
            return [
                future.result() if future is not None else
                {"name": mutant.name, "file": mutant.file, "outcome": "invalid", "seconds": 0.0}
                for mutant, future in [
                    (mutant, pool.submit(planted_one, mutant) if green[mutant.tests] else None) for mutant in mutants
                ]
            ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--room", choices=ROOMS, help="the mutants of one room")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="a mutant by its name; may repeat")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time (2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records there")
    parser.add_argument("--no-baseline", action="store_true", help="take it that the tests are green without an edit")
    options = parser.parse_args()
    chosen = [mutant for mutant in table(options.room) if not options.only or mutant.name in options.only]
    if missing := set(options.only) - {mutant.name for mutant in chosen}:
        parser.error(f"no such mutant: {', '.join(sorted(missing))}")
    began = time.perf_counter()
    records = judge(chosen, options.jobs, baseline=not options.no_baseline)
    counts = Counter(record["outcome"] for record in records)
    if options.json:
        options.json.write_text(json.dumps({"counts": counts, "mutants": records}, indent=1) + "\n", encoding="utf-8")
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
          + f" of {len(records)} in {time.perf_counter() - began:.0f} s")  # fmt: skip
    for record in records:
        if record["outcome"] != "killed":
            print(f"  {record['outcome']}: {record['name']} ({record.get('breaks', 'its tests are red without it')})")
    return int(counts["killed"] != len(records))


if __name__ == "__main__":
    sys.exit(main())
