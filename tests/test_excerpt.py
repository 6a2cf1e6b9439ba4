"""What a family's code shows in one layer of random numbers, before its weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import whet
from whet.base.errors import UserError
from whet.engine.compute import excerpt as excerpts
from whet.engine.compute.excerpt import Shown, excerpt, shown_by_code
from whet.engine.compute.probe import sees_padding
from whet.engine.task import CAUSAL, Task

SIZES: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 64, "n_layer": 3, "n_head": 4, "vocab_size": 500, "pad_token_id": 3},
    "gpt_neo": {
        "hidden_size": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 500,
        "attention_types": [[["global", "local"], 1]],
    },
    "codegen": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "vocab_size": 500},
    "xlnet": {"d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 96, "vocab_size": 500},
    "rembert": {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 500,
        "input_embedding_size": 64, "output_embedding_size": 64, "is_decoder": True,
    },
    "llama": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96},
}  # fmt: skip


def empty(family: str, **changes: Any) -> Any:
    """A decoder without memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(SIZES[family] | changes)))


@pytest.mark.parametrize("family", ["bloom", "gpt_neo", "codegen"])
def test_a_decoder_shows_nothing(family: str) -> None:
    assert shown_by_code(empty(family), CAUSAL) == Shown()


@pytest.mark.parametrize("family", ["xlnet", "rembert"])
def test_one_that_sees_ahead_shows_it(family: str) -> None:
    assert shown_by_code(empty(family), CAUSAL).moved > 0.05


def test_a_rows_answer_beside_a_longer_one() -> None:
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    sizes = {"hidden_size": 64, "num_encoder_layers": 2, "num_decoder_layers": 2, "vocab_size": 90,
             "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4}  # fmt: skip
    with torch.device("meta"):
        network = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("prophetnet", **sizes))
    assert shown_by_code(network, Task("seq2seq")) == Shown(beside=True)


def test_a_family_whose_attention_can_be_chosen_is_asked_when_it_is_loaded() -> None:
    assert excerpt(empty("llama")) is None


def test_an_excerpt_has_one_layer_and_leaves_the_model_without_memory() -> None:
    network = empty("bloom")
    first: Any = excerpt(network)
    assert (len(first.transformer.h), len(network.transformer.h)) == (1, 3)
    assert all(parameter.is_meta for parameter in network.parameters())


def test_a_large_table_is_cut_and_a_large_layer_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    network = empty("bloom", vocab_size=100_000, pad_token_id=99_999)
    monkeypatch.setattr(excerpts, "MOST_NUMBERS", 100_000)
    first: Any = excerpt(network)
    assert first.get_input_embeddings().weight.shape[0] == excerpts.TOKENS
    assert first.config.get_text_config().pad_token_id == 0
    assert shown_by_code(network, CAUSAL) == Shown()
    monkeypatch.setattr(excerpts, "MOST_NUMBERS", 1_000)
    assert excerpt(network) is None


def test_a_mask_that_nobody_fills_is_no_ground_for_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-Neo has its causal mask in a buffer: were it left empty, every token would be seen."""
    network = empty("gpt_neo")
    monkeypatch.setattr(type(network), "initialize_weights", lambda self: None)
    assert excerpt(network) is None


def test_asking_draws_from_nobodys_random_numbers() -> None:
    before = torch.get_rng_state()
    shown_by_code(empty("bloom"), CAUSAL)
    assert torch.equal(before, torch.get_rng_state())


def test_a_config_that_names_no_padding_token_can_be_asked() -> None:
    first = excerpt(empty("codegen"))
    assert first is not None
    assert not hasattr(first.config, "pad_token_id")
    assert not sees_padding(first, masked=False)


def test_a_plan_needs_no_weights_to_refuse(tmp_path: Path) -> None:
    empty("xlnet").config.save_pretrained(str(tmp_path))
    with pytest.raises(UserError, match="sees the tokens that it should predict"):
        whet.plan(None, **{"model.path": str(tmp_path / "config.json"), "model.task": "causal", "data.dataset": "x"})
