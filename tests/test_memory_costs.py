"""What the memory modes cost, against the figures of an 8B model, and that the fastest mode that fits is chosen."""

from __future__ import annotations

import pytest
from test_memory_modes import CONFIGS, HIDDEN, LAYERS
from transformers import AutoModelForCausalLM, LlamaConfig

from whet.base.errors import UserError
from whet.engine.layers import decoder_layers
from whet.planning import costs

LLAMA_8B = costs.Sizes(hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_dim=128, layers=32)


def test_costs_at_llama_8b_width() -> None:
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8
    )
    assert costs.sizes_of(config) == LLAMA_8B
    assert LLAMA_8B.kept_bytes == pytest.approx(92 * 1024, rel=0.05)
    assert LLAMA_8B.input_bytes == 8 * 1024
    assert 32 * LLAMA_8B.layer_flops(0) == pytest.approx(13.96e9, rel=0.01)
    step = 32.2e9  # performance tables: forward and backward at rows of 2048 tokens, and 46.7e9 with full recompute
    again = costs.recompute_cost(LLAMA_8B, 1, 2048, 32).flops
    assert (step + again) / step == pytest.approx(1.45, rel=0.01)
    host = costs.offload_cost(LLAMA_8B, 1, 32)
    assert host.host_bytes == 31 * 8192
    assert host.transfer_bytes == 2 * host.host_bytes
    assert costs.embedding_cost(128256, 4096, 0).device_bytes == -128256 * 4096 * 2


@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_of_every_config(name: str) -> None:
    sizes = costs.sizes_of(CONFIGS[name]())
    assert (sizes.hidden, sizes.layers, sizes.head_dim, sizes.gated) == (HIDDEN, LAYERS, 8, name != "gpt2")
    model = AutoModelForCausalLM.from_config(CONFIGS[name]())
    layer = decoder_layers(model)[0]
    matrices = sum(p.numel() for p in layer.parameters() if p.dim() == 2)
    assert sizes.layer_flops(0) == 2 * matrices


def test_the_last_layer_is_not_worth_running_again() -> None:
    most, least = costs.Mode(32), costs.Mode(31)
    assert costs.peak_bytes(LLAMA_8B, 4096, least) < costs.peak_bytes(LLAMA_8B, 4096, most)


def test_choose_is_the_fastest_that_fits_and_monotone() -> None:
    tokens, chosen = 16384, []
    most = costs.keep_bytes(LLAMA_8B, tokens)
    for share in range(100, 0, -1):
        try:
            choice = costs.choose(most * share // 100, LLAMA_8B, tokens, 4096)
        except UserError:
            break
        assert choice.peak_bytes <= most * share // 100
        chosen.append(choice)
    flops = [choice.cost.flops for choice in chosen]
    assert flops == sorted(flops)
    layers = [choice.mode.recompute for choice in chosen]
    assert layers == sorted(layers)
    assert chosen[0].mode == costs.Mode()
    assert len(set(layers)) > 20
    assert chosen[-1].mode.tile_tokens > 0
    assert any(choice.mode.offload and not choice.mode.tile_tokens for choice in chosen)
    needed = [costs.choose(most, LLAMA_8B, tokens * more, 4096).cost.flops for more in (1, 2, 3)]
    assert needed == sorted(needed)


def test_choose_keeps_to_what_is_allowed_and_to_the_host() -> None:
    tiled, offloaded = costs.Mode(31, tile_tokens=4096), costs.Mode(31, offload=True)
    free = costs.peak_bytes(LLAMA_8B, 65536, tiled)
    assert costs.choose(free, LLAMA_8B, 65536, 4096).mode == offloaded
    assert costs.choose(free, LLAMA_8B, 65536, 4096, host_bytes=0).mode == tiled
    assert costs.choose(free, LLAMA_8B, 65536, 4096, allow=costs.Mode(1, False, 1)).mode == tiled
    with pytest.raises(UserError, match="do not fit"):
        costs.choose(free, LLAMA_8B, 65536, 4096, allow=costs.Mode(1))
