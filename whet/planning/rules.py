"""What excludes each other: settings, device, method, task and the layout of rows, in one table.

A recipe may ask for parts that are each possible but not together. Every such pair is a row of `RULES`, in the order in
which it is refused; `check` raises the first one that holds. What is wrong with one value alone, with the rows, or with
the names in a model is said where that value is defined or read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from whet.data.config import Data
from whet.engine.task import LABELLED, auto_name, fits_task, kind_of
from whet.methods.capability import DENSE
from whet.methods.method import Method
from whet.planning.asked import Asked
from whet.planning.model_rules import MODEL
from whet.planning.rule import Rule
from whet.recipe import Recipe
from whet.settings import Train

FLAT_ONLY = ("compile", "cuda_graphs", "fit_micro_batches", "activation_offload", "tile_mlp")
PACKED_FIRST = ("fp8", "nf4", "int8")  # in the order in which a fix names them
AUTOMATIC = ("compile", "cuda_graphs", "offload_optimizer")  # on a GPU whet decides these by itself


def check(asked: Asked, rules: Iterable[Rule] | None = None) -> None:
    """Raise the UserError of the first rule that is broken, of all or of `rules`."""
    for rule in RULES if rules is None else rules:
        if not rule.holds(asked):
            raise rule.refusal(asked)


def decided(asked: Asked) -> Train:
    """The training settings, with those that whet would decide by itself turned off where a rule forbids them."""
    train = asked.train
    for name in AUTOMATIC:
        if getattr(train, name) is None:
            wanted = replace(asked, train=replace(train, **{name: True}))
            if not all(rule.holds(wanted) for rule in RULES):
                train = replace(train, **{name: False})
    return train


def data_for_method(recipe: Recipe) -> Data:
    """The data settings, with what the method cannot read turned off."""
    if recipe.method.can.inside:
        return recipe.data
    return replace(recipe.data, packing=False, padding_free=False)


def follows_updates(method: Method) -> bool:
    """Whether the method hooks itself to the optimiser."""
    return type(method).begin is not Method.begin


def _trains_tokens(asked: Asked) -> bool:
    """Whether PEFT trains single rows of the embedding."""
    return bool(asked.model.new_tokens or getattr(asked.method, "trainable_token_indices", None))


def _packed(asked: Asked) -> list[str]:
    """The storages of few bits on which the method trains."""
    return [one for one in PACKED_FIRST if one in asked.method.can.storages]


_KINDS = {"causal": "decoder", "seq2seq": "encoder_decoder"}


def _fits_the_task(asked: Asked) -> bool:
    assert asked.task is not None
    assert asked.config is not None
    return fits_task(asked.task, asked.config)


def _kind(asked: Asked) -> str:
    """The model's family and kind, as in `bert, an encoder`; where the kind is right, the class that it lacks."""
    assert asked.config is not None
    kind = kind_of(asked.config)
    if asked.task is not None and kind == _KINDS.get(asked.task, kind):
        return f"{asked.config.model_type}, which transformers' {auto_name(asked.task)} does not know"
    return f"{asked.config.model_type}, {'an' if kind[0] == 'e' else 'a'} {kind.replace('_', '-')}"


def _kind_for_the_task(asked: Asked) -> str:
    assert asked.task is not None
    wanted = {"causal": "a decoder (Llama, Qwen, GPT-2)", "seq2seq": "an encoder-decoder (T5)"}
    kind = wanted.get(asked.task, "a model with a classification head")
    return f"{kind} that transformers' {auto_name(asked.task)} opens"


def _task_for_the_kind(asked: Asked) -> str:
    """The fix where a model cannot be trained for a task."""
    assert asked.config is not None
    if asked.task in LABELLED:
        return "give another model"
    fixes = {"encoder": "rows with text and label", "encoder_decoder": "model.task=seq2seq"}
    other = "model.task=causal" if asked.task == "seq2seq" else "give another model"
    return fixes.get(kind_of(asked.config), other)


