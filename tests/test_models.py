"""Every family that users have, from rows to a merged model: trained, evaluated, merged, and opened in plain PEFT.

Tiny random models with tokenizers of their own kind; the target names are found in the structure.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import task_nets
import tiny
import torch

import whet
from whet import runs
from whet.engine.config import Model
from whet.engine.device import Placement
from whet.engine.load.load import load_model
from whet.engine.load.open import open_trained
from whet.ship.merge import CERTIFICATE

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": len(task_nets.SPECIALS) + len(task_nets.WORDS), "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 2, "eos_token_id": 4,
}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 2, "initializer_range": 0.2}
DECODERS: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": GROUPED | {"sliding_window": 8},
    "qwen2": GROUPED | {"vocab_size": tiny.VOCABULARY, "eos_token_id": 2},
    "qwen3": GROUPED | {"head_dim": 8},
    "gemma2": GROUPED | {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": GROUPED | {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "phi3": GROUPED,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2},
    "bloom": {"n_layer": 2, "n_head": 4, "initializer_range": 0.2},
}  # fmt: skip
# By the general path: attention of their own (eager or SDPA), or with sinks.
OTHERS: dict[str, dict[str, Any]] = {
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4, "initializer_range": 0.2},
    "falcon": {"initializer_range": 0.2},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "initializer_range": 0.2},
    "gpt_oss": GROUPED | {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8},
    "olmo2": GROUPED,
    "starcoder2": GROUPED,
}  # fmt: skip
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {"initializer_range": 0.2},
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "initializer_range": 0.2},
    "roberta": {"type_vocab_size": 1, "initializer_range": 0.2},
    "modernbert": {"cls_token_id": 2, "sep_token_id": 3, "global_attn_every_n_layers": 2, "local_attention": 8},
}
T5 = {
    "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
}  # fmt: skip
FAMILIES = {
    **{name: ("causal", sizes) for name, sizes in DECODERS.items()},
    "t5": ("seq2seq", T5),
    **{name: ("classification", sizes) for name, sizes in ENCODERS.items()},
}
KINDS = {"bert": "Bert", "distilbert": "DistilBert", "roberta": "Roberta", "modernbert": "ModernBert", "t5": "T5"}
OWNERS = {"causal": "AutoModelForCausalLM", "seq2seq": "AutoModelForSeq2SeqLM", "classification": "AutoModel"}


def save_model(family: str, task: str, sizes: dict[str, Any], directory: Path) -> Path:
    """A random pretrained model of `family` with a tokenizer, as they come from the hub."""
    import transformers

    config = transformers.AutoConfig.for_model(family, **(SIZES | sizes))
    torch.manual_seed(0)
    network = getattr(transformers, OWNERS[task]).from_config(config, dtype=torch.float32)
    network.save_pretrained(str(directory))
    if family == "qwen2":  # transformers gives it byte pairs, whatever its files say
        return tiny.copy_tokenizer(directory, files=2)
    tokenizer = task_nets.tokenizer(KINDS.get(family, "Llama"))
    if task == "causal":
        tokenizer.pad_token = "[PAD]"
    tokenizer.save_pretrained(str(directory))
    return directory


def inputs(task: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(6, SIZES["vocab_size"], (2, 13), generator=torch.Generator().manual_seed(1))
    more = {"decoder_input_ids": ids[:, :5]} if task == "seq2seq" else {}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}


def answers(network: Any, task: str) -> np.ndarray:
    with torch.inference_mode():
        return network.eval()(**inputs(task)).logits.float().numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_goes_the_whole_way(family: str, tmp_path: Path) -> None:
    import transformers

    task, sizes = FAMILIES[family]
    model = save_model(family, task, sizes, tmp_path / "model")
    data = task_nets.write(tmp_path / "rows.jsonl", task_nets.rows(task, 16))
    changes: dict[str, Any] = {"model.chat_template": "alpaca"} if task == "causal" else {}
    run = whet.train(None, **{
        "model.path": str(model), "data.dataset": str(data), "data.val_size": 4, "output_dir": str(tmp_path / "run"),
        "base.device": "cpu", "base.storage": "fp32", "base.compute": "fp32", "method.r": 4, "train.max_steps": 3,
        "train.per_device_train_batch_size": 4, "train.learning_rate": 0.02, "eval.max_new_tokens": 4, **changes,
    })  # fmt: skip
    assert run.task.name == task
    lines = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    assert sum(line["kind"] == "train" for line in lines) == 3

    result = whet.evaluate(run.path, max_rows=2)
    assert result["rows"] == 2
    assert result["base"]["metrics"].keys() == result["tuned"]["metrics"].keys()

    certificate = whet.merge(run.path, tmp_path / "out")
    assert json.loads((tmp_path / "out" / CERTIFICATE).read_text(encoding="utf-8")) == certificate
    recipe = run.recipe
    opened = open_trained(recipe.model, recipe.base, run.trained, recipe.method, run.task)
    live = answers(opened.answering, task)
    with opened.base_only():
        assert np.abs(answers(opened.answering, task) - live).max() > 1e-4, "nothing was learned"
    owner = run.task.auto_class()
    # transformers' other attentions leave out Gemma 2's cap
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    plain = peft.PeftModel.from_pretrained(
        owner.from_pretrained(str(model), **options, **labelled(run)), str(run.adapter)
    )
    np.testing.assert_allclose(answers(plain, task), live, atol=2e-4 * np.abs(live).max())
    merged = owner.from_pretrained(str(tmp_path / "out"), **options)
    assert not [name for name, _ in merged.named_modules() if "lora" in name]
    near = 2e-2 if certificate["chosen"].endswith("bf16") else 2e-4
    np.testing.assert_allclose(answers(merged, task), live, atol=near * np.abs(live).max())
    assert type(transformers.AutoConfig.from_pretrained(str(tmp_path / "out"))) is type(merged.config)


def labelled(run: runs.Run) -> dict[str, Any]:
    """What plain transformers must be told of the head: how many labels there are."""
    return {"num_labels": len(run.task.labels)} if run.task.labelled else {}


@pytest.mark.parametrize("family", [*DECODERS, *OTHERS])
def test_no_decoder_sees_the_future_and_all_compute_what_transformers_does(family: str, tmp_path: Path) -> None:
    """A family whose attention is its own would be given no mask for whet's, and would read on."""
    import transformers

    path = save_model(family, "causal", (DECODERS | OTHERS)[family], tmp_path)
    network = load_model(Model(path=str(path)), Placement(torch.device("cpu"), "fp32", torch.float32, False, {}))
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        str(path), dtype=torch.float32, attn_implementation="eager"
    )
    ids = inputs("causal")["input_ids"]
    other = ids.clone()
    other[:, -1] = 6 + (ids[:, -1] + 1) % 40
    with torch.inference_mode():
        first, second = (network(input_ids=one).logits[:, :-1] for one in (ids, other))
        exact = plain(input_ids=ids).logits[:, :-1]
    assert torch.allclose(first, second, atol=1e-5)
    assert torch.allclose(first, exact, atol=1e-4 * float(exact.abs().max()))


@pytest.mark.parametrize("family", ["bloom", "gpt2", "gemma3_text"])
def test_decoders_learn_labels_too(family: str, tmp_path: Path) -> None:
    model = save_model(family, "causal", DECODERS[family], tmp_path / "model")
    data = task_nets.write(tmp_path / "rows.jsonl", task_nets.rows("classification", 16))
    run = whet.train(None, **{
        "model.path": str(model), "data.dataset": str(data), "data.val_size": 4, "output_dir": str(tmp_path / "run"),
        "base.device": "cpu", "base.storage": "fp32", "base.compute": "fp32", "method.r": 4, "train.max_steps": 2,
    })  # fmt: skip
    assert whet.evaluate(run.path)["rows"] == 4
    assert whet.merge(run.path, tmp_path / "out")["agreement"] == 1.0
