"""What a method can and cannot do: declared by the method, enforced by the recipe, printed by `whet methods`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Capability:
    """One row of the capability matrix.

    storages: base storages on which it trains. mergeable: folds into plain weights. peft_format: the saved adapter
    opens in plain PEFT. vllm: vLLM serves it unmerged. learning_rate: the usual peak rate when the recipe says none.
    """

    storages: tuple[str, ...]
    mergeable: bool
    peft_format: bool
    vllm: bool
    learning_rate: float