STORAGE = (
    Rule(
        name="storage_of_method", field="base.storage", needs=("storage",),
        broken=lambda asked: asked.storage not in asked.method.can.storages,
        problem="this method cannot train on this storage", found="{storage}",
        expected=lambda asked: " or ".join(asked.method.can.storages),
        fix="base.storage={method.can.storages[0]}; plain method=lora trains on each",
    ),
    Rule(
        name="fp32_on_bf16", field="base.compute", needs=("storage",),
        broken=lambda asked: asked.storage == "bf16" and asked.compute == "fp32",
        problem="weights stored as bf16 are computed with in bf16", found="{compute}", expected="bf16 or auto",
        fix="base.storage=fp32",
    ),
    Rule(
        name="fp8_on_dense", field="base.compute", needs=("storage",),
        broken=lambda asked: asked.compute == "fp8" and asked.storage in DENSE,
        problem="FP8 products need frozen weights that are stored in few bits", found="fp8 with {storage} storage",
        expected=lambda asked: "storage fp8, nf4 or int8" if _packed(asked) else "fp32, bf16 or auto",
        fix=lambda asked: f"base.storage={_packed(asked)[0]}" if _packed(asked) else "base.compute=bf16",
    ),
    Rule(  # a CPU emulates it: slow, for trying out
        name="fp8_without_hardware", field="base.compute", needs=("storage", "device"),
        broken=lambda asked: asked.compute == "fp8" and asked.device != "cpu" and not asked.has_fp8,
        problem="this device has no FP8 arithmetic", found="{device_name}",
        expected="an NVIDIA GPU of compute capability 8.9 or newer", fix="base.compute=bf16",
    ),
    Rule(
        name="double_quant_alone", field="base.double_quant", needs=("storage",),
        broken=lambda asked: asked.base.double_quant is not None and asked.storage != "nf4",
        problem="this needs nf4 storage and would do nothing here",
        found=lambda asked: str(asked.base.double_quant).lower(), expected="auto",
        fix="base.storage=nf4, or remove the line",
    ),
    Rule(
        name="keep_transposed_alone", field="base.keep_transposed", needs=("storage",),
        broken=lambda asked: (
            asked.base.keep_transposed is not None and not (asked.storage == "fp8" and asked.compute == "fp8")
        ),
        problem="this needs fp8 storage and fp8 compute and would do nothing here",
        found=lambda asked: str(asked.base.keep_transposed).lower(), expected="auto", fix="remove the line",
    ),
    Rule(
        name="fp8_head_alone", field="base.fp8_head", needs=("storage",),
        broken=lambda asked: asked.base.fp8_head and asked.compute != "fp8",
        problem="this needs fp8 compute and would do nothing here", expected="auto", fix="remove the line",
    ),
)  # fmt: skip

OPTIMISER = (
    *(
        Rule(
            name=f"{name}_without_adam", field=f"train.{name}",
            broken=lambda asked, name=name: getattr(asked.train, name) is not None and "adamw" not in asked.train.optim,
            problem="{train.optim} has no such setting", found=f"{{train.{name}}}", expected="auto",
            fix="train.optim=adamw, or remove the line",
        )
        for name in ("adam_beta1", "adam_beta2", "adam_epsilon")
    ),
    Rule(
        name="decay_of_another_schedule", field="train.decay_ratio",
        broken=lambda asked: (
            asked.train.decay_ratio is not None and asked.train.lr_scheduler_type != "warmup_stable_decay"
        ),
        problem="the {train.lr_scheduler_type} schedule has no decay phase", found="{train.decay_ratio}",
        expected="auto", fix="train.lr_scheduler_type=warmup_stable_decay, or remove the line",
    ),
    Rule(
        name="another_optimiser_on_the_host", field="train.offload_optimizer",
        broken=lambda asked: asked.train.offload_optimizer and asked.train.optim != "adamw",
        problem="{train.optim} has no form on the host", found="true with {train.optim}", expected="adamw",
        fix="train.optim=adamw, or train.offload_optimizer=auto",
    ),
)  # fmt: skip

