"""Recipes that do not fit their rows, the names in their model or the other settings of their method.

Whoever owns those says so at once, before any model is loaded, and the fix that is named is one. What excludes each
other: test_impossible.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from refusals import Refused, check_case, fired, workplace, write_models

from whet.base.errors import UserError
from whet.recipe import parse
from whet.runs import Run
from whet.ship.merge import merge

ROWS = [
    Refused("chats_on_an_encoder", "", "data.dataset", "prompt_completion", "bert", "chats",
               "data.dataset=fields.jsonl data.columns.text=title data.columns.label=kind"),
    Refused("labels_of_chats", "model.task=classification", "model.task", "prompt_completion", mended="data.dataset="
               "fields.jsonl data.columns.text=title data.columns.label=kind"),
    Refused("next_token_of_labels", "model.task=causal", "model.task", "classification", "llama", "labels"),
    Refused("several_labels_of_one", "model.task=multi_label", "label", "a name", "bert", "labels"),
    Refused("one_label_of_several", "model.task=classification", "label", "a list of names", "bert", "several"),
    Refused("value_of_a_name", "model.task=regression", "label", "a name", "llama", "labels"),
    Refused("answers_of_raw_text", "", "data.format", "text", "t5", "texts", "data.dataset=chats.jsonl"),
    Refused("packed_labels", "data.packing=true", "data.packing", "true", "bert", "labels"),
    Refused("padding_free_answers", "data.padding_free=true", "data.padding_free", "true", "t5"),
    Refused("turns_of_labels", "data.loss_on=assistant", "data.loss_on", "assistant", "bert", "labels"),
    Refused("labels_split", "data.over_length=split", "data.over_length", "split", "bert", "labels"),
]  # fmt: skip

MODELS = [
    Refused("bitfit_without_biases", "method=bitfit", "method.name", "LlamaForCausalLM"),
    Refused("bitfit_on_t5", "method=bitfit", "method.name", "T5ForConditionalGeneration", "t5"),
    Refused("adaption_prompt_on_phi3", "method=adaption_prompt", "method", "adaption_prompt", "phi3"),
    Refused("prefix_before_a_head_of_two_layers", "method=prefix", "method.name", "prefix", "distilbert", "labels"),
    Refused("more_layers_than_there_are", "method=freeze method.layers=9", "method.layers", "9"),
    Refused("a_layer_that_is_not_there", "method.layers_to_transform=[7]", "method.layers_to_transform", "7"),
    Refused("pissa_wider_than_the_layers", "method.init_lora_weights=pissa method.r=80", "method.r", "80"),
    Refused("eva_wider_than_the_layers", "method.init_lora_weights=eva method.r=80", "method.r", "80"),
    Refused("a_token_that_is_not_there", "method.trainable_token_indices=[20000]", "method.trainable_token_indices",
               "20000", mended="method.trainable_token_indices=[16383]"),
]  # fmt: skip

METHODS = [
    Refused("orthogonal_of_odd_rank", "method.init_lora_weights=orthogonal method.r=3", "method.r", "3"),
    Refused("loftq_with_biases", "method.init_lora_weights=loftq method.bias=all", "method.bias", "all"),
    Refused("rows_of_a_whole_embedding", "method.trainable_token_indices=[1] method.modules_to_save=[embed_tokens]",
               "method.trainable_token_indices", "[1]", mended="method.trainable_token_indices=[1]"),
    Refused("no_tokens_named", "method=trainable_tokens", "method.token_indices", "none"),
    Refused("unknown_option", "method=ia3 method.feedforward_module=[x]", "method.feedforward_module",
               "feedforward_module", mended="method=ia3 method.feedforward_modules=[down_proj] "
               "method.target_modules=[k_proj, v_proj, down_proj]"),
    Refused("option_of_another_kind", "method=vera method.r=wide", "method.r", "'wide'", mended="method=vera "
               "method.r=8"),
    Refused("option_that_is_not_the_recipes", "method=prompt method.task_type=CAUSAL_LM", "method.task_type",
               "CAUSAL_LM"),
    Refused("lora_setting_of_bitfit", "method=bitfit method.r=8", "method.r", "method.r", "gpt2"),
]  # fmt: skip

CASES = {case.name: case for case in (*ROWS, *MODELS, *METHODS)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def place(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return workplace(models, tmp_path, monkeypatch)


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_at_once_and_the_fix_is_one(
    name: str, place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with fired(monkeypatch) as names:
        check_case(CASES[name], place, capfd)
    assert names == [], "a rule of the table: its case belongs to test_impossible.py"


@pytest.mark.parametrize("method", ["prompt", "prefix", "p_tuning", "adaption_prompt", "bottleneck", "lily", "beft"])
def test_what_does_not_merge_is_served_as_it_is(method: str, tmp_path: Path) -> None:
    recipe = parse(None, [f"method={method}", "base.device=cpu"]).recipe
    unmerged = Run(tmp_path / "run", recipe)
    with pytest.raises(UserError) as caught:
        merge(unmerged, tmp_path / "out")
    error = caught.value
    assert f"what {method} trains does not fold" in error.problem
    assert error.field == "method.name"
    assert f"serve the adapter as it is: {unmerged.adapter}" in error.fix
    able = (error.expected or "").split(", ")
    assert method not in able
    assert {"lora", "ia3", "bitfit"} <= set(able)
    assert all(parse(None, [f"method={name}"]).recipe.method.can.mergeable for name in able)
    assert not (tmp_path / "out").exists()


def test_a_whole_model_is_not_merged(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no adapter to merge") as caught:
        merge(Run(tmp_path / "run", parse(None, ["method=full"]).recipe), tmp_path / "out")
    assert "is a plain model already" in caught.value.fix
