"""The pages that teach are true: the method of docs/add-a-method.md is added and proven, recipes train, Python runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import task_nets
import tasks
import tiny
from ruamel.yaml import YAML

import whet

ROOT = Path(__file__).parents[1]
TUTORIAL = "add-a-method.md"
# Trains with the added method through the public door, answers, merges, and runs the conformance table on it.
SCRIPT = """
import json, sys
import conformance, whet
from pathlib import Path

place = Path(sys.argv[1])
assert Path(whet.__file__).parent == place / "whet", whet.__file__
rows = [case for case in conformance.cases() if case.method.name == "scale"]
kept = {}
for case in rows:
    for name, (check, _) in conformance.CHECKS.items():
        if sys.argv[2] not in ("all", name):
            continue
        try:
            kept[f"{case.task}: {name}"] = check(case)
        except AssertionError:
            kept[f"{case.task}: {name}"] = "broken"
found = {"kept": kept}
if sys.argv[2] == "all":
    run = whet.train(place / "scale.yaml", **json.loads((place / "overrides.json").read_text()))
    found["files"] = sorted(path.name for path in run.adapter.iterdir())
    found["tuned"] = whet.evaluate(run.path, max_rows=2)["tuned"]["metrics"]
    found["merge"] = whet.merge(run.path, place / "out")["chosen"]
    found["row"] = next(row for row in whet.methods() if row["method"] == "scale")
print(json.dumps(found))
"""


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page of docs/ in one language."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return [body for name, body in re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", text) if name == language]


def copy_with_scale(place: Path, source: str) -> None:
    """A copy of the package with the tutorial's file in it and its lines in the list of methods."""
    shutil.copytree(ROOT / "whet", place / "whet", ignore=shutil.ignore_patterns("builtin", "__pycache__"))
    (place / "whet" / "builtin").symlink_to(ROOT / "whet" / "builtin")
    (place / "whet" / "methods" / "scale.py").write_text(source, encoding="utf-8")
    (change,) = blocks(TUTORIAL, "diff")
    added = [line[1:] for line in change.splitlines() if line.startswith("+")]
    (removed,) = [line[1:] for line in change.splitlines() if line.startswith("-")]
    listing = place / "whet" / "methods" / "all.py"
    text = listing.read_text(encoding="utf-8")
    assert text.count(f"\n{removed}\n") == 1, "the tutorial shows another list of methods than there is"
    text = text.replace(removed, added[1]).replace("from whet.methods.lora import", f"{added[0]}\nfrom whet.methods.lora import")
    listing.write_text(text, encoding="utf-8")


def run_script(place: Path, checks: str) -> dict:
    path = os.pathsep.join([str(place), str(ROOT / "tests")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(place), checks], env=environment, cwd=place,
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout.splitlines()[-1])


def test_the_method_of_the_tutorial_keeps_its_promises(model_dir: Path, data_file: Path, tmp_path: Path) -> None:
    (source,) = blocks(TUTORIAL, "python")
    (recipe,) = blocks(TUTORIAL, "yaml")
    copy_with_scale(tmp_path, source)
    (tmp_path / "scale.yaml").write_text(recipe, encoding="utf-8")
    overrides = tiny.settings(model_dir, data_file, tmp_path / "run") | {"data.val_size": 4, "train.max_steps": 3}
    del overrides["method.r"], overrides["train.learning_rate"]
    (tmp_path / "overrides.json").write_text(json.dumps(overrides), encoding="utf-8")
    found = run_script(tmp_path, "all")
    not_promised = {"causal: peft", "classification: peft", "seq2seq: peft", "classification: compile", "seq2seq: compile"}
    assert {name for name, verdict in found["kept"].items() if verdict is False} == not_promised
    assert [name for name, verdict in found["kept"].items() if verdict == "broken"] == []
    assert len(found["kept"]) == 30
    assert {"trained.safetensors", "method.json"} <= set(found["files"])
    assert found["tuned"]
    assert found["merge"].startswith("trained base")
    assert found["row"]["mergeable"]


def test_the_fault_of_the_tutorial_is_seen(tmp_path: Path) -> None:
    (source,) = blocks(TUTORIAL, "python")
    fault, count = re.subn(r"(?m)^.*layer\.bias.*\n", "", source)
    assert count == 2
    copy_with_scale(tmp_path, fault)
    kept = run_script(tmp_path, "merge")["kept"]
    assert kept == {"causal: merge": True, "classification: merge": "broken", "seq2seq: merge": True}