LAYOUT = (
    Rule(
        name="captured_penalty", field="train.cuda_graphs",
        broken=lambda asked: asked.train.cuda_graphs and asked.method.penalised,
        problem="the method adds a penalty to the loss after the forward pass, which a captured step would leave out",
        expected="auto or false", fix="train.cuda_graphs=auto",
    ),
    Rule(
        name="captured_tokens", field="train.cuda_graphs",
        broken=lambda asked: asked.train.cuda_graphs and _trains_tokens(asked),
        problem="PEFT copies the places of the trained tokens from the host in every forward pass",
        expected="auto or false", fix="train.cuda_graphs=auto",
    ),
    Rule(
        name="captured_parameters", field="train.cuda_graphs",
        broken=lambda asked: asked.train.cuda_graphs and getattr(asked.method, "target_parameters", None),
        problem="PEFT makes the weights of adapted parameters anew in every forward pass", expected="auto or false",
        fix="train.cuda_graphs=auto",
    ),
    Rule(
        name="captured_optimiser", field="train.optim",
        broken=lambda asked: asked.train.cuda_graphs and asked.train.optim in ("adafactor", "sgd"),
        problem="{train.optim} cannot be captured in a CUDA graph", found="{train.optim}",
        expected="adamw, adamw_8bit or paged_adamw_8bit, or train.cuda_graphs auto", fix="train.optim=adamw",
    ),
    Rule(
        name="captured_host_optimiser", field="train.cuda_graphs",
        broken=lambda asked: asked.train.cuda_graphs and asked.train.offload_optimizer,
        problem="an update on the host cannot be captured", expected="auto or false", fix="train.cuda_graphs=auto",
    ),
    Rule(
        name="captured_memory_mode", field="train.cuda_graphs",
        broken=lambda asked: asked.train.cuda_graphs and (asked.train.activation_offload or asked.train.tile_mlp),
        problem="steps with inputs on the host or MLPs in tiles cannot be captured", expected="auto or false",
        fix="train.cuda_graphs=auto",
    ),
    *(
        rule
        for name in ("compile", "cuda_graphs", "fit_micro_batches")
        for rule in (
            Rule(
                name=f"{name}_without_cuda", field=f"train.{name}", needs=("device",),
                broken=lambda asked, name=name: getattr(asked.train, name) and asked.device != "cuda",
                problem="this runs on CUDA only", expected="auto", fix="remove the line",
            ),
            Rule(
                name=f"{name}_of_padded_rows", field=f"train.{name}",
                broken=lambda asked, name=name: getattr(asked.train, name) and asked.data.padding_free is False,
                problem="padded batches have too many shapes for this", expected="auto",
                fix="data.padding_free=true, or remove the line",
            ),
        )
    ),
    Rule(
        name="memory_mode_without_checkpointing", field="train.gradient_checkpointing",
        broken=lambda asked: (
            (asked.train.activation_offload or asked.train.tile_mlp) and asked.train.gradient_checkpointing is False
        ),
        problem="this needs recomputed layers", found="false", expected="true or auto",
        fix="train.gradient_checkpointing=true",
    ),
    Rule(
        name="host_optimiser_of_a_method_that_follows_it", field="train.offload_optimizer",
        broken=lambda asked: asked.train.offload_optimizer and follows_updates(asked.method),
        problem="{method.name} reads the gradients on the device after each update", expected="false or auto",
        fix="remove the line",
    ),
)  # fmt: skip

TASK = (
    Rule(
        name="task_of_another_kind_of_model", field="model.task", needs=("task", "config"),
        broken=lambda asked: not _fits_the_task(asked),
        problem="this kind of model cannot be trained for the task {task}", found=_kind, expected=_kind_for_the_task,
        fix=_task_for_the_kind,
    ),
    Rule(
        name="task_of_another_method", field="model.task", needs=("task",),
        broken=lambda asked: asked.task not in asked.method.can.tasks,
        problem="the method {method.name} cannot be used for this task", found="{task}",
        expected=lambda asked: ", ".join(asked.method.can.tasks), fix="method=lora can",
    ),
    Rule(
        name="new_tokens_that_are_not_trained", field="model.new_tokens", needs=("task",),
        broken=lambda asked: asked.model.new_tokens and not asked.method.can.new_tokens,
        problem="{method.name} does not train the rows of new tokens, which would stay as they start",
        found=lambda asked: ", ".join(asked.model.new_tokens), expected="[]", fix="remove them, or method.name=lora",
    ),
    Rule(
        name="template_of_another_task", field="model.chat_template", needs=("task",),
        broken=lambda asked: asked.task != "causal" and asked.model.chat_template is not None,
        problem="rows of the task {task} are not rendered by a template", found="{model.chat_template}",
        expected="auto", fix="remove the line",
    ),
    Rule(
        name="checkpointing_of_a_trained_cache", field="train.gradient_checkpointing", needs=("task",),
        broken=lambda asked: asked.train.gradient_checkpointing and not asked.method.can.recomputes,
        problem="{method.name} trains a cache, and layers that are run again have none", expected="false or auto",
        fix="remove the line",
    ),
    Rule(
        name="compiled_method", field="train.compile", needs=("task",),
        broken=lambda asked: asked.train.compile and not asked.method.can.compiles,
        problem="the layers of {method.name} with these settings are not one graph", expected="auto or false",
        fix="remove the line",
    ),
    *(
        Rule(
            name=f"{name}_with_padding", field=f"train.{name}", needs=("task",),
            broken=lambda asked, name=name: asked.padded and getattr(asked.train, name),
            problem="this is for text in rows without padding",
            found=lambda asked, name=name: str(getattr(asked.train, name)).lower(), expected="auto",
            fix="remove the line",
        )
        for name in FLAT_ONLY
    ),
    Rule(
        name="fp8_head_with_padding", field="base.fp8_head", needs=("task",),
        broken=lambda asked: asked.padded and asked.base.fp8_head,
        problem="this is for the output head of text in rows without padding", expected="false",
        fix="remove the line",
    ),
)  # fmt: skip

