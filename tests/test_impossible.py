"""Recipes whose parts are each possible but not together: refused at once, and the fix that is named is one.

The models are configs and tokenizers without any tensor file, so that nothing can have been loaded.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tasks
import tiny

from whet.base.errors import UserError
from whet.cli import run
from whet.recipe import parse
from whet.runs import Run
from whet.ship.merge import merge
from whet.training import load as loading

ASSIGNMENT = re.compile(r"\b((?:model|base|method|data|train|eval)(?:\.\w+)*)=(\[[^\]]*\]|[^\s,;]+)")
FP8 = "base.storage=fp8 base.compute=fp8 base.fp8_head=true"
TEXTS = ("a dog writes a reply", "the quick fox", "고객님 감사합니다", "over the lazy dog", "then jumps", "각각 내일")


@dataclass(frozen=True)
class Impossible:
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


def split(words: str) -> list[str]:
    """Overrides, one or more spaces apart; a space inside of brackets or braces is none."""
    return re.split(r" +(?=[a-z_]+(?:\.\w+)*=)", words) if words else []


STORAGES = [
    Impossible("full_on_nf4", "method=full base.storage=nf4", "base.storage", "nf4"),
    Impossible("freeze_on_int8", "method=freeze base.storage=int8", "base.storage", "int8"),
    Impossible("diff_pruning_on_nf4", "method=diff_pruning base.storage=nf4", "base.storage", "nf4"),
    Impossible("ia3_on_fp8", "method=ia3 base.storage=fp8", "base.storage", "fp8"),
    Impossible("oft_on_nf4_for_labels", "method=oft base.storage=nf4", "base.storage", "nf4", "bert", "labels"),
    Impossible("pissa_on_nf4", "method.init_lora_weights=pissa base.storage=nf4", "base.storage", "nf4"),
    Impossible("dora_from_olora_on_int8", "method.use_dora=true method.init_lora_weights=olora base.storage=int8",
               "base.storage", "int8"),
    Impossible("corda_on_fp8", "method.init_lora_weights=corda base.storage=fp8", "base.storage", "fp8"),
    Impossible("loftq_on_dense", "method.init_lora_weights=loftq base.storage=fp32", "base.storage", "fp32"),
    Impossible("biases_on_nf4", "method.bias=all base.storage=nf4", "base.storage", "nf4", "gpt2"),
    Impossible("whole_module_on_nf4", "method.modules_to_save=[down_proj] method.target_modules=attention "
               "base.storage=nf4", "method.modules_to_save", "down_proj"),
    Impossible("scales_of_fp8_quantised_twice", "base.storage=fp8 base.double_quant=true", "base.double_quant", "true"),
    Impossible("fp8_on_full", "method=full base.compute=fp8", "base.compute", "fp8 with fp32"),
]  # fmt: skip

TASKS = [
    Impossible("seq2seq_on_a_decoder", "model.task=seq2seq", "model.task", "llama, a decoder"),
    Impossible("seq2seq_on_an_encoder", "model.task=seq2seq", "model.task", "bert, an encoder", "bert", "chats",
               "data.dataset=labels.jsonl model.task=auto"),
    Impossible("causal_on_an_encoder", "model.task=causal", "model.task", "bert, an encoder", "bert", "chats",
               "data.dataset=labels.jsonl model.task=auto"),
    Impossible("causal_on_t5", "model.task=causal", "model.task", "t5, an encoder-decoder", "t5"),
    Impossible("chats_on_an_encoder", "", "data.dataset", "prompt_completion", "bert", "chats",
               "data.dataset=fields.jsonl data.columns.text=title data.columns.label=kind"),
    Impossible("labels_of_chats", "model.task=classification", "model.task", "prompt_completion", mended="data.dataset="
               "fields.jsonl data.columns.text=title data.columns.label=kind"),
    Impossible("next_token_of_labels", "model.task=causal", "model.task", "classification", "llama", "labels"),
    Impossible("several_labels_of_one", "model.task=multi_label", "label", "a name", "bert", "labels"),
    Impossible("one_label_of_several", "model.task=classification", "label", "a list of names", "bert", "several"),
    Impossible("value_of_a_name", "model.task=regression", "label", "string 'yes'", "llama", "labels"),
    Impossible("answers_of_raw_text", "", "data.format", "text", "t5", "texts", "data.dataset=chats.jsonl"),
    Impossible("adaption_prompt_for_labels", "method=adaption_prompt", "model.task", "classification", "llama",
               "labels"),
    Impossible("trainable_tokens_for_labels", "method=trainable_tokens method.token_indices=[1]", "model.task",
               "classification", "bert", "labels"),
    Impossible("adaption_prompt_on_t5", "method=adaption_prompt", "model.task", "seq2seq", "t5"),
    Impossible("template_for_labels", "model.chat_template=chatml", "model.chat_template", "chatml", "bert", "labels"),
    Impossible("packed_labels", "data.packing=true", "data.packing", "true", "bert", "labels"),
    Impossible("padding_free_answers", "data.padding_free=true", "data.padding_free", "true", "t5"),
    Impossible("turns_of_labels", "data.loss_on=assistant", "data.loss_on", "assistant", "bert", "labels"),
    Impossible("labels_split", "data.over_length=split", "data.over_length", "split", "bert", "labels"),
    Impossible("tiled_labels", "train.tile_mlp=64", "train.tile_mlp", "64", "llama", "labels"),
    Impossible("offloaded_answers", "train.activation_offload=true", "train.activation_offload", "true", "t5"),
    Impossible("captured_labels", "train.cuda_graphs=true", "train.cuda_graphs", "true", "bert", "labels"),
    Impossible("fp8_head_for_labels", FP8, "base.fp8_head", "true", "llama", "labels"),
]  # fmt: skip

MODELS = [
    Impossible("bitfit_without_biases", "method=bitfit", "method.name", "LlamaForCausalLM"),
    Impossible("bitfit_on_t5", "method=bitfit", "method.name", "T5ForConditionalGeneration", "t5"),
    Impossible("adaption_prompt_on_phi3", "method=adaption_prompt", "method", "adaption_prompt", "phi3"),
    Impossible("prefix_before_a_head_of_two_layers", "method=prefix", "method.name", "prefix", "distilbert", "labels"),
    Impossible("more_layers_than_there_are", "method=freeze method.layers=9", "method.layers", "9"),
    Impossible("a_layer_that_is_not_there", "method.layers_to_transform=[7]", "method.layers_to_transform", "7"),
    Impossible("pissa_wider_than_the_layers", "method.init_lora_weights=pissa method.r=80", "method.r", "80"),
    Impossible("eva_wider_than_the_layers", "method.init_lora_weights=eva method.r=80", "method.r", "80"),
    Impossible("a_token_that_is_not_there", "method.trainable_token_indices=[20000]", "method.trainable_token_indices",
               "20000", mended="method.trainable_token_indices=[4095]"),
]  # fmt: skip

SETTINGS = [
    Impossible("packed_prompt", "method=prompt data.packing=true", "data.packing", "true"),
    Impossible("padding_free_prefix", "method=prefix data.padding_free=true", "data.padding_free", "true"),
    Impossible("prefix_run_again", "method=prefix train.gradient_checkpointing=true", "train.gradient_checkpointing",
               "true"),
    Impossible("tiled_p_tuning", "method=p_tuning train.tile_mlp=32", "train.tile_mlp", "32"),
    Impossible("compiled_dora", "method.use_dora=true train.compile=true", "train.compile", "true"),
    Impossible("compiled_shira", "method=shira train.compile=true", "train.compile", "true"),
    Impossible("captured_diff_pruning", "method=diff_pruning train.cuda_graphs=true", "train.cuda_graphs", "true"),
    Impossible("captured_new_tokens", "model.new_tokens=[<tool>] train.cuda_graphs=true", "train.cuda_graphs", "true"),
    Impossible("captured_rows_of_tokens", "method.trainable_token_indices=[3] train.cuda_graphs=true",
               "train.cuda_graphs", "true"),
    Impossible("offloaded_diff_pruning", "method=diff_pruning train.offload_optimizer=true", "train.offload_optimizer",
               "true"),
    Impossible("fp8_head_that_is_trained", f"method=head {FP8}", "base.fp8_head", "true"),
    Impossible("fp8_head_that_is_saved", f"method.modules_to_save=[lm_head] {FP8}", "base.fp8_head", "true"),
    Impossible("fp8_head_tied_to_trained_tokens", f"method=trainable_tokens method.token_indices=[5] {FP8}",
               "base.fp8_head", "true"),
    Impossible("fp8_head_of_diff_pruning", f"method=diff_pruning {FP8}", "base.storage", "fp8",
               mended="method=diff_pruning base.storage=fp32"),
    Impossible("host_embedding_that_is_the_head", "base.offload_embedding=true", "base.offload_embedding", "head too"),
    Impossible("host_embedding_that_is_trained", "method=freeze method.train_embeddings=true "
               "base.offload_embedding=true", "base.offload_embedding", "trained", "bert", "labels"),
    Impossible("orthogonal_of_odd_rank", "method.init_lora_weights=orthogonal method.r=3", "method.r", "3"),
    Impossible("loftq_with_biases", "method.init_lora_weights=loftq method.bias=all", "method.bias", "all"),
    Impossible("rows_of_a_whole_embedding", "method.trainable_token_indices=[1] method.modules_to_save=[embed_tokens]",
               "method.trainable_token_indices", "[1]", mended="method.trainable_token_indices=[1]"),
    Impossible("no_tokens_named", "method=trainable_tokens", "method.token_indices", "none"),
    Impossible("unknown_option", "method=ia3 method.feedforward_module=[x]", "method.feedforward_module",
               "feedforward_module", mended="method=ia3 method.feedforward_modules=[down_proj] "
               "method.target_modules=[k_proj, v_proj, down_proj]"),
    Impossible("option_of_another_kind", "method=vera method.r=wide", "method.r", "'wide'", mended="method=vera "
               "method.r=8"),
    Impossible("option_that_is_not_the_recipes", "method=prompt method.task_type=CAUSAL_LM", "method.task_type",
               "CAUSAL_LM"),
    Impossible("lora_setting_of_bitfit", "method=bitfit method.r=8", "method.r", "method.r", "gpt2"),
]  # fmt: skip

CASES = [*STORAGES, *TASKS, *MODELS, *SETTINGS]


class ModelLoaded(BaseException):
    """Not an Exception, so that no handler takes it for a mistake of the recipe."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configs and tokenizers by name: no tensor file anywhere."""
    import transformers

    place = tmp_path_factory.mktemp("models")
    small: dict[str, Any] = {"vocab_size": tiny.VOCABULARY, "pad_token_id": 0}
    configs = {kind: tasks.config(kind) for kind in ("llama", "bert", "t5")}
    configs["gpt2"] = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=256, **small)
    configs["phi3"] = transformers.Phi3Config(**{**tasks.config("llama").to_dict(), "model_type": "phi3"})
    configs["distilbert"] = transformers.DistilBertConfig(dim=64, hidden_dim=128, n_layers=2, n_heads=4, **small)
    for kind, config in configs.items():
        config.save_pretrained(str(place / kind))
        tiny.copy_tokenizer(place / kind, files=3)
    return place


