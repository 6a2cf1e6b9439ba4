"""LoRA: W x + (alpha / r) B A x with W frozen (Hu et al., 2021, arXiv:2106.09685).

PEFT owns injection, adapter files, switching and composition; whet hands it a layer of its own through
`LoraConfig._register_custom_module`, so an adapter trained here opens in plain PEFT on a plain model. QLoRA is not a
method: it is this one on `base.storage: nf4`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Lt

from whet.base.config import config, setting
from whet.base.errors import UserError, nearest
from whet.engine.task import Task
from whet.methods.capability import ANY, Capability
from whet.methods.method import PeftMethod

if TYPE_CHECKING:
    import peft
    from transformers import PreTrainedModel


@config
class Lora(PeftMethod):
    """Train a low-rank update of every linear layer."""

    name: Literal["lora"] = setting("lora", "Train a low-rank update of the linear layers.")
    r: Annotated[int, Ge(1)] = setting(16, "Rank of the update; r * (inputs + outputs) parameters a layer.")
    lora_alpha: Annotated[float, Gt(0)] | None = setting(None, "The update is scaled by lora_alpha / r; auto = 2 * r.")
    lora_dropout: Annotated[float, Ge(0), Lt(1)] = setting(0.0, "Share of inputs dropped in front of the update.")
    target_modules: str | list[str] = setting(
        "all-linear", "all-linear (but the output head), a list of layer names, or a regular expression."
    )
    use_rslora: bool = setting(False, "Scale by lora_alpha / sqrt(r) (Kalajdzievski, 2023), for high ranks.")
    init_lora_weights: Literal["kaiming", "gaussian"] = setting(
        "kaiming", "Distribution of A at the start (B is 0, so the model starts unchanged)."
    )

    capability: ClassVar[Capability] = Capability(
        storages=ANY, mergeable=True, peft_format=True, vllm=True, learning_rate=2e-4, composable=True, gguf=True
    )

    def peft_config(self, network: PreTrainedModel, task: Task) -> peft.LoraConfig:
        """PEFT's config. Raises UserError when no layer matches `target_modules`."""
        import peft

        lora_alpha = self.lora_alpha if self.lora_alpha is not None else 2 * self.r
        return peft.LoraConfig(
            r=self.r,
            lora_alpha=lora_alpha,  # type: ignore[arg-type]
            lora_dropout=self.lora_dropout,
            target_modules=self._targets(network),
            use_rslora=self.use_rslora,
            init_lora_weights=True if self.init_lora_weights == "kaiming" else "gaussian",
        )

    def _targets(self, model: PreTrainedModel) -> str | list[str]:
        """Names for PEFT, found in the model's own structure."""
        import re

        from whet.engine.linear import linear_names

        names = linear_names(model)
        leaves = sorted({name.rsplit(".", 1)[-1] for name in names})
        if self.target_modules == "all-linear":
            return leaves
        if isinstance(self.target_modules, str):
            try:
                re.compile(self.target_modules)
            except re.error as error:
                raise UserError(
                    f"this is no regular expression: {error}", field="method.target_modules",
                    found=self.target_modules, expected="all-linear, a list of layer names, or a regular expression",
                    fix="use target_modules: all-linear, or a list of names",
                ) from error  # fmt: skip
            if not any(re.fullmatch(self.target_modules, name) for name in names):
                raise self._no_match(self.target_modules, leaves)
            return self.target_modules
        for wanted in self.target_modules:
            if not any(name == wanted or name.endswith("." + wanted) for name in names):
                raise self._no_match(wanted, leaves)
        return list(self.target_modules)

    @staticmethod
    def _no_match(wanted: str, leaves: list[str]) -> UserError:
        near = nearest(wanted, leaves)
        return UserError(
            "no linear layer of the model has this name",
            field="method.target_modules",
            found=wanted,
            expected=", ".join(leaves),
            fix=f"write {near}" if near else "use target_modules: all-linear",
        )
