"""Small runs of every task without their training: random models, random adapters, rows that are made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch

from whet import runs
from whet.base.files import whole_directory, write_json
from whet.engine.config import Model
from whet.engine.device import Placement
from whet.engine.load.load import load_model, load_tokenizer
from whet.recipe import resolve
from whet.runs import LABELS, Run

CPU = Placement(torch.device("cpu"), "fp32", torch.float32, False, {})
NAMES = ("billing", "other", "배송")
SMALL: dict[str, Any] = {"vocab_size": tiny.VOCABULARY, "pad_token_id": 0, "initializer_range": 0.2}


def config(kind: str) -> Any:
    """A BERT, a Llama or a T5 of two layers for the built-in tokenizer."""
    import transformers

    if kind == "llama":
        return tiny.llama(initializer_range=0.2)
    if kind == "t5":
        return transformers.T5Config(
            d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=tiny.VOCABULARY, pad_token_id=0,
            eos_token_id=2, decoder_start_token_id=0, dropout_rate=0.0, initializer_factor=2.0,
        )  # fmt: skip
    return transformers.BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, max_position_embeddings=256,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **SMALL,
    )  # fmt: skip


def save_model(kind: str, directory: Path) -> Path:
    """A model without a head for labels, as it comes from pretraining, and its tokenizer."""
    import transformers

    heads = {"llama": "AutoModelForCausalLM", "t5": "AutoModelForSeq2SeqLM", "bert": "AutoModelForPreTraining"}
    torch.manual_seed(0)
    network = getattr(transformers, heads[kind]).from_config(config(kind), dtype=torch.float32)
    network.save_pretrained(str(directory))
    return tiny.copy_tokenizer(directory, files=3)


def rows(task: str, count: int = 40) -> list[dict[str, Any]]:
    """Texts of very unequal length with labels of `task`, or questions with answers."""
    found = []
    for index in range(count):
        words = tiny.KOREAN if index % 3 == 2 else tiny.ENGLISH
        text = " ".join(words[(index + place) % len(words)] for place in range(tiny.ANSWER_WORDS[index % 24]))
        labels: dict[str, Any] = {
            "classification": NAMES[index % 3 if index % 2 else 0],
            "multi_label": [name for place, name in enumerate(NAMES) if (index >> place) % 2],
            "regression": 0.25 * index - 3.5,
        }
        if task == "seq2seq":
            found.append({"prompt": f"{index} {text}", "completion": " ".join(reversed(text.split()[:6]))})
        else:
            found.append({"text": f"{index} {text}", "label": labels[task]})
    return found


def make_run(kind: str, task: str, model: Path, place: Path, *, records: Any = None, **changes: Any) -> Run:
    """A finished run whose adapter and head are random but not small."""
    data = tiny.write_rows(place / "rows.jsonl", records or rows(task))
    settings = {"data__val_size": 12, "train__max_steps": 1, **changes}
    parsed = tiny.recipe(model, data, place / "run", **settings)
    prepared = runs.prepared(parsed.recipe)
    values = {path: value for path, (value, _) in prepared.decided.items()}
    run = runs.start(resolve(parsed.recipe, values), parsed.origins, prepared.decided, {})
    network = load_model(run.recipe.model, CPU, prepared.task)
    network = run.recipe.method.attach(network, prepared.task)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
    with whole_directory(run.trained) as directory:
        run.recipe.method.save(network, directory)
        prepared.row_tokenizer.tokenizer.save_pretrained(str(directory))
        write_json(directory / LABELS, {"task": prepared.task.name, "labels": list(prepared.task.labels)})
    return run


def token_rows(count: int = 9) -> list[np.ndarray]:
    """Rows of 1 to 40 tokens, none of them padding."""
    generator = np.random.default_rng(0)
    return [generator.integers(3, tiny.VOCABULARY, size) for size in ([1, 40, 7, 7, 23, 2, 40, 15, 31] * 9)[:count]]


def tokenizer(model: Path) -> Any:
    return load_tokenizer(Model(path=str(model)))
