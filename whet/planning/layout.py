"""How a run sits on the hardware: every decision, taken once, before the model is loaded.

`planning.decide` makes it, `training.apply` carries it out, `whet plan` prints it, and a run directory keeps it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from whet.data.batch.batches import Cut
from whet.planning.costs import MemoryMode


@dataclass(frozen=True)
class Layout:
    """One way to run the same steps; the result does not depend on it beyond rounding.

    flat: documents share rows without padding. padded_task: labels, answers or virtual tokens, for which the model is
    called as a whole. cut: rows of a forward pass, forward passes of an optimiser step, and the forms that batches are
    filled up to. tokens: of the largest forward pass. group_lora: LoRA layers that read one input are one product.
    keep_transposed: fp8 bytes in both orders. mode: how activations are kept; lean: compiled layers keep less.
    compile_layers, cuda_graphs: decoder layers are compiled, whole steps captured. offload_optimizer: moments,
    gradients and exact weights in host memory; short_weights: the device keeps linear layers in bf16 then.
    page_optimizer: moments of 8 bits may move to host memory. memory: predicted bytes on the device by class;
    host_bytes: in host memory.
    """

    flat: bool
    padded_task: bool
    cut: Cut
    tokens: int
    optim: str = "adamw"
    group_lora: bool = False
    keep_transposed: bool = False
    mode: MemoryMode = field(default_factory=MemoryMode)
    lean: bool = False
    compile_layers: bool = False
    cuda_graphs: bool = False
    offload_optimizer: bool = False
    short_weights: bool = False
    page_optimizer: bool = False
    memory: dict[str, int] = field(default_factory=dict)
    host_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """Predicted peak on the device."""
        return sum(self.memory.values())

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as layout.json holds them."""
        return asdict(self)
