"""AdaLoRA: LoRA whose ranks move to where they matter (Zhang et al., 2023, arXiv:2303.10512).

W x + (8 / init_r) B diag(E) A x, where E learns any other scale. Each triplet of a column of B, a number of E and a row
of A is scored by how much the loss moves with it, smoothed over the steps. The number of triplets falls from init_r to
target_r a layer on average, along a cubic curve: the lowest scores get E = 0, and what is zero in the end is cut off.
B and A are held near orthogonal by a penalty, so that a triplet can go without its neighbours noticing.

PEFT owns the layers, the scores and the file. It wants to be called between an update and the clearing of its
gradients: that is a hook of torch's optimisers, put there by `begin`. The scores lie in the optimiser's state, beside
the moments, so a checkpoint holds them. Gives up: packed storages, whet's fused layers and CUDA graphs.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Lt

from whet.base.config import config, setting
from whet.base.errors import UserError
from whet.engine.task import CAUSAL, Task
from whet.methods.capability import DENSE, Capability
from whet.methods.method import PeftMethod, check_updates

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import torch
    from torch import nn
    from transformers import PreTrainedModel

NAME = "default"
SENSITIVITY, UNCERTAINTY, KEPT = "sensitivity", "uncertainty", "kept"  # entries of the optimiser's state
FIRST, LAST = 0.1, 0.3  # shares of the steps before and after ranks are given away
Decay = Annotated[float, Gt(0), Lt(1)]


@config
class AdaLora(PeftMethod):
    """Train a low-rank update whose ranks move to the layers that need them."""

    name: Literal["adalora"] = setting("adalora", "Train a low-rank update whose ranks move between the layers.")
    init_r: Annotated[int, Ge(2)] = setting(12, "Rank of each layer at the start.")
    target_r: Annotated[int, Ge(1)] = setting(8, "Average rank of a layer in the end; less than init_r.")
    lora_dropout: Annotated[float, Ge(0), Lt(1)] = setting(0.0, "Share of inputs dropped in front of the update.")
    target_modules: str | list[str] = setting(
        "all-linear", "all-linear (but the output head), attention, mlp, a list of names, or a regular expression."
    )
    tinit: Annotated[int, Ge(0)] | None = setting(None, "Steps before ranks are taken away; auto = a tenth of all.")
    tfinal: Annotated[int, Ge(0)] | None = setting(
        None, "Steps at the end with ranks that stay; auto = three tenths of all."
    )
    deltaT: Annotated[int, Ge(1)] = setting(1, "Steps between two allocations.")
    beta1: Decay = setting(0.85, "Smoothing of the scores.")
    beta2: Decay = setting(0.85, "Smoothing of their uncertainty.")
    orth_reg_weight: Annotated[float, Ge(0)] = setting(0.5, "Times the distance from orthogonal is added to the loss.")

    capability: ClassVar[Capability] = Capability(
        storages=DENSE, mergeable=True, peft_format=True, vllm=False, learning_rate=1e-3
    )

    def __post_init__(self) -> None:
        """Raises UserError for ranks that leave nothing to give away."""
        if self.target_r >= self.init_r:
            raise UserError(
                "there is no rank to take away", field="method.target_r", found=str(self.target_r),
                expected=f"less than init_r ({self.init_r})",
                fix=f"method.target_r={self.init_r - 1}, or method.name=lora",
            )  # fmt: skip

    def peft_config(self, network: PreTrainedModel, task: Task) -> Any:
        """PEFT's config, with a number of steps that `begin` sets right."""
        import peft
        from transformers.pytorch_utils import Conv1D

        from whet.methods.targets import find_targets, shortest_endings

        names = find_targets(network, self.target_modules)
        return peft.AdaLoraConfig(
            init_r=self.init_r,
            target_r=self.target_r,
            lora_dropout=self.lora_dropout,
            target_modules=shortest_endings(network, names),
            deltaT=self.deltaT,
            beta1=self.beta1,
            beta2=self.beta2,
            orth_reg_weight=self.orth_reg_weight,
            total_step=1,
            fan_in_fan_out=all(isinstance(network.get_submodule(name), Conv1D) for name in names),
        )

    def begin(self, model: Any, optimiser: Any, steps: int, step: Callable[[], int]) -> None:
        """Let PEFT allocate ranks after each update. Raises UserError when the steps are too few for it."""
        tinit = int(FIRST * steps) if self.tinit is None else self.tinit
        tfinal = int(LAST * steps) if self.tfinal is None else self.tfinal
        if tinit + 1 >= steps - tfinal:
            raise UserError(
                "no step is left in which ranks could be taken away", field="method.tinit, method.tfinal",
                found=f"{tinit} steps before, {tfinal} after, {steps} in all", expected="fewer than there are steps",
                fix="remove method.tinit and method.tfinal, or train for more steps",
            )  # fmt: skip
        check_updates(optimiser, next(iter(numbers(model).values())), self.name)
        made = model.peft_config[NAME]
        made.total_step, made.tinit, made.tfinal = steps, tinit, tfinal
        optimiser.register_step_post_hook(lambda *_: allocate(model, optimiser, step() + 1))

    def before_step(self, model: Any, done: float) -> bool:
        """True in front of the update after which the ranks stay."""
        made = model.peft_config[NAME]
        return round(done * made.total_step) + 1 == made.total_step - made.tfinal

    def penalty(self, model: Any) -> torch.Tensor:
        """orth_reg_weight times the mean Frobenius distance of A A^T and B^T B from the identity."""
        import torch

        found = []
        for name, matrix in model.named_parameters():
            if f"lora_A.{NAME}" in name or f"lora_B.{NAME}" in name:
                product = matrix @ matrix.T if "lora_A" in name else matrix.T @ matrix
                found.append(torch.linalg.matrix_norm(product - torch.eye(len(product), device=product.device)))
        return self.orth_reg_weight * torch.stack(found).mean()

    def save(self, model: Any, directory: Path) -> None:
        """Write the adapter in PEFT's format."""
        with _without_alarm():
            super().save(model, directory)

    @property
    def opens_empty(self) -> bool:
        return False  # PEFT reads off the weights what has been pruned

    def load(self, network: PreTrainedModel, directory: Path, task: Task = CAUSAL) -> nn.Module:
        """PEFT's model with the adapter in `directory`."""
        with _without_alarm():
            return super().load(network, directory, task)

    def finalize(self, model: Any) -> None:
        """What has E = 0 is not saved: the ranks are read off the weights, which may be those of an earlier step."""
        model.peft_config[NAME].rank_pattern = {
            name: (number.detach() != 0).flatten().tolist() for name, number in numbers(model).items()
        }  # fmt: skip


