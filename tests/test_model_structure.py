"""What is read from a model's structure and config: sizes, targets, token types, poolers, ids, padding in answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import task_nets
import tiny
import torch
from torch import nn

import whet
from whet.base.errors import UserError
from whet.engine.answer.proof import find_generation_fault, mixes_rows
from whet.engine.answer.static_cache import generation_bytes
from whet.engine.sizes import sizes_of
from whet.engine.task import reads_types
from whet.engine.weights.linear import is_linear, linear_names
from whet.methods.targets import find_targets, left_alone_notices
from whet.planning.costs import layer_shape

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 96, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 2, "eos_token_id": 4,
}  # fmt: skip
LAYERS = {"layer_types": ["sliding_attention", "full_attention"] * 2, "vocab_size_per_layer_input": 96,
          "hidden_size_per_layer_input": 8}  # fmt: skip
MAMBA = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 96, "state_size": 8, "pad_token_id": 0}
CONFIGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "heads of two widths": ("gemma4_text", LAYERS | {"global_head_dim": 32}, {"head_dim": 32, "layers": 4}),
    "a list of widths": ("gemma3n_text", LAYERS | {"intermediate_size": [96, 128, 96, 64], "num_kv_shared_layers": 0},
                         {"intermediate": 128}),
    "other names": ("gpt2", {"n_embd": 64, "n_layer": 3, "n_head": 4}, {"hidden": 64, "layers": 3}),
    "no heads": ("mamba", MAMBA, {"heads": None, "head_dim": None, "layers": 2}),
    "an encoder-decoder": ("bart", {"d_model": 64, "decoder_layers": 3, "decoder_ffn_dim": 80}, {"layers": 3}),
}  # fmt: skip


def config(family: str, sizes: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **(SIZES | sizes if family.startswith("gemma") else sizes))


@pytest.mark.parametrize("case", CONFIGS)
def test_sizes_are_read_whatever_their_form(case: str) -> None:
    family, sizes, expected = CONFIGS[case]
    found = sizes_of(config(family, sizes))
    assert {name: getattr(found, name) for name in expected} == expected
    assert layer_shape(config(family, sizes)).kept_bytes > 0


@pytest.mark.parametrize("value", [None, 0, -1])
def test_a_size_of_nothing_is_unknown_and_stops_no_plan(value: int | None) -> None:
    class Odd:
        hidden_size, num_attention_heads, intermediate_size, num_hidden_layers = 32, value, value, value

        def get_text_config(self, decoder: bool = False) -> Odd:
            return self

    found = sizes_of(Odd())
    assert (found.heads, found.intermediate, found.layers) == (None, 128, 1)


def causal(family: str, sizes: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    made = AutoConfig.for_model(family, **(SIZES | sizes))
    return AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()


def test_memory_of_answers_is_counted_for_a_model_without_heads() -> None:
    assert generation_bytes(causal("mamba", MAMBA), 2, 100) > 0


class Doubled(nn.Linear):
    """A linear layer that is none."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class Same(nn.Linear):
    """One that computes the same by another line."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input @ self.weight.T + self.bias


def test_only_what_computes_a_linear_product_is_linear() -> None:
    assert [is_linear(kind(4, 3)) for kind in (nn.Linear, Same, Doubled)] == [True, True, False]
    with torch.device("meta"):
        assert is_linear(Same(4, 3)), "a plan and a run must agree"


def test_a_router_is_no_target() -> None:
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 96}
    model = causal("llama4_text", experts | {"num_hidden_layers": 2})
    assert any("router" in name for name, _ in model.named_modules())
    assert not [name for name in linear_names(model) if "router" in name]


def test_a_weight_that_is_read_past_its_layer_is_no_target() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.attention = nn.Linear(8, 8), nn.MultiheadAttention(8, 2)

        def get_output_embeddings(self) -> None:
            return None

    assert linear_names(Net()) == ["first"]


def test_what_peft_refuses_in_a_family_is_left_out_and_said() -> None:
    model = causal("mamba", MAMBA)
    names = find_targets(model, "all-linear")
    assert names
    assert not [name for name in names if name.endswith("out_proj")]
    assert "out_proj" in " ".join(left_alone_notices(model))


def test_layers_that_a_recipe_names_against_peft_are_a_clear_error() -> None:
    from whet.methods.lora import Lora

    with pytest.raises(UserError, match="PEFT cannot put lora on this model"):
        Lora(target_modules=["out_proj"]).attach(causal("mamba", MAMBA))


def test_all_linear_stays_in_the_text_model() -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = SIZES | {"num_hidden_layers": 2, "sliding_window": 8}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 8}  # fmt: skip
    with torch.device("meta"):
        model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision))
    assert any("vision_tower" in name for name in linear_names(model))
    names = find_targets(model, "all-linear")
    assert names
    assert all("language_model" in name for name in names)
    assert "text part" in left_alone_notices(model)[0]


@pytest.mark.parametrize(("kind", "reads"), [("Bert", True), ("GPT2", False), ("Roberta", False), ("Llama", False)])
def test_token_types_go_to_models_that_have_a_table_of_them(kind: str, reads: bool) -> None:
    from transformers import AutoModelForSequenceClassification

    assert reads_types(AutoModelForSequenceClassification.from_config(task_nets.config(kind))) is reads


def test_prediction_gives_a_model_what_training_gave_it() -> None:
    """GPT-2 has an input for token types and no table of them: it would add the embedding of token 0."""
    from transformers import AutoModelForSequenceClassification

    from whet.engine.answer.logits import LabelSession

    model = AutoModelForSequenceClassification.from_config(task_nets.config("GPT2", pad_token_id=0)).eval()
    rows = [np.arange(6, 12), np.arange(7, 10)]
    with LabelSession(model) as session:
        given = session.logits(rows, [np.zeros_like(row) for row in rows], batch_size=2)
        plain = session.logits(rows, batch_size=2)
    np.testing.assert_array_equal(given, plain)


def test_a_pooler_that_the_checkpoint_lacks_starts_new_and_is_trained(tmp_path: Path) -> None:
    from transformers import BertForMaskedLM

    torch.manual_seed(0)
    place = tmp_path / "model"
    BertForMaskedLM(task_nets.config("Bert")).save_pretrained(str(place))
    task_nets.tokenizer("Bert").save_pretrained(str(place))
    data = task_nets.write(tmp_path / "rows.jsonl", task_nets.rows("classification"))
    settings = tiny.settings(place, data, tmp_path / "run", train__max_steps=2)
    run = whet.train(None, **settings)
    saved = (run.adapter / "adapter_config.json").read_text(encoding="utf-8")
    assert "bert.pooler" in saved
    said = whet.predict(run.path, ["good film"])
    assert said == whet.predict(run.path, ["good film"]), "what was trained is what is opened"


def test_an_id_without_a_row_is_named_before_a_model_is_loaded(tmp_path: Path) -> None:
    place = tiny.save_model(tiny.llama(vocab_size=1000), tmp_path / "model")
    (place / "model.safetensors").unlink()
    data = tiny.write_rows(tmp_path / "rows.jsonl", tiny.rows())
    with pytest.raises(UserError, match="no row in the model's embedding") as caught:
        whet.train(None, **tiny.settings(place, data, tmp_path / "run"))
    assert "row" in str(caught.value.found)
    assert "999" in str(caught.value.expected) or "1000" in str(caught.value.expected)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("family", "mixes"), [("llama", False), ("mamba", False), ("blenderbot", True)])
def test_rows_that_change_each_other_are_found(family: str, mixes: bool) -> None:
    learned = {"d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 96, "init_std": 0.2}
    learned |= {"is_decoder": True, "is_encoder_decoder": False}  # its positions are those of the columns
    sizes = {"mamba": MAMBA, "blenderbot": learned}
    model = causal(family, sizes.get(family, {}) | {"initializer_range": 0.2})
    assert mixes_rows(model) is mixes


def test_a_generate_that_counts_positions_otherwise_is_found() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    made = AutoConfig.for_model("roberta", **(SIZES | {"is_decoder": True, "initializer_range": 0.2}))
    assert "forward pass" in find_generation_fault(AutoModelForCausalLM.from_config(made).eval())
    assert find_generation_fault(causal("llama", {"initializer_range": 0.2})) == ""


@pytest.mark.parametrize(("family", "word"), [("mistral3", "AutoModelForCausalLM"), ("bert", "an encoder")])
def test_the_refusal_of_a_task_says_what_is_missing(family: str, word: str) -> None:
    from transformers import AutoConfig

    made = AutoConfig.for_model(family)
    with pytest.raises(UserError, match="cannot be trained for the task") as caught:
        refuse(made)
    assert word in str(caught.value.found)
    assert caught.value.found != caught.value.expected


def refuse(made: Any) -> None:
    from whet.planning.asked import Asked
    from whet.planning.rules import TASK, check
    from whet.recipe import parse

    check(Asked.of(parse(None, []).recipe, config=made, task="causal"), TASK)
