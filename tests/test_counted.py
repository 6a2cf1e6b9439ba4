"""What layers keep, counted without memory, is what a GPU allocated; and what follows from it for a plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import whet
from whet.base.errors import UserError
from whet.engine.device import Hardware, Placement, resolve_placement
from whet.engine.memory.kept import Kept
from whet.engine.weights import stored
from whet.planning import counted
from whet.planning.card_table import CARDS
from whet.planning.cards import hardware_of, smallest_card, usable_bytes
from whet.planning.counted import COMPILED, EAGER, LEAN, TOKENS, count_layers
from whet.recipe import Recipe, parse

ROOT = Path(__file__).parents[1]
MEASURED = {case["case"]: case for case in json.loads((ROOT / "bench/results/h200/memory.json").read_text())["after"]}
CARD = Hardware(torch.device("cuda"), "a card", has_bf16=True, has_fp8=True, free_bytes=80 << 30)


def asked(config: str | Path, *words: str) -> tuple[Recipe, Placement]:
    path = ROOT / "bench" / "configs" / f"{config}.json" if isinstance(config, str) else config
    recipe = parse(None, [f"model.path={path}", "model.from_config=true", *words]).recipe
    return recipe, resolve_placement(recipe.base, recipe.method.can.storages, 4096, hardware=CARD)


def count(config: str | Path, *words: str, compiled: bool = False) -> dict[str, Kept]:
    recipe, placement = asked(config, *words)
    return count_layers(recipe, placement, compiled=compiled, grouped=True)


def allocated(name: str) -> float:
    """Bytes per token that the forward pass of a case left on an H200: hidden states and losses among them."""
    case = MEASURED[name]
    return (case["after_forward"] - case["before"]) / case["largest_tokens"]


@pytest.mark.parametrize(
    ("name", "config", "words", "hidden"),
    [
        ("0.6B bf16 4x1024 eager", "Qwen3-0.6B", ["base.storage=bf16"], 1024),
        ("8B nf4 bf16 2x2048 eager", "Llama-3.1-8B", ["base.storage=nf4", "base.compute=bf16"], 4096),
    ],
)
def test_the_count_is_what_a_gpu_allocated(name: str, config: str, words: list[str], hidden: int) -> None:
    kept = count(config, *words)[EAGER]
    foretold = sum(kept.layers) + kept.outside
    head = 2 * 2 * hidden  # what the head adds: the chosen hidden states and their gradient
    assert abs(foretold + head - allocated(name)) < 0.005 * allocated(name)


def test_the_count_of_compiled_layers_is_what_a_gpu_allocated() -> None:
    ways = count("Qwen3-0.6B", "base.storage=bf16", compiled=True)
    kept, lean = ways[COMPILED], ways[LEAN]
    name = "0.6B bf16 4x1024"
    assert abs(sum(kept.layers) + kept.outside + 4096 - allocated(name)) < 0.005 * allocated(name)
    assert 0.5 * sum(kept.layers) < sum(lean.layers) < 0.9 * sum(kept.layers)


def small(tmp_path: Path, **sizes: Any) -> Path:
    config = json.loads((ROOT / "bench/configs/Qwen3-0.6B.json").read_text())
    path = tmp_path / "config.json"
    shape = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 500}
    path.write_text(
        json.dumps(config | shape | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16} | sizes)
    )
    return path


def test_dense_weights_that_are_kept_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: a compiled layer keeps the weights that it rebuilt."""
    words = ("base.storage=fp8", "base.compute=bf16")
    right = count(small(tmp_path), *words, compiled=True)[COMPILED]
    monkeypatch.setattr(stored, "_unseen", lambda tensor: tensor)
    wrong = count(small(tmp_path), *words, compiled=True)[COMPILED]
    assert wrong.fixed[1] > right.fixed[1] + 2 * 64 * 128 * 2


def test_dropout_keeps_more_and_a_frozen_method_less(tmp_path: Path) -> None:
    config = small(tmp_path)
    plain = sum(count(config)[EAGER].layers)
    assert sum(count(config, "method.lora_dropout=0.1")[EAGER].layers) > 1.1 * plain
    assert sum(count(config, "method=ia3")[EAGER].layers) != plain


def test_layers_of_another_kind_are_counted_by_themselves(tmp_path: Path) -> None:
    """One layer has no adapters: it keeps less, whatever the layers beside it keep."""
    layers = count(small(tmp_path), "method.layers_to_transform=[0,1,3]")[EAGER].layers
    assert len(layers) == 4
    assert layers[2] < layers[1]
    assert layers[3] == layers[1]


