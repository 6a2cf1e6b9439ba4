"""Choice of a run's objective: the only file of training that tells tasks apart."""

from __future__ import annotations

from typing import Any

from whet.base.errors import UserError
from whet.engine.compute.head import find_head
from whet.engine.compute.probe import sees_padding
from whet.engine.device import Placement
from whet.engine.task import Task, kind_of, reads_types, takes
from whet.training.objective.labels import LabelObjective
from whet.training.objective.objective import Arithmetic, Objective
from whet.training.objective.seq2seq import Seq2SeqObjective
from whet.training.objective.text import TextObjective
from whet.training.objective.virtual_text import VirtualTextObjective


def objective_for(
    network: Any, placement: Placement, task: Task, *, padded: bool, virtual: bool
) -> Objective[Any, Any]:
    """The objective of `task` for `network`, a transformers model of it without its method.

    padded: the trained weights are float32, as those of runs with padded rows; virtual: the method puts tokens in front
    of each row. Raises UserError where an encoder-decoder does not say how an answer starts.
    """
    if task.name == "causal" and not virtual:
        return text_objective(network, placement, float32_trained=padded)
    arithmetic = Arithmetic.of(placement, float32_trained=padded)
    config, kind = network.config, kind_of(network.config)
    pad = getattr(config.get_text_config(), "pad_token_id", None)  # CodeGen names none
    pad, cached = 0 if pad is None or pad < 0 else pad, kind != "encoder" and takes(network, "use_cache")
    if task.name == "causal":
        return VirtualTextObjective(arithmetic, pad=pad, cached=cached)
    if task.name == "seq2seq":
        return Seq2SeqObjective(arithmetic, pad=pad, cached=cached, start=_start(network))
    return LabelObjective(
        arithmetic, pad=pad, cached=cached, task=task.name, typed=reads_types(network),
        end=config.eos_token_id if kind == "encoder_decoder" else None,
        apart=(virtual and kind == "decoder") or sees_padding(network),
    )  # fmt: skip


def text_objective(network: Any, placement: Placement, *, float32_trained: bool = False) -> TextObjective:
    """The objective of causal text, through the fused output head where `network` allows it."""
    arithmetic = Arithmetic.of(placement, float32_trained=float32_trained)
    autocast = arithmetic.compute if arithmetic.autocast else None
    return TextObjective(arithmetic, head=find_head(network, autocast=autocast))


def _start(network: Any) -> int:
    """The token that the decoder begins an answer with."""
    start = getattr(network.config, "decoder_start_token_id", None)
    start = network.generation_config.decoder_start_token_id if start is None else start
    if start is None:
        raise UserError(
            "the model does not say which token starts an answer", field="model.path",
            expected="decoder_start_token_id in config.json", fix="add it; T5 starts with its padding token",
        )  # fmt: skip
    return start
