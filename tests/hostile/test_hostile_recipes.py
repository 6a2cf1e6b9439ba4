"""Recipes that are hostile, huge, contradictory or written for another tool: one clear error, or a defined meaning."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from whet.base.errors import UserError
from whet.recipe import parse, to_tree
from whet.spelling.problems import RecipeProblems
from whet.spelling.unneeded import NOT_THERE, REASONS

TOKEN = "hf_" + "aB3dE5gH7jK9mN1pQ2rS4tU6vW8xY0z"
MERGES = "a: &a {k: v}\n" + "".join(
    f"b{n}: &b{n} {{<<: [{', '.join([f'*b{n - 1}' if n else '*a'] * 9)}]}}\n" for n in range(9)
)
# name: the recipe as bytes or text, and words that the one error has to hold.
REFUSED: dict[str, tuple[str | bytes, tuple[str, ...]]] = {
    "empty": ("", ("says nothing", "an empty file")),
    "blank": (" \n\n", ("says nothing",)),
    "comments": ("# one\n# two\n", ("says nothing", "nothing but comments")),
    "byte_order_mark": ("\ufeff", ("says nothing",)),
    "null": ("null\n", ("says nothing",)),
    "braces": ("{}\n", ("says nothing",)),
    "end_marks": ("---\n...\n", ("says nothing",)),
    "huge_comment": ("# " + "x" * 5_000_000 + "\ntrain: {seed: 1}\n", ("too large to be a recipe",)),
    "huge_value": ("output_dir: " + "x" * 1_000_000 + "\n", ("too large",)),
    "many_values": ("data: {dataset: [" + "a, " * 20_000 + "a]}\n", ("over 10000 values",)),
    "many_lines": ("#\n" * 50_000 + "train: {seed: 1}\n", ("over 10000 values",)),
    "anchors": ("a: &a [1,1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
                "d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: [*d,*d,*d,*d,*d,*d,*d,*d,*d]\n", ("over 10000 values",)),
    "anchored_text": ("a: &a '" + "x" * 100_000 + "'\nb: [" + ", ".join(["*a"] * 5000) + "]\n", ("over 10000 values",)),
    "anchored_itself": ("train: &t\n  seed: *t\n", ("field train.seed",)),
    "long_key": ("x" * 3000 + ": 1\n", ("not valid YAML",)),
    "long_key_of_many": ("x" * 1000 + ": [" + "1, " * 3000 + "1]\n", ("key is too long",)),
    "deep_flow": ("train: " + "{a: " * 40 + "1" + "}" * 40 + "\n", ("nested too deeply",)),
    "deep_blocks": ("".join("  " * n + "a:\n" for n in range(200)), ("nested too deeply",)),
    "deep_lists": ("train: " + "[" * 5000 + "\n", ("nested too deeply",)),
    "nul": (b"train:\n  seed: 1\0\n", ("not valid YAML",)),
    "latin": (b"output_dir: caf\xe9\n", ("not UTF-8",)),
    "utf16": ("train: {seed: 1}".encode("utf-16"), ("not UTF-8",)),
    "escape_as_key": ("'\\x1b[2J': 1\n".replace("'", '"'), ("no such setting", "␛")),
    "turned_key": ('"train\\u202eseed": 1\n', ("no such setting", "⟨U+202E⟩")),
    "python_tag": ("train: !!python/object/apply:os.system [id]\n", ("the tag",)),
    "binary_tag": ("output_dir: !!binary aGk=\n", ("field output_dir",)),
    "set_tag": ("data: {dataset: !!set {a, b}}\n", ("field data.dataset",)),
    "merged_unknown": ("usual: &u {seed: 1}\ntrain: {<<: *u}\n", ("no such setting", "usual")),
    "merge_of_nothing": ("train: {<<: 3}\n", ("not valid YAML",)),
    "duplicate": ("train: {seed: 1, seed: 2}\n", ("duplicate key",)),
    "two_documents": ("train: {seed: 1}\n---\ntrain: {seed: 2}\n", ("another document",)),
    "number_of_digits": ("train: {seed: " + "9" * 6000 + "}\n", ("cannot be read",)),
    "infinite": ("train: {learning_rate: .inf}\n", ("finite",)),
    "not_a_number": ("train: {warmup_ratio: .nan}\n", ("finite",)),
    "epochs_without_end": ("train: {num_train_epochs: 1e18}\n", ("field train.num_train_epochs", "1000000")),
    "steps_without_end": ("train: {max_steps: 100000000000000000000}\n", ("field train.max_steps",)),
    "negative_steps": ("train: {max_steps: -5}\n", ("field train.max_steps",)),
    "negative_warmup": ("train: {warmup_steps: -1}\n", ("field train.warmup_steps",)),
    "huge_batch": ("train: {per_device_train_batch_size: 10000000000000}\n", ("per_device_train_batch_size",)),
    "date": ("output_dir: 2026-01-01\n", ("field output_dir", "date")),
    "octal": ("train: {seed: 0o7x}\n", ("field train.seed",)),
    "yes": ("train: {load_best_model_at_end: yes}\n", ("valid boolean",)),
    "list_of_lists": ("data: {dataset: [[a.jsonl]]}\n", ("field data.dataset",)),
    "mapping_for_text": ("model: {path: {name: a}}\n", ("field model.path",)),
    "text_for_section": ("train: fast\n", ("field train",)),
    "list_for_section": ("train: [1]\n", ("field train",)),
    "empty_path": ("model: {path: ''}\n", ("the name is empty",)),
    "dpo": ("method: dpo\n", ("preference learning is not there yet", "data.preference=chosen")),
    "orpo": ("rl: orpo\n", ("preference learning is not there yet",)),
    "stage_dpo": ("stage: dpo\n", ("preference learning is not there yet",)),
    "stage_rm": ("stage: rm\n", ("preference learning is not there yet",)),
    "grpo": ("rlhf_type: grpo\n", ("preference learning is not there yet",)),
    "token_field": (f"hf_token: {TOKEN}\n", ("holds no secrets", "HF_TOKEN")),
    "api_key": ("api_key: sk-0123456789abcdef0123\n", ("holds no secrets",)),
    "secret_metric": (f"eval: {{metrics: [{TOKEN}]}}\n", ("holds no secrets", "[SECRET]")),
    "secret_path": (f"model: {{path: {TOKEN}}}\n", ("holds no secrets", "[SECRET]")),
    "secret_in_address": (f"data: {{dataset: 'https://me:{TOKEN}@host/x.jsonl'}}\n", ("holds no secrets",)),
    "password_in_address": ("data: {dataset: 'https://me:hunter2@host/x.jsonl'}\n", ("holds no secrets",)),
    "secret_in_query": ("data: {dataset: 'https://host/x.jsonl?token=abcdef123'}\n", ("holds no secrets",)),
    "secret_key": (f"{TOKEN}: 1\n", ("holds no secrets",)),
    "secret_column": (f"data: {{columns: {{prompt: {TOKEN}}}}}\n", ("holds no secrets",)),
    "secret_output": (f"output_dir: runs/{TOKEN}\n", ("holds no secrets",)),
    "neftune": ("neftune_noise_alpha: 5\n", ("would change what is learned",)),
    "smoothing": ("label_smoothing_factor: 0.1\n", ("would change what is learned",)),
    "masked_words": ("mlm: true\n", ("would change what is learned",)),
    "fp4": ("bnb_4bit_quant_type: fp4\n", ("stores 4 bits as nf4",)),
    "odd_type": ("torch_dtype: int4\n", ("no type to compute with",)),
    "odd_bits": ("quantization_bit: 3\n", ("no such setting",)),
    "twice_by_alias": ("lora_r: 8\nmethod: {r: 16}\n", ("same setting twice",)),
    "twice_by_wrapper": ("lora_config: {r: 8}\nr: 16\n", ("same setting twice",)),
    "two_storages": ("load_in_4bit: true\nload_in_8bit: true\n", ("same setting twice",)),
    "axolotl_prompter": ("datasets: [{path: a.jsonl, type: {system_prompt: x}}]\n", ("description is not understood",)),
    "axolotl_odd": ("datasets: [{path: a.jsonl, magic: 1}]\n", ("description is not understood", "magic")),
    "axolotl_no_path": ("datasets: [{type: alpaca}]\n", ("description is not understood",)),
    "peft_left_out": ("method: poly\n", ("method",)),
    "misspelt": ("train: {lerning_rate: 1}\n", ("write train.learning_rate",)),
    "in_another_section": ("data: {lora_r: 0}\n", ("field method.r", "greater than or equal to 1")),
}  # fmt: skip
OVERRIDES: dict[str, tuple[str, tuple[str, ...]]] = {
    "no_value": ("train.seed", ("not an override",)), "no_key": ("=3", ("not an override",)),
    "long_path": ("a" * 3000 + "=1", ("no such setting",)), "deep_path": (".".join("a" * 3000) + "=1", ("no such",)),
    "long_value": ("output_dir=" + "x" * 300_000, ("too large for a setting",)),
    "many_values": ("data.dataset=[" + "a," * 20_000 + "a]", ("too large for a setting",)),
    "anchors": ("data.dataset=[&a [1,1], *a, *a, *b]", ("not valid YAML",)),
    "escape": ("train.\x1b[2J=1", ("no such setting", "␛")), "tag": ("train.seed=!!python/name:os.system x", ("tag",)),
    "secret": (f"model.path={TOKEN}", ("holds no secrets", "[SECRET]")), "open": ("train.seed={a", ("not valid YAML",)),
    "empty_part": ("train..seed=1", ("no such setting",)), "dot": (".=1", ("no such setting",)),
    "endless": ("train.num_train_epochs=1e18", ("field train.num_train_epochs",)),
    "dpo": ("method=dpo", ("preference learning is not there yet",)), "nan": ("train.learning_rate=.nan", ("finite",)),
}  # fmt: skip
# name: a recipe of another tool, and what it means here.
MEANT: dict[str, tuple[str, dict[str, Any]]] = {
    "no_end": ("max_steps: -1\nnum_train_epochs: 2\n", {"train.max_steps": None, "train.num_train_epochs": 2.0}),
    "warmup": ("warmup_steps: 5\n", {"train.warmup_steps": 5}), "no_warmup": ("warmup_steps: 0\n", {"train.warmup_steps": 0}),
    "warmup_share": ("warmup_steps: 0.1\n", {"train.warmup_ratio": 0.1, "train.warmup_steps": None}),
    "bits": ("load_in_8bit: true\n", {"base.storage": "int8"}), "eight": ("quantization_bit: 8\n", {"base.storage": "int8"}),
    "not_quantised": ("load_in_4bit: false\nbnb_4bit_quant_type: nf4\n", {"base.storage": None}),
    "dtype": ("bnb_4bit_compute_dtype: torch.bfloat16\n", {"base.compute": "bf16"}),
    "either": ("fp16: false\nbf16: true\ntorch_dtype: float16\n", {"base.compute": "bf16"}),
    "unsloth_dtype": ("dtype: null\nfull_finetuning: true\n", {"base.compute": None, "method.name": "full"}),
    "wandb": ("report_to: wandb\n", {"train.report_to": []}), "none": ("report_to: none\n", {"train.report_to": []}),
    "both": ("report_to: [wandb, tensorboard]\n", {"train.report_to": ["tensorboard"]}),
    "field": ("dataset_text_field: body\n", {"data.columns": {"text": "body"}}),
    "state": ("random_state: 3407\n", {"train.seed": 3407}),
    "two_seeds": ("seed: 1\nrandom_state: 3407\n", {"train.seed": 1}),
    "peft": ("peft_type: LORA\nr: 8\nbias: none\ntask_type: CAUSAL_LM\n", {"method.name": "lora", "method.r": 8}),
    "wrapped": ("training_arguments: {learning_rate: 1e-4}\npeft_config: {r: 4}\n",
                {"train.learning_rate": 1e-4, "method.r": 4}),
    "prompt": ("method: prompt_tuning\nnum_virtual_tokens: 20\n", {"method.name": "prompt"}),
    "axolotl": ("datasets:\n- {path: a.jsonl, type: alpaca}\n- {path: b.jsonl, type: chat_template}\n",
                {"data.dataset": ["a.jsonl", "b.jsonl"]}),
    "axolotl_hub": ("datasets: [{path: someone/rows, type: alpaca, split: train}]\n",
                    {"data.dataset": "hub:someone/rows#train"}),
    "axolotl_field": ("datasets: [{path: a.jsonl, type: completion, field: body}]\n", {"data.columns": {"text": "body"}}),
    "factory": ("stage: sft\ndo_train: true\ntemplate: qwen\nplot_loss: true\noverwrite_output_dir: true\n"
                "finetuning_type: lora\nlora_target: all\ncutoff_len: 512\npreprocessing_num_workers: 2\n",
                {"method.target_modules": "all-linear", "data.max_length": 512, "data.num_proc": 2}),
    "unsloth_template": ("chat_template: qwen-3\n", {"model.chat_template": None}),
    "own_template": ("template: chatml\n", {"model.chat_template": "chatml"}),
    "responses": ("train_on_responses_only: true\n", {"data.loss_on": "assistant"}),
    "merges": ("train: {<<: [{seed: 3}]}\n", {"train.seed": 3}),
}  # fmt: skip


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found[prefix + key] = value
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
    return found


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_recipe_is_refused_at_once(name: str, tmp_path: Path) -> None:
    text, mentions = REFUSED[name]
    path = tmp_path / "bad.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    start = time.process_time()
    with pytest.raises(UserError) as caught:
        parse(path)
    assert time.process_time() - start < 10
    message = str(caught.value)
    assert all(words in message for words in mentions), message
    assert TOKEN not in message
    assert "hunter2" not in message
    assert caught.value.fix or isinstance(caught.value, RecipeProblems)
    assert len(message) < 3000
    assert TOKEN not in str(caught.value.as_dict())


@pytest.mark.parametrize("name", OVERRIDES)
def test_a_hostile_override_is_refused(name: str) -> None:
    override, mentions = OVERRIDES[name]
    with pytest.raises(UserError) as caught:
        parse(None, [override])
    message = str(caught.value)
    assert all(words in message for words in mentions), message
    assert TOKEN not in message
    assert len(message) < 2000


@pytest.mark.parametrize("name", MEANT)
def test_a_recipe_of_another_tool_means_what_it_says(name: str, tmp_path: Path) -> None:
    text, meant = MEANT[name]
    path = tmp_path / "peer.yaml"
    path.write_text(text)
    parsed = parse(path)
    found = flat(to_tree(parsed.recipe))
    assert {key: found[key] for key in meant} == meant
    assert parsed.notes or name == "merges", "what is read otherwise than it is written is said"


def test_merges_of_merges_end(tmp_path: Path) -> None:
    path = tmp_path / "merges.yaml"
    path.write_text(MERGES)
    with pytest.raises(UserError, match="no such setting"):
        parse(path)


def test_a_special_file_is_no_recipe(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.yaml")
    for path in ("/dev/zero", tmp_path / "pipe.yaml", tmp_path):
        with pytest.raises(UserError, match="no such recipe"):
            parse(path)


def test_all_problems_are_said_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("trian: {seed: 1}\nmethod: dpo\ntrain: {seed: x, zz: 1}\nhf_token: a\ndata: {val_size: -1}\n")
    with pytest.raises(RecipeProblems) as caught:
        parse(path, ["eval.max_rows=0"])
    assert {one.field for one in caught.value.problems} == {
        "trian", "method.name", "train.seed", "train.zz", "hf_token", "data.val_size", "eval.max_rows",
    }  # fmt: skip
    rows = [one.row for one in caught.value.problems if one.row is not None]
    assert rows == sorted(rows)
    assert str(caught.value).count("fix:") == 7
    assert len(caught.value.as_dict()["problems"]) == 7


@pytest.mark.parametrize("name", sorted(REASONS))
def test_a_name_that_is_not_needed_is_ignored_and_said(name: str, tmp_path: Path) -> None:
    path = tmp_path / "peer.yaml"
    path.write_text(f"{name}: true\n")
    parsed = parse(path)
    assert parsed.recipe == parse(None, ["output_dir=runs/peer"]).recipe
    assert [note for note in parsed.notes if note.startswith(f"{name}: ignored, ")]


def test_what_would_change_the_learning_is_refused_unless_it_is_off(tmp_path: Path) -> None:
    path = tmp_path / "peer.yaml"
    for name in NOT_THERE:
        for off in ("null", "false", "0"):
            path.write_text(f"{name}: {off}\n")
            assert parse(path).notes == [f"{name}: ignored, it is off"]
        path.write_text(f"{name}: 0.37\n")
        with pytest.raises(UserError, match="would change what is learned"):
            parse(path)


# The argument names of the scripts in five Korean articles about fine-tuning, with a value of the kind that they have.
OF_ARTICLES: dict[str, Any] = {
    "model_name": "m", "model_name_or_path": "m", "model_id": "m", "tokenizer_name_or_path": "t", "torch_dtype": "torch.bfloat16",
    "device_map": "auto", "trust_remote_code": True, "use_fast": True, "use_cache": False, "num_labels": 2, "load_in_4bit": True,
    "load_in_8bit": False, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "torch.bfloat16",
    "r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "bias": "none", "task_type": "TaskType.CAUSAL_LM", "target_modules": ["q_proj"],
    "inference_mode": False, "use_gradient_checkpointing": "unsloth", "random_state": 2025, "use_rslora": False, "loftq_config": None,
    "max_seq_length": 2048, "dtype": None, "full_finetuning": False, "output_dir": "out", "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4, "gradient_accumulation_steps": 4, "num_train_epochs": 3, "max_steps": 60, "warmup_steps": 5,
    "warmup_ratio": 0.03, "learning_rate": 2e-4, "weight_decay": 0.01, "lr_scheduler_type": "cosine", "optim": "paged_adamw_8bit",
    "max_grad_norm": 0.3, "logging_steps": 10, "save_steps": 100, "save_strategy": "epoch", "save_total_limit": 2,
    "evaluation_strategy": "epoch", "eval_strategy": "steps", "eval_steps": 100, "fp16": True, "bf16": True, "report_to": "none",
    "gradient_checkpointing": True, "seed": 42, "packing": False, "dataset_text_field": "text", "dataset_num_proc": 2,
    "group_by_length": True, "load_best_model_at_end": True, "remove_unused_columns": False, "test_size": 0.1,
    "fsdp": "full_shard auto_wrap", "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer", "padding_side": "right",
    "pad_token": "</s>", "max_length": 256, "padding": "max_length", "truncation": True, "instruction_part": "user",
    "response_part": "assistant", "chat_template": "qwen-3", "do_sample": True, "temperature": 0.1, "top_p": 0.9,
    "repetition_penalty": 1.1, "max_new_tokens": 128, "project": "tuning", "train_dataset": "a.jsonl", "eval_dataset": "b.jsonl",
    "data_collator": None, "mlm": False, "run_name": "a", "push_to_hub": False,
}  # fmt: skip


@pytest.mark.parametrize("name", OF_ARTICLES)
def test_an_argument_of_the_articles_works_in_a_recipe(name: str, tmp_path: Path) -> None:
    import json

    path = tmp_path / "article.yaml"
    path.write_text(f"{name}: {json.dumps(OF_ARTICLES[name])}\n")
    assert parse(path).recipe


def test_whole_scripts_of_the_articles_work_together(tmp_path: Path) -> None:
    path = tmp_path / "article.yaml"
    left_out = {"model_name", "model_id", "max_length", "eval_strategy"}
    path.write_text("".join(f"{k}: {v!r}\n".replace("None", "null").replace("True", "true").replace("False", "false")
                            for k, v in OF_ARTICLES.items() if k not in left_out))  # fmt: skip
    parsed = parse(path)
    assert parsed.recipe.train.seed == 42
    assert parsed.recipe.base.storage == "nf4"
    assert any("without effect" in note for note in parsed.notes), "max_steps and num_train_epochs"


@pytest.mark.parametrize(("options", "field"), [
    (["train.max_steps=4", "train.num_train_epochs=3"], "train.num_train_epochs"),
    (["train.warmup_steps=4", "train.warmup_ratio=0.1"], "train.warmup_ratio"),
    (["model.path=builtin:tiny", "model.revision=v2"], "model.revision"),
    (["data.replay=0.2"], "data.replay"), (["data.leakage=drop", "data.val_size=0"], "data.leakage"),
    (["data.val_size=0", "train.load_best_model_at_end=true"], "train.load_best_model_at_end"),
])  # fmt: skip
def test_a_setting_without_effect_is_said(options: list[str], field: str) -> None:
    assert [note for note in parse(None, options).notes if note.startswith(f"{field}=") and "without effect" in note]
