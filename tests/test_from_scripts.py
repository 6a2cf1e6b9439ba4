"""The recipes of docs/from-scripts.md say what the scripts say, and its Korean twin shows the same ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from whet.recipe import parse, to_tree

DOCS = Path(__file__).parents[1] / "docs"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# What the arguments of each script mean, in whet's names.
MEANT: dict[str, dict[str, Any]] = {
    "runs/lora": {
        "model.path": "meta-llama/Llama-2-7b-hf", "model.task": "causal", "model.chat_template": "alpaca",
        "base.compute": "bf16", "method.name": "lora", "method.r": 16, "method.lora_alpha": 32,
        "method.lora_dropout": 0.05, "method.bias": "none", "method.target_modules": ALL,
        "data.dataset": "tickets.jsonl",
    },
    "runs/qlora": {
        "base.storage": "nf4", "base.compute": "bf16", "base.double_quant": True, "method.r": 16,
        "data.max_length": 2048, "train.num_train_epochs": 3, "train.per_device_train_batch_size": 4,
        "train.gradient_accumulation_steps": 4, "train.learning_rate": 2e-4, "train.weight_decay": 0.01,
        "train.warmup_ratio": 0.03, "train.lr_scheduler_type": "cosine", "train.logging_steps": 10,
        "train.save_steps": 100, "train.save_total_limit": 2, "train.optim": "paged_adamw_8bit",
        "train.gradient_checkpointing": True, "train.max_grad_norm": 0.3, "train.report_to": [],
    },
    "runs/qwen3": {
        "model.path": "unsloth/Qwen3-4B-unsloth-bnb-4bit", "data.max_length": 2048, "base.storage": "nf4",
        "method.r": 8, "method.lora_alpha": 8, "method.lora_dropout": 0, "method.target_modules": ALL,
        "train.gradient_checkpointing": True, "data.dataset": "hub:mlabonne/FineTome-100k", "data.packing": False,
        "train.per_device_train_batch_size": 2, "train.gradient_accumulation_steps": 4, "train.warmup_steps": 5,
        "train.max_steps": 60, "train.learning_rate": 2e-4, "train.logging_steps": 1, "train.optim": "adamw_8bit",
        "train.weight_decay": 0.01, "train.lr_scheduler_type": "linear", "train.seed": 3407,
    },
    "runs/imdb": {
        "model.path": "distilbert-base-uncased", "model.task": None, "method.target_modules": [
            "q_lin", "k_lin", "v_lin", "out_lin"],
        "method.lora_dropout": 0.1, "data.dataset": "reviews.jsonl", "data.eval_dataset": "reviews_test.jsonl",
        "data.max_length": 256, "train.per_device_train_batch_size": 16, "eval.per_device_eval_batch_size": 32,
        "train.gradient_accumulation_steps": 2, "train.num_train_epochs": 2, "base.compute": "bf16",
    },
    "runs/gpt2": {
        "model.path": "gpt2", "method.target_modules": ["c_attn", "c_proj"], "train.per_device_train_batch_size": 8,
        "train.gradient_accumulation_steps": 4, "train.num_train_epochs": 1, "train.save_steps": 200,
    },
    "runs/prefix": {"method.name": "prefix", "method.num_virtual_tokens": 20},
    "runs/prompt": {
        "method.name": "prompt", "method.num_virtual_tokens": 20, "method.prompt_tuning_init": "TEXT",
        "method.prompt_tuning_init_text": "Classify the following text:",
    },
    "runs/ia3": {
        "method.name": "ia3", "method.target_modules": ["k_proj", "v_proj", "down_proj"],
        "method.feedforward_modules": ["down_proj"],
    },
}  # fmt: skip


def recipes(page: str) -> dict[str, str]:
    """The recipes that a page shows, by their output directory."""
    shown = re.findall(r"(?ms)^```yaml\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"))
    return {re.findall(r"(?m)^output_dir: (\S+)$", text)[0]: text for text in shown}


@pytest.mark.parametrize("name", MEANT)
def test_a_recipe_says_what_the_script_says(name: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipes("from-scripts.md")[name], encoding="utf-8")
    tree = to_tree(parse(path).recipe)
    for setting, value in MEANT[name].items():
        section, _, key = setting.partition(".")
        part = tree[section] if key in tree[section] else tree[section]["options"]
        assert part[key] == value, setting


def test_every_recipe_is_compared() -> None:
    assert set(recipes("from-scripts.md")) == set(MEANT)


def test_the_korean_page_shows_the_same_recipes_and_commands() -> None:
    english, korean = ((DOCS / page).read_text(encoding="utf-8") for page in ("from-scripts.md", "from-scripts.ko.md"))
    assert recipes("from-scripts.md") == recipes("from-scripts.ko.md")
    blocks = re.compile(r"(?ms)^```\w*\n(.*?)^```$")
    assert blocks.findall(english) == blocks.findall(korean)
    assert len(re.findall("(?m)^## ", english)) == len(re.findall("(?m)^## ", korean))
