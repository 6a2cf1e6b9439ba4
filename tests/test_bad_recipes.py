"""Every bad recipe ends `whet train` with exit code 2 and one clear error: nothing loaded, nothing written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from bad_recipes import BAD_RECIPES, GOOD, BadRecipe, recipe_names, workshop

from whet.cli import run

CASES = [
    pytest.param(bad, id=bad.name, marks=[pytest.mark.xfail(reason=bad.bug, strict=True)] if bad.bug else [])
    for bad in BAD_RECIPES
]


class ModelLoaded(BaseException):
    """Not an Exception, so that no handler takes it for a mistake of the recipe."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The furnished directory, as the current one, on a machine where loading a model is a failure."""

    def refuse(*_: object, **__: object) -> None:
        raise ModelLoaded

    workshop(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", refuse)
    return tmp_path


def train(bad: BadRecipe, place: Path, *more: str) -> tuple[int, set[str]]:
    """Exit code, and what is in the directory now that was not before."""
    if bad.text is not None:
        content = bad.text if isinstance(bad.text, bytes) else bad.text.encode()
        (place / "bad.yaml").write_bytes(content)
    before = {str(path) for path in place.rglob("*")}
    code = run(["train", *recipe_names(bad), *more])
    return code, {str(path) for path in place.rglob("*")} - before


@pytest.mark.parametrize("bad", CASES)
def test_it_is_refused_with_its_place_and_a_fix_and_nothing_is_written(
    bad: BadRecipe, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, new = train(bad, place)
    out, message = capfd.readouterr()
    message = re.sub(r"\Atrain: .*\n", "", message)  # what is being done is said first
    head = message.splitlines()[0]
    assert (code, new, out) == (2, set(), "")
    assert message.startswith("error: ")
    assert message.count("error: ") == 1
    assert "Traceback" not in message
    assert "\n  fix:      " in message
    assert len(message) < 1500, "one screen"
    for words in bad.mentions:
        assert words in message
    if bad.file:
        assert head.startswith(f"error: {bad.file}")
    else:
        assert "bad.yaml" not in message, "the file is not to blame"
    if bad.line:
        assert f"{bad.file}, row {bad.line}" in head


def test_the_harness_sees_a_model_being_loaded_and_a_run_directory(place: Path) -> None:
    """Otherwise the two promises above would hold for anything."""
    good = BadRecipe("good", GOOD, (), ())
    with pytest.raises(ModelLoaded):
        train(good, place)
    assert (place / "runs" / "bad" / "recipe.yaml").is_file()


@pytest.mark.parametrize("name", ["misspelt_setting", "no_such_optimiser", "bad_row", "duplicate_key"])
def test_json_says_the_same_on_stdout(name: str, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bad = next(bad for bad in BAD_RECIPES if bad.name == name)
    assert train(bad, place, "--json") == (2, set())
    out, message = capfd.readouterr()
    error = json.loads(out)["error"]
    assert error["problem"] in message
    assert error["fix"] in message
    assert error["file"] == bad.file
    assert error["row"] == (bad.line or (2 if name == "bad_row" else None))


@pytest.mark.parametrize("verb", [["plan"], ["data", "check"]])
def test_the_other_verbs_on_recipes_refuse_the_same_way(
    verb: list[str], place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for bad in BAD_RECIPES:
        if bad.line and not bad.bug:
            (place / "bad.yaml").write_bytes(bad.text.encode() if isinstance(bad.text, str) else bad.text or b"")
            assert run([*verb, "bad.yaml"]) == 2, bad.name
            message = capfd.readouterr().err
            assert f"bad.yaml, row {bad.line}" in message
            assert all(words in message for words in bad.mentions), bad.name


def test_a_secret_is_never_shown(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("hf_token", "token", "api_key", "wandb_api_key", "model.token", "hub_token", "train.api_key"):
        for bad in (BadRecipe(name, f"{name}: s3cr3t\n", (), ()), BadRecipe(name, GOOD, (f"{name}=s3cr3t",), ())):
            assert train(bad, place) == (2, set())
            assert "s3cr3t" not in "".join(capfd.readouterr())


def test_the_table_is_large_and_its_names_differ() -> None:
    assert len({bad.name for bad in BAD_RECIPES}) == len(BAD_RECIPES) >= 100
    print(f"{sum(not bad.bug for bad in BAD_RECIPES)}/{len(BAD_RECIPES)} bad recipes refused as they should be")
