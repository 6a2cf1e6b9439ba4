"""What a model is asked for: the next token, a label, several labels, a number, or a sequence from a sequence.

A task decides the class of model that is loaded and which parameters are new and always trained (the head); everything
else of a run is told apart by the shape of its batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any, Literal

from whet.base.errors import UserError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

TaskName = Literal["causal", "classification", "multi_label", "regression", "seq2seq"]
LABELLED: tuple[TaskName, ...] = ("classification", "multi_label", "regression")
_AUTO = {"causal": "AutoModelForCausalLM", "seq2seq": "AutoModelForSeq2SeqLM"}
_CLASSES = {"causal": "MODEL_FOR_CAUSAL_LM_MAPPING", "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING"}
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

        return getattr(transformers, auto_name(self.name))

    def classes(self) -> Mapping[Any, Any]:
        """transformers' models for the task: class of config to class of model."""
        import transformers

        return getattr(transformers, _CLASSES.get(self.name, "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING"))

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


def auto_name(task: TaskName) -> str:
    """The name of transformers' class that loads a model for a task."""
    return _AUTO.get(task, "AutoModelForSequenceClassification")


def kind_of(config: PreTrainedConfig) -> Literal["decoder", "encoder", "encoder_decoder"]:
    """What a model is built for: text after text, text as a whole, or text from text."""
    import transformers

    if config.is_encoder_decoder:
        return "encoder_decoder"
    masked = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    return "encoder" if masked else "decoder"


def text_task(config: PreTrainedConfig) -> TaskName:
    """What a model can learn from text: to go on, to answer what its encoder has read, or nothing but labels."""
    names: dict[str, TaskName] = {"decoder": "causal", "encoder_decoder": "seq2seq", "encoder": "classification"}
    return names[kind_of(config)]


def fits_task(name: TaskName, config: PreTrainedConfig) -> bool:
    """Whether the model can be trained for the task."""
    right_kind = name in LABELLED or kind_of(config) == ("encoder_decoder" if name == "seq2seq" else "decoder")
    return right_kind and type(config) in Task(name).classes()


def set_pad(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast | None) -> None:
    """Give `config` the token that rows are filled up with, where it has none: the tokenizer's, else its end token.

    A decoder's classification head reads the last token that is another one, so without it a padded row would be read
    at its padding. Raises UserError where there is no such token.
    """
    text = config.get_text_config()
    found = text.pad_token_id
    if (found is None or found < 0) and tokenizer is not None:
        found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if found is None or found < 0:  # type: ignore[operator]
        raise UserError(
            "neither the model nor its tokenizer has a token to fill rows up with", field="model.tokenizer",
            expected="pad_token or eos_token", fix="set pad_token in tokenizer_config.json",
        )  # fmt: skip
    text.pad_token_id = config.pad_token_id = found  # type: ignore[assignment]


def takes(model: Any, name: str) -> bool:
    """Whether a transformers model, or PEFT's around one, names an input so. What it takes by ** is no input: a layer
    further down may be given it twice."""
    network = model.get_base_model() if hasattr(model, "get_base_model") else model
    return name in signature(network.forward).parameters


def reads_types(model: Any) -> bool:
    """Whether a model is told which token belongs to which of two texts: training, evaluation, prediction and merging
    ask here, and nowhere else. Those that have an input for it but no table of types (GPT-2) would add the embedding of
    a token."""
    types = getattr(model.config, "type_vocab_size", None) or 0
    return types > 1 and takes(model, "token_type_ids")


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
    ] + list(getattr(network, "new_poolers", ()))  # fmt: skip


def poolers(network: nn.Module) -> list[str]:
    """Names of the modules of the body that lead to a head for labels, and to nothing else: further masked
    pre-training leaves them out of the checkpoint, and then they start new as the head does."""
    return [
        name for name, module in network.named_modules()
        if name.rpartition(".")[2] == "pooler" and next(module.parameters(), None) is not None
    ] if head_names(network) else []  # fmt: skip
