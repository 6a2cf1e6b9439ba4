"""Tiny random models of every family that has a head for labels or answers, with tokenizers of their own kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

# fmt: off
WORDS = [
    "good", "bad", "fine", "awful", "great", "poor", "film", "plot", "actor", "scene", "slow", "fast", "long", "short",
    "red", "blue", "green", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "the", "a",
    "is", "was", "very", "not", "and", "but", "so", "who", "why", "how", "when", "where", "this", "that", "it", "they",
    "we", "you",
]
# fmt: on
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "</s>", "[MASK]"]
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": len(SPECIALS) + len(WORDS), "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 2,
    "eos_token_id": 4,
}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "pad_token_id": None}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
DISTIL = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}
CHANGES: dict[str, dict[str, Any]] = {
    "Bert": {}, "DistilBert": DISTIL, "Roberta": {"type_vocab_size": 1},
    "ModernBert": {"cls_token_id": 2, "sep_token_id": 3, "global_attn_every_n_layers": 2, "local_attention": 8},
    "Llama": {"pad_token_id": None}, "Qwen3": {"pad_token_id": None, "head_dim": 8, "num_key_value_heads": 2},
    "GPT2": GPT2, "T5": T5,
}  # fmt: skip
ENCODERS = ("Bert", "DistilBert", "Roberta", "ModernBert")
DECODERS = ("Llama", "Qwen3", "GPT2")


def config(kind: str, **changes: Any) -> Any:
    import transformers

    return getattr(transformers, f"{kind}Config")(**(SIZES | CHANGES[kind] | changes))


def tokenizer(kind: str) -> Any:
    """Words as tokens; encoders close a text with [CLS] ... [SEP], T5 with </s>, decoders with nothing and no pad."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate([*SPECIALS, *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    names: dict[str, Any] = {"unk_token": "[UNK]"}
    if kind in ENCODERS:
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        names |= {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    elif kind == "T5":
        made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 4)])
        names |= {"pad_token": "[PAD]", "eos_token": "</s>"}
    else:
        names |= {"eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def save(kind: str, directory: Path, **changes: Any) -> Path:
    """A pretrained body without a head for labels, as they come from the hub; T5 with its own head."""
    import transformers

    torch.manual_seed(0)
    made = config(kind, **changes)
    owner = transformers.AutoModelForSeq2SeqLM if kind == "T5" else transformers.AutoModel
    if kind in DECODERS:
        owner = transformers.AutoModelForCausalLM
    owner.from_config(made, dtype=torch.float32).save_pretrained(str(directory))
    tokenizer(kind).save_pretrained(str(directory))
    return directory


def text(index: int, words: int) -> str:
    return " ".join(WORDS[(7 * index + 3 * place) % len(WORDS)] for place in range(words))


def rows(task: str, count: int = 12) -> list[dict[str, Any]]:
    """Rows of 1 to 15 words; labels that no single word gives away, but that can be learned by heart."""
    found: list[dict[str, Any]] = []
    for index in range(count):
        row: dict[str, Any] = {"text": text(index, 1 + 5 * index % 15)}
        if task == "classification":
            row["label"] = ("bad", "fine", "good")[index % 3]
        elif task == "regression":
            row["label"] = 0.5 * (index % 4) - 0.5
        elif task == "multi_label":
            row["label"] = [name for bit, name in enumerate(("fast", "red", "slow")) if index >> bit & 1]
        else:
            row = {"prompt": row["text"], "completion": text(3 * index + 1, 1 + index % 4)}
        found.append(row)
    return found


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
