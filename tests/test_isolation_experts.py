"""The isolation check on mixtures of experts: what rounding does is excused, what a neighbour does is not.

An expert multiplies all its tokens at once, so a neighbour's tokens change how a document's products are rounded. Such
models are trained on documents that share a row, and the losses are those of padded rows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_experts
import tiny
import torch
from torch import nn

from whet.engine.compute.attention import ATTENTION
from whet.engine.compute.isolation import check_isolation
from whet.training.run import train

FAINT = 3e-7  # of what attention gives out: below what rounding does to the logits of a mixture


def model(kind: str) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**test_experts.SIZES) if kind == "llama" else test_experts.config(kind)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=ATTENTION).eval()


def beside(strength: float) -> Callable[..., Any]:
    """A hook after attention that lets every token see the first of the row, as a sink or a shared state would."""
    return lambda module, inputs, output: (output[0] + strength * output[0][:, :1], *output[1:])


def rounded(module: Any, inputs: Any, output: Any) -> Any:
    """What other shapes of products do on some processors: the row's first token moves the last bits, and no more."""
    hidden = output[0] if isinstance(output, tuple) else output
    hidden = hidden * (1 + 2e-7 * hidden.detach()[:, :1].sign())
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


class Changed(nn.Module):
    """A model that hands on something else than it is given."""

    def __init__(self, network: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        super().__init__()
        self.network, self.change = network, change
        self.get_input_embeddings = network.get_input_embeddings

    def forward(self, **inputs: Any) -> Any:
        return self.network(**(inputs | self.change(inputs)))


FAULTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "documents lost": lambda inputs: {"documents": None},
    "positions wrong": lambda inputs: {"position_ids": 2 * inputs["position_ids"]} if "documents" in inputs else {},
}


@pytest.mark.parametrize("length", [12, 17, 40])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3"])
def test_mixtures_keep_documents_apart(kind: str, length: int) -> None:
    found = check_isolation(model(kind), tiny.VOCABULARY, length=length)
    assert found.moved < 1e-5 * found.scale
    assert found.holds


@pytest.mark.parametrize("kind", ["llama", "mixtral", "qwen3"])
def test_rounding_is_no_leak(kind: str) -> None:
    network = model(kind)
    network.model.layers[0].mlp.register_forward_hook(rounded)
    found = check_isolation(network, tiny.VOCABULARY)
    assert 0.0 < found.moved < 1e-5 * found.scale
    assert found.reached == 0.0
    assert found.holds


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("strength", [FAINT, 1e-3, 1.0])
@pytest.mark.parametrize("kind", ["llama", "mixtral", "qwen3"])
def test_a_neighbour_that_is_seen_is_found_however_faint(
    kind: str, strength: float, autocast: torch.dtype | None
) -> None:
    """In short types a leak below their precision moves nothing at all; there only one that rounding could hide."""
    if autocast is not None:
        strength = max(strength, 1e-3)
    network = model(kind)
    assert check_isolation(network, tiny.VOCABULARY, autocast=autocast, length=17).holds
    network.model.layers[0].self_attn.register_forward_hook(beside(strength))
    assert not check_isolation(network, tiny.VOCABULARY, autocast=autocast, length=17).holds


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", ["llama", "mixtral", "qwen3"])
def test_lost_documents_and_wrong_positions_are_found(kind: str, fault: str) -> None:
    network = model(kind)
    assert check_isolation(Changed(network, lambda inputs: {}), tiny.VOCABULARY).holds
    assert not check_isolation(Changed(network, FAULTS[fault]), tiny.VOCABULARY).holds


@pytest.mark.parametrize("broken", ["embeddings", "backward"])
def test_a_mixture_that_cannot_be_asked_is_not_trusted(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = model("mixtral")
    network.model.layers[0].mlp.register_forward_hook(rounded)
    assert check_isolation(network, tiny.VOCABULARY).holds
    if broken == "embeddings":
        monkeypatch.setattr(network, "get_input_embeddings", lambda: None)
    else:  # as an operator without a derivative does
        network.model.norm.register_forward_hook(lambda module, inputs, output: output.detach())
    assert not check_isolation(network, tiny.VOCABULARY).holds


@pytest.mark.parametrize("training", [True, False])
def test_the_check_leaves_no_trace(training: bool) -> None:
    network = model("mixtral").train(training)
    network.model.layers[0].mlp.register_forward_hook(rounded)
    assert check_isolation(network, tiny.VOCABULARY).reached == 0.0
    assert network.training is training
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not network.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("kind", ["mixtral", "qwen3"])
def test_experts_learn_the_same_from_shared_and_from_padded_rows(kind: str, tmp_path: Path) -> None:
    directory = tiny.save_model(test_experts.config(kind), tmp_path / "model")
    data = tiny.write_rows(tmp_path / "rows.jsonl", tiny.rows(24))
    losses, changes = {}, {"train__max_steps": 4, "data__val_size": 6, "train__per_device_train_batch_size": 6}
    for flat in (None, False):
        out = tmp_path / f"run-{flat}"
        run = train(tiny.recipe(directory, data, out, data__padding_free=flat, **changes))
        assert run.recipe.data.padding_free is (flat is None), "mixtures are trained without padding"
        losses[flat] = [line.get("loss", line.get("eval_loss")) for line in run.lines("metrics.jsonl")]
    assert len(losses[None]) >= 5
    assert losses[None] == pytest.approx(losses[False], rel=2e-6)
