"""Rewrite and report other tools' names for our settings, so that their recipes can be used here.

Sources: the option names of Hugging Face's TrainingArguments, PEFT, TRL, Axolotl, LLaMA-Factory, ms-swift, LitGPT,
mlx-lm, torchtune, Unsloth and Megatron-LM. A name that means the opposite (`train_on_inputs`) is rewritten with the
opposite value; one that would mean something else here is refused, never guessed.
"""

from __future__ import annotations

import re
from typing import Any

from whet.base.config import field_docs
from whet.base.errors import UserError
from whet.sections import SECTION_CLASSES, SECTIONS
from whet.settings import TILE_TOKENS

# A peer's name, alone or inside a section, to ours.
NAMES = {
    "model_name_or_path": "model.path", "base_model": "model.path", "model_id": "model.path",
    "name_or_path": "model.path", "task_type": "model.task", "problem_type": "model.task", "task": "model.task",
    "tokenizer_name_or_path": "model.tokenizer", "template": "model.chat_template",
    "bnb_4bit_use_double_quant": "base.double_quant", "use_double_quant": "base.double_quant",
    "double_quantization": "base.double_quant", "keep_fp8_transpose_cache": "base.keep_transposed",
    "adapter_name_or_path": "model.adapter", "lora_model_dir": "model.adapter",
    "peft": "method.name", "adapter": "method.name", "finetuning_type": "method.name", "tuner_type": "method.name",
    "fine_tune_type": "method.name",
    "lora_r": "method.r", "lora_rank": "method.r", "rank": "method.r", "alpha": "method.lora_alpha",
    "lora_alpha": "method.lora_alpha", "lora_dropout": "method.lora_dropout", "dropout": "method.lora_dropout",
    "target_modules": "method.target_modules", "lora_target_modules": "method.target_modules",
    "lora_target": "method.target_modules", "use_rslora": "method.use_rslora", "peft_use_rslora": "method.use_rslora",
    "dataset_name": "data.dataset", "datasets": "data.dataset", "path": "data.dataset", "train_file": "data.dataset",
    "dataset_path": "data.dataset", "dataset": "data.dataset", "val_size": "data.val_size",
    "val_set_size": "data.val_size", "split_dataset_ratio": "data.val_size", "validation_size": "data.val_size",
    "val_split": "data.val_size", "eval_file": "data.eval_dataset", "eval_dataset": "data.eval_dataset",
    "max_length": "data.max_length", "max_seq_length": "data.max_length", "max_seq_len": "data.max_length",
    "sequence_len": "data.max_length", "cutoff_len": "data.max_length", "model_max_length": "data.max_length",
    "seq_length": "data.max_length", "packing": "data.packing", "sample_packing": "data.packing",
    "neat_packing": "data.packing", "packed": "data.packing", "pack": "data.packing",
    "padding_free": "data.padding_free", "max_samples": "data.max_rows", "columns": "data.columns",
    "micro_batch_size": "train.per_device_train_batch_size", "batch_size": "train.per_device_train_batch_size",
    "local_batch_size": "train.per_device_train_batch_size",
    "per_device_train_batch_size": "train.per_device_train_batch_size",
    "grad_accumulation": "train.gradient_accumulation_steps",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "num_train_epochs": "train.num_train_epochs", "num_epochs": "train.num_train_epochs",
    "epochs": "train.num_train_epochs", "max_steps": "train.max_steps", "iters": "train.max_steps",
    "learning_rate": "train.learning_rate", "lr": "train.learning_rate",
    "lr_scheduler": "train.lr_scheduler_type", "lr_scheduler_type": "train.lr_scheduler_type",
    "warmup_ratio": "train.warmup_ratio", "weight_decay": "train.weight_decay", "max_grad_norm": "train.max_grad_norm",
    "gradient_clipping": "train.max_grad_norm", "optim": "train.optim", "optimizer": "train.optim",
    "gradient_checkpointing": "train.gradient_checkpointing", "grad_checkpoint": "train.gradient_checkpointing",
    "enable_activation_checkpointing": "train.gradient_checkpointing",
    "use_gradient_checkpointing": "train.gradient_checkpointing",
    "activation_offloading": "train.activation_offload", "enable_activation_offloading": "train.activation_offload",
    "torch_compile": "train.compile", "enable_cuda_graph": "train.cuda_graphs",
    "eval_steps": "train.eval_steps", "save_steps": "train.save_steps", "save_total_limit": "train.save_total_limit",
    "logging_steps": "train.logging_steps", "seed": "train.seed",
    "load_best_model_at_end": "train.load_best_model_at_end",
    "early_stopping_patience": "train.early_stopping_patience",
    "early_stopping_steps": "train.early_stopping_patience",
    "max_new_tokens": "eval.max_new_tokens",
}  # fmt: skip

