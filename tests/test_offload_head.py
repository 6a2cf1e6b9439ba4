"""The output head on the host: the same loss and gradients to the bit, alone, tied, and in FP8."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nets
import pytest
import tiny
import torch
from tiny import plan

from whet.base.errors import UserError
from whet.engine.compute.head import find_head
from whet.engine.memory.host_tables import HostTensors, OffloadedEmbedding, OffloadedHead, offload_embedding
from whet.methods.layers.fuse import fuse
from whet.recipe import Parsed, parse
from whet.training.run import train

Make = Callable[..., Parsed]
KINDS = ["Llama", "Gemma2", "GPT2"]


def loss_and_gradients(kind: str, *, tied: bool, away: bool, fp8: bool = False) -> tuple[Any, dict[str, torch.Tensor]]:
    net = nets.network(kind, tie_word_embeddings=tied).eval()
    head = find_head(net)
    assert head is not None
    model = nets.adapted(net)
    if kind == "GPT2":  # it has dropout of its own
        model.eval()
    fused = fuse(model, compute=torch.float32)
    if fp8:
        head = head.in_fp8(net, both_orders=False)
    if away:
        head = head.on_host(net)
        assert not list(head.output.parameters())
        assert isinstance(head.output, OffloadedHead)
        assert isinstance(net.get_input_embeddings(), OffloadedEmbedding) == tied
    fused.refresh()
    tokens = nets.ids()
    places = torch.arange(tokens.numel() - 1)
    inputs = {"input_ids": tokens, "use_cache": False}
    loss = sum(head.losses(inputs, places, tokens.flatten()[1:]).sum() for _ in range(2))
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    return loss.item(), {name: g.clone() for name, g in nets.gradients(model).items()}


@pytest.mark.parametrize("fp8", [False, True], ids=["plain", "fp8"])
@pytest.mark.parametrize("tied", [False, True], ids=["alone", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_head_on_the_host_changes_no_bit(kind: str, tied: bool, fp8: bool) -> None:
    loss, gradients = loss_and_gradients(kind, tied=tied, away=False, fp8=fp8)
    found, theirs = loss_and_gradients(kind, tied=tied, away=True, fp8=fp8)
    assert found == loss
    assert gradients.keys() == theirs.keys()
    assert all(torch.equal(gradients[name], theirs[name]) and bool(gradients[name].any()) for name in gradients)


def test_a_head_that_came_incomplete_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = loss_and_gradients("Llama", tied=False, away=False)[0]
    call = HostTensors.call

    def short(self: HostTensors) -> None:
        call(self)
        assert self._coming is not None
        self._coming[0][-1].zero_()

    monkeypatch.setattr(HostTensors, "call", short)
    assert loss_and_gradients("Llama", tied=False, away=True)[0] != right


def test_whoever_calls_the_head_gets_its_logits_and_names_stay() -> None:
    for fp8 in (False, True):
        net, plain = (nets.network("Llama", tie_word_embeddings=False).eval().requires_grad_(False) for _ in range(2))
        names = set(plain.state_dict())
        head, exact = find_head(net), find_head(plain)
        assert head is not None
        assert exact is not None
        if fp8:
            head, exact = (one.in_fp8(of, both_orders=True) for one, of in ((head, net), (exact, plain)))
            names = set(plain.state_dict())
        head = head.on_host(net)
        assert set(net.state_dict()) == names
        assert torch.equal(net(input_ids=nets.ids()).logits, plain(input_ids=nets.ids()).logits)
        assert head.away is not None
        assert len(head.away.tensors) == (3 if fp8 else 1)
        on_host = {t.data_ptr() for t in net.get_output_embeddings().state_dict().values()}
        travels = {t.data_ptr() for t in head.away.tensors}
        assert len(on_host & travels) == (2 if fp8 else 1), "kept twice"


def test_it_is_gone_while_the_decoder_is_differentiated() -> None:
    net = nets.network("Llama", tie_word_embeddings=False).eval()
    head = find_head(net)
    assert head is not None
    nets.adapted(net)
    head = head.on_host(net)
    assert head.away is not None
    losses = head.losses({"input_ids": nets.ids()}, torch.arange(4), torch.arange(4))
    assert head.away._coming is None
    kept: list[Any] = []

    def walk(node: Any) -> None:
        kept.extend(t for t in getattr(node, "saved_tensors", ()) if t is not None)
        for following, _ in getattr(node, "next_functions", ()):
            if following is not None:
                walk(following)

    assert losses.grad_fn is not None
    kept.extend(t for t in losses.grad_fn.saved_tensors if t is not None)  # type: ignore[attr-defined]
    assert kept
    assert all(t.shape != (nets.VOCABULARY, 64) for t in kept)


def test_a_trained_head_stays() -> None:
    net = nets.network("Llama", tie_word_embeddings=False).eval()
    head = find_head(net)
    assert head is not None
    with pytest.raises(ValueError, match="trained"):
        head.on_host(net)


def test_a_run_is_the_same_run(recipe: Make) -> None:
    """On a tied model, whose embedding goes with the head; beside offload_embedding, which alone would be refused."""
    settings = {"train__max_steps": 2, "data__val_size": 4}
    expected = train(recipe("plain", **settings))
    for name, more in (("head", {}), ("both", {"base__offload_embedding": True})):
        found = train(recipe(name, base__offload_head=True, **more, **settings))
        assert found.metrics.read_bytes() == expected.metrics.read_bytes()
    arranged = tiny.built(recipe("again", base__offload_head=True))
    assert arranged.objective.head is not None
    assert arranged.objective.head.away is not None
    assert offload_embedding(arranged.network) == 0


@pytest.mark.parametrize(
    ("more", "said"),
    [({"method.name": "head"}, "trained"), ({"method.name": "full"}, "trained"),
     ({"method__modules_to_save": ["lm_head"]}, "trained"), ({"method.name": "prompt"}, "padding")],
    ids=str,
)  # fmt: skip
def test_where_it_cannot_be_it_is_refused_before_anything_is_loaded(more: Any, said: str, recipe: Make) -> None:
    if more.get("method.name") in ("head", "prompt"):
        given = tiny.settings(Path("builtin:tiny"), Path("rows"), Path("out"), base__offload_head=True, **more)
        del given["method.r"]
        parsed = parse(None, tiny.words(given))
    else:
        parsed = recipe(base__offload_head=True, **more)
    with pytest.raises(UserError) as refused:
        plan(parsed.recipe)
    assert refused.value.field == "base.offload_head"
    assert said in str(refused.value)


def test_the_plan_counts_what_waits_on_the_host(recipe: Make) -> None:
    few = {"train.per_device_train_batch_size": 1, "train.gradient_accumulation_steps": 1, "data.max_length": 16}
    plain = plan(recipe(**few).recipe)  # with more tokens a layer's backward pass takes more than the head, later
    assert plain["host_bytes"] == 0
    table = tiny.VOCABULARY * 64 * 4
    away = plan(recipe(base__offload_head=True, **few).recipe)
    assert plain["memory"]["frozen weights"] - away["memory"]["frozen weights"] == table
    assert away["memory"]["logits"] - plain["memory"]["logits"] == table
    assert table <= away["host_bytes"] <= 4 * table
    wide = {"method.name": "full", "base__compute": "bf16"}
    full, hosted = plan(recipe(**wide).recipe), plan(recipe(train__offload_optimizer=True, **wide).recipe)
    count = full["trainable_params"]
    assert full["memory"]["optimiser"] == 8 * count
    assert hosted["memory"]["optimiser"] == 0
    linears = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert full["memory"]["trained weights"] - hosted["memory"]["trained weights"] == 2 * linears
    assert hosted["host_bytes"] >= 16 * count
    assert hosted["peak_bytes"]["train"] < full["peak_bytes"]["train"]
    assert replace(recipe().recipe.train, offload_optimizer=None).offload_optimizer is None
