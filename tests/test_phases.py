"""What a plan says beside training: each phase, several cards, the page; and that all of it is there quickly."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

import whet
from whet.base.errors import UserError
from whet.base.language import choose
from whet.cli import main
from whet.report.plan_page import plan_page

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "bench" / "configs"
GIB = 1 << 30
MEASURED = {case["case"]: case for case in json.loads((ROOT / "bench/results/h200/memory.json").read_text())["after"]}


def plan(config: str, *, gpu: str = "RTX 4090", gpus: int = 1, **more: Any) -> dict[str, Any]:
    model = {"path": str(CONFIGS / f"{config}.json"), "from_config": True}
    settings = {"train": {"compile": False, "per_device_train_batch_size": 2, "max_steps": 60}} | more
    return whet.plan({"model": model, **settings}, gpu=gpu, gpus=gpus)


NF4 = {"storage": "nf4", "compute": "bf16"}


@pytest.fixture(scope="module")
def eight() -> dict[str, Any]:
    return plan("Llama-3.1-8B", base=NF4, gpus=4)


def test_every_phase_is_the_sum_of_its_classes(eight: dict[str, Any]) -> None:
    assert [*eight["peak_bytes"]] == ["load", "train", "evaluate", "generate", "merge"]
    for phase, classes in eight["phases"].items():
        assert eight["peak_bytes"][phase] == sum(classes.values())
    assert eight["peak_bytes"]["train"] == sum(eight["memory"].values())
    assert eight["peak_bytes"]["merge"] > 2 * 8e9  # a merged model in 16 bits beside the trained one
    assert eight["host"]["merge"] > 4 * 8e9
    assert eight["disk"]["a checkpoint"] == 12 * eight["trainable_params"]
    assert eight["disk"]["what was trained"] == 4 * eight["trainable_params"]


def test_loading_takes_what_a_gpu_allocated(eight: dict[str, Any]) -> None:
    measured = MEASURED["8B nf4 bf16 2x2048"]["load_peak"]
    assert 0 <= eight["peak_bytes"]["load"] - measured < 1.1 * 2 * 128256 * 4096  # one tensor, the table, at most


def test_answers_are_cut_to_what_fits() -> None:
    card, big = plan("Llama-3.1-8B", base=NF4), plan("Llama-3.1-8B", gpu="H200", base=NF4)
    assert card["peak_bytes"]["generate"] <= card["free_bytes"] < big["peak_bytes"]["generate"]
    assert "dense copies" in big["phases"]["generate"]
    assert "dense copies" not in card["phases"]["generate"]


def test_a_model_that_is_trained_whole_is_not_merged() -> None:
    found = plan("Qwen3-0.6B", method={"name": "full"})
    assert "merge" not in found["peak_bytes"]
    assert "a merged model" not in found["disk"]


def test_several_cards_are_a_plan_only(eight: dict[str, Any]) -> None:
    several = eight["several"]
    assert several["available"] is False
    assert "not available" in several["notice"]
    assert several["replicate"]["peak_bytes"] == eight["peak_bytes"]["train"]
    share, whole = several["shard"]["memory"], eight["memory"]["frozen weights"]
    tables = 2 * 2 * 128256 * 4096
    assert share["frozen weights"] == tables + (whole - tables) // 4
    assert share["gathered layers"] == 2 * ((whole - tables) // 32)
    assert "several" not in plan("Qwen3-0.6B")
    for cards, gpu in ((0, "RTX 4090"), (2, None)):
        with pytest.raises(UserError) as error:
            whet.plan({}, gpu=gpu, gpus=cards)
        assert error.value.field == "--gpus"


def test_a_large_base_is_shared_where_it_cannot_be_held() -> None:
    several = plan("Llama-3.1-70B", base=NF4, gpus=4, train={"compile": False, "per_device_train_batch_size": 1})[
        "several"
    ]
    assert several["replicate"]["fits"] is False
    frozen = several["shard"]["memory"]["frozen weights"]
    assert 12 * GIB < frozen < 14 * GIB  # a quarter of 33 GiB, the tables whole


@pytest.mark.parametrize("language", ["en", "ko"])
def test_the_page_loads_nothing_and_shows_every_class(
    eight: dict[str, Any], language: str, capsys: pytest.CaptureFixture[str]
) -> None:
    choose(["--lang", language])
    try:
        page = plan_page(eight | {"model": "<script>x</script>"})
    finally:
        choose(["--lang", "en"])
    assert "<script" not in page
    assert "&lt;script" in page
    assert not re.search(r"(?:src|href)=\"(?!#)", page)
    assert page.count('class="phase"') == 5
    assert page.count('class="end"') == 6
    assert f'lang="{language}"' in page
    assert ("단계별 메모리" if language == "ko" else "Memory by phase") in page
    whole = max(*eight["peak_bytes"].values(), eight["free_bytes"])
    width = 100 * eight["phases"]["train"]["activations"] / whole
    assert f"width:{width:.2f}%" in page


def test_an_empty_plan_is_a_page_too() -> None:
    assert "<h1>" in plan_page({})
    assert "<h2>" in plan_page({"seconds_per_step": None, "time": {"reason": "why"}, "fits": False})


def test_the_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "plan.html"
    words = ["plan", str(CONFIGS / "Qwen3-0.6B.json"), "model.from_config=true", "train.compile=false",
             "--gpu", "RTX 3090", "--html", str(page)]  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert "evaluate" in shown
    assert "s a step" in shown
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    page.write_text("mine")
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2


MOE = {
    "mixtral": {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 14336},
    "qwen3_moe": {"model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
                  "intermediate_size": 6144},
}  # fmt: skip


@pytest.mark.parametrize("family", MOE)
def test_a_mixture_is_planned_with_the_experts_that_a_token_visits(family: str, tmp_path: Path) -> None:
    shape = {"hidden_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 32, "num_key_value_heads": 4,
             "head_dim": 128, "vocab_size": 32000}  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps(shape | MOE[family]))
    found = whet.plan({"model": {"path": str(path), "from_config": True}, "train": {"compile": False}}, gpu="H200")
    assert found["seconds_per_step"] > 0
    all_of_them = 2 * 16384 * 2 * found["all_params"] / (989e12 * 0.6)
    assert found["time"]["parts"]["products"] < 0.5 * all_of_them


@pytest.mark.parametrize("config", ["Qwen3-0.6B", pytest.param("Llama-3.1-70B", marks=pytest.mark.proof)])
def test_a_plan_takes_no_more_than_seconds(config: str) -> None:
    start = time.process_time()
    plan(config, gpu="H200")
    assert time.process_time() - start < 5
