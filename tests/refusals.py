"""Recipes that are refused before any model is loaded: how such a case is told, run and mended.

The models are configs and tokenizers without any tensor file, so that nothing can have been loaded.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tasks
import tiny

from whet.cli import run
from whet.planning.rule import Rule
from whet.training import setup

ASSIGNMENT = re.compile(r"\b((?:model|base|method|data|train|eval)(?:\.\w+)*)=(\[[^\]]*\]|[^\s,;]+)")
TEXTS = ("a dog writes a reply", "the quick fox", "고객님 감사합니다", "over the lazy dog", "then jumps", "각각 내일")


@dataclass(frozen=True)
class Refused:
    """words: overrides on `model` and `rows`. field, found: what the refusal names. mended: the words that the fix
    leads to, where it is told in words; otherwise it is read out of the fix."""

    name: str
    words: str
    field: str
    found: str
    model: str = "llama"
    rows: str = "chats"
    mended: str | None = None

    def overrides(self) -> list[str]:
        return [f"model.path={self.model}", f"data.dataset={self.rows}.jsonl", *split(self.words)]


class ModelLoaded(BaseException):
    """Not an Exception, so that no handler takes it for a mistake of the recipe."""


def split(words: str) -> list[str]:
    """Overrides, one or more spaces apart; a space inside of brackets or braces is none."""
    return re.split(r" +(?=[a-z_]+(?:\.\w+)*=)", words) if words else []


def write_models(place: Path) -> Path:
    """Configs and tokenizers by name: no tensor file anywhere."""
    import transformers

    small: dict[str, Any] = {"vocab_size": tiny.VOCABULARY, "pad_token_id": 0}
    configs = {kind: tasks.config(kind) for kind in ("llama", "bert", "t5")}
    configs["gpt2"] = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=256, **small)
    configs["phi3"] = transformers.Phi3Config(**{**tasks.config("llama").to_dict(), "model_type": "phi3"})
    configs["distilbert"] = transformers.DistilBertConfig(dim=64, hidden_dim=128, n_layers=2, n_heads=4, **small)
    for kind, config in configs.items():
        config.save_pretrained(str(place / kind))
        for name in tiny.TOKENIZER_FILES[:3]:
            shutil.copy(tiny.BUILTIN / name, place / kind / name)
    return place


def workplace(models: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with all models and rows, the current one, on a machine where loading a model ends everything."""

    def refuse(*_: object, **__: object) -> None:
        raise ModelLoaded

    shutil.copytree(models, place, dirs_exist_ok=True)
    assert not [*place.rglob("*.safetensors"), *place.rglob("*.bin")]
    rows: dict[str, list[dict[str, Any]]] = {
        "chats": [{"prompt": text, "completion": text[::-1]} for text in TEXTS],
        "texts": [{"text": text} for text in TEXTS],
        "labels": [{"text": text, "label": ("yes", "no")[index % 2]} for index, text in enumerate(TEXTS)],
        "several": [{"text": text, "label": ["a", "b"][: 1 + index % 2]} for index, text in enumerate(TEXTS)],
        "fields": [{"title": text, "kind": ("yes", "no")[index % 2]} for index, text in enumerate(TEXTS)],
    }
    for name, records in rows.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (place / "recipe.yaml").write_text("data:\n  val_size: 0\nbase:\n  device: cpu\n")
    monkeypatch.chdir(place)
    monkeypatch.setattr(setup, "load_model", refuse)
    return place


def train(place: Path, overrides: list[str]) -> tuple[int, set[str]]:
    """Exit code, and what is in the directory now that was not before."""
    before = {str(path) for path in place.rglob("*")}
    code = run(["train", "recipe.yaml", *overrides, "--json"])
    return code, {str(path) for path in place.rglob("*")} - before


def passes(place: Path, overrides: list[str]) -> bool:
    """Whether all checks are passed, so that the model would be loaded."""
    try:
        train(place, overrides)
    except ModelLoaded:
        return True
    return False


def mended(case: Refused, error: dict[str, Any]) -> list[str]:
    """The overrides as the fix says: its first assignments, or without the line."""
    if case.mended is not None:
        return [*case.overrides()[:2], *split(case.mended)]
    for part in re.split(r"; |, or ", error["fix"]):
        if found := ASSIGNMENT.findall(part):
            return [*case.overrides(), *(f"{path}={value}" for path, value in found)]
    assert "remove" in error["fix"], f"no fix that can be tried: {error['fix']}"
    kept = [word for word in case.overrides() if word.partition("=")[0] != error["field"]]
    assert len(kept) < len(case.overrides())
    return kept


def check_case(case: Refused, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The case is refused at once with one error, nothing is written, and its fix is one."""
    assert train(place, case.overrides()) == (2, set())
    out, message = capfd.readouterr()
    error = json.loads(out)["error"]
    assert message.count("error: ") == 1
    assert "Traceback" not in message
    assert error["field"] == case.field, message
    assert case.found in error["found"], message
    assert error["expected"], message
    assert error["fix"], message
    assert passes(place, mended(case, error)), f"{error['fix']}: still refused: {capfd.readouterr().err}"
    assert list((place / "runs").iterdir()), "a run directory appears when all is good"


@contextmanager
def fired(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the rules that refuse something inside of the block."""
    names: list[str] = []
    plain = Rule.refusal

    def watched(rule: Rule, asked: Any) -> Any:
        names.append(rule.name)
        return plain(rule, asked)

    with monkeypatch.context() as patch:
        patch.setattr(Rule, "refusal", watched)
        yield names
