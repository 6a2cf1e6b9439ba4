"""Adapters as others leave them: made with plain PEFT and transformers, and what those two answer with them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import tiny
import torch

NEW_TOKENS = 6


def base_model(place: Path) -> Path:
    """A Llama of two layers whose answers differ from prompt to prompt."""
    return tiny.save_model(tiny.llama(initializer_range=0.2), place)


def plain_base(model: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32).eval()


def tokenizer_of(place: Path) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(str(place))


def save_adapter(
    model: Path, out: Path, config: Any, *, tokens: tuple[str, ...] = (), template: str | None = None,
    keep_tokenizer: bool = True, seed: int = 3,
) -> Path:  # fmt: skip
    """An adapter of random numbers on `model`, saved by PEFT, its tokenizer with new `tokens` or another template."""
    import peft

    base, tokenizer = plain_base(model), tokenizer_of(model)
    if tokens:
        tokenizer.add_tokens(list(tokens))
        base.resize_token_embeddings(len(tokenizer))
    adapted = peft.get_peft_model(base, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(str(out))
    if keep_tokenizer:
        if template is not None:
            tokenizer.chat_template = template
        tokenizer.save_pretrained(str(out))
    return out


def rename_keys(adapter: Path, old: str, new: str) -> Path:
    """The same adapter under names that begin otherwise, as another class of the model has them."""
    from safetensors.torch import load_file, save_file

    out = adapter.with_name(f"{adapter.name}-renamed")
    shutil.copytree(adapter, out)
    tensors = load_file(adapter / "adapter_model.safetensors")
    renamed = {key.replace(f"base_model.model.{old}", f"base_model.model.{new}"): t for key, t in tensors.items()}
    save_file(renamed, out / "adapter_model.safetensors", metadata={"format": "pt"})
    return out


def opened(model: Path, adapter: Path, rows: int | None = None) -> Any:
    """PEFT's model of it, on a base whose tables have `rows` rows."""
    import peft

    base = plain_base(model)
    if rows is not None:
        base.resize_token_embeddings(rows)
    return peft.PeftModel.from_pretrained(base, str(adapter)).eval()


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, text: str, count: int = NEW_TOKENS) -> str:
    """The greedy answer of plain transformers."""
    chat = [{"role": "user", "content": text}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    written = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0,
        eos_token_id=ends,
    )[0, ids.shape[1] :].tolist()  # fmt: skip
    stop = next((place for place, token in enumerate(written) if token in ends), None)
    return tokenizer.decode(written[:stop], skip_special_tokens=False)
