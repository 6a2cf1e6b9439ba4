"""What a method can and cannot do: declared by the method, enforced by the recipe, printed by `whet methods`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

DENSE = ("fp32", "bf16")
ANY = ("fp32", "bf16", "fp8", "int8", "nf4")
LABEL_TASKS = ("classification", "multi_label", "regression")
WIDE, NARROW = 4096, 256  # widths between which the usual rate changes
HEAD_FACTOR = 1.5
ALL_TASKS = ("causal", *LABEL_TASKS, "seq2seq")


@dataclass(frozen=True)
class Capability:
    """One row of the capability matrix.

    storages: base storages on which it trains. mergeable: folds into plain weights. peft_format: the saved adapter
    opens in plain PEFT. vllm: vLLM serves it unmerged. learning_rate: the usual peak rate when the recipe says none.
    narrow_rate: True where `rate_for` raises it for narrow models.
    tasks: what it can be trained for. inside: what it trains lies inside of the layers, so that the layers can be
    called without the method's own wrapper: documents can share a row, losses are fused, decoding is whet's own.
    composable: adapters of it can be combined into one. compiles: its layers compile as whole graphs. whole_model: what
    is saved is a model, not an adapter. recomputes: its layers can be run again in the backward pass (a cache they add
    to cannot). new_tokens: it trains the rows of tokens that `model.new_tokens` adds.
    """

    storages: tuple[str, ...]
    mergeable: bool
    peft_format: bool
    vllm: bool
    learning_rate: float
    tasks: tuple[str, ...] = ALL_TASKS
    inside: bool = True
    composable: bool = False
    compiles: bool = True
    whole_model: bool = False
    recomputes: bool = True
    new_tokens: bool = False
    narrow_rate: bool = False

    def rate_for(self, config: Any, *, labelled: bool = False) -> tuple[float, str]:
        """The usual peak rate for a model, and why. config: of transformers, None: unknown; labelled: for a new head.

        Narrow models want a higher one: (4096 / width) ** 0.8 times that of a model of 7 B parameters. The exponent is
        near the 0.78 that the authors of "LoRA Without Regret" (Thinking Machines, 2025) give for Llama models in their
        cookbook's `hyperparam_utils` (for Qwen models they found next to none), and was tried here on widths of 320 and
        384 (docs/log.md). A new head has to move far in the few steps that a set with labels gives, so there it is half
        as much again.
        """
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        width = getattr(text, "hidden_size", None)
        if not self.narrow_rate or not isinstance(width, int) or not 0 < width < WIDE:
            return self.learning_rate, ""
        rate = self.learning_rate * (WIDE / max(width, NARROW)) ** 0.8 * (HEAD_FACTOR if labelled else 1)
        return float(f"{rate:.1e}"), f", raised for a model of width {width:,}{' and a new head' if labelled else ''}"
