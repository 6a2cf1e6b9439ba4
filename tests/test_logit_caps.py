"""The fused head computes a model's own logits: with its cap, whatever the config calls it, or not at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from whet.engine.compute import head as heads
from whet.engine.compute.head import find_head

SIZES: dict[str, dict[str, Any]] = {
    "gemma2": {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 96},
    "recurrent_gemma": {"num_attention_heads": 2, "intermediate_size": 192, "lru_width": 64, "num_hidden_layers": 3},
    "xlstm": {"num_heads": 4, "chunk_size": 16},
}
USUAL = {
    "hidden_size": 64,
    "vocab_size": 96,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 4,
}


def network(family: str, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(USUAL | SIZES[family]))
    made = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()
    with torch.no_grad():  # a cap of 30 moves logits of 3 by less than bf16 rounds, and larger ones by much
        largest = made(input_ids=torch.arange(8)[None], use_cache=False).logits.abs().max()
        made.get_output_embeddings().weight.mul_(3 / largest)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", SIZES)
def test_a_cap_is_found_by_every_name(family: str, dtype: torch.dtype) -> None:
    head = find_head(network(family, dtype))
    assert head is not None
    assert head.softcap == 30.0


@pytest.mark.parametrize("family", SIZES)
def test_a_cap_of_a_name_that_nobody_knows_is_seen_in_the_logits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "CAPS", ())
    assert find_head(network(family, torch.float32)) is None
