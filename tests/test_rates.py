"""The rate that `auto` takes, and the word that says that training ended too early."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tasks

from whet import api
from whet.methods.all import METHODS
from whet.recipe import Parsed, parse
from whet.training.run import train
from whet.training.trend import still_falling


@pytest.mark.parametrize("name", ["lora", "qlora", "full", "classify"])
def test_a_stock_recipe_leaves_the_rate_to_the_method(name: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(api.init(name), encoding="utf-8")
    for method in ("ia3", "full", "lora"):
        words = [f"method={method}", *(["base.storage=fp32", "base.double_quant=auto"] if name == "qlora" else [])]
        assert parse(tmp_path / "r.yaml", words).recipe.train.learning_rate is None


def test_narrow_models_get_a_higher_rate() -> None:
    def rate(method: str, width: int | None) -> float:
        return METHODS[method]().can.rate_for(SimpleNamespace(hidden_size=width))[0]

    assert rate("lora", 4096) == rate("lora", 8192) == rate("lora", None) == 2e-4
    assert rate("lora", 384) == pytest.approx(1.3e-3, rel=0.05)
    assert rate("lora", 1024) == pytest.approx(6e-4, rel=0.05)
    assert rate("lora", 64) == rate("lora", 256), "no model is so narrow that the rate grows for ever"
    assert rate("full", 768) == pytest.approx(7.6e-5, rel=0.05)
    assert rate("ia3", 384) == rate("ia3", 4096)


def test_the_reason_stands_in_the_run(recipe: Callable[..., Parsed]) -> None:
    run = train(recipe(train__learning_rate=None, train__max_steps=1))
    entry = (run.read("origins.json") or {})["train.learning_rate"]
    assert entry["reason"] == "usual for lora, raised for a model of width 64"
    assert run.recipe.train.learning_rate == entry["value"] > 2e-4


def curve(losses: list[float], kind: str = "eval", every: int = 10) -> list[dict[str, Any]]:
    name = "eval_loss" if kind == "eval" else "loss"
    return [{"kind": kind, "step": every * (index + 1), name: loss} for index, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("lines", "falls"),
    [
        (curve([3.0, 2.8, 2.5]), True),
        (curve([3.0, 1.0, 0.99]), False),
        (curve([3.0, 1.0, 1.2]), False),
        (curve([3.0]), False),
        (curve([3.0, 2.5], every=4), False),
        (curve([3.0 - 0.01 * step for step in range(250)], "train", 1), True),
        (curve([0.5] * 250, "train", 1), False),
        (curve([3.0 - 0.1 * step for step in range(20)], "train", 1), False),
        ([], False),
    ],
)
def test_a_loss_that_still_falls_is_found(lines: list[dict[str, Any]], falls: bool) -> None:
    found = still_falling(lines)
    assert (found is not None) is falls
    if found:
        assert "more epochs" in found
        assert "higher rate" in found


def test_terminal_and_page_say_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = tasks.save_model("bert", tmp_path / "bert"), tasks.rows("classification")
    import tiny

    held = tiny.write_rows(tmp_path / "held.jsonl", data[:8])
    file = tiny.write_rows(tmp_path / "rows.jsonl", data)
    changes = {"train__max_steps": 21, "train__eval_steps": 7, "data__eval_dataset": str(held), "method.r": 4}
    settings = tiny.settings(model, file, tmp_path / "run", train__learning_rate=2e-3, **changes)
    del settings["data.val_size"]
    run = api.train_parsed(parse(None, tiny.words(settings)))
    said = capsys.readouterr().err
    assert said.count("held-out loss") >= 4, "one line an evaluation, and the last line"
    assert "epochs)" in said
    assert "lowest held-out loss" in said.splitlines()[-1]
    page = (run.path / "report.html").read_text(encoding="utf-8")
    (finding,) = (run.finished or {})["findings"]
    assert finding in said
    assert finding[:40] in page
