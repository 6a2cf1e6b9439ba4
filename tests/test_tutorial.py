"""The pages that teach are true: the method of docs/add-a-method.md is added and proven, recipes train, Python runs."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import tasks
import theirs
import tiny
from ruamel.yaml import YAML

import whet
from whet import api, cli
from whet.adapters.files import describe
from whet.runs import open_run
from whet.training.run import train

ROOT = Path(__file__).parents[1]
TAKEN = ("model.path", "method.r")  # from the adapter that training goes on from
TUTORIAL = "add-a-method.md"
LIGHT = "import sys; from whet.methods.all import METHODS; assert 'scale' in METHODS and 'torch' not in sys.modules"
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
    found["row"] = next(row for row in whet.capabilities() if row["method"] == "scale")
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
    text = text.replace(removed, added[1]).replace(
        "from whet.methods.lora import", f"{added[0]}\nfrom whet.methods.lora import"
    )
    listing.write_text(text, encoding="utf-8")


def python(code: str, path: list[Path], place: Path, *words: str) -> list[str]:
    """The lines that a process of its own prints; `path`: where it finds modules first."""
    found = os.pathsep.join(map(str, path))
    environment = os.environ | {"PYTHONPATH": found, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *words], env=environment, cwd=place, capture_output=True,
        text=True, timeout=1800, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout.splitlines()


def proven(place: Path, checks: str) -> dict[str, Any]:
    """What SCRIPT says of the copy in `place`; checks: the name of one, or all."""
    return json.loads(python(SCRIPT, [place, ROOT / "tests"], place, str(place), checks)[-1])


def test_the_method_of_the_tutorial_keeps_its_promises(model_dir: Path, data_file: Path, tmp_path: Path) -> None:
    (source,) = blocks(TUTORIAL, "python")
    (recipe,) = blocks(TUTORIAL, "yaml")
    copy_with_scale(tmp_path, source)
    (tmp_path / "scale.yaml").write_text(recipe, encoding="utf-8")
    overrides = tiny.settings(model_dir, data_file, tmp_path / "run") | {"data.val_size": 4, "train.max_steps": 3}
    del overrides["method.r"], overrides["train.learning_rate"]
    (tmp_path / "overrides.json").write_text(json.dumps(overrides), encoding="utf-8")
    assert python(LIGHT, [tmp_path], tmp_path) == []
    found = proven(tmp_path, "all")
    not_promised = {"causal: peft", "classification: peft", "classification: compile"}
    assert {name for name, verdict in found["kept"].items() if verdict is False} == not_promised
    assert [name for name, verdict in found["kept"].items() if verdict == "broken"] == []
    assert len(found["kept"]) == 20
    assert {"trained.safetensors", "method.json"} <= set(found["files"])
    assert found["tuned"]
    assert found["merge"].startswith("trained base")
    assert found["row"]["mergeable"]


def test_the_fault_of_the_tutorial_is_seen(tmp_path: Path) -> None:
    (source,) = blocks(TUTORIAL, "python")
    fault, count = re.subn(r"(?m)^.*layer\.bias.*\n", "", source)
    assert count == 2
    copy_with_scale(tmp_path, fault)
    kept = proven(tmp_path, "merge")["kept"]
    assert kept["classification: merge"] == "broken"


HUB = {"google-bert/bert-base-uncased": "bert", "google-t5/t5-small": "t5", "builtin:tiny": "llama"}
RECIPES = [(page, text) for page in ("methods.md", "tasks.md") for text in blocks(page, "yaml")]
RECIPES.append(("classify", (ROOT / "recipes" / "classify.yaml").read_text(encoding="utf-8")))


def recipe_name(part: str) -> str:
    """The run that a recipe names; "recipe" where whet names it."""
    found = re.search(r"output_dir: runs/(\w+)", part)
    return found[1] if found else part if "\n" not in part else "recipe"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small random models of the kinds that the pages name."""
    return {name: tasks.save_model(kind, tmp_path_factory.mktemp(kind)) for name, kind in HUB.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("page", "text"), RECIPES, ids=recipe_name)
def test_a_recipe_that_is_shown_trains(page: str, text: str, models: dict[str, Path], tmp_path: Path) -> None:
    shown = YAML(typ="safe").load(text)
    if (shown.get("base") or {}).get("storage") == "nf4":
        pytest.importorskip("bitsandbytes")
    (tmp_path / "shown.yaml").write_text(text, encoding="utf-8")
    model = shown["model"] if isinstance(shown["model"], str) else shown["model"]["path"]
    wanted = {"stars": "regression", "topics": "multi_label", "pairs": "seq2seq"}.get(
        recipe_name(text), "classification"
    )
    data = shown["data"] if isinstance(shown["data"], str) else shown["data"]["dataset"]
    records = tiny.rows() if data.startswith("builtin:") else tasks.rows(wanted)
    overrides = {
        "model.path": str(models[model]), "data.dataset": str(tiny.write_rows(tmp_path / "rows.jsonl", records)),
        "data.val_size": 0, "train.max_steps": 2, "base.device": "cpu", "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    run = whet.train(tmp_path / "shown.yaml", **overrides)
    assert run.finished is not None
    assert run.finished["steps"] == 2
    assert run.task.name == ("causal" if data.startswith("builtin:") else wanted)


@pytest.mark.parametrize(
    ("text", "task"),
    list(zip(blocks("tasks.md", "json"), ("classification", "multi_label", "regression", "seq2seq"), strict=True)),
)
def test_the_rows_that_are_shown_are_of_their_task(
    text: str, task: str, models: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    model = models["google-t5/t5-small" if task == "seq2seq" else "google-bert/bert-base-uncased"]
    overrides = {"model.path": str(model), "data.dataset": str(tmp_path / "rows.jsonl"), "data.val_size": 0}
    prepared = api.prepared(api.parse(None, tiny.words(overrides)))
    assert prepared.task.name == task
    assert len(prepared.train) == len(text.splitlines())


def test_what_the_page_on_adapters_shows_runs(
    model_dir: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, name in enumerate(("tickets", "polite")):
        changes = {"train__seed": seed, "train__max_steps": 2, "data__val_size": 4}
        train(tiny.recipe(model_dir, data_file, tmp_path / "runs" / name, **changes))
    (tmp_path / "second.yaml").write_text("method: lora\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (shown,) = blocks("adapters.md", "python")
    assert python(shown, [ROOT], tmp_path)[-1] == "['tickets', 'polite', 'both'] both"
    ran = []
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    theirs.save_adapter(model_dir, Path("adapters/theirs"), settings)
    shutil.copy(data_file, "rows.jsonl")
    for line in "".join(blocks("adapters.md", "")).splitlines():
        words = shlex.split(line)[1:]
        if words[0] == "train":
            further = any(word.startswith("model.adapter") for word in words)
            out = tmp_path / ("further" if further else "second")
            given = tiny.settings("merged", data_file, out, train__max_steps=1)
            words += tiny.words({path: value for path, value in given.items() if not further or path not in TAKEN})
        if words[0] == "chat":
            words += ([] if "--message" in words else ["--message", "Hello"]) + ["--max-new-tokens", "2"]
        assert cli.run(words) == 0, line
        ran.append(words[0])
    assert ran == ["chat", "eval", "merge", "train"] + ["adapters"] * 5 + ["chat", "merge", "train"]
    assert open_run("further").recipe.model.path == str(model_dir)
    assert describe("runs/both").rank == 8
    assert describe("adapters/both").rank == 8
    assert not Path("runs/narrow").exists()
    assert open_run("second").recipe.model.path == "merged"
