"""Recipes whose parts are each possible but not together: one rule of `planning.rules` refuses each, and the fix that
it names is one. Every rule of the table has a case here."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from refusals import ASSIGNMENT, Refused, check_case, fired, passes, split, train, workplace, write_models

from whet.base.errors import UserError
from whet.planning.asked import Asked, Structure
from whet.planning.rule import Rule
from whet.planning.rules import FLAT_ONLY, RULES, check, rule_out
from whet.recipe import parse

FP8 = "base.storage=fp8 base.compute=fp8 base.fp8_head=true"


def said(rule: str, *cases: Refused) -> dict[str, tuple[str, Refused]]:
    """The cases of one rule, by name."""
    return {case.name: (rule, case) for case in cases}


STORAGE = (
    said("storage_of_method",
        Refused("full_on_nf4", "method=full base.storage=nf4", "base.storage", "nf4"),
        Refused("freeze_on_int8", "method=freeze base.storage=int8", "base.storage", "int8"),
        Refused("diff_pruning_on_nf4", "method=diff_pruning base.storage=nf4", "base.storage", "nf4"),
        Refused("ia3_on_fp8", "method=ia3 base.storage=fp8", "base.storage", "fp8"),
        Refused("oft_on_nf4_for_labels", "method=oft base.storage=nf4", "base.storage", "nf4", "bert", "labels"),
        Refused("pissa_on_nf4", "method.init_lora_weights=pissa base.storage=nf4", "base.storage", "nf4"),
        Refused("dora_from_olora_on_int8", "method.use_dora=true method.init_lora_weights=olora base.storage=int8",
                "base.storage", "int8"),
        Refused("corda_on_fp8", "method.init_lora_weights=corda base.storage=fp8", "base.storage", "fp8"),
        Refused("loftq_on_dense", "method.init_lora_weights=loftq base.storage=fp32", "base.storage", "fp32"),
        Refused("biases_on_nf4", "method.bias=all base.storage=nf4", "base.storage", "nf4", "gpt2"),
        Refused("fp8_head_of_diff_pruning", f"method=diff_pruning {FP8}", "base.storage", "fp8",
                mended="method=diff_pruning base.storage=fp32"))
    | said("fp32_on_bf16", Refused("bf16_computed_in_fp32", "base.storage=bf16 base.compute=fp32", "base.compute",
                                   "fp32"))
    | said("fp8_on_dense",
        Refused("fp8_on_full", "method=full base.compute=fp8", "base.compute", "fp8 with fp32"),
        Refused("fp8_on_fp32", "base.storage=fp32 base.compute=fp8", "base.compute", "fp8 with fp32"))
    | said("double_quant_alone",
        Refused("scales_of_fp8_quantised_twice", "base.storage=fp8 base.double_quant=true", "base.double_quant",
                "true"))
    | said("keep_transposed_alone", Refused("turned_without_fp8", "base.keep_transposed=true", "base.keep_transposed",
                                            "true"))
    | said("fp8_head_alone", Refused("head_without_fp8", "base.fp8_head=true", "base.fp8_head", "true"))
)  # fmt: skip

OPTIMISER = (
    said("adam_beta1_without_adam", Refused("beta1_of_sgd", "train.optim=sgd train.adam_beta1=0.9", "train.adam_beta1",
                                            "0.9"))
    | said("adam_beta2_without_adam", Refused("beta2_of_sgd", "train.optim=sgd train.adam_beta2=0.99",
                                              "train.adam_beta2", "0.99"))
    | said("adam_epsilon_without_adam", Refused("epsilon_of_adafactor", "train.optim=adafactor train.adam_epsilon=1e-6",
                                                "train.adam_epsilon", "1e-06"))
    | said("decay_of_another_schedule", Refused("decay_of_cosine", "train.decay_ratio=0.1", "train.decay_ratio", "0.1"))
    | said("another_optimiser_on_the_host", Refused("sgd_on_the_host", "train.optim=sgd train.offload_optimizer=true",
                                                    "train.offload_optimizer", "true with sgd"))
    | said("8bit_without_cuda", Refused("8bit_on_a_cpu", "train.optim=adamw_8bit", "train.optim", "adamw_8bit on cpu"))
)  # fmt: skip

LAYOUT = (
    said("captured_penalty", Refused("captured_diff_pruning", "method=diff_pruning train.cuda_graphs=true",
                                     "train.cuda_graphs", "true"))
    | said("captured_tokens",
        Refused("captured_new_tokens", "model.new_tokens=[<tool>] train.cuda_graphs=true", "train.cuda_graphs", "true"),
        Refused("captured_rows_of_tokens", "method.trainable_token_indices=[3] train.cuda_graphs=true",
                "train.cuda_graphs", "true"))
    | said("captured_host_optimiser", Refused("captured_update_on_the_host",
        "train.offload_optimizer=true train.cuda_graphs=true", "train.cuda_graphs", "true"))
    | said("captured_memory_mode", Refused("captured_reruns",
        "train.gradient_checkpointing=true train.cuda_graphs=true", "train.cuda_graphs", "true"))
    | said("compile_without_cuda",
        Refused("compiled_dora", "method.use_dora=true train.compile=true", "train.compile", "true"),
        Refused("compiled_shira", "method=shira train.compile=true", "train.compile", "true"))
    | said("cuda_graphs_without_cuda", Refused("captured_labels", "train.cuda_graphs=true", "train.cuda_graphs", "true",
                                               "bert", "labels"))
    | said("fit_micro_batches_without_cuda", Refused("fitted_on_a_cpu", "train.fit_micro_batches=true",
                                                     "train.fit_micro_batches", "true"))
    | said("memory_mode_without_checkpointing",
        Refused("tiles_of_nothing", "train.tile_mlp=64 train.gradient_checkpointing=false",
                "train.gradient_checkpointing", "false"),
        Refused("offload_of_nothing", "train.activation_offload=true train.gradient_checkpointing=false",
                "train.gradient_checkpointing", "false"))
    | said("host_optimiser_of_a_method_that_follows_it", Refused("offloaded_diff_pruning",
        "method=diff_pruning train.offload_optimizer=true", "train.offload_optimizer", "true"))
)  # fmt: skip

TASK = (
    said("task_of_another_kind_of_model",
        Refused("seq2seq_on_a_decoder", "model.task=seq2seq", "model.task", "llama, a decoder"),
        Refused("seq2seq_on_an_encoder", "model.task=seq2seq", "model.task", "bert, an encoder", "bert", "chats",
                "data.dataset=labels.jsonl model.task=auto"),
        Refused("causal_on_an_encoder", "model.task=causal", "model.task", "bert, an encoder", "bert", "chats",
                "data.dataset=labels.jsonl model.task=auto"),
        Refused("causal_on_t5", "model.task=causal", "model.task", "t5, an encoder-decoder", "t5"))
    | said("task_of_another_method",
        Refused("adaption_prompt_for_labels", "method=adaption_prompt", "model.task", "classification", "llama",
                "labels"),
        Refused("trainable_tokens_for_labels", "method=trainable_tokens method.token_indices=[1]", "model.task",
                "classification", "bert", "labels"),
        Refused("adaption_prompt_on_t5", "method=adaption_prompt", "model.task", "seq2seq", "t5"))
    | said("new_tokens_that_are_not_trained", Refused("new_tokens_of_ia3", "method=ia3 model.new_tokens=[<tool>]",
                                                      "model.new_tokens", "<tool>"))
    | said("template_of_another_task", Refused("template_for_labels", "model.chat_template=chatml",
                                               "model.chat_template", "chatml", "bert", "labels"))
    | said("checkpointing_of_a_trained_cache", Refused("prefix_run_again",
        "method=prefix train.gradient_checkpointing=true", "train.gradient_checkpointing", "true"))
    | said("activation_offload_with_padding", Refused("offloaded_answers", "train.activation_offload=true",
                                                      "train.activation_offload", "true", "t5"))
    | said("tile_mlp_with_padding",
        Refused("tiled_labels", "train.tile_mlp=64", "train.tile_mlp", "64", "llama", "labels"),
        Refused("tiled_p_tuning", "method=p_tuning train.tile_mlp=32", "train.tile_mlp", "32"))
    | said("fp8_head_with_padding", Refused("fp8_head_for_labels", FP8, "base.fp8_head", "true", "llama", "labels"))
)  # fmt: skip

ROWS = (
    said("packing_behind_tokens_of_the_method", Refused("packed_prompt", "method=prompt data.packing=true",
                                                        "data.packing", "true"))
    | said("padding_free_behind_tokens_of_the_method", Refused("padding_free_prefix",
        "method=prefix data.padding_free=true", "data.padding_free", "true"))
    | said("stopping_early_without_held_out_rows", Refused("stopping_blind", "train.early_stopping_patience=2",
        "train.early_stopping_patience", "no held-out row",  # a twentieth of six rows is none
        mended="train.early_stopping_patience=2 data.val_size=1"))
)  # fmt: skip

STRUCTURE = (
    said("embedding_on_the_host",
        Refused("host_embedding_that_is_the_head", "base.offload_embedding=true", "base.offload_embedding", "head too"),
        Refused("host_embedding_that_is_trained", "method=freeze method.train_embeddings=true "
                "base.offload_embedding=true", "base.offload_embedding", "trained", "bert", "labels"))
    | said("fp8_head_that_is_trained",
        Refused("fp8_head_that_is_trained", f"method=head {FP8}", "base.fp8_head", "true"),
        Refused("fp8_head_that_is_saved", f"method.modules_to_save=[lm_head] {FP8}", "base.fp8_head", "true"),
        Refused("fp8_head_tied_to_trained_tokens", f"method=trainable_tokens method.token_indices=[5] {FP8}",
                "base.fp8_head", "true"))
    | said("quantised_module_trained_whole", Refused("whole_module_on_nf4", "method.modules_to_save=[down_proj] "
        "method.target_modules=attention base.storage=nf4", "method.modules_to_save", "down_proj"))
    | said("head_on_the_host_with_padding", Refused("host_head_for_labels", "base.offload_head=true",
                                                    "base.offload_head", "rows with padding", "llama", "labels"))
    | said("head_on_the_host", Refused("host_head_that_is_saved", "method.modules_to_save=[lm_head] "
        "base.offload_head=true", "base.offload_head", "trained"))
)  # fmt: skip

CASES = STORAGE | OPTIMISER | LAYOUT | TASK | ROWS | STRUCTURE
ONE_OF_EACH: dict[str, Refused] = dict(reversed(CASES.values()))


@dataclass(frozen=True)
class OnGpu:
    """A case that a machine without GPU can only tell of: words over the defaults, and facts as they would be found."""

    rule: str
    words: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


GPU: dict[str, Any] = {
    "device": "cuda", "device_name": "a GPU", "has_fp8": True, "storage": "bf16", "compute": "bf16", "task": "causal",
    "held_out_rows": 1, "structure": Structure(), "head_alone": True, "head_in_fp8": True, "can_capture": True,
}  # fmt: skip
LABELS, OLD = {"task": "classification"}, {"has_fp8": False, "storage": "fp8", "compute": "fp8"}
IN_FP8 = {"storage": "fp8", "compute": "fp8"}
ON_GPU = [
    OnGpu("fp8_without_hardware", "base.storage=fp8 base.compute=fp8", OLD),
    OnGpu("captured_penalty", "method=diff_pruning train.cuda_graphs=true", {"storage": "fp32"}),
    OnGpu("captured_optimiser", "train.optim=sgd train.cuda_graphs=true"),
    OnGpu("captured_memory_mode", "train.gradient_checkpointing=true train.cuda_graphs=true"),
    OnGpu("captured_memory_mode", "train.tile_mlp=64 train.cuda_graphs=true"),
    OnGpu("captured_host_optimiser", "train.offload_optimizer=true train.cuda_graphs=true"),
    *(OnGpu("another_optimiser_on_the_host", f"train.optim={optim} train.offload_optimizer=true")
      for optim in ("adamw_8bit", "paged_adamw_8bit", "adafactor", "sgd")),
    *(OnGpu(f"{name}_of_padded_rows", f"train.{name}=true data.padding_free=false")
      for name in ("compile", "cuda_graphs", "fit_micro_batches")),
    OnGpu("compiled_method", "method.use_dora=true train.compile=true"),
    *(OnGpu(f"{name}_with_padding", f"train.{name}={'32' if name == 'tile_mlp' else 'true'}", LABELS)
      for name in FLAT_ONLY),
    OnGpu("layers_that_cannot_run_again", "train.gradient_checkpointing=true",
          LABELS | {"structure": Structure(reruns=False)}),
    OnGpu("fp8_head_of_another_form", FP8, IN_FP8 | {"head_in_fp8": False}),
    OnGpu("head_on_the_host_of_another_form", "base.offload_head=true", {"head_alone": False}),
    OnGpu("layout_that_cannot_be_captured", "train.cuda_graphs=true", {"can_capture": False}),
]  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def place(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return workplace(models, tmp_path, monkeypatch)


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_at_once_by_its_rule_and_the_fix_is_one(
    name: str, place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rule, case = CASES[name]
    with fired(monkeypatch) as names:
        check_case(case, place, capfd)
    assert names == [rule]


@pytest.mark.parametrize("rule", ONE_OF_EACH)
def test_without_its_rule_nothing_refuses_it(
    rule: str, place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: the rule is forgotten. If anything else said the same, the table would not be all there is."""
    case, holds = ONE_OF_EACH[rule], Rule.holds
    assert train(place, case.overrides())[0] == 2
    refused = capfd.readouterr().err
    monkeypatch.setattr(Rule, "holds", lambda self, asked: self.name == rule or holds(self, asked))
    assert passes(place, case.overrides()) or refused not in capfd.readouterr().err