# Sections in which a short name keeps its section's meaning instead of the table's.
LOCAL = {
    "model.path": "model.path", "data.path": "data.dataset", "data.max_rows": "data.max_rows",
    "eval.max_rows": "eval.max_rows", "eval.batch_size": "eval.per_device_eval_batch_size",
    "per_device_eval_batch_size": "eval.per_device_eval_batch_size",
    "eval.dataset": "data.eval_dataset",
}  # fmt: skip

OPTIMISERS = {
    "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw", "adamw_bnb_8bit": "adamw_8bit",
    "adamw8bit": "adamw_8bit", "paged_adamw8bit": "paged_adamw_8bit",
}  # fmt: skip
# PEFT's and ms-swift's names of tasks, and transformers' of problems; a head for labels leaves the kind to the rows.
TASKS = {
    "causal_lm": "causal", "seq_2_seq_lm": "seq2seq", "seq2seq_lm": "seq2seq", "seq_cls": None,
    "sequence_classification": None, "text-classification": None, "single_label_classification": "classification",
    "multi_label_classification": "multi_label", "regression": "regression",
}  # fmt: skip
SCHEDULES = {"wsd": "warmup_stable_decay", "constant_with_warmup": "constant"}
SHORTHANDS = {"model": "path", "method": "name", "data": "dataset"}
TOP_LEVEL = (*SECTIONS, "output_dir")
# Words that mean something else in another section (model.dropout, eval.seed): no alias may move them from there.
AT_HOME = ("path", "rank", "alpha", "dropout", "seed", "columns", "max_length")

Rewritten = list[tuple[str, Any, str | None]]


def canonical_tree(
    tree: dict[str, Any], notes: list[str], file: str | None, lines: dict[str, int], bridged: bool = False
) -> dict[str, Any]:
    """The tree with other tools' names and shorthands rewritten to ours, each with a note. An empty section is left
    out.

    bridged: the method's options are PEFT's, whose names are left as they are. Raises UserError for a setting that is
    given twice, once under another name.
    """
    result: dict[str, Any] = {}
    said: dict[str, Any] = {}
    for key, value in tree.items():
        if key in SECTIONS and value is None:
            continue
        if key in SHORTHANDS and not isinstance(value, dict):
            value = {SHORTHANDS[key]: value}
        if isinstance(value, dict) and key in TOP_LEVEL:
            pairs = [(f"{key}.{name}", item) for name, item in value.items()]
            result.setdefault(key, {})
        else:
            pairs = [(key, value)]
        for path, item in pairs:
            line = lines.get(path, lines.get(key))
            theirs = bridged and path.startswith("method.") and path != "method.name"
            for new_path, new_value, note in [(path, item, None)] if theirs else canonical(path, item, file, line):
                if said.setdefault(new_path, new_value) != new_value:
                    raise UserError(
                        "the same setting twice, with two values", file=file, row=line, field=new_path,
                        found=f"{path}: {new_value}", expected=f"{said[new_path]}, as said before",
                        fix="remove one of them",
                    )  # fmt: skip
                if note:
                    notes.append(note)
                if line is not None:
                    lines.setdefault(new_path, line)
                _put(result, new_path.split("."), new_value)
    return result


def _put(tree: dict[str, Any], path: list[str], value: Any) -> None:
    for key in path[:-1]:
        if not isinstance(tree.get(key), dict):
            tree[key] = {}
        tree = tree[key]
    tree[path[-1]] = value