@contextlib.contextmanager
def _without_alarm() -> Iterator[None]:
    """Inside, PEFT does not take a layer of rank 0 for a damaged file, nor its own names for unknown ones."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*have invalid shape")
        warnings.filterwarnings("ignore", message=r".*rank_pattern keys did not match")
        yield


def numbers(model: Any) -> dict[str, torch.nn.Parameter]:
    """E [rank, 1] of each layer, by the name that PEFT has for it."""
    found = model.base_model.model.named_parameters()
    return {name: parameter for name, parameter in found if f"lora_E.{NAME}" in name}


def allocate(model: Any, optimiser: torch.optim.Optimizer, step: int) -> None:
    """What PEFT does after update `step`, counted from 1, with its memory in the optimiser's state."""
    import torch

    made, allocator = model.peft_config[NAME], model.base_model.rankallocator
    last = made.total_step - made.tfinal
    if step > last:
        with torch.no_grad():
            for number in numbers(model).values():
                number.mul_(optimiser.state[number][KEPT])
        return
    scored = {name: p for name, p in model.base_model.model.named_parameters() if "lora_" in name and NAME in name}
    for name, parameter in scored.items():
        if parameter.grad is None:  # a layer that the model did not call
            parameter.grad = torch.zeros_like(parameter)
        state = optimiser.state[parameter]
        if SENSITIVITY in state:
            allocator.ipt[name] = state[SENSITIVITY]
            allocator.exp_avg_ipt[name], allocator.exp_avg_unc[name] = state[SENSITIVITY], state[UNCERTAINTY]
    model.base_model.update_and_allocate(step)
    for name, parameter in scored.items():
        state = optimiser.state[parameter]
        if step < last:
            state[SENSITIVITY], state[UNCERTAINTY] = allocator.exp_avg_ipt[name], allocator.exp_avg_unc[name]
        else:
            state.pop(SENSITIVITY, None), state.pop(UNCERTAINTY, None)
    if step == last:
        for number in numbers(model).values():
            optimiser.state[number][KEPT] = (number.detach() != 0).to(number.dtype)
