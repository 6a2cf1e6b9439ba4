"""Peers' names for our settings: each leads to a real one, whole recipes mean the same, nothing is guessed."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
from test_recipe import flat, read, value

from whet.base.errors import UserError
from whet.methods.all import METHODS
from whet.recipe import parse, to_tree, to_yaml
from whet.spelling import aliases

KNOWN = {path for name in METHODS for path in flat(to_tree(parse(None, [f"method={name}"]).recipe))}
KNOWN |= {"method.rank_pattern", "method.alpha_pattern"}
SAMPLES = {
    "method.name": "lora", "model.adapter": "a",
    "method.target_modules": ["q_proj"], "data.columns": {"prompt": "q"}, "train.optim": "sgd",
    "train.lr_scheduler_type": "linear", "data.dataset": "a.jsonl", "data.eval_dataset": "b.jsonl",
    "model.chat_template": "chatml", "model.tokenizer": "t", "model.path": "m", "data.max_length": 64,
    "base.double_quant": True, "data.packing": True, "data.padding_free": False, "base.keep_transposed": True,
    "train.gradient_checkpointing": True, "train.activation_offload": True, "train.compile": True,
    "train.cuda_graphs": True, "model.task": "seq2seq", "model.revision": "main", "data.test_dataset": "c.jsonl",
    "method.bias": "all", "method.modules_to_save": ["lm_head"], "method.init_lora_weights": "pissa",
    "method.layers_to_transform": [1], "method.rank_pattern": {"q": 3}, "method.alpha_pattern": {"q": 3},
    "method.exclude_modules": ["q"], "method.trainable_token_indices": [3], "train.report_to": ["tensorboard"],
    "train.adam_beta1": 0.5, "train.adam_beta2": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("table", [aliases.NAMES, aliases.LOCAL], ids=["NAMES", "LOCAL"])
def test_every_alias_leads_to_a_real_setting(table: dict[str, str], tmp_path: Path) -> None:
    for alias, path in table.items():
        assert path in KNOWN, alias
        sample = SAMPLES.get(path, 3 if "ratio" not in path and "dropout" not in path else 0.5)
        sample = sample if not isinstance(value(parse(None).recipe, path), bool) else True
        parsed = read(json.dumps({alias: sample}), tmp_path)
        assert value(parsed.recipe, path) == sample, alias
        assert any(note.startswith(alias.rpartition(".")[2]) for note in parsed.notes) == (alias != path), alias


PEERS = [
    (
        "Axolotl",
        """
        base_model: Qwen/Qwen3-0.6B
        adapter: qlora
        datasets: [a.jsonl, b.jsonl]
        val_set_size: 0.1
        sequence_len: 2048
        sample_packing: true
        lora_r: 32
        lora_alpha: 16
        lora_dropout: 0.05
        lora_target_linear: true
        micro_batch_size: 2
        gradient_accumulation_steps: 4
        activation_offloading: hidden_states
        tiled_mlp: true
        torch_compile: auto
        num_epochs: 3
        optimizer: adamw_bnb_8bit
        lr_scheduler: cosine
        learning_rate: 2e-4
        train_on_inputs: false
        bf16: auto
        load_in_4bit: true
        """,
        {"model.path": "Qwen/Qwen3-0.6B", "method.name": "lora", "base.storage": "nf4", "data.val_size": 0.1,
         "data.dataset": ["a.jsonl", "b.jsonl"], "data.max_length": 2048, "data.packing": True, "method.r": 32,
         "method.lora_alpha": 16.0, "method.lora_dropout": 0.05, "method.target_modules": "all-linear",
         "train.per_device_train_batch_size": 2, "train.gradient_accumulation_steps": 4, "train.num_train_epochs": 3.0,
         "train.optim": "adamw_8bit", "train.learning_rate": 2e-4, "data.loss_on": "assistant", "base.compute": None,
         "train.activation_offload": True, "train.tile_mlp": 4096, "train.compile": None},
    ),
    (
        "LLaMA-Factory",
        """
        model_name_or_path: ./model
        finetuning_type: lora
        lora_rank: 8
        lora_target: q_proj,v_proj
        dataset: a.json
        template: chatml
        cutoff_len: 1024
        max_samples: 1000
        val_size: 0.05
        quantization_bit: 4
        double_quantization: false
        per_device_train_batch_size: 1
        train_on_prompt: true
        bf16: true
        lr_scheduler_type: constant_with_warmup
        output_dir: saves/a
        """,
        {"model.path": "./model", "method.name": "lora", "method.r": 8, "method.target_modules": ["q_proj", "v_proj"],
         "data.dataset": "a.json", "model.chat_template": "chatml", "data.max_length": 1024, "data.max_rows": 1000,
         "data.val_size": 0.05, "base.storage": "nf4", "base.double_quant": False, "base.compute": "bf16",
         "data.loss_on": "all", "train.lr_scheduler_type": "constant", "output_dir": "saves/a"},
    ),
    (
        "TRL",
        """
        model_name_or_path: m
        dataset_name: d.jsonl
        learning_rate: 2.0e-5
        max_length: 512
        packing: false
        padding_free: true
        assistant_only_loss: true
        lora_target_modules: [q_proj]
        use_rslora: true
        warmup_ratio: 0.1
        optim: adamw_torch_fused
        activation_offloading: true
        torch_compile: true
        """,
        {"model.path": "m", "data.dataset": "d.jsonl", "train.learning_rate": 2e-5, "data.max_length": 512,
         "data.packing": False, "data.padding_free": True, "data.loss_on": "assistant",
         "method.target_modules": ["q_proj"], "method.use_rslora": True, "train.optim": "adamw",
         "train.activation_offload": True, "train.compile": True},
    ),
    (
        "Unsloth",
        """
        model: {model_name_or_path: m, max_seq_length: 2048, load_in_4bit: true}
        method: {r: 16, alpha: 32, dropout: 0, target_modules: all}
        train: {optimizer: paged_adamw8bit, epochs: 1, batch_size: 2, seed: 3407, lr_scheduler_type: wsd,
                use_gradient_checkpointing: unsloth}
        eval: {batch_size: 4, dataset: held.jsonl}
        """,
        {"data.max_length": 2048, "base.storage": "nf4", "method.r": 16, "method.lora_alpha": 32.0,
         "method.target_modules": "all-linear", "train.optim": "paged_adamw_8bit", "train.num_train_epochs": 1.0,
         "train.per_device_train_batch_size": 2, "train.seed": 3407, "eval.per_device_eval_batch_size": 4,
         "train.lr_scheduler_type": "warmup_stable_decay", "data.eval_dataset": "held.jsonl",
         "train.gradient_checkpointing": True, "train.activation_offload": True},
    ),
    (
        "mlx-lm",
        """
        model_id: m
        fine_tune_type: full
        iters: 600
        mask_prompt: false
        grad_checkpoint: true
        max_seq_length: 64
        """,
        {"model.path": "m", "method.name": "full", "train.max_steps": 600, "data.loss_on": "all",
         "train.gradient_checkpointing": True, "data.max_length": 64},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("text", "meant"), [peer[1:] for peer in PEERS], ids=[peer[0] for peer in PEERS])
def test_a_recipe_of_a_peer_means_the_same_here(text: str, meant: dict[str, Any], tmp_path: Path) -> None:
    parsed = read(textwrap.dedent(text), tmp_path)
    assert {path: value(parsed.recipe, path) for path in meant} == meant
    assert parsed.notes
    assert all("read as" in note for note in parsed.notes)
    again = read(to_yaml(parsed.recipe), tmp_path)
    assert (again.recipe, again.notes) == (parsed.recipe, [])


def test_a_word_is_never_guessed_and_never_taken_twice(tmp_path: Path) -> None:
    for text in ("model: {dropout: 0.1}", "eval: {seed: 3}", "data: {rank: 3}", "train: {alpha: 3}", "quant_bits: 3"):
        with pytest.raises(UserError, match="no such setting"):
            read(text, tmp_path)
    with pytest.raises(UserError, match="twice") as caught:
        read("learning_rate: 1e-4\ntrain:\n  lr: 2e-4\n", tmp_path)
    assert (caught.value.row, caught.value.field) == (3, "train.learning_rate")
    assert read("adapter: qlora\nload_in_4bit: true\n", tmp_path).recipe.base.storage == "nf4", "twice the same is fine"
    with pytest.raises(UserError, match=r"row 2, field method\.r"):
        read("method: lora\nlora_r: many\n", tmp_path)
    assert read("lora_r: 1\n", tmp_path).notes == ["lora_r=1: read as method.r=1"]
