"""whet's attention is used only where it computes what the model's own does, however far away a window ends.

The judge is the eager attention that the family is written in, one row at a time, in plain transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from transformers import AttentionInterface

from whet.base.errors import UserError
from whet.engine.answer.session import DecoderSession
from whet.engine.compute import proven_attention
from whet.engine.compute.attention import ATTENTION, attend
from whet.engine.compute.probe import sees_padding
from whet.engine.compute.proven_attention import attention_notice, prove_attention
from whet.engine.config import Base, Model
from whet.engine.load.load import load_model
from whet.engine.load.open import answering_placement
from whet.engine.task import Task

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 20000, "initializer_range": 0.2,
    "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
LLAMA4 = {"head_dim": 8, "intermediate_size_mlp": 48, **EXPERTS}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 0.5}
# family: (sizes, what the reason says; None where whet's attention is right)
FAMILIES: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "a window in the mask alone": ("phimoe", {"sliding_window": 16, **EXPERTS}, "windows"),
    "such a window of 8,192": ("phimoe", {"sliding_window": 8192, **EXPERTS}, "windows"),
    "chunks": ("llama4_text", {"attention_chunk_size": 16, **LLAMA4}, "windows"),
    "chunks of 8,192": ("llama4_text", {"attention_chunk_size": 8192, **LLAMA4}, "windows"),
    "no window": ("llama", {}, None),
    "a window that layers pass on": ("mistral", {"sliding_window": 16}, None),
    "such a window of 4,096": ("mistral", {"sliding_window": 4096}, None),
    "a cap and windows": ("gemma2", {"sliding_window": 16, **GEMMA}, None),
}  # fmt: skip


def config(family: str, sizes: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **(SIZES | sizes))


def network(family: str, sizes: dict[str, Any], attention: str = ATTENTION) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        config(family, sizes), attn_implementation=attention, dtype=torch.float32
    ).eval()


@torch.inference_mode()
def logits(model: Any, tokens: int = 60) -> torch.Tensor:
    ids = torch.randint(3, SIZES["vocab_size"], (1, tokens), generator=torch.Generator().manual_seed(0))
    return model(input_ids=ids).logits


@pytest.mark.parametrize("case", FAMILIES)
def test_the_attention_is_the_models_own(case: str) -> None:
    family, sizes, reason = FAMILIES[case]
    model = network(family, sizes)
    said = prove_attention(model)
    used = model.config._attn_implementation
    assert (used == ATTENTION) is (reason is None)
    assert bool(said) is (reason is not None)
    if reason is not None:
        assert reason in said
        assert reason in str(attention_notice(model))
    ours = logits(model)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(ours, logits(model), atol=1e-4, rtol=1e-4)


def deep(family: str = "llama", sizes: dict[str, Any] | None = None) -> Any:
    """A bf16 model whose layers stir so much that two right ways end in other logits."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = SIZES | {"num_hidden_layers": 24, "initializer_range": 0.3} | (sizes or {})
    return AutoModelForCausalLM.from_config(
        config(family, sizes), attn_implementation=ATTENTION, dtype=torch.bfloat16
    ).eval()


def test_rounding_in_a_deep_model_is_no_other_attention() -> None:
    model = deep()
    ours = logits(model).float()
    assert prove_attention(model) == ""
    assert model.config._attn_implementation == ATTENTION
    model.set_attn_implementation("eager")
    own = logits(model).float()
    assert float((ours - own).abs().flatten(1).amax(1).median()) > 0.05 * float(own.abs().max())


