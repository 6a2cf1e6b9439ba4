"""Rewrite and report other tools' names for our settings, so that their recipes can be used here.

Sources: the option names of Hugging Face's TrainingArguments, PEFT, TRL, Axolotl, LLaMA-Factory, ms-swift, LitGPT,
mlx-lm, torchtune, Unsloth and Megatron-LM. A name that means the opposite (`train_on_inputs`) is rewritten with the
opposite value; one that would mean something else here is refused, never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from whet.base.config import field_docs
from whet.base.errors import UserError
from whet.sections import SECTION_CLASSES, SECTIONS
from whet.spelling.translations import method_name, shown, translated

# A peer's name, alone or inside a section, to ours.
NAMES = {
    "model_name_or_path": "model.path", "base_model": "model.path", "model_id": "model.path",
    "name_or_path": "model.path", "model_name": "model.path", "pretrained_model_name_or_path": "model.path",
    "tokenizer": "model.tokenizer", "tokenizer_name": "model.tokenizer", "revision": "model.revision",
    "model_revision": "model.revision", "task_type": "model.task", "problem_type": "model.task", "task": "model.task",
    "tokenizer_name_or_path": "model.tokenizer",
    "template": "model.chat_template", "chat_template": "model.chat_template",
    "bnb_4bit_use_double_quant": "base.double_quant", "use_double_quant": "base.double_quant",
    "double_quantization": "base.double_quant", "keep_fp8_transpose_cache": "base.keep_transposed",
    "adapter_name_or_path": "model.adapter", "lora_model_dir": "model.adapter",
    "peft": "method.name", "adapter": "method.name", "finetuning_type": "method.name", "tuner_type": "method.name",
    "fine_tune_type": "method.name",
    "r": "method.r", "bias": "method.bias", "modules_to_save": "method.modules_to_save", "use_dora": "method.use_dora",
    "lora_modules_to_save": "method.modules_to_save", "init_lora_weights": "method.init_lora_weights",
    "layers_to_transform": "method.layers_to_transform", "lora_layers_to_transform": "method.layers_to_transform",
    "rank_pattern": "method.rank_pattern", "alpha_pattern": "method.alpha_pattern",
    "exclude_modules": "method.exclude_modules", "loraplus_lr_ratio": "method.loraplus_lr_ratio",
    "trainable_token_indices": "method.trainable_token_indices",
    "lora_r": "method.r", "lora_rank": "method.r", "rank": "method.r", "alpha": "method.lora_alpha",
    "lora_alpha": "method.lora_alpha", "lora_dropout": "method.lora_dropout", "dropout": "method.lora_dropout",
    "target_modules": "method.target_modules", "lora_target_modules": "method.target_modules",
    "lora_target": "method.target_modules", "use_rslora": "method.use_rslora", "peft_use_rslora": "method.use_rslora",
    "dataset_name": "data.dataset", "datasets": "data.dataset", "path": "data.dataset", "train_file": "data.dataset",
    "train_dataset": "data.dataset", "test_size": "data.test_size", "test_file": "data.test_dataset",
    "train_data": "data.dataset", "dataset_num_proc": "data.num_proc", "preprocessing_num_workers": "data.num_proc",
    "dataset_processes": "data.num_proc", "max_train_samples": "data.max_rows",
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
    "train_batch_size": "train.per_device_train_batch_size", "warmup_steps": "train.warmup_steps",
    "num_warmup_steps": "train.warmup_steps", "adam_beta1": "train.adam_beta1", "adam_beta2": "train.adam_beta2",
    "adam_epsilon": "train.adam_epsilon", "report_to": "train.report_to", "random_state": "train.seed",
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
SCHEDULES = {"wsd": "warmup_stable_decay", "constant_with_warmup": "constant"}
SHORTHANDS = {"model": "path", "method": "name", "data": "dataset"}
TOP_LEVEL = (*SECTIONS, "output_dir")
# Words that mean something else in another section (model.dropout, eval.seed): no alias may move them from there.
AT_HOME = ("path", "rank", "alpha", "dropout", "seed", "columns", "max_length")

# Mappings under these names hold settings as if they stood at the top.
WRAPPERS = ("args", "training_args", "training_arguments", "trainer_args", "sft_config", "sft_args", "lora_config",
            "peft_config", "bnb_config", "quantization_config", "model_args", "data_args",
            "generation_args")  # fmt: skip
# Where both are said the first is left out, since in other tools the second decides.
OVERRULED = {
    "random_state": ("seed",), "torch_dtype": ("bf16", "fp16"), "dtype": ("bf16", "fp16"),
    "bnb_4bit_compute_dtype": ("bf16", "fp16"), "compute_dtype": ("bf16", "fp16"), "bf16": ("fp16",),
}  # fmt: skip

# Words that are ours in their section and another tool's outside of it.
_OF_OTHERS = ("chat_template", "bias", "task")

Rewritten = list[tuple[str | None, Any, str | None]]  # no path: the setting is left out


@dataclass(frozen=True)
class Said:
    """All that is said about a recipe while it is read. file, lines: where each path stands; notes: names that were
    rewritten; problems: faults, raised together at the end."""

    file: str | None
    lines: dict[str, int]
    notes: list[str] = field(default_factory=list)
    problems: list[UserError] = field(default_factory=list)

    def of_override(self) -> Said:
        """The same for a setting of the command line, which stands in no file."""
        return replace(self, file=None, lines={})


def canonical_tree(tree: dict[str, Any], said: Said, bridged: bool = False) -> dict[str, Any]:
    """The tree with other tools' names and shorthands rewritten to ours, each with a note. An empty section is left
    out.

    bridged: the method's options are PEFT's, whose names are left as they are. A setting that is refused, or is given
    twice with two values, becomes a problem.
    """
    result: dict[str, Any] = {}
    values: dict[str, Any] = {}
    written = list(_written(tree, result, said.lines))
    overruled = _overruled({path.rpartition(".")[2]: item for path, item, _ in written})
    for path, item, line in written:
        word = path.rpartition(".")[2]
        if word in overruled and not _ours(path):
            said.notes.append(f"{word}={shown(item)}: ignored, {overruled[word]} decides")
            continue
        theirs = bridged and path.startswith("method.") and path != "method.name"
        try:
            rewritten = [(path, item, None)] if theirs else canonical(path, item, said.file, line)
        except UserError as problem:
            said.problems.append(problem)
            continue
        for new_path, new_value, note in rewritten:
            if note:
                said.notes.append(note)
            if new_path is None:
                continue
            if bridged and new_path not in TOP_LEVEL and "." not in new_path:
                new_path = f"method.{new_path}"
            if values.setdefault(new_path, new_value) != new_value:
                said.problems.append(UserError(
                    "the same setting twice, with two values", file=said.file, row=line, field=new_path,
                    found=f"{path}: {new_value}", expected=f"{values[new_path]}, as said before",
                    fix="remove one of them",
                ))  # fmt: skip
            if line is not None:
                said.lines.setdefault(new_path, line)
            _put(result, new_path.split("."), new_value)
    return result


def _written(
    tree: Mapping[str, Any], result: dict[str, Any], lines: Mapping[str, int]
) -> Iterator[tuple[str, Any, int | None]]:
    """Each setting as it is written: its path, value and line. result: gets the sections that are there."""
    for key, value in tree.items():
        if key in SECTIONS and value is None:
            continue
        if key in SHORTHANDS and not isinstance(value, dict):
            value = {SHORTHANDS[key]: value}
        if isinstance(value, dict) and key in TOP_LEVEL:
            result.setdefault(key, {})
            yield from (
                (f"{key}.{name}", item, lines.get(f"{key}.{name}", lines.get(key))) for name, item in value.items()
            )
        elif isinstance(value, dict) and key in WRAPPERS:
            yield from ((name, item, lines.get(f"{key}.{name}", lines.get(key))) for name, item in value.items())
        else:
            yield key, value, lines.get(key)


def _overruled(words: Mapping[str, Any]) -> dict[str, str]:
    """The words that another one makes void, with that one."""
    void = {
        word: next(one for one in by if words.get(one))
        for word, by in OVERRULED.items()
        if word in words and any(words.get(one) for one in by) and not (word == "bf16" and words[word])
    }
    if "load_in_4bit" in words and not words["load_in_4bit"]:
        void |= dict.fromkeys((word for word in words if word.startswith("bnb_4bit_")), "load_in_4bit")
    return void


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
    if not (inside and (word in AT_HOME or (_ours(path) and word in _OF_OTHERS))):
        turned = translated(word, value, inside=inside, where={"file": file, "row": line, "field": word})
        if turned is not None:
            settings, reason = turned
            if not settings:
                return [(None, None, f"{word}: ignored, {reason}")]
            return [(new, item, f"{word}: read as {new}={shown(item)}") for new, item in settings]
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
    if target == "method.name" and isinstance(value, str):
        new_value = method_name(value)
    if target == "method.target_modules" and value in ("all", "all_linear"):
        new_value = "all-linear"
    if target == "method.target_modules" and isinstance(value, str) and re.fullmatch(r"\w+(\s*,\s*\w+)+", value):
        new_value = [name.strip() for name in value.split(",")]
    changed = target != path or new_value != value
    note = f"{word}={shown(value)}: read as {target}={shown(new_value)}" if changed else None
    return [(target, new_value, note)]


def _ours(path: str) -> bool:
    """True if a path inside a section is already one of our names (so that no alias may move it)."""
    section, _, name = path.partition(".")
    return any(name in field_docs(cls) for cls in SECTION_CLASSES.get(section, ()))
