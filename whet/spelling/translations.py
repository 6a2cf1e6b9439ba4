"""Other tools' settings whose value has to be translated too, and those that whet does not need.

`translated` gives our settings for a name and a value, each with a sentence that says so. What only concerns logging,
uploading, speed or another program's files is left out and said (`unneeded`). What would change what is learned is
never left out: it is accepted where it is off, and refused otherwise.

Sources: TrainingArguments, SFTConfig, LoraConfig and BitsAndBytesConfig; Unsloth, Axolotl and LLaMA-Factory.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

from whet.base.errors import UserError
from whet.data.template.named import NAMED
from whet.engine.config import Base
from whet.methods.all import METHODS
from whet.settings import TILE_TOKENS
from whet.spelling.unneeded import NOT_THERE, OFF, REASONS, SECRETS, SERVICES

Settings = list[tuple[str, Any]]
Found = Settings | str | None  # a text is the reason why it is ignored
Translated = tuple[Settings, str]  # our settings, and what is said of the one that was written

# PEFT's and ms-swift's names of tasks, and transformers' of problems; a head for labels leaves the kind to the rows.
TASKS = {
    "causal_lm": "causal", "seq_2_seq_lm": "seq2seq", "seq2seq_lm": "seq2seq", "seq_cls": None,
    "sequence_classification": None, "text-classification": None, "single_label_classification": "classification",
    "multi_label_classification": "multi_label", "regression": "regression",
}  # fmt: skip
PEFT_NAMES = {"prompt_tuning": "prompt", "prefix_tuning": "prefix", "ptuning": "p_tuning"}
COMPUTE = {"bfloat16": "bf16", "bf16": "bf16", "float32": "fp32", "fp32": "fp32", "float": "fp32", "float16": "fp16",
           "fp16": "fp16", "half": "fp16"}  # fmt: skip


def translated(word: str, value: Any, *, inside: bool, where: dict[str, Any]) -> Translated | None:
    """Our settings for another tool's, and what is said; None for a name that is translated by itself or is ours.

    word: the name without a section; inside: it stands in a section of ours; where: file, row and field for errors.
    Raises UserError for what is refused.
    """
    if word in SECRETS and value not in (None, False, True):
        raise UserError("a recipe holds no secrets", **where, fix="set it in the environment (HF_TOKEN)")
    if word in SECRETS:
        return [], "the environment says it (HF_TOKEN)"
    if word in REASONS:
        return [], REASONS[word]
    if word in NOT_THERE:
        if value in (*OFF, *NOT_THERE[word]):
            return [], "it is off"
        raise UserError(
            "whet has no such thing, and it would change what is learned", **where, found=shown(value),
            expected="off, as where the line is missing", fix="remove the line",
        )  # fmt: skip
    for rule in (_of_model, _of_storage, _of_data, _of_training, _of_stage):
        found = rule(word, value, inside, where)
        if found is not None:
            return ([], found) if isinstance(found, str) else (found, "" if found else "it is off")
    return None


def _of_model(word: str, value: Any, inside: bool, where: dict[str, Any]) -> Found:
    if word in ("task_type", "problem_type", "task") and isinstance(value, str):
        name = value.lower().removeprefix("tasktype.")
        return [("model.task", TASKS[name])] if name in TASKS else None
    if word in ("template", "chat_template") and not inside and isinstance(value, str):
        file = value.endswith(".jinja")
        return None if value in NAMED or file else "the model's own template is used"
    if word == "peft_type" and isinstance(value, str):
        return [("method.name", method_name(value))]
    if word == "full_finetuning" and isinstance(value, bool):
        return [("method.name", "full")] if value else []
    if word == "bias" and not inside and value in OFF:
        return "no bias is trained"
    if word == "lora_target_linear" and isinstance(value, bool):
        return [("method.target_modules", "all-linear")] if value else []
    if word == "init_lora_weights" and value in (True, "default"):
        return "it is the usual start"
    if word == "use_dora" and not inside and value is False:
        return []
    return None


def method_name(name: str) -> str:
    """Our name of a method that PEFT writes otherwise (PROMPT_TUNING), any other name as it is."""
    known = name.lower().removeprefix("pefttype.").replace("-", "_")
    known = PEFT_NAMES.get(known, known)
    return name if name in METHODS or known not in METHODS else known


def _of_storage(word: str, value: Any, inside: bool, where: dict[str, Any]) -> Found:
    if word in ("load_in_4bit", "q_lora") and isinstance(value, bool):
        return [("base.storage", "nf4")] if value else []
    if word == "load_in_8bit" and isinstance(value, bool):
        return [("base.storage", "int8")] if value else []
    if word == "bnb_4bit_quant_type" and value == "nf4":
        return [("base.storage", "nf4")]
    if word == "bnb_4bit_quant_type":
        raise UserError("whet stores 4 bits as nf4", **where, found=shown(value), expected="nf4", fix="write nf4")
    if word in ("quantization_bit", "quant_bits") and value in (4, 8, None):
        return [] if value is None else [("base.storage", "nf4" if value == 4 else "int8")]
    if word in ("bnb_4bit_compute_dtype", "torch_dtype", "dtype", "compute_dtype", "model_dtype"):
        return _compute(str(value).removeprefix("torch."), where)
    if word == "bf16" and isinstance(value, bool | None):
        return [("base.compute", {True: "bf16", False: "fp32", None: None}[value])]
    if word in ("fp16", "float16") and isinstance(value, bool | None):
        return _compute("fp16", where) if value else []
    if word in ("fp32", "pure_bf16") and isinstance(value, bool):
        return [("base.compute", "fp32" if word == "fp32" else "bf16")] if value else []
    return None


def _compute(name: str, where: dict[str, Any]) -> Settings | str:
    """The arithmetic of this name, left to whet where it has none of it."""
    if name in ("None", "auto", ""):
        return "the hardware decides"
    if name not in COMPUTE:
        raise UserError(
            "no type to compute with", **where, found=name, expected="bfloat16, float16, float32 or auto",
            fix="write auto",
        )  # fmt: skip
    if COMPUTE[name] not in _computes():
        return "whet computes in bf16 or fp32, as the hardware can (base.compute)"
    return [("base.compute", COMPUTE[name])]


def _computes() -> set[str]:
    """The values that base.compute has."""
    kinds = get_args(get_type_hints(Base, include_extras=True)["compute"])
    return {value for kind in kinds for value in get_args(kind)}


def _of_data(word: str, value: Any, inside: bool, where: dict[str, Any]) -> Found:
    if word in ("train_on_inputs", "train_on_prompt") and isinstance(value, bool):
        return [("data.loss_on", "all" if value else "assistant")]
    names = ("assistant_only_loss", "completion_only_loss", "mask_prompt", "train_on_responses_only")
    if word in names and isinstance(value, bool):
        return [("data.loss_on", "assistant" if value else "all")]
    if word in ("assistant_only_loss", "completion_only_loss") and value is None:
        return "the rows decide"
    if word == "dataset_text_field" and isinstance(value, str):
        return "the field is called so anyway" if value == "text" else [("data.columns", {"text": value})]
    if word in ("datasets", "test_datasets", "pretraining_dataset") and isinstance(value, list):
        if not any(isinstance(one, dict) for one in value):
            return None
        return _of_axolotl(value, "data.eval_dataset" if word == "test_datasets" else "data.dataset", where)
    return None


def _of_axolotl(entries: list[Any], field: str, where: dict[str, Any]) -> Settings:
    """Axolotl's list of data sets: `{path, type, split, name}`; the types are recognised from the rows."""
    paths, columns = [], {}
    for entry in entries:
        entry = {"path": entry} if isinstance(entry, str) else entry
        known = ("path", "type", "split", "name", "ds_type", "data_files", "field", "field_messages", "chat_template",
                 "roles_to_train", "train_on_eos", "conversation", "shards", "trust_remote_code")  # fmt: skip
        odd = [key for key in entry if key not in known] if isinstance(entry, dict) else ["path"]
        if odd or isinstance(entry.get("type"), dict) or not isinstance(entry.get("path"), str):
            raise UserError(
                "a data set whose description is not understood", **where, found=", ".join(odd) or shown(entry),
                expected="path, and perhaps type, split, name, field", fix="write data.dataset and data.columns",
            )  # fmt: skip
        files = entry.get("data_files") or entry["path"]
        part = "/".join(str(entry[key]) for key in ("name", "split") if entry.get(key))
        for file in files if isinstance(files, list) else [files]:
            on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", file) and not Path(file).suffix and not Path(file).exists()
            split = f"#{part}" if part and (on_hub or Path(file).is_dir()) else ""
            paths.append(f"hub:{file}{split}" if on_hub else file + split)
        for ours, theirs in (("text", "field"), ("messages", "field_messages")):
            if entry.get(theirs) and entry[theirs] not in (ours, "conversations"):
                columns[ours] = entry[theirs]
    return [(field, paths if len(paths) > 1 else paths[0])] + ([("data.columns", columns)] if columns else [])


