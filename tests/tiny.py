"""A random model of one megabyte, rows of very unequal length, and short ways to a recipe: shared by the tests."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import nets
import torch

from whet.methods.layers.state import trained_state
from whet.recipe import Parsed, parse

BUILTIN = Path(__file__).parents[1] / "whet" / "builtin" / "tiny"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
VOCABULARY = 4096  # the first of the 16,384 tokens of the built-in tokenizer: reading all is a third of a short run

ENGLISH = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "the",
    "lazy",
    "dog",
    "and",
    "then",
    "writes",
    "a",
    "short",
    "reply",
    "to",
    "each",
    "customer",
]
KOREAN = [
    "고객님",
    "문의",
    "주셔서",
    "감사합니다",
    "주문하신",
    "상품은",
    "내일",
    "오전에",
    "도착할",
    "예정입니다",
    "다시",
    "한번",
    "확인해",
    "드리겠습니다",
]
ANSWER_WORDS = (1, 40, 2, 25, 1, 90, 5, 60, 3, 1, 12, 33, 2, 70, 8, 1, 18, 45, 4, 1, 27, 9, 2, 55)


def llama(**changes: Any) -> Any:
    """Two Llama layers with grouped queries and tied embeddings."""
    from transformers import LlamaConfig

    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 1024,
        "initializer_range": 0.08,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return LlamaConfig(**(sizes | changes))


@cache
def _first_tokens() -> str:
    """tokenizer.json of the built-in tokenizer after its first merges alone: tokens that are left keep their ids."""
    whole = json.loads((BUILTIN / "tokenizer.json").read_text(encoding="utf-8"))
    model = whole["model"]
    left_out = len(model["vocab"]) - VOCABULARY
    model["vocab"] = {token: id_ for token, id_ in model["vocab"].items() if id_ < VOCABULARY}
    model["merges"] = model["merges"][:-left_out]
    return json.dumps(whole, ensure_ascii=False)


def copy_tokenizer(directory: Path, files: int = len(TOKENIZER_FILES)) -> Path:
    """Put the first of TOKENIZER_FILES, cut to VOCABULARY tokens, beside a model; returns the directory."""
    (directory / TOKENIZER_FILES[0]).write_text(_first_tokens(), encoding="utf-8")
    for name in TOKENIZER_FILES[1:files]:
        shutil.copy(BUILTIN / name, directory / name)
    return directory


def save_model(config: Any, directory: Path, seed: int = 0) -> Path:
    """Random fp32 weights of `config` with the built-in tokenizer beside them."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(str(directory))
    return copy_tokenizer(directory)


def rows(count: int = 24) -> list[dict[str, str]]:
    """Alpaca rows; answers of 1 to 90 words, every third one Korean."""
    found = []
    for index in range(count):
        words = KOREAN if index % 3 == 2 else ENGLISH
        length = ANSWER_WORDS[index % len(ANSWER_WORDS)]
        answer = " ".join(words[(index + place) % len(words)] for place in range(length))
        found.append({"instruction": f"Question {index}: answer it.", "input": "", "output": answer})
    return found


def write_rows(path: Path, records: list[dict[str, str]]) -> Path:
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text(text, encoding="utf-8")
    return path


def settings(model: Path | str, data: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """Dotted path to value: fp32 on the CPU, nothing held out, one row a batch at a constant rate."""
    usual = {
        "model.path": str(model),
        "base.device": "cpu",
        "base.storage": "fp32",
        "base.compute": "fp32",
        "method.r": 4,
        "data.dataset": str(data),
        "data.val_size": 0,
        "train.learning_rate": 0.005,
        "output_dir": str(out),
    }
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    if changes.get("method.name") == "full":
        del usual["method.r"]
    if changes.get("base.storage") == "nf4":
        usual["base.double_quant"] = True
    return usual | changes


def words(values: dict[str, Any]) -> list[str]:
    """The settings as they are written on the command line."""
    return [f"{path}={json.dumps(value, ensure_ascii=False)}" for path, value in values.items()]


def recipe(model: Path | str, data: Path, out: Path, **changes: Any) -> Parsed:
    """A parsed recipe; `train__max_steps=3` is train.max_steps=3."""
    return parse(None, words(settings(model, data, out, **changes)))


def plan(recipe: Any) -> dict[str, Any]:
    """The plan of a recipe whose rows are not read, as `whet plan --json` prints it."""
    from whet.planning.plan import plan_recipe

    return plan_recipe(recipe).as_dict()


def built(parsed: Parsed) -> Any:
    """The model of a recipe, loaded and laid out as training does it (`whet.training.apply.Arranged`)."""
    from whet.training.run import build
    from whet.training.setup import get_ready

    return build(get_ready(parsed))[0]


def randomise_adapter(model: torch.nn.Module, seed: int = 1) -> None:
    """Give every lora_B values, so that no gradient is trivially zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in trained_state(model).items():
            if "lora_B" in name:
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The gradient of everything that is trained by PEFT's names, as `nets.gradients` finds them."""
    inside = {id(p) for group in nets.groups_of(model) for p in (group.a, group.b)}
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and id(p) not in inside}
    found |= nets.grouped(model, lambda p: p.grad)
    assert all(grad is not None for grad in found.values())
    return {name: grad.clone() for name, grad in found.items() if grad is not None}


def final_bytes(run: Path) -> dict[str, bytes]:
    """Adapter, last checkpoint and metrics: everything that must not depend on interruptions."""
    last = max((run / "checkpoints").glob("step-*"), key=lambda path: int(path.name.split("-")[1]))
    names = ("model.safetensors", "optimizer.safetensors", "random.safetensors")
    files = {f"{last.name}/{name}": last / name for name in names}
    files |= {"adapter": run / "adapter" / "adapter_model.safetensors", "metrics": run / "metrics.jsonl"}
    return {name: path.read_bytes() for name, path in files.items()}