def test_a_count_is_remembered_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHET_CACHE", str(tmp_path / "cache"))
    config = small(tmp_path)
    first = count(config)
    real, calls = counted._count, []

    def watched(*given: Any, **more: Any) -> Kept:
        calls.append(given)
        return real(*given, **more)

    monkeypatch.setattr(counted, "_count", watched)
    assert count(config) == first
    assert calls == []
    other = count(config, "method.r=64")
    assert len(calls) == 1
    assert other != first
    (tmp_path / "cache" / "layers.json").write_text("{damaged", encoding="utf-8")
    assert count(config) == first


def test_a_model_that_needs_values_is_estimated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def needs(*given: Any, **more: Any) -> Kept:
        raise RuntimeError("data-dependent")

    monkeypatch.setattr(counted, "_count", needs)
    assert count(small(tmp_path)) == {}
    found = whet.plan({"model": {"path": str(small(tmp_path)), "from_config": True}}, gpu="24GB")
    assert found["assumed"]["activations"] == "estimated from its sizes"


@pytest.mark.parametrize(
    ("name", "card"),
    [("RTX 4090", "RTX 4090"), ("rtx4090", "RTX 4090"), ("4090", "RTX 4090"), ("NVIDIA GeForce RTX 3090", "RTX 3090"),
     ("A100", "A100 40GB"), ("A100-80GB", "A100 80GB"), ("Tesla T4", "T4"), ("A10", "A10"), ("H100", "H100 80GB")],
)  # fmt: skip
def test_a_card_is_found_by_its_name(name: str, card: str) -> None:
    hardware = hardware_of(name)
    known = next(one for one in CARDS if one.name == card)
    assert (hardware.name, hardware.free_bytes, hardware.has_fp8) == (card, usable_bytes(known), known.fp8 is not None)


def test_a_card_is_found_by_its_memory() -> None:
    for name in ("24", "24GB", "24 GiB", "24g"):
        hardware = hardware_of(name)
        assert 22 << 30 < (hardware.free_bytes or 0) < 24 << 30
        assert not hardware.has_fp8
    for name in ("RTX 9999", "", "-3", "0", "A1", "24 apples"):
        with pytest.raises(UserError) as error:
            hardware_of(name)
        assert error.value.field == "--gpu"
    assert smallest_card(20 << 30) in ("RTX 3090", "RTX 4090", "A10", "A10G", "L4")
    assert smallest_card(1 << 50) is None


def test_a_plan_for_a_card_says_whether_it_fits() -> None:
    def plan(gpu: str, config: str = "Llama-3.1-8B", **more: Any) -> dict[str, Any]:
        model = {"path": str(ROOT / "bench/configs" / f"{config}.json"), "from_config": True}
        base = {"storage": "nf4", "compute": "bf16"}
        train = {"compile": False, "per_device_train_batch_size": 2, "max_steps": 60} | more
        return whet.plan({"model": model, "base": base, "train": train}, gpu=gpu)

    big, card, little = plan("H100"), plan("RTX 4090"), plan("8GB")
    assert (big["fits"], card["fits"], little["fits"]) == (True, True, False)
    assert not big["layout"]["mode"]["checkpointed_layers"]
    assert card["layout"]["mode"]["checkpointed_layers"]
    assert card["peak_bytes"]["train"] == sum(card["memory"].values()) < card["free_bytes"]
    assert little["least_bytes"] > little["free_bytes"]
    assert card["smallest_card"] in {one.name for one in CARDS}
    peaks = {mode["mode"]: mode["peak_bytes"] for mode in big["modes"]}
    assert (
        abs(peaks["keep everything"] - MEASURED["8B nf4 bf16 2x2048 eager"]["step_peak"])
        < 0.02 * peaks["keep everything"]
    )
    at_most = card["longest_row_tokens"]
    assert 2048 <= at_most < plan("H100")["longest_row_tokens"]


def test_it_refuses_a_gpu_for_a_recipe_of_the_cpu() -> None:
    with pytest.raises(UserError) as error:
        whet.plan({"base": {"device": "cpu"}}, gpu="T4")
    assert error.value.field == "base.device"


def test_the_copies_of_trained_weights_do_not_grow_with_the_tokens(tmp_path: Path) -> None:
    """Under autocast a layer keeps its weights in bf16, however few tokens there are."""
    assert all(TOKENS % divisor for divisor in range(2, int(TOKENS**0.5) + 1))  # a prime: no width is a multiple of it
    kept = count(small(tmp_path), "method=full", "base.storage=fp32", "base.compute=bf16")[EAGER]
    weights = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128
    assert kept.fixed[1] == pytest.approx(2 * weights, rel=0.05)
    assert len(kept.fixed) == 4