def _of_training(word: str, value: Any, inside: bool, where: dict[str, Any]) -> Found:
    if word == "report_to" and not isinstance(value, list):
        value = [] if value in OFF else ["tensorboard"] if value == "all" else [value]
        reports = _reports(value)
        return [("train.report_to", reports)] if reports else f"nothing is sent to {value[0]}" if value else []
    if word == "report_to" and isinstance(value, list):
        return [("train.report_to", _reports(value))] if _reports(value) != value else None
    if word == "max_steps" and not isinstance(value, bool) and value in (-1, 0):
        return [("train.max_steps", None)]
    if word == "num_train_epochs" and value == -1:
        return []
    if word in ("warmup_steps", "num_warmup_steps") and isinstance(value, float) and 0 < value < 1:
        return [("train.warmup_ratio", value)]
    if word in ("tiled_mlp", "unsloth_tiled_mlp") and isinstance(value, bool):
        return [("train.tile_mlp", TILE_TOKENS)] if value else []
    if word in ("gradient_checkpointing", "use_gradient_checkpointing") and value in ("unsloth", "offload"):
        return [("train.gradient_checkpointing", True), ("train.activation_offload", True)]
    if word == "activation_offloading" and value == "hidden_states":
        return [("train.activation_offload", True)]
    return None


def _reports(names: list[Any]) -> list[Any]:
    """Those that whet writes; of the others nothing is sent."""
    return [name for name in names if name not in OFF and name not in SERVICES]


def _of_stage(word: str, value: Any, inside: bool, where: dict[str, Any]) -> Found:
    if word in ("stage", "rl", "rlhf_type", "training_type", "trainer_type") and isinstance(value, str):
        if value.lower() in ("sft", "pt", "cpt", "none"):
            return "the rows say which kind of training it is"
        raise preference(value, **where)
    return [] if word in ("rl",) and value in OFF else None


def preference(value: str, **where: Any) -> UserError:
    """The refusal of an objective that learns from preferences."""
    return UserError(
        "preference learning is not there yet", **where, found=value,
        expected="supervised training: a method that `whet methods` lists",
        fix="data.preference=chosen learns the preferred answers, with method.name=lora",
    )  # fmt: skip


def shown(value: Any) -> str:
    """A value as a recipe writes it."""
    return "auto" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