def asked_for(words: str, facts: dict[str, Any]) -> Asked:
    return replace(Asked.of(parse(None, split(words)).recipe), **(GPU | facts))


@pytest.mark.parametrize("case", ON_GPU, ids=lambda case: f"{case.rule} {case.words}")
def test_on_a_gpu_its_rule_refuses_it_and_the_fix_is_one(case: OnGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    with fired(monkeypatch) as names, pytest.raises(UserError) as caught:
        check(asked_for(case.words, case.facts))
    assert names == [case.rule]
    error = caught.value
    assert error.found
    assert error.expected
    words = [word for word in split(case.words) if word.partition("=")[0] != error.field]
    assert len(words) < len(split(case.words)), "the field that is named is one of those that were given"
    fixes = ASSIGNMENT.findall(error.fix.partition(", or ")[0])
    mended = [*(words if not fixes else split(case.words)), *(f"{path}={value}" for path, value in fixes)]
    facts = case.facts | ({"has_fp8": True} if case.rule == "fp8_without_hardware" else {})  # another machine
    check(asked_for(" ".join(mended), facts))


def test_every_rule_has_a_case_and_a_name_of_its_own() -> None:
    names = [rule.name for rule in RULES]
    assert len(names) == len(set(names))
    assert {rule for rule, _ in CASES.values()} | {case.rule for case in ON_GPU} == set(names)


def test_a_rule_waits_until_its_facts_are_known() -> None:
    """Nothing but what the recipe says by itself is refused when nothing else is known."""
    for case in ON_GPU:
        unknown = Asked.of(parse(None, split(case.words)).recipe)
        broken = [rule.name for rule in RULES if not rule.holds(unknown)]
        rule = next(rule for rule in RULES if rule.name == case.rule)
        assert (case.rule in broken) == (not rule.needs), case.rule


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_what_is_asked_by_default_breaks_no_rule(rule: Rule) -> None:
    assert rule.holds(asked_for("", {}))
    assert rule.holds(replace(asked_for("", {}), device="cpu", has_fp8=False))


@pytest.mark.parametrize(
    ("words", "facts", "off"),
    [
        ("", {}, set()),
        ("method=diff_pruning", {"storage": "fp32"}, {"cuda_graphs", "offload_optimizer"}),
        ("method.use_dora=true", {}, {"compile"}),
        ("model.new_tokens=[<tool>]", {}, {"cuda_graphs"}),
        ("train.optim=sgd", {}, {"cuda_graphs", "offload_optimizer"}),
        ("train.gradient_checkpointing=true", {}, {"cuda_graphs"}),
        ("train.cuda_graphs=true", {}, {"offload_optimizer"}),
        ("data.padding_free=false", {}, {"compile", "cuda_graphs"}),
        ("", {"device": "cpu"}, {"compile", "cuda_graphs"}),
    ],
    ids=str,
)
def test_what_a_rule_forbids_is_not_decided(words: str, facts: dict[str, Any], off: set[str]) -> None:
    """An automatic choice that could not be asked for is off; the others stay open, and what was asked stays."""
    asked = asked_for(words, facts)
    train = rule_out(asked)
    automatic = ("compile", "cuda_graphs", "offload_optimizer")
    assert {name for name in automatic if getattr(train, name) is False} == off
    assert replace(train, **{name: getattr(asked.train, name) for name in off}) == asked.train


def test_the_harness_sees_a_model_being_loaded(place: Path) -> None:
    """Otherwise nothing would show that a refusal comes before it."""
    assert passes(place, ["model.path=llama", "data.dataset=chats.jsonl"])
    assert (place / "runs" / "recipe" / "recipe.yaml").is_file()
