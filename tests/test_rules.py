"""The rules about what excludes each other: each has a case that breaks it, and one fact away nothing is broken.

Facts are plain values, so that what holds on a GPU only is tried here too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tasks

from whet.base.errors import UserError
from whet.data.config import Data
from whet.engine.config import Base, Model
from whet.planning.asked import Asked, Structure
from whet.planning.plan import plan_recipe
from whet.planning.rules import RULES, check, data_for_method, decided
from whet.recipe import parse
from whet.settings import Train


def method(name: str, **settings: Any) -> Any:
    words = [f"method={name}", *(f"method.{key}={value}" for key, value in settings.items())]
    return parse(None, words).recipe.method


LORA, DORA, PREFIX, DIFF = method("lora"), method("lora", use_dora="true"), method("prefix"), method("diff_pruning")
GPU = Asked(
    model=Model(path="m"), base=Base(), method=LORA, data=Data(dataset=("rows.jsonl",)), train=Train(),
    storage="bf16", compute="bf16", device="cuda", device_name="a GPU", has_fp8=True, config=tasks.config("llama"),
    task="causal", held_out_rows=100, structure=Structure(), head_alone=True, head_in_fp8=True, can_capture=True,
)  # fmt: skip
CPU = replace(GPU, device="cpu", has_fp8=False)
FP8 = replace(GPU, storage="fp8", compute="fp8")
LABELS = replace(GPU, task="classification")


def trains(asked: Asked, **settings: Any) -> Asked:
    return replace(asked, train=replace(asked.train, **settings))


def based(asked: Asked, **settings: Any) -> Asked:
    return replace(asked, base=replace(asked.base, **settings))


def rows(asked: Asked, **settings: Any) -> Asked:
    return replace(asked, data=replace(asked.data, **settings))


def built(asked: Asked, **facts: Any) -> Asked:
    return replace(asked, structure=Structure(**facts))


def mixture(**more: Any) -> Any:
    from transformers import MixtralConfig

    return MixtralConfig(num_hidden_layers=1, hidden_size=16, router_aux_loss_coef=0.01, **more)


# Each rule: (what breaks it, the same but for one fact).
CASES: dict[str, tuple[Asked, Asked]] = {
    "storage_of_method": (replace(GPU, method=method("full"), storage="nf4"), replace(GPU, storage="nf4")),
    "fp32_on_bf16": (replace(GPU, compute="fp32"), replace(GPU, storage="fp32", compute="fp32")),
    "fp8_on_dense": (replace(GPU, compute="fp8"), FP8),
    "fp8_without_hardware": (replace(FP8, has_fp8=False), replace(FP8, has_fp8=False, device="cpu")),
    "double_quant_alone": (based(FP8, double_quant=False), based(replace(GPU, storage="nf4"), double_quant=False)),
    "keep_transposed_alone": (based(GPU, keep_transposed=True), based(FP8, keep_transposed=True)),
    "fp8_head_alone": (based(GPU, fp8_head=True), based(FP8, fp8_head=True)),
    "adam_beta1_without_adam": (trains(GPU, optim="sgd", adam_beta1=0.8), trains(GPU, adam_beta1=0.8)),
    "adam_beta2_without_adam": (
        trains(GPU, optim="adafactor", adam_beta2=0.8), trains(GPU, optim="paged_adamw_8bit", adam_beta2=0.8)
    ),
    "adam_epsilon_without_adam": (trains(GPU, optim="sgd", adam_epsilon=0.1), trains(GPU, adam_epsilon=0.1)),
    "decay_of_another_schedule": (
        trains(GPU, decay_ratio=0.1), trains(GPU, decay_ratio=0.1, lr_scheduler_type="warmup_stable_decay")
    ),
    "another_optimiser_on_the_host": (
        trains(GPU, offload_optimizer=True, optim="adamw_8bit"), trains(GPU, offload_optimizer=True)
    ),
    "captured_penalty": (trains(replace(GPU, method=DIFF), cuda_graphs=True), trains(GPU, cuda_graphs=True)),
    "captured_tokens": (
        trains(replace(GPU, model=Model(path="m", new_tokens=("<a>",))), cuda_graphs=True),
        replace(GPU, model=Model(path="m", new_tokens=("<a>",))),
    ),
    "captured_parameters": (
        trains(replace(GPU, method=method("lora", target_parameters="[experts.down_proj]")), cuda_graphs=True),
        replace(GPU, method=method("lora", target_parameters="[experts.down_proj]")),
    ),
    "captured_optimiser": (trains(GPU, cuda_graphs=True, optim="sgd"), trains(GPU, optim="sgd")),
    "captured_host_optimiser": (
        trains(GPU, cuda_graphs=True, offload_optimizer=True), trains(GPU, cuda_graphs=True, offload_optimizer=False)
    ),
    "captured_memory_mode": (
        trains(GPU, cuda_graphs=True, tile_mlp=64), trains(GPU, cuda_graphs=True, gradient_checkpointing=False)
    ),
    "compile_without_cuda": (trains(CPU, compile=True), trains(CPU, compile=False)),
    "compile_of_padded_rows": (rows(trains(GPU, compile=True), padding_free=False), trains(GPU, compile=True)),
    "cuda_graphs_without_cuda": (trains(CPU, cuda_graphs=True), trains(GPU, cuda_graphs=True)),
    "cuda_graphs_of_padded_rows": (
        rows(trains(GPU, cuda_graphs=True), padding_free=False), rows(trains(GPU, cuda_graphs=True), padding_free=True)
    ),
    "fit_micro_batches_without_cuda": (trains(CPU, fit_micro_batches=True), trains(GPU, fit_micro_batches=True)),
    "fit_micro_batches_of_padded_rows": (
        rows(trains(GPU, fit_micro_batches=True), padding_free=False), rows(GPU, padding_free=False)
    ),
    "memory_mode_without_checkpointing": (
        trains(GPU, activation_offload=True, gradient_checkpointing=False), trains(GPU, activation_offload=True)
    ),
    "host_optimiser_of_a_method_that_follows_it": (
        trains(replace(GPU, method=DIFF, storage="fp32", compute="fp32"), offload_optimizer=True),
        trains(replace(GPU, method=method("full"), storage="fp32", compute="fp32"), offload_optimizer=True),
    ),
    "task_of_another_kind_of_model": (
        replace(GPU, task="seq2seq"), replace(GPU, task="seq2seq", config=tasks.config("t5"))
    ),
    "task_of_another_method": (
        replace(LABELS, method=method("adaption_prompt")), replace(GPU, method=method("adaption_prompt"))
    ),
    "new_tokens_that_are_not_trained": (
        replace(GPU, model=Model(path="m", new_tokens=("<a>",)), method=method("bottleneck")),
        replace(GPU, model=Model(path="m", new_tokens=("<a>",))),
    ),
    "template_of_another_task": (
        replace(LABELS, model=Model(path="m", chat_template="chatml")),
        replace(GPU, model=Model(path="m", chat_template="chatml")),
    ),
    "checkpointing_of_a_trained_cache": (
        trains(replace(GPU, method=PREFIX), gradient_checkpointing=True), trains(GPU, gradient_checkpointing=True)
    ),
    "compiled_method": (trains(replace(GPU, method=DORA), compile=True), trains(GPU, compile=True)),
    "compile_with_padding": (trains(LABELS, compile=True), trains(LABELS, compile=False)),
    "cuda_graphs_with_padding": (trains(LABELS, cuda_graphs=True), trains(LABELS, cuda_graphs=False)),
    "fit_micro_batches_with_padding": (trains(LABELS, fit_micro_batches=True), trains(GPU, fit_micro_batches=True)),
    "activation_offload_with_padding": (trains(LABELS, activation_offload=True), trains(GPU, activation_offload=True)),
    "tile_mlp_with_padding": (trains(LABELS, tile_mlp=64), trains(GPU, tile_mlp=64)),
    "fp8_head_with_padding": (based(replace(FP8, task="classification"), fp8_head=True), based(FP8, fp8_head=True)),
    "packing_behind_tokens_of_the_method": (rows(replace(GPU, method=PREFIX), packing=True), rows(GPU, packing=True)),
    "padding_free_behind_tokens_of_the_method": (
        rows(replace(GPU, method=PREFIX), padding_free=True), rows(replace(GPU, method=PREFIX), padding_free=False)
    ),
    "stopping_early_without_held_out_rows": (
        trains(replace(GPU, held_out_rows=0), early_stopping_patience=2), trains(GPU, early_stopping_patience=2)
    ),
    "router_loss": (replace(GPU, config=mixture(output_router_logits=True)), replace(GPU, config=mixture())),
    "another_start_of_an_adapter": (
        replace(GPU, model=Model(path="m", adapter="a"), method=method("lora", init_lora_weights="pissa")),
        replace(GPU, method=method("lora", init_lora_weights="pissa")),
    ),
    "adapter_of_random_weights": (
        replace(GPU, model=Model(path="m", adapter="a", from_config=True)),
        replace(GPU, model=Model(path="m", from_config=True)),
    ),
    "embedding_on_the_host": (
        built(based(GPU, offload_embedding=True), embedding_obstacle="it is the output head too", tied=True),
        built(based(GPU, offload_embedding=True, offload_head=True), embedding_obstacle="it is the output head too",
              tied=True),
    ),
    "fp8_head_that_is_trained": (built(based(FP8, fp8_head=True), head_frozen=False), based(FP8, fp8_head=True)),
    "quantised_module_trained_whole": (built(GPU, trained_whole="down_proj"), GPU),
    "head_on_the_host_with_padding": (based(LABELS, offload_head=True), based(GPU, offload_head=True)),
    "head_on_the_host": (
        built(based(GPU, offload_head=True), head_obstacle="it is trained"), built(GPU, head_obstacle="it is trained")
    ),
    "layers_that_cannot_run_again": (
        built(trains(LABELS, gradient_checkpointing=True), reruns=False),
        built(trains(GPU, gradient_checkpointing=True), reruns=False),
    ),
    "fp8_head_of_another_form": (
        based(replace(FP8, head_in_fp8=False), fp8_head=True), replace(FP8, head_in_fp8=False)
    ),
    "head_on_the_host_of_another_form": (
        based(replace(GPU, head_alone=False), offload_head=True), replace(GPU, head_alone=False)
    ),
    "layout_that_cannot_be_captured": (
        trains(replace(GPU, can_capture=False), cuda_graphs=True), replace(GPU, can_capture=False)
    ),
}  # fmt: skip


def test_every_rule_has_a_case_and_a_name_of_its_own() -> None:
    assert len(RULES) >= 50
    assert [rule.name for rule in RULES] == list(CASES)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_refuses_what_breaks_it_and_nothing_else(rule: Any) -> None:
    broken, sound = CASES[rule.name]
    assert not rule.holds(broken)
    with pytest.raises(UserError) as caught:
        check(broken, [rule])
    error = caught.value
    assert error.field == rule.field
    assert error.problem
    assert error.found
    assert error.expected
    assert error.fix
    assert "{" not in f"{error.problem}{error.found}{error.expected}{error.fix}", "a fact that was not filled in"
    check(sound)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_waits_for_the_facts_that_it_needs(rule: Any) -> None:
    """Before the rows or the model are read, what they decide is not known, and not refused."""
    broken, _ = CASES[rule.name]
    for fact in rule.needs:
        assert rule.holds(replace(broken, **{fact: None}))


def test_what_is_left_open_is_turned_off_where_a_rule_forbids_it() -> None:
    """Never what the recipe says, and never more than what a rule forbids."""
    for asked, off in (
        (GPU, set()), (CPU, {"compile", "cuda_graphs"}), (LABELS, {"compile", "cuda_graphs"}),
        (replace(GPU, method=DIFF), {"cuda_graphs", "offload_optimizer"}),
        (replace(GPU, method=DORA), {"compile"}),
        (replace(GPU, model=Model(path="m", new_tokens=("<a>",))), {"cuda_graphs"}),
        (rows(GPU, padding_free=False), {"compile", "cuda_graphs"}),
        (trains(GPU, optim="sgd"), {"cuda_graphs", "offload_optimizer"}),
        (trains(GPU, tile_mlp=64), {"cuda_graphs"}),
    ):  # fmt: skip
        train = decided(asked)
        names = {name for name in ("compile", "cuda_graphs", "offload_optimizer") if getattr(train, name) is False}
        assert names == off
        assert replace(train, compile=None, cuda_graphs=None, offload_optimizer=None) == asked.train
    said = trains(CPU, compile=True)
    assert decided(said).compile


def test_rows_behind_tokens_of_the_method_never_share_a_row() -> None:
    recipe = parse(None, ["method=prefix", "data.dataset=rows.jsonl"]).recipe
    assert (data_for_method(recipe).packing, data_for_method(recipe).padding_free) == (False, False)
    plain = parse(None, ["data.dataset=rows.jsonl", "data.packing=true"]).recipe
    assert data_for_method(plain) == plain.data


def test_a_recipe_for_another_machine_can_be_planned_on_this_one() -> None:
    """whet plan does not ask for the device; training does."""
    words = ["train.compile=true", "train.cuda_graphs=true", "train.optim=adamw", "base.device=cpu"]
    plan = plan_recipe(parse(None, words).recipe)
    assert plan.layout.compile_layers
    with pytest.raises(UserError, match="CUDA only"):
        check(plan.asked)
