"""Mixtures of experts: what no target reaches is said, and `target_parameters` trains it as plain PEFT does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import theirs
import tiny
import torch

import whet
from whet.base.errors import UserError
from whet.methods.lora import Lora
from whet.recipe import parse
from whet.training.run import train

EXPERTS = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": tiny.VOCABULARY, "max_position_embeddings": 512, "bos_token_id": None,
    "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.1, "head_dim": 16,
}  # fmt: skip


def config(kind: str, **more: Any) -> Any:
    import transformers as T

    mixtures = {
        "qwen3": lambda: T.Qwen3MoeConfig(
            **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, **more
        ),
        "mixtral": lambda: T.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, **more),
        "gpt-oss": lambda: T.GptOssConfig(
            **SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=512, **more
        ),
    }  # fmt: skip
    return mixtures[kind]()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    kinds = ("qwen3", "mixtral", "gpt-oss")
    return {kind: tiny.save_model(config(kind), tmp_path_factory.mktemp(kind)) for kind in kinds}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", tiny.rows(8))


@pytest.mark.parametrize("kind", ["qwen3", "mixtral", "gpt-oss"])
def test_experts_are_trained_merged_and_open_in_plain_peft(
    kind: str, models: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(tiny.recipe(
        models[kind], data, tmp_path / "run", method__target_parameters=EXPERTS, train__max_steps=3, data__val_size=2
    ))  # fmt: skip
    said = " ".join(capsys.readouterr().err.split())
    assert "are not trained" not in said
    ids = torch.arange(5, 30)[None]
    with torch.inference_mode():
        plain = theirs.opened(models[kind], run.adapter)(input_ids=ids).logits
        base = theirs.plain_base(models[kind])(input_ids=ids).logits
    with torch.inference_mode():
        from whet.engine.load.open import open_trained

        live = open_trained(run.recipe.model, run.recipe.base, run.adapter, run.recipe.method).network(ids).logits
    torch.testing.assert_close(live, plain, rtol=1e-3, atol=1e-3)
    assert float((plain - base).abs().max()) > 1e-3
    found = whet.merge(run.path, tmp_path / "out")
    assert found["held_out_loss"] == pytest.approx(found["live_held_out_loss"], abs=1e-3)
    with torch.inference_mode():
        merged = theirs.plain_base(tmp_path / "out")(input_ids=ids).logits
    torch.testing.assert_close(merged, plain, rtol=1e-3, atol=1e-3)


def test_the_updates_of_experts_are_not_zero(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    run = train(tiny.recipe(
        models["qwen3"], data, tmp_path / "run", method__target_parameters=EXPERTS, method__target_modules=[],
        train__max_steps=2,
    ))  # fmt: skip
    tensors = load_file(run.adapter / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 2
    assert all("experts" in name for name in tensors)
    assert all(float(tensor.abs().max()) > 0 for tensor in tensors.values())


def test_what_is_not_trained_is_said_with_its_share(
    models: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny.recipe(models["qwen3"], data, tmp_path / "run", train__max_steps=1))
    said = " ".join(capsys.readouterr().err.split())
    network = theirs.plain_base(models["qwen3"])
    experts = sum(p.numel() for name, p in network.named_parameters() if "experts" in name)
    share = f"experts, {100 * experts / sum(p.numel() for p in network.parameters()):.0f} % of the weights"
    assert f"{share}, are not trained: method.target_parameters=[" in said
    fix = said.partition("method.target_parameters=[")[2].partition("]")[0]
    assert sorted(fix.split(",")) == EXPERTS, "what it says to write works"
    plan = tiny.plan(tiny.recipe(models["qwen3"], data, tmp_path / "run").recipe)
    assert share in plan["notices"][0]


def test_experts_that_stay_dense_are_said_and_planned_for(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    dense = tiny.plan(tiny.recipe(models["mixtral"], data, tmp_path / "run").recipe)
    packed = tiny.plan(tiny.recipe(models["mixtral"], data, tmp_path / "run", base__storage="int8").recipe)
    assert any("stay as they are" in notice for notice in packed["notices"])
    assert not any("stay as they are" in notice for notice in dense["notices"])
    network = theirs.plain_base(models["mixtral"])
    experts = sum(p.numel() for name, p in network.named_parameters() if "experts" in name)
    frozen = next(count for name, count in packed["memory"].items() if "frozen" in name or "weights" in name)
    assert frozen > 4 * experts


def test_a_dense_model_has_nothing_to_say(model_dir: Path, data: Path, tmp_path: Path) -> None:
    assert tiny.plan(tiny.recipe(model_dir, data, tmp_path / "run").recipe)["notices"] == []


def test_mlp_of_a_mixture_names_what_works(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="made of experts") as caught:
        tiny.plan(tiny.recipe(models["qwen3"], data, tmp_path / "run", method__target_modules="mlp").recipe)
    words = caught.value.fix.split()
    base = tiny.settings(models["qwen3"], data, tmp_path / "run")
    found = tiny.plan(parse(None, [*tiny.words(base), *words]).recipe)
    assert found["notices"] == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lora_dropout": 0.1}, "for linear layers"), ({"use_dora": True}, "for linear layers"),
        ({"init_lora_weights": "pissa"}, "for linear layers"),
    ],
)  # fmt: skip
def test_what_parameters_cannot_have_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Lora(target_parameters=["mlp.experts.down_proj"], **settings)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method__target_parameters": ["mlp.experts.dwn_proj"]}, "no such parameter"),
        ({"method__target_parameters": EXPERTS, "base__storage": "nf4"}, "cannot train on this storage"),
    ],
)  # fmt: skip
def test_what_the_model_cannot_have_is_refused(
    changes: dict[str, Any], words: str, models: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        tiny.plan(tiny.recipe(models["qwen3"], data, tmp_path / "run", **changes).recipe)


def test_a_loss_of_the_router_is_refused(data: Path, tmp_path: Path) -> None:
    model = tiny.save_model(config("qwen3", output_router_logits=True), tmp_path / "model")
    with pytest.raises(UserError, match="loss of its router"):
        train(tiny.recipe(model, data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_training_goes_on_from_experts_of_others(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    import peft

    given = peft.LoraConfig(
        r=2, target_modules=["q_proj"], target_parameters=EXPERTS, task_type="CAUSAL_LM", lora_alpha=4
    )
    adapter = theirs.save_adapter(models["qwen3"], tmp_path / "theirs", given)
    words = [
        f"model.adapter={adapter}", f"data.dataset={data}", "data.val_size=0", "train.max_steps=1", "base.device=cpu",
        "base.storage=fp32", "base.compute=fp32", f"output_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    run = train(parse(None, words))
    assert run.recipe.method.target_parameters == EXPERTS  # type: ignore[union-attr]
