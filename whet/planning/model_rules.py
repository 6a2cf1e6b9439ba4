"""Rules about the model that training starts from: an adapter on it, and losses that its own config asks for."""

from __future__ import annotations

from whet.planning.asked import Asked
from whet.planning.rule import Rule


def _router_loss(asked: Asked) -> float:
    """The weight of the loss that keeps experts equally busy, where the model's own loss would have it."""
    assert asked.config is not None
    text = asked.config.get_text_config()
    if asked.task != "causal" or not getattr(text, "output_router_logits", False):
        return 0.0
    return float(getattr(text, "router_aux_loss_coef", None) or 0.0)


MODEL = (
    Rule(
        name="router_loss", field="model.path", needs=("config",),
        broken=lambda asked: _router_loss(asked) > 0,
        problem="the model's config asks for a loss of its router, which whet does not add to that of the rows",
        found=lambda asked: f"output_router_logits true, router_aux_loss_coef {_router_loss(asked):g}",
        expected="output_router_logits false, as transformers trains without it",
        fix="write output_router_logits: false into the model's config.json",
    ),
    Rule(
        name="another_start_of_an_adapter", field="method.init_lora_weights",
        broken=lambda asked: asked.model.adapter and getattr(asked.method, "init_lora_weights", "kaiming") != "kaiming",
        problem="an adapter that is trained further starts where it is", found="{method.init_lora_weights}",
        expected="kaiming, which has no effect then", fix="remove the line",
    ),
    Rule(
        name="adapter_of_random_weights", field="model.from_config",
        broken=lambda asked: asked.model.adapter and asked.model.from_config,
        problem="an adapter belongs to the weights that it was trained on", expected="false", fix="remove the line",
    ),
)  # fmt: skip