@pytest.mark.parametrize("fault", ["scale", "half the heads", "keys", "who sees whom"])
def test_another_attention_is_seen_in_a_deep_bf16_model(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted faults: whet's attention computes something else in one layer of 24."""
    right, calls = proven_attention.ATTENTION, []

    def wrong(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: Any = None, **more: Any) -> Any:
        calls.append(module.layer_idx)
        from whet.engine.compute.attention import attend

        if module.layer_idx != 13:
            return attend(module, query, key, value, mask, scaling, **more)
        if fault == "scale":
            scaling = 0.5 * scaling
        if fault == "keys":
            key = key.roll(1, dims=2)
        if fault == "who sees whom":
            key, value = key.roll(-1, dims=2), value.roll(-1, dims=2)
        output, weights = attend(module, query, key, value, mask, scaling, **more)
        if fault == "half the heads":
            output = output.clone()
            output[:, :, ::2] = 0
        return output, weights

    AttentionInterface.register("wrong", wrong)
    monkeypatch.setattr(proven_attention, "ATTENTION", "wrong")
    monkeypatch.setattr(proven_attention, "_unlike", lambda model: iter(()))
    model = deep()
    model.set_attn_implementation("wrong")
    assert "layer's output" in prove_attention(model)
    assert 13 in calls
    assert model.config._attn_implementation == "sdpa"
    assert right == ATTENTION


@pytest.mark.parametrize("case", ["a window in the mask alone", "chunks"])
def test_without_the_proof_the_logits_would_be_others(case: str) -> None:
    """The fault itself: what the proof is for."""
    family, sizes, _ = FAMILIES[case]
    model = network(family, sizes)
    ours = logits(model)
    model.set_attn_implementation("eager")
    assert float((ours - logits(model)).abs().max()) > 0.01


def test_the_rule_is_asked_and_not_only_a_short_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: only logits are compared, of a row that no long window cuts."""
    family, sizes, _ = FAMILIES["such a window of 8,192"]
    monkeypatch.setattr(proven_attention, "_unlike", lambda model: iter(()))
    assert prove_attention(network(family, sizes)) == ""


def test_a_model_is_loaded_and_answers_with_a_proven_attention(tmp_path: Path) -> None:
    family, sizes, _ = FAMILIES["a window in the mask alone"]
    place = tiny.save_model(config(family, sizes | {"vocab_size": tiny.VOCABULARY}), tmp_path / "model")
    model = Model(path=str(place))
    loaded = load_model(model, answering_placement(model, Base(device="cpu")))
    assert "windows" in str(attention_notice(loaded))
    prompt = [int(i) for i in torch.randint(3, 60, (40,), generator=torch.Generator().manual_seed(1))]
    with DecoderSession(loaded) as session:
        answer = session.answer([prompt], stop_ids=[], max_new_tokens=4, batch_size=1)[0]
    loaded.set_attn_implementation("eager")
    exact = list(prompt)
    with torch.inference_mode():
        for _ in range(4):
            exact.append(int(loaded(input_ids=torch.tensor([exact]), use_cache=False).logits[0, -1].argmax()))
    assert answer == exact[40:]


@pytest.mark.parametrize(
    ("keywords", "word"),
    [({"position_bias": torch.zeros(1)}, "position_bias"), ({"s_aux": torch.zeros(1)}, "s_aux"),
     ({"indices": torch.zeros(1)}, "indices"), ({"is_causal": False}, "is_causal"), ({"head_mask": 1}, "head_mask")],
)  # fmt: skip
def test_a_keyword_that_changes_scores_is_an_error(keywords: dict[str, Any], word: str) -> None:
    tensor = torch.randn(1, 2, 5, 8)
    with pytest.raises(TypeError, match=word):
        attend(nn.Module(), tensor, tensor, tensor, None, **keywords)


def test_a_keyword_that_changes_nothing_is_none(model_dir: Path) -> None:
    tensor = torch.randn(1, 2, 5, 8)
    plain, _ = attend(nn.Module(), tensor, tensor, tensor, None)
    more, _ = attend(nn.Module(), tensor, tensor, tensor, None, position_ids=tensor, is_causal=True, s_aux=None)
    assert torch.equal(plain, more)
    assert plain.is_contiguous(), "as transformers' own attentions return it: some families view it"


def test_a_labelled_model_keeps_its_cap(tmp_path: Path) -> None:
    """torch's attention leaves out Gemma 2's cap; a head for labels reads what the capped layers give."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    made = config("gemma2", FAMILIES["a cap and windows"][1] | {"num_labels": 2})
    AutoModelForSequenceClassification.from_config(made, dtype=torch.float32).save_pretrained(str(tmp_path))
    model = Model(path=str(tmp_path))
    task = Task("classification", ("a", "b"))
    loaded = load_model(model, answering_placement(model, Base(device="cpu")), task)
    ours = logits(loaded)
    plain = AutoModelForSequenceClassification.from_pretrained(str(tmp_path), attn_implementation="eager").eval()
    torch.testing.assert_close(ours, logits(plain), atol=1e-5, rtol=1e-4)


def labelled(family: str, **changes: Any) -> Any:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    sizes = SIZES | {"max_position_embeddings": 256, "num_labels": 2} | changes
    from transformers import AutoConfig

    return AutoModelForSequenceClassification.from_config(AutoConfig.for_model(family, **sizes)).eval()


@pytest.mark.parametrize(("family", "seen"), [("bert", False), ("fnet", True), ("llama", False)])
def test_padding_that_an_answer_depends_on_is_found(family: str, seen: bool) -> None:
    assert sees_padding(labelled(family)) is seen


@pytest.mark.parametrize("case", ["chunks", "chunks of 8,192"])
def test_documents_share_a_row_only_with_whets_attention(case: str, tmp_path: Path, data_file: Path) -> None:
    """Chunks of the model's own attention are counted from the start of the row, not of the document. Long ones end
    behind the short rows of the isolation check, which sees nothing of them."""
    import whet

    family, sizes, _ = FAMILIES[case]
    place = tiny.save_model(config(family, sizes | {"vocab_size": tiny.VOCABULARY}), tmp_path / "model")
    settings = tiny.settings(place, data_file, tmp_path / "run", train__max_steps=1) | {
        "method.target_modules": "attention"
    }
    assert whet.train(None, **settings).recipe.data.padding_free is False
    with pytest.raises(UserError, match="share a row"):
        whet.train(None, **(settings | {"data.padding_free": True, "output_dir": str(tmp_path / "flat")}))
