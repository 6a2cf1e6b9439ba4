"""Recipes that must be refused before any model is loaded, one mistake each, and what the refusal has to say.

Every entry is run as `whet train bad.yaml OVERRIDES` in a directory that `workshop` furnished.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from whet.recipe import parse, to_yaml


@dataclass(frozen=True)
class BadRecipe:
    """text: the recipe file (None: there is none). mentions: each occurs in the error. line: the row it must name.

    file: the file it must name, None when the fault is not in a file. bug: why it is not refused as it should be yet.
    """

    name: str
    text: str | bytes | None
    overrides: tuple[str, ...]
    mentions: tuple[str, ...]
    line: int | None = None
    file: str | None = "bad.yaml"
    bug: str = ""


GOOD = "# a recipe that trains\ndata:\n  dataset: rows.jsonl\n  val_size: 0\nbase:\n  device: cpu\n"


def workshop(place: Path) -> None:
    """What the entries refer to: data, an empty directory, a file, a stranger's directory, an earlier run."""
    rows = [{"prompt": f"{a} + {b}?", "completion": str(a + b)} for a in range(2) for b in range(2)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "text.jsonl").write_text('{"text": "once upon a time there was a model"}\n')
    (place / "half.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    (place / "folder.yaml").mkdir()
    (place / "nothing").mkdir()
    (place / "file").write_text("not a directory\n")
    (place / "foreign").mkdir()
    (place / "foreign" / "thesis.tex").write_text("years of work\n")
    (place / "earlier").mkdir()
    (place / "earlier" / "recipe.yaml").write_text(to_yaml(parse(None, ["train.seed=7"]).recipe))
    (place / "bad.jinja").write_text("{% for message in messages %}")


def said(name: str, text: str, *mentions: str, line: int | None = None) -> BadRecipe:
    """A fault in the file itself."""
    return BadRecipe(name, text, (), mentions, line)


def given(name: str, override: str, *mentions: str, file: str | None = None, bug: str = "") -> BadRecipe:
    """A fault on the command line, over a good file."""
    return BadRecipe(name, GOOD, tuple(override.split()), mentions, None, file, bug)


FILES = [
    BadRecipe("no_recipe", None, (), ("there is no such recipe", "whet init"), None, "bad.yaml"),
    BadRecipe("not_utf8", b"model:\n  path: caf\xe9\n", (), ("not UTF-8", "byte 18", "save it as UTF-8")),
    BadRecipe("utf16", "model:\n".encode("utf-16"), (), ("not UTF-8",)),
    BadRecipe("nul", b"model: a\0b\n", (), ("not valid YAML", "plain text")),
    said("a_list", "- model\n- data\n", "a mapping of sections", "found:    a list", "model:, method:"),
    said("a_word", "lora\n", "a mapping of sections", "'lora' (str)"),
    said("a_number", "3\n", "a mapping of sections", "3 (int)"),
    said("two_documents", "method: lora\n---\nmethod: full\n", "not valid YAML", "another document", line=2),
    said("tab", "train:\n\tseed: 1\n", "not valid YAML", "'\\t'", line=2),
    said("unclosed", "train: {seed: 1\n", "not valid YAML", "'}'", line=2),
    said("indentation", "train:\n    seed: 1\n  max_steps: 2\n", "not valid YAML", "two spaces", line=3),
    said("duplicate_key", "train:\n  seed: 1\n  seed: 2\n", "duplicate key", "seed", "each setting once", line=3),
    said("duplicate_section", "train:\n  seed: 1\ntrain:\n  seed: 2\n", "duplicate key", '"train"', line=3),
    said("twice_by_alias", "lora_r: 8\nmethod:\n  r: 16\n", "twice", "field method.r", "16", "8, as said", line=3),
    said("undefined_alias", "train:\n  seed: *other\n", "undefined alias", line=2),
    said("tag_python", "train: !!python/object/apply:os.system [id]\n", "field train", "python/object", "tag", line=1),
    said("tag_scalar", "train:\n  seed: !env SEED\n", "field train.seed", "tag", line=2),
    said("tag_mapping", "method: !lora {r: 8}\n", "field method", "the tag !lora", line=1),
    said("date", "train:\n  seed: 2026-11-21\n", "field train.seed", "found:    date", "quotes", line=2),
    said("no_such_date", "train:\n  seed: 2026-13-41\n", "cannot be read", "month", "quotes"),
    said("deep", "train: " + "[" * 500 + "\n", "nested too deeply"),
    said("bomb", "a: &a [1,1,1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a]\n"
         "c: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: [*d,*d]\n",
         "over 10000 values", "aliases"),
]  # fmt: skip

KEYS = [
    said("misspelt_setting", "model: builtin:tiny\ntrain:\n  lerning_rate: 1e-4\n", "no such setting",
         "field train.lerning_rate", "write train.learning_rate", line=3),
    said("misspelt_section", "trian:\n  seed: 1\n", "no such setting", "field trian", "write train", line=1),
    said("wrong_section", "train:\n  offload_head: true\n", "no such setting", "field train.offload_head",
         "write base.offload_head", line=2),
    said("misspelt_at_the_top", "warmup_step: 8\n", "field warmup_step", "write train.warmup_steps", line=1),
    said("unknown_at_all", "data:\n  zzz: 8\n", "field data.zzz", "docs/recipe.md", line=2),
    said("number_as_key", "train:\n  1: 2\n", "field train.1", line=2),
    said("other_meaning", "model:\n  dropout: 0.1\n", "field model.dropout", "no such setting", line=2),
    said("other_method", "method:\n  name: full\n  r: 8\n", "the method full has no such setting", "field method.r",
         "method.name: lora", line=3),
    said("unknown_method", "method: lroa\n", "no such method", "field method.name", "found:    lroa", "lora, full",
         "write lora", line=1),
    said("token", "hf_token: hf_abcdefgh\n", "holds no secrets", "HF_TOKEN", line=1),
    given("misspelt_override", "train.max_stpes=3", "field train.max_stpes", "write train.max_steps"),
    given("no_value", "train.max_steps", "not an override", "section.key=value"),
    given("no_key", "=3", "not an override"),
    given("empty_part", "train..seed=1", "no such setting"),
    given("broken_value", "train.seed={a", "not valid YAML", "field train.seed", "quotes"),
    given("override_of_other_method", "method=full method.r=3", "the method full", "field method.r"),
    given("unknown_column", "data.columns.promt=question", "field data.columns.promt", "data.columns.prompt?"),
]  # fmt: skip

VALUES = [
    said("word_for_number", "train:\n  learning_rate: fast\n", "field train.learning_rate", "'fast' (str)",
         "valid number", "Peak learning rate", line=2),
    said("text_number", "train:\n  learning_rate: '1e-4'\n", "'1e-4' (str)", "valid number", line=2),
    said("number_for_word", "model:\n  path: 3\n", "field model.path", "3 (int)", "valid string", line=2),
    said("number_as_model", "model: 3\n", "field model.path", "3 (int)", line=1),
    said("fraction_of_a_step", "train:\n  max_steps: 2.5\n", "2.5 (float)", "valid integer", line=2),
    said("yes_is_a_word", "train:\n  gradient_checkpointing: yes\n", "'yes' (str)", "valid boolean", line=2),
    said("true_is_no_number", "train:\n  max_steps: true\n", "True (bool)", "valid integer", line=2),
    said("word_for_section", "train: fast\n", "field train", "'fast' (str)", "an object", line=1),
    said("list_for_number", "train:\n  seed: [1]\n", "[1] (list)", "valid integer", line=2),
    said("item_of_list", "data:\n  dataset: [rows.jsonl, 3]\n", "field data.dataset", line=2),
    said("column_number", "data:\n  columns: {prompt: 3}\n", "field data.columns.prompt", "3 (int)", line=2),
    said("metrics_word", "eval:\n  metrics: exact_match\n", "field eval.metrics", "'exact_match' (str)", line=2),
    said("zero_rate", "train:\n  learning_rate: 0\n", "0 (int)", "greater than 0", line=2),
    said("negative_share", "data:\n  val_size: -0.1\n", "field data.val_size", "greater than or equal to 0", line=2),
    said("warmup_over_one", "train:\n  warmup_ratio: 10\n", "10 (int)", "less than or equal to 1", line=2),
    said("dropout_one", "method:\n  lora_dropout: 1.0\n", "1.0 (float)", "less than 1", line=2),
    said("rank_zero", "method:\n  r: 0\n", "field method.r", "greater than or equal to 1", line=2),
    said("short_rows", "data:\n  max_length: 4\n", "field data.max_length", "greater than or equal to 8", line=2),
    said("empty_names", "model:\n  path: ''\noutput_dir: ''\n", "2 problems", "field model.path", "field output_dir",
         "the name is empty", line=2),
    said("infinite_rate", "train:\n  learning_rate: .inf\n", "field train.learning_rate", "finite", line=2),
    said("infinite_epochs", "train:\n  num_train_epochs: 1e999\n", "field train.num_train_epochs", "finite", line=2),
    said("not_a_number", "method:\n  lora_alpha: .nan\n", "field method.lora_alpha", "finite", line=2),
    said("misspelt_optimiser", "train:\n  optim: adamww\n", "found:    adamww", "'adamw'", "write adamw", line=2),
    said("unknown_optimiser", "train:\n  optim: lion\n", "'lion' (str)", "'adamw'", line=2),
    said("unknown_schedule", "train:\n  lr_scheduler_type: cosin\n", "found:    cosin", "write cosine", line=2),
    said("unknown_storage", "base:\n  storage: gguf\n", "field base.storage", "'fp32', 'bf16'", "or 'nf4'", line=2),
    said("unknown_format", "data:\n  format: csv\n", "field data.format", "'alpaca'", line=2),
    given("infinite_override", "train.learning_rate=.inf", "field train.learning_rate", "finite"),
    given("date_override", "train.seed=2026-11-21", "field train.seed", "date"),
    given("rows_and_a_half", "data.val_size=1.5", "field data.val_size", "whole number", "data.val_size=2"),
    given("beta_of_one", "train.adam_beta1=1.0", "field train.adam_beta1", "less than 1"),
    given("huge_seed", "train.seed=99999999999999999999999", "field train.seed"),
]  # fmt: skip

PAIRS = [
    given("beta_without_adam", "train.optim=sgd train.adam_beta1=0.9", "field train.adam_beta1", "sgd has no such",
          "found:    0.9", "train.optim=adamw"),
    given("epsilon_without_adam", "train.optim=adafactor train.adam_epsilon=1e-6", "field train.adam_epsilon"),
    given("decay_of_cosine", "train.decay_ratio=0.1", "field train.decay_ratio", "cosine schedule has no decay",
          "warmup_stable_decay"),
    given("double_quant_alone", "base.double_quant=true", "field base.double_quant", "nf4", "found:    true"),
    given("full_on_nf4", "method=full base.storage=nf4", "field base.storage", "found:    nf4", "fp32", "method=lora"),
    given("full_on_bf16", "method=full base.storage=bf16", "field base.storage", "found:    bf16"),
    given("bf16_computed_in_fp32", "base.storage=bf16 base.compute=fp32", "field base.compute", "base.storage=fp32"),
    *(given(f"{name}_on_cpu", f"train.{name}=true", f"field train.{name}", "CUDA only", "found:    true")
      for name in ("compile", "cuda_graphs", "fit_micro_batches")),
    given("turned_without_fp8", "base.keep_transposed=true", "field base.keep_transposed", "fp8 compute"),
    given("head_without_fp8", "base.fp8_head=true", "field base.fp8_head", "fp8 compute", "found:    true"),
    given("fp8_on_dense", "base.storage=fp32 base.compute=fp8", "field base.compute", "fp8 with fp32 storage"),
    given("offload_of_nothing", "train.activation_offload=true train.gradient_checkpointing=false",
          "field train.gradient_checkpointing", "recomputed layers"),
    given("tiles_of_nothing", "train.tile_mlp=64 train.gradient_checkpointing=false",
          "field train.gradient_checkpointing", "recomputed layers"),
    given("no_such_optimiser", "train.optim=adamw_4bit", "field train.optim", "adamw_4bit", "adamw_8bit"),
    given("split_chats", "data.over_length=split", "field data.over_length", "cannot be split", "over_length=drop"),
    given("answers_of_text", "data.dataset=text.jsonl data.loss_on=assistant", "field data.loss_on", "raw text"),
    given("prompt_of_text", "data.dataset=text.jsonl data.over_length=truncate_prompt", "field data.over_length",
          "no prompt to cut", "over_length=split"),
    given("stopping_blind", "train.early_stopping_patience=2", "field train.early_stopping_patience", "held-out rows",
          "data.val_size"),
    given("padded_packing", "data.packing=true data.padding_free=false", "padding", "data.packing=false"),
]  # fmt: skip

THINGS = [
    given("unknown_builtin_model", "model=builtin:tyni", "field model.path", "found:    builtin:tyni", "builtin:tiny"),
    given("no_model_there", "model=./nowhere", "field model.path", "found:    ./nowhere", "Qwen/Qwen3-0.6B"),
    given("no_config", "model=nothing", "field model.path", "no config.json", "save_pretrained", file="nothing"),
    given("model_is_a_file", "model=file", "field model.path", "found:    file"),
    given("no_tokenizer_there", "model.tokenizer=./nowhere", "field model.tokenizer", "./nowhere"),
    given("unknown_template", "model.chat_template=chatlm", "field model.chat_template", "alpaca,", "write chatml"),
    given("broken_template", "model.chat_template=bad.jinja", "chat template"),
    given("no_layer", "method.target_modules=[q_prj]", "field method.target_modules", "q_prj", "write q_proj"),
    given("empty_model", "model=''", "field model.path", "the name is empty", "''"),
    given("empty_tokenizer", "model.tokenizer=''", "field model.tokenizer", "the name is empty"),
    given("empty_output", "output_dir=''", "field output_dir", "the name is empty"),
    given("no_tokenizer_files", "model.tokenizer=nothing", "field model.tokenizer", file="nothing"),
    given("bad_expression", "method.target_modules=(", "field method.target_modules", "expression"),
    given("unknown_metric", "eval.metrics=[exact_mach]", "field eval.metrics", "exact_mach", "exact_match"),
    given("unknown_builtin_data", "data.dataset=builtin:support_tikets", "field data.dataset", "support_tickets"),
    given("missing_data", "data.dataset=row.jsonl", "no such file", "did you mean rows.jsonl?", file="row.jsonl"),
    given("missing_held_out", "data.eval_dataset=row.jsonl", "no such file", file="row.jsonl"),
    given("empty_name", "data.dataset=''", "field data.dataset", "empty"),
    given("no_names", "data.dataset=[]", "no data files", "at least one"),
    BadRecipe("bad_row", "data: half.jsonl\n", (), ("row 2", "completion is missing"), None, "half.jsonl"),
    given("too_long_for_the_model", "data.max_length=4096", "field data.max_length", "4096", "at most 1024",
          "data.max_length=1024"),
    given("all_rows_too_long", "data.max_length=8", "no row is left", "4 dropped", "raise data.max_length"),
    given("one_row_too_long", "data.max_length=8 data.over_length=error", "row 1", "field data.over_length",
          "at most 8", file="rows.jsonl"),
    given("all_held_out", "data.val_size=4", "no row is left", "4 held out", "lower data.val_size"),
    given("output_is_a_file", "output_dir=file", "it is a file", "field output_dir", file="file"),
    given("output_in_a_file", "output_dir=file/run", "field output_dir", file="file/run"),
    given("output_is_foreign", "output_dir=foreign", "not empty", "field output_dir", "foreign-2", file="foreign"),
    given("output_is_another_run", "output_dir=earlier", "another recipe", "earlier-2", file="earlier"),
    BadRecipe("recipe_is_a_directory", None, (), ("there is no such recipe",), None, "folder.yaml"),
]  # fmt: skip

BAD_RECIPES = [*FILES, *KEYS, *VALUES, *PAIRS, *THINGS]


def recipe_names(bad: BadRecipe) -> Iterator[str]:
    """The words after `whet train` for this entry."""
    yield "folder.yaml" if bad.name == "recipe_is_a_directory" else "bad.yaml"
    yield from bad.overrides