ROWS = (
    *(
        Rule(
            name=f"{name}_behind_tokens_of_the_method", field=f"data.{name}",
            broken=lambda asked, name=name: getattr(asked.data, name) and not asked.method.can.inside,
            problem="{method.name} puts its own tokens in front of each row, so no two documents can share one",
            expected="false or auto", fix="remove the line",
        )
        for name in ("packing", "padding_free")
    ),
    Rule(
        name="stopping_early_without_held_out_rows", field="train.early_stopping_patience", needs=("held_out_rows",),
        broken=lambda asked: not asked.held_out_rows and asked.train.early_stopping_patience is not None,
        problem="early stopping needs held-out rows", found="no held-out row",
        expected="data.val_size above 0, or data.eval_dataset", fix="data.val_size=0.05",
    ),
)  # fmt: skip

STRUCTURE = (
    Rule(
        name="embedding_on_the_host", field="base.offload_embedding", needs=("structure",),
        broken=lambda asked: (
            asked.base.offload_embedding
            and asked.built.embedding_obstacle
            and not (asked.base.offload_head and asked.built.tied)
        ),
        problem="the input embedding cannot be kept on the host", found="{structure.embedding_obstacle}",
        expected="a frozen embedding of its own", fix="base.offload_embedding=false",
    ),
    Rule(
        name="fp8_head_that_is_trained", field="base.fp8_head", needs=("structure",),
        broken=lambda asked: asked.base.fp8_head and not asked.built.head_frozen,
        problem="only an output head that stays frozen can be multiplied in FP8",
        expected="false where the method trains the head", fix="base.fp8_head=false",
    ),
    Rule(
        name="quantised_module_trained_whole", field="method.modules_to_save", needs=("structure",),
        broken=lambda asked: asked.built.trained_whole, problem="a quantised module cannot be trained whole",
        found="{structure.trained_whole}", expected="a module of dense weights",
        fix="base.storage=bf16, or train it with target_modules",
    ),
    Rule(
        name="head_on_the_host_with_padding", field="base.offload_head", needs=("structure", "task"),
        broken=lambda asked: asked.base.offload_head and asked.padded,
        problem="the output head cannot be kept on the host",
        found="rows with padding, whose loss is made of the model's own logits",
        expected="a frozen head that is a plain linear layer", fix="base.offload_head=false",
    ),
    Rule(
        name="head_on_the_host", field="base.offload_head", needs=("structure",),
        broken=lambda asked: asked.base.offload_head and asked.built.head_obstacle,
        problem="the output head cannot be kept on the host", found="{structure.head_obstacle}",
        expected="a frozen head that is a plain linear layer", fix="base.offload_head=false",
    ),
    Rule(
        name="layers_that_cannot_run_again", field="train.gradient_checkpointing", needs=("structure", "task"),
        broken=lambda asked: asked.padded and asked.train.gradient_checkpointing and not asked.built.reruns,
        problem="this model's layers cannot be run again", expected="auto", fix="remove the line",
    ),
)  # fmt: skip

LOADED = (
    Rule(
        name="fp8_head_of_another_form", field="base.fp8_head", needs=("head_in_fp8",),
        broken=lambda asked: asked.base.fp8_head and not asked.head_in_fp8,
        problem="this model's output head cannot be multiplied in FP8", expected="false", fix="base.fp8_head=false",
    ),
    Rule(
        name="head_on_the_host_of_another_form", field="base.offload_head", needs=("head_alone",),
        broken=lambda asked: asked.base.offload_head and not asked.head_alone,
        problem="this model's output head cannot be kept on the host", expected="false", fix="base.offload_head=false",
    ),
    Rule(
        name="layout_that_cannot_be_captured", field="train.cuda_graphs", needs=("can_capture",),
        broken=lambda asked: asked.train.cuda_graphs and not asked.can_capture,
        problem="this run's steps cannot be captured",
        expected="padding-free rows, nothing on the host, no layers run again that draw random numbers",
        fix="train.cuda_graphs=auto",
    ),
)  # fmt: skip

RULES = (*STORAGE, *OPTIMISER, *LAYOUT, *TASK, *ROWS, *MODEL, *STRUCTURE, *LOADED)
OF_ANY_MACHINE = tuple(rule for rule in RULES if not {"device", "can_capture"} & {*rule.needs})
