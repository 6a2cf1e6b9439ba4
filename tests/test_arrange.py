"""Every setting of the arrangement does what it says as far as a CPU can show; what needs CUDA is in bad_recipes.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch._dynamo.exc import TorchDynamoException
from transformers import LlamaForCausalLM

from whet.data.batch.batches import Batches
from whet.data.batch.rows import Rows
from whet.engine.compute.compile import compile_layers
from whet.engine.memory.checkpointing import CheckpointedCall, decoder_layers
from whet.methods.layers.group import Group
from whet.methods.layers.lora_layer import LoraLinear
from whet.planning.costs import keep_bytes, sizes_of
from whet.recipe import Parsed
from whet.training.arrange import (
    MAX_COMPILED_FORMS,
    MAX_FORMS,
    Arrangement,
    _keeps,
    _most_forms,
    cut,
)
from whet.training.setup import build_model, get_ready

Make = Callable[..., Parsed]
FP8 = {"base__storage": "fp8", "base__compute": "fp8"}


def built(parsed: Parsed) -> tuple[Any, Arrangement]:
    model, _, arranged = build_model(get_ready(parsed))
    tiny.randomise_adapter(model)
    return model, arranged


def step(parsed: Parsed) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss of the first batch, and its gradients."""
    model, arranged = built(parsed)
    assert arranged.forward.prepare is not None
    arranged.forward.prepare()
    loss = arranged.forward.loss(model, arranged.batches.step(0)[0])
    loss.backward()
    return float(loss), tiny.gradients(model, arranged.matrices)


def groups(model: Any) -> list[Group]:
    return [layer.group for layer in model.modules() if isinstance(layer, LoraLinear) and layer.group is not None]


@pytest.mark.parametrize(
    ("changes", "mode"),
    [({}, (0, False, 0)), ({"train__gradient_checkpointing": False}, (0, False, 0)),
     ({"train__gradient_checkpointing": True}, (1, False, 0)), ({"train__activation_offload": True}, (1, True, 0)),
     ({"train__gradient_checkpointing": True, "train__activation_offload": False}, (1, False, 0)),
     ({"train__tile_mlp": 16}, (1, False, 16))],
    ids=str,
)  # fmt: skip
def test_the_memory_mode_is_the_one_that_is_asked_for(
    changes: dict[str, Any], mode: tuple[int, bool, int], recipe: Make
) -> None:
    model, arranged = built(recipe(**changes))
    assert tuple(arranged.facts["memory"][name] for name in ("recompute", "offload", "tile_tokens")) == mode
    layers: list[Any] = decoder_layers(model.base_model.model)
    calls = [layer._gradient_checkpointing_func for layer in layers if layer.gradient_checkpointing]
    assert len(calls) == mode[0]
    assert all(isinstance(call, CheckpointedCall) and (call.stash is not None) == mode[1] for call in calls)
    assert all(type(layer.mlp).__name__.startswith("Tiled") == bool(mode[2]) for layer in layers)


def test_fp8_multiplies_in_fp8_and_little_changes(recipe: Make) -> None:
    model, _ = built(recipe("fp8", **FP8))
    assert {group.kind for group in groups(model)} == {"fp8+fp8"}
    model, _ = built(recipe("stored", base__storage="fp8"))
    assert {group.kind for group in groups(model)} == {"fp8"}
    stored, _ = step(recipe("stored", base__storage="fp8"))
    computed, gradients = step(recipe("fp8", **FP8))
    assert 0 < abs(stored - computed) < 0.02 * stored
    assert all(bool(gradient.isfinite().all()) and bool(gradient.any()) for gradient in gradients.values())


def test_kept_in_both_orders_the_bytes_double_and_nothing_changes(recipe: Make) -> None:
    sizes, results = [], []
    for name, kept in (("once", False), ("twice", True)):
        made = recipe(name, base__keep_transposed=kept, **FP8)
        model, _ = built(made)
        sizes.append(sum(w.numel() for group in groups(model) for w in group.weights if w is not None and w.ndim == 2))
        results.append(step(made))
    assert sizes[1] == 2 * sizes[0]
    assert results[0][0] == results[1][0]
    assert all(torch.equal(one, results[1][1][name]) for name, one in results[0][1].items())


def test_the_head_in_fp8_is_another_head(recipe: Make) -> None:
    plain, _ = step(recipe("plain", **FP8))
    quantised, _ = step(recipe("head", base__fp8_head=True, **FP8))
    assert 0 < abs(plain - quantised) < 0.02 * plain


@pytest.mark.parametrize(
    ("size", "accumulate", "room", "expected"),
    [(2, 4, 1 << 20, (8, 1)), (2, 4, 8192, (4, 2)), (8, 1, 8192, (4, 2)), (8, 1, 16384, (8, 1)), (8, 1, 4096, (2, 4)),
     (8, 1, 2048, (8, 1)), (1, 8, 2048, (1, 8)), (2, 4, 0, (2, 4))],
)  # fmt: skip
def test_a_step_is_cut_into_what_fits(size: int, accumulate: int, room: int, expected: tuple[int, int]) -> None:
    parts = ((index, np.full(2048, 5, np.int32), np.ones(2048, bool)) for index in range(20))
    batches = Batches(Rows.gather(parts), None, size=size, accumulate=accumulate, flat=True, seed=3)
    found = cut(batches, lambda candidate: int(candidate.facts(1).tokens.max()) <= room, 2)
    assert (found.size, found.accumulate) == expected
    for step in range(3):  # the last window holds four rows alone
        before, after = ([source for batch in made.step(step) for source in batch.sources] for made in (batches, found))
        assert before == after


def test_one_form_where_the_memory_of_two_is_not_there() -> None:
    """Sixteen rows of unequal length are wanted in two forms; what they keep fits once, twice, or not at all."""
    lengths = [256] * 8 + [2048] * 8
    parts = ((i, np.full(n, 5, np.int32), np.ones(n, bool)) for i, n in enumerate(lengths))
    batches = Batches(Rows.gather(parts), None, size=1, accumulate=1, flat=True, seed=3)
    network = LlamaForCausalLM(tiny.llama())
    once = int(_keeps(batches, True)[0] * keep_bytes(sizes_of(network.config), 2048))
    found = [_most_forms(batches, network, free, True, 16) for free in (None, 3 * once, once + 1, 0)]
    assert found == [MAX_FORMS, MAX_COMPILED_FORMS, 1, 1]


def test_layers_that_cannot_be_compiled_run_as_they_are(recipe: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """The first step falls back and says so; a run that compiles nothing hides no failure."""
    model, arranged = built(recipe())
    calls: list[Any] = []

    def once() -> str:
        calls.append([layer._compiled_call_impl for layer in decoder_layers(model.base_model.model)])
        if len(calls) == 1:
            raise TorchDynamoException("no such thing as this loop")
        return "done"

    with pytest.raises(TorchDynamoException):
        arranged.first(once)
    calls.clear()
    compile_layers(model.base_model.model)
    assert replace(arranged, facts=arranged.facts | {"compile": True}).first(once) == "done"
    assert all(calls[0])
    assert not any(calls[1])
    assert "no such thing as this loop" in capsys.readouterr().err