@pytest.fixture
def place(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with all models and rows, on a machine where loading a model ends everything."""

    def refuse(*_: object, **__: object) -> None:
        raise ModelLoaded

    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    assert not [*tmp_path.rglob("*.safetensors"), *tmp_path.rglob("*.bin")]
    rows: dict[str, list[dict[str, Any]]] = {
        "chats": [{"prompt": text, "completion": text[::-1]} for text in TEXTS],
        "texts": [{"text": text} for text in TEXTS],
        "labels": [{"text": text, "label": ("yes", "no")[index % 2]} for index, text in enumerate(TEXTS)],
        "several": [{"text": text, "label": ["a", "b"][: 1 + index % 2]} for index, text in enumerate(TEXTS)],
        "fields": [{"title": text, "kind": ("yes", "no")[index % 2]} for index, text in enumerate(TEXTS)],
    }
    for name, records in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "recipe.yaml").write_text("data:\n  val_size: 0\nbase:\n  device: cpu\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "load_model", refuse)
    return tmp_path


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


def mended(case: Impossible, error: dict[str, Any]) -> list[str]:
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


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_it_is_refused_at_once_and_the_fix_is_one(
    case: Impossible, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
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


def test_the_harness_sees_a_model_being_loaded(place: Path) -> None:
    """Otherwise nothing would show that a refusal comes before it."""
    assert passes(place, ["model.path=llama", "data.dataset=chats.jsonl"])
    assert (place / "runs" / "recipe" / "recipe.yaml").is_file()


def test_the_table_is_large_and_its_names_differ() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 40
    print(f"{len(CASES)}/{len(CASES)} impossible combinations refused")


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
