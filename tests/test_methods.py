"""Every method on every storage it trains on: what it freezes, how it starts, what it saves, and that it learns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from sampled import sampled
from tiny import plan
from torch import nn

from whet.base.errors import UserError
from whet.data.format.standardise import Message
from whet.engine.answer.session import text_session
from whet.engine.config import Model
from whet.engine.device import PACKED, Placement
from whet.engine.load.load import load_model
from whet.engine.load.open import open_trained
from whet.engine.weights.linear import FrozenLinear, count_parameters, dense_weight, linear_names
from whet.methods.all import METHODS, capability_rows
from whet.methods.layers.group import LoraGroup
from whet.methods.layers.state import trained_state
from whet.methods.lora import Lora
from whet.recipe import Parsed, parse
from whet.training.optim import build_optimiser
from whet.training.run import build, train
from whet.training.setup import get_ready
from whet.training.step import train_step

Make = Callable[..., Parsed]
OWN = {name: METHODS[name] for name in ("lora", "full")}  # the others: test_conformance.py, test_bridge.py
PAIRS = [(name, storage) for name, cls in OWN.items() for storage in cls.capability.storages]
CPU = torch.device("cpu")


def pair(method: str, storage: str, **more: Any) -> dict[str, Any]:
    compute = "bf16" if storage == "bf16" else "fp32"
    return {"method.name": method, "base.storage": storage, "base.compute": compute} | more


def placed(storage: str) -> Placement:
    return Placement(CPU, storage, torch.bfloat16 if storage == "bf16" else torch.float32, True, {})


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits.float()


IDS = torch.randint(3, tiny.VOCABULARY, (2, 21), generator=torch.Generator().manual_seed(5))


def test_the_table_covers_every_method() -> None:
    assert {name for name, _ in PAIRS} == set(OWN)
    assert set(METHODS) == {row["method"] for row in capability_rows()}


@pytest.mark.parametrize(("method", "storage"), PAIRS)
def test_it_starts_as_the_base_model(method: str, storage: str, recipe: Make, model_dir: Path) -> None:
    model = tiny.built(recipe(**pair(method, storage))).model
    base = load_model(Model(path=str(model_dir)), placed(storage))
    assert torch.equal(logits(model.eval(), IDS), logits(base, IDS))


@pytest.mark.parametrize(("method", "storage"), PAIRS)
def test_one_step_changes_what_is_trained_and_nothing_else(method: str, storage: str, recipe: Make) -> None:
    settings = pair(method, storage, train__per_device_train_batch_size=8, train__learning_rate=0.01)
    ready = get_ready(recipe(**settings))
    arranged, ready = build(ready)
    model = arranged.model
    before = {name: p.detach().clone() for name, p in [*model.named_parameters(), *model.named_buffers()]}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    expected = set(dict(model.named_parameters()))
    if method == "lora":
        expected = {name for name in expected if ".lora_" in name and name.endswith((".a", ".b"))}
        assert all(p.dtype == torch.float32 for name, p in model.named_parameters() if name in expected)
        assert len(trained_state(model)) == 2 * len(linear_names(load_model(ready.recipe.model, placed(storage))))
    assert trained == expected
    optimiser = build_optimiser(ready.recipe.train, arranged.trained)
    for index in range(2):
        train_step(
            model, optimiser, arranged.batches.step(index), arranged.objective, max_grad_norm=1.0, step=index + 1
        )
        if index == 0 and method == "lora":
            assert all(bool(tensor.any()) for name, tensor in trained_state(model).items() if "lora_B" in name)
    after = dict([*model.named_parameters(), *model.named_buffers()])
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == trained
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("storage", METHODS["lora"].capability.storages)
def test_a_saved_adapter_opens_in_plain_peft_on_a_plain_model(storage: str, recipe: Make, model_dir: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    run = train(recipe(train__max_steps=3, **pair("lora", storage)))
    live = open_trained(run.recipe.model, run.recipe.base, run.adapter, run.recipe.method)
    base = AutoModelForCausalLM.from_pretrained(str(model_dir), dtype=torch.float32)
    if storage in PACKED:
        quantised = load_model(Model(path=str(model_dir)), placed(storage))
        with torch.no_grad():
            for name in linear_names(base):
                base.get_submodule(name).weight.copy_(dense_weight(quantised.get_submodule(name), torch.float32))
    plain = peft.PeftModel.from_pretrained(base, str(run.adapter)).eval()
    ours, theirs, untuned = logits(live.network, IDS), logits(plain, IDS), logits(plain.disable_adapter() and base, IDS)
    with plain.disable_adapter():
        untuned = logits(plain, IDS)
    assert float((ours - theirs).abs().max()) <= 1e-5 * max(1.0, float(theirs.abs().max()))
    assert float((ours - untuned).abs().max()) > 1e-2
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in (path.name for path in run.path.rglob("*")))


@pytest.mark.parametrize("save_dtype", ["fp32", "bf16"])
def test_a_fully_trained_model_opens_in_plain_transformers(save_dtype: str, recipe: Make) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = train(recipe(train__max_steps=2, **pair("full", "fp32", method__save_dtype=save_dtype)))
    plain = AutoModelForCausalLM.from_pretrained(str(run.model))
    assert plain.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[save_dtype]
    assert plain.lm_head.weight.data_ptr() == plain.model.embed_tokens.weight.data_ptr()
    live = open_trained(run.recipe.model, run.recipe.base, run.model, run.recipe.method)
    assert torch.equal(logits(plain.float(), IDS), logits(live.network, IDS))
    assert AutoTokenizer.from_pretrained(str(run.model)).chat_template


@pytest.mark.parametrize(
    ("method", "storage"), sampled(PAIRS, [("full", "fp32"), ("lora", "bf16"), ("lora", "nf4"), ("lora", "fp8")])
)
def test_it_learns_four_rows_by_heart_and_stops_by_itself(
    method: str, storage: str, model_dir: Path, tmp_path: Path
) -> None:
    answers = ("a red fox", "blue", "서울입니다", "seven brown dogs over the river")
    records = [{"instruction": f"Say word {n}.", "input": "", "output": text} for n, text in enumerate(answers)]
    data = tiny.write_rows(tmp_path / "four.jsonl", records)
    settings = pair(method, storage, train__max_steps=60, train__learning_rate=0.02 if method == "lora" else 0.003,
                    train__per_device_train_batch_size=4, train__lr_scheduler_type="constant")  # fmt: skip
    parsed = tiny.recipe(model_dir, data, tmp_path / "run", **settings)
    run = train(parsed)
    row_tokenizer = get_ready(parsed).prepared.row_tokenizer
    live = open_trained(run.recipe.model, run.recipe.base, run.trained, run.recipe.method)
    prompts = [row_tokenizer.prompt([Message("user", str(record["instruction"]))]) for record in records]
    stop = row_tokenizer.stop_ids()
    with text_session(live) as session:
        found = session.answer(prompts, stop_ids=stop, max_new_tokens=40, batch_size=4)
    assert [row_tokenizer.tokenizer.decode(ids) for ids in found] == list(answers)
    assert all(len(ids) < 40 for ids in found)


def test_nf4_takes_a_third_of_the_bytes_and_is_what_bitsandbytes_computes(model_dir: Path) -> None:
    import bitsandbytes as bnb

    dense, packed = (load_model(Model(path=str(model_dir)), placed(storage)) for storage in ("fp32", "nf4"))
    names = linear_names(packed)
    assert names == linear_names(dense)
    assert len(names) == 14
    assert all(isinstance(packed.get_submodule(name), FrozenLinear) for name in names)
    bf16_bytes = sum(2 * dense.get_submodule(name).weight.numel() for name in names)
    nf4_bytes = sum(p.numel() * p.element_size() for name in names for p in packed.get_submodule(name).parameters())
    assert nf4_bytes <= 0.35 * bf16_bytes
    assert count_parameters(packed)[1] == count_parameters(dense)[1]
    for name in names:
        weight = dense.get_submodule(name).weight
        theirs = bnb.nn.Linear4bit(
            weight.shape[1], weight.shape[0], bias=False, quant_type="nf4", compress_statistics=True
        )
        theirs.weight = bnb.nn.Params4bit(
            weight.detach().clone(), requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        theirs = theirs.to("cpu")
        expected = bnb.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
        ours = packed.get_submodule(name).dense(torch.float32)
        assert torch.equal(ours, expected.float()), name
        assert 0 < float((ours - weight).abs().max()) < 0.2 * float(weight.abs().max())


def test_lora_of_rank_16_on_a_square_layer_has_131072_parameters() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    with torch.device("meta"):
        model = inject_adapter_in_model(LoraConfig(r=16, target_modules=["0"]), nn.Sequential(nn.Linear(4096, 4096)))
    assert sum(p.numel() for name, p in model.named_parameters() if "lora_" in name) == 131_072


CONFIGS = Path(__file__).parents[2] / "shared" / "data" / "configs"
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.skipif(not CONFIGS.is_dir(), reason="the published configs lie beside the development checkout only")
@pytest.mark.parametrize(
    ("name", "rank", "trainable", "total"),
    [("Qwen3-4B", 8, 16_515_072, 4_038_983_168), ("Llama-2-7B", 16, 39_976_960, 6_738_415_616 + 39_976_960)],
)
def test_published_parameter_counts(name: str, rank: int, trainable: int, total: int, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_bytes((CONFIGS / f"{name}.json").read_bytes())
    for targets in ("all-linear", SEVEN):
        settings = {"model.path": str(config), "base.device": "cpu", "method.r": rank, "method.target_modules": targets}
        found = plan(parse(None, tiny.words(settings)).recipe)
        assert (found["trainable_params"], found["all_params"]) == (trainable, total)


@pytest.mark.parametrize("targets", [["q_porj"], ["q_proj", "v_prj"], r".*\.q_porj"], ids=str)
def test_a_target_that_matches_no_layer_is_refused_with_the_nearest(targets: Any, recipe: Make) -> None:
    with pytest.raises(UserError) as caught:
        train(recipe(method__target_modules=targets))
    assert caught.value.field == "method.target_modules"
    assert "q_proj" in str(caught.value.expected)
    if isinstance(targets, list):
        assert caught.value.fix in ("write q_proj", "write v_proj")


def test_target_modules_choose_the_layers(recipe: Make) -> None:
    model = tiny.built(recipe(method__target_modules=["q_proj", "layers.1.mlp.up_proj"])).model
    names = [name for name in trained_state(model) if ".lora_A" in name]
    adapted = {name.partition(".lora_A")[0].removeprefix("base_model.model.") for name in names}
    assert adapted == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    }


@pytest.mark.parametrize(("rslora", "scale"), [(False, 8 / 4), (True, 8 / 2)])
def test_the_update_is_scaled_by_alpha_over_rank(rslora: bool, scale: float, recipe: Make) -> None:
    made = recipe(method__r=4, method__lora_alpha=8, method__use_rslora=rslora)
    model = tiny.built(made).model
    assert {module.shape.scale for module in model.modules() if isinstance(module, LoraGroup)} == {scale}


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_an_update_is_seen_by_the_next_forward_pass(compute: str, recipe: Make) -> None:
    """In bf16 groups of LoRA layers compute with copies, which `before_step` brings up to date."""
    arranged = tiny.built(recipe(base__compute=compute))
    arranged.objective.before_step()
    before = logits(arranged.model.eval(), IDS)
    tiny.randomise_adapter(arranged.model)
    arranged.objective.before_step()
    assert not torch.equal(logits(arranged.model, IDS), before)


def test_dropout_is_on_in_training_and_off_in_evaluation(recipe: Make) -> None:
    arranged = tiny.built(recipe(method__lora_dropout=0.5))
    model = arranged.model
    tiny.randomise_adapter(model)
    assert arranged.objective.refresh is not None
    arranged.objective.before_step()
    steps = []
    for step in (1, 2, 1):
        arranged.objective.place(step, 0)
        steps.append(logits(model, IDS))
    assert not torch.equal(steps[0], steps[1])
    assert torch.equal(steps[0], steps[2]), "a step that is made again has the same masks"
    evaluated = logits(model.eval(), IDS)
    assert not any(torch.equal(evaluated, one) for one in steps)
    arranged.objective.place(2, 0)
    assert torch.equal(evaluated, logits(model, IDS))


def test_the_config_of_an_adapter_is_the_same_in_every_process(recipe: Make, tmp_path: Path) -> None:
    """PEFT keeps names in sets, which are written in another order by each process."""
    model = tiny.built(recipe()).model
    model.peft_config["default"].target_modules = {"v_proj", "q_proj", "up_proj", "k_proj", "gate_proj", "down_proj"}
    Lora().save(model, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))["target_modules"]
    assert written == ["down_proj", "gate_proj", "k_proj", "q_proj", "up_proj", "v_proj"]
