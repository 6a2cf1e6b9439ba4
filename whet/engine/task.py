"""What a model is asked for: the next token, a label, several labels, a number, or a sequence from a sequence.

A task decides the class of model that is loaded and which parameters are new and always trained (the head); everything
else of a run is told apart by the shape of its batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import nn

TaskName = Literal["causal", "classification", "multi_label", "regression", "seq2seq"]
LABELLED: tuple[TaskName, ...] = ("classification", "multi_label", "regression")
_AUTO = {"causal": "AutoModelForCausalLM", "seq2seq": "AutoModelForSeq2SeqLM"}
_PROBLEMS = {
    "classification": "single_label_classification", "multi_label": "multi_label_classification",
    "regression": "regression",
}  # fmt: skip
_PEFT = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}


@dataclass(frozen=True)
class Task:
    """labels: names of the classes in the order of their indices; () for a number and for tasks that write text."""

    name: TaskName = "causal"
    labels: tuple[str, ...] = ()

    @property
    def labelled(self) -> bool:
        """Whether a row has labels rather than tokens to learn."""
        return self.name in LABELLED

    @property
    def peft_type(self) -> str:
        """The name of PEFT's task type."""
        return _PEFT.get(self.name, "SEQ_CLS")

    def auto_class(self) -> Any:
        """transformers' class that loads a model for the task."""
        import transformers

        return getattr(transformers, _AUTO.get(self.name, "AutoModelForSequenceClassification"))

    def config_values(self) -> dict[str, Any]:
        """What the model's config must say: how many outputs there are, and their names."""
        if not self.labelled:
            return {}
        names = self.labels or ("value",)
        return {
            "num_labels": len(names), "id2label": dict(enumerate(names)),
            "label2id": {name: index for index, name in enumerate(names)}, "problem_type": _PROBLEMS[self.name],
        }  # fmt: skip


CAUSAL = Task()


def head_names(network: nn.Module) -> list[str]:
    """Names of the modules outside of the pretrained body that have parameters: a classifier and what leads to it.

    Empty for models that write text: their head is pretrained, or tied to the embedding.
    """
    body = getattr(network, "base_model_prefix", "")
    kind = type(network).__name__
    if "SequenceClassification" not in kind and "TokenClassification" not in kind:
        return []
    return [
        name for name, child in network.named_children()
        if name != body and next(child.parameters(), None) is not None
    ]  # fmt: skip