def canonical(path: str, value: Any, file: str | None, line: int | None) -> Rewritten:
    """Our dotted paths and values for a setting as written, each with a note if it was rewritten."""
    section, _, name = path.partition(".")
    inside = bool(name) and section in TOP_LEVEL
    word = name if inside else path
    turned = _task(word, value, file, line)
    turned = _turned(word, value, file, line) if turned is None else turned
    if turned is not None:
        return [(new, item, f"{word}: read as {new}={_shown(item)}") for new, item in turned]
    target = LOCAL.get(path) or (path if inside and _ours(path) else NAMES.get(word, path))
    if inside and word in AT_HOME and target.partition(".")[0] != section:
        target = path
    if target == "method.name" and value == "qlora":
        return [
            ("method.name", "lora", "qlora: read as method.name=lora with base.storage=nf4"),
            ("base.storage", "nf4", None),
        ]
    new_value = value
    if target == "train.optim" and isinstance(value, str):
        new_value = OPTIMISERS.get(value, value)
    if target == "train.lr_scheduler_type" and isinstance(value, str):
        new_value = SCHEDULES.get(value, value)
    if target == "method.target_modules" and value == "all":
        new_value = "all-linear"
    if target == "method.target_modules" and isinstance(value, str) and re.fullmatch(r"\w+(\s*,\s*\w+)+", value):
        new_value = [name.strip() for name in value.split(",")]
    changed = target != path or new_value != value
    note = f"{word}={_shown(value)}: read as {target}={_shown(new_value)}" if changed else None
    return [(target, new_value, note)]


def _task(word: str, value: Any, file: str | None, line: int | None) -> list[tuple[str, Any]] | None:
    """Another tool's name for the task, rewritten; labels are refused, since they come from the data."""
    if word in ("task_type", "problem_type", "task") and isinstance(value, str) and value.lower() in TASKS:
        return [("model.task", TASKS[value.lower()])]
    if word in ("num_labels", "id2label", "label2id"):
        raise UserError(
            "labels come from the data", file=file, row=line, field=word, found=_shown(value),
            expected="rows with text and label", fix="remove the line; whet data check shows the labels",
        )  # fmt: skip
    return None


def _turned(word: str, value: Any, file: str | None, line: int | None) -> list[tuple[str, Any]] | None:
    """Other tools' names whose value must be translated too, rewritten; None for any other name."""
    if word in ("load_in_4bit", "q_lora") and isinstance(value, bool):
        return [("base.storage", "nf4")] if value else []
    if word == "bnb_4bit_quant_type" and value == "nf4":
        return [("base.storage", "nf4")]
    if word in ("quantization_bit", "quant_bits") and value == 4:
        return [("base.storage", "nf4")]
    if word in ("train_on_inputs", "train_on_prompt") and isinstance(value, bool):
        return [("data.loss_on", "all" if value else "assistant")]
    if word in ("assistant_only_loss", "completion_only_loss", "mask_prompt") and isinstance(value, bool):
        return [("data.loss_on", "assistant" if value else "all")]
    if word == "lora_target_linear" and isinstance(value, bool):
        return [("method.target_modules", "all-linear")] if value else []
    if word in ("tiled_mlp", "unsloth_tiled_mlp") and isinstance(value, bool):
        return [("train.tile_mlp", TILE_TOKENS)] if value else []
    if word in ("gradient_checkpointing", "use_gradient_checkpointing") and value in ("unsloth", "offload"):
        return [("train.gradient_checkpointing", True), ("train.activation_offload", True)]
    if word == "activation_offloading" and value == "hidden_states":
        return [("train.activation_offload", True)]
    if word == "bf16" and isinstance(value, bool | None):
        return [("base.compute", {True: "bf16", False: "fp32", None: None}[value])]
    if word in ("trust_remote_code", "hf_token", "token", "api_key", "wandb_api_key"):
        raise UserError(
            "whet never runs a model's own code" if word == "trust_remote_code" else "a recipe holds no secrets",
            file=file,
            row=line,
            field=word,
            fix="remove the line" if word == "trust_remote_code" else "set it in the environment (HF_TOKEN)",
        )
    return None


def _ours(path: str) -> bool:
    """True if a path inside a section is already one of our names (so that no alias may move it)."""
    section, _, name = path.partition(".")
    return any(name in field_docs(cls) for cls in SECTION_CLASSES.get(section, ()))


def _shown(value: Any) -> str:
    return "auto" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
