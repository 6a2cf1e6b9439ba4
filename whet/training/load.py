"""The model to train: seeded, loaded, its method attached, and its attention proven before the first step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from whet.adapters.further import start_directory
from whet.base.console import say
from whet.base.errors import UserError
from whet.base.seed import seed_everything
from whet.engine.compute.isolation import check_causality, check_isolation, knows_documents
from whet.engine.compute.probe import sees_padding
from whet.engine.compute.proven_attention import attention_notice, attention_to_name
from whet.engine.compute.readable import check_trainable
from whet.engine.load.identity import base_identity, check_base
from whet.engine.load.load import load_model, rebuilding_notice
from whet.engine.memory.host_adam import shorten_weights
from whet.engine.weights.linear import count_parameters
from whet.methods.targets import left_alone_notices
from whet.planning.unfit import check_beside, check_moved
from whet.recipe import resolve
from whet.runs import IDENTITY
from whet.training.apply import Loaded
from whet.training.setup import Ready, plan_of


def load(ready: Ready) -> tuple[Loaded, Ready]:
    """Load the model of a run and attach its method; returns it with the run, which may have been laid out anew.

    Raises UserError for weights that cannot be used, and for a model that sees the tokens that it should predict.
    """
    recipe, placement, layout = ready.recipe, ready.plan.facts.placement, ready.plan.layout
    seed_everything(recipe.train.seed)
    home = placement
    if layout.short_weights and not recipe.model.from_config:  # random weights are drawn where they always are
        home = replace(placement, device=torch.device("cpu"))
    if notice := rebuilding_notice(recipe.model, home):
        say(notice, style="yellow")
    known = _check_base(ready)
    network = load_model(recipe.model, home, ready.plan.task)
    if not known:  # it was fetched just now
        _check_base(ready)
    check_trainable(network)
    named = attention_to_name(network) if recipe.method.can.whole_model else ""
    _check_ends(ready, network.get_input_embeddings().weight.shape[0])  # type: ignore[union-attr]
    if notice := attention_notice(network):
        say(notice, style="yellow")
    start = None if recipe.model.adapter is None else start_directory(recipe.model.adapter)
    if start is not None:
        recipe.method.make_room(network, start)
    model = recipe.method.attach(network, ready.plan.task)
    if start is not None:
        count = recipe.method.start_from(model, start)
        say(f"going on from {start}: {count} tensors, equal to the bit")
    for text in left_alone_notices(network):
        say(text, style="yellow")
    masters = shorten_weights(network, placement.device, placement.compute) if layout.short_weights else {}
    if not ready.plan.facts.padded_task:
        ready = _with_proven_attention(ready, model, network)
    elif ready.plan.task.name == "seq2seq":
        _check_padding(ready, network, masked=True)
    for notice in ready.plan.notices:
        say(notice, style="yellow")
    trainable, total = count_parameters(model)
    say(f"trainable parameters: {trainable:,} of {total:,} ({100 * trainable / total:.2f} %)")
    return Loaded(network, model.train(), masters, named), ready


def _check_base(ready: Ready) -> bool:
    """Compare the base with the one that the run began with, or record it; returns whether it is on this machine."""
    run, model = ready.run, ready.recipe.model
    recorded = run.read(IDENTITY)
    if recorded is not None:
        check_base(model, recorded)
        return True
    found = base_identity(model)
    if found is not None:
        run.write(IDENTITY, found)
    return found is not None


def _check_ends(ready: Ready, rows: int) -> None:
    """Refuse a tokenizer whose end of an answer is no token of the model."""
    tokenizer = ready.prepared.row_tokenizer
    beyond = [one for one in (tokenizer.stop_ids() if tokenizer.template is not None else []) if one >= rows]
    if beyond:
        raise UserError(
            "the token that ends an answer is none of the model's", field="model.tokenizer", found=str(beyond[0]),
            expected=f"0 to {rows - 1}", fix="give the tokenizer that belongs to the model",
        )  # fmt: skip


def _with_proven_attention(ready: Ready, model: torch.nn.Module, network: Any) -> Ready:
    """Refuse a model that sees ahead; where documents share a row and see each other, fall back to padded rows."""
    if ready.plan.facts.flat and not knows_documents(network):
        ready = _padded(ready, "its attention is not whet's, and knows no documents")
    placement, flat = ready.plan.facts.placement, ready.plan.facts.flat
    vocabulary = network.get_input_embeddings().weight.shape[0]
    autocast = placement.compute if placement.autocast else None
    check_moved(check_causality(model, vocabulary, flat=flat, autocast=autocast))
    if not flat:
        _check_padding(ready, network, masked=False)
        return ready
    isolation = check_isolation(model, vocabulary, autocast=autocast)
    return ready if isolation.holds else _padded(ready, f"logits moved by {isolation.moved:.2g}")


def _check_padding(ready: Ready, network: Any, *, masked: bool) -> None:
    """Raise UserError where rows of unlike length share a batch and the model does not keep them apart."""
    train = ready.recipe.train
    if train.per_device_train_batch_size > 1:
        check_beside(sees_padding(network, masked=masked), train)


def _padded(ready: Ready, reason: str) -> Ready:
    """The same run with a row for each document. Raises UserError where the recipe asks for shared rows."""
    origins = ready.run.read("origins.json") or {}
    if ready.prepared.bins is not None or origins["data.padding_free"]["origin"] != "decided":
        raise UserError(
            "the model lets documents that share a row see each other", field="data.packing",
            found=reason, expected="0", fix="data.packing=false data.padding_free=false",
        )  # fmt: skip
    say("the model's attention cannot keep documents apart in one row: training padded instead", style="yellow")
    recipe = resolve(ready.recipe, {"data.padding_free": False})
    facts = ready.plan.facts
    plan = plan_of(recipe, ready.prepared, facts.hardware, facts.placement)
    kept = {name: getattr(ready.plan.layout, name) for name in ("offload_optimizer", "short_weights")}  # done already
    plan = replace(plan, layout=replace(plan.layout, **kept))
    run = ready.run.rewritten(recipe, {"data.padding_free": (False, "the model did not pass the isolation check")})
    run.write("plan.json", plan.as_dict())
    return replace(ready, run=run, plan=plan)
