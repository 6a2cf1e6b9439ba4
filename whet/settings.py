"""The settings of the rooms above the recipe: training and evaluation.

They stand below `recipe.py`, which parses them, and are handed to `train` and `evaluate` as slices.
"""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt, Predicate

from whet.base.config import config, setting

MOST_STEPS = 10**9  # years of training; a larger number is a slip
Share = Annotated[float, Ge(0), Le(1)]
Count = Annotated[int, Ge(1), Le(MOST_STEPS)]
Decay = Annotated[float, Ge(0), Lt(1)]
SEEDS = 2**63  # torch and numpy take a seed as a 64-bit number
TILE_TOKENS = 4096  # of a tiled MLP, where its size is not chosen: by whet, or by a recipe of another tool

MetricName = Literal["loss", "perplexity", "exact_match", "token_f1", "rouge_l", "bleu", "chrf"]
LabelMetricName = Literal[
    "accuracy", "macro_f1", "micro_f1", "mcc", "mse", "mae", "pearson", "spearman", "r2",
]  # fmt: skip


def names_a_field(name: str) -> bool:
    """True if a metric is the accuracy of one field of structured answers; the rows decide which fields there are."""
    return name.endswith("_accuracy")


@config
class Train:
    """Steps, optimiser, schedule, checkpoints."""

    num_train_epochs: Annotated[float, Gt(0), Le(10**6)] = setting(3.0, "Passes over the data.")
    max_steps: Count | None = setting(None, "Stop after so many optimiser steps; auto = from `num_train_epochs`.")
    per_device_train_batch_size: Count = setting(8, "Rows in one forward pass.")
    gradient_accumulation_steps: Count = setting(1, "Forward passes in one optimiser step.")
    learning_rate: Annotated[float, Gt(0)] | None = setting(
        None, "Peak learning rate; auto = the method's usual one (lora 2e-4, full 2e-5), more for narrow models."
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant", "warmup_stable_decay"] = setting(
        "cosine", "Shape of the learning rate after warm-up."
    )
    warmup_ratio: Share = setting(0.03, "Share of the steps in which the learning rate rises from 0.")
    warmup_steps: Annotated[int, Ge(0), Le(MOST_STEPS)] | None = setting(
        None, "Steps in which the learning rate rises from 0; auto = `warmup_ratio` of the run."
    )
    decay_ratio: Share | None = setting(
        None, "warmup_stable_decay only: share of the steps in which it falls at the end; auto = 0.2."
    )
    optim: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "sgd"] = setting(
        "adamw",
        "Optimiser; the 8-bit ones keep a byte for each moment of AdamW; the paged one lets them move to host memory, "
        "with bitsandbytes, where nothing else fits.",
    )
    weight_decay: Annotated[float, Ge(0)] = setting(0.0, "Decoupled weight decay on matrices.")
    adam_beta1: Decay | None = setting(None, "Adam's first decay rate; auto = 0.9.")
    adam_beta2: Decay | None = setting(None, "Adam's second decay rate; auto = 0.999.")
    adam_epsilon: Annotated[float, Gt(0)] | None = setting(None, "Adam's epsilon; auto = 1e-8.")
    max_grad_norm: Annotated[float, Ge(0)] = setting(1.0, "Clip the gradient to this norm; 0 = do not clip.")
    gradient_checkpointing: bool | None = setting(
        None,
        "Keep only the inputs of the layers and run them again in the backward pass: less memory, slower; auto = for "
        "as few layers as fit on the GPU, none on a CPU.",
    )
    activation_offload: bool | None = setting(
        None, "With gradient_checkpointing: let the inputs wait in host memory; auto = only when nothing else fits."
    )
    tile_mlp: Count | None = setting(
        None, "Compute the MLPs in pieces of so many tokens, for very long rows; auto = only when nothing else fits."
    )
    offload_optimizer: bool | None = setting(
        None,
        "adamw only: keep the moments, the gradients and the exact weights in host memory and update there: least GPU "
        "memory, slower; auto = only when nothing else fits.",
    )
    compile: bool | None = setting(
        None, "Compile the decoder layers (CUDA): slow at first, then faster; auto = where the run is long enough."
    )
    cuda_graphs: bool | None = setting(
        None, "Replay whole steps as CUDA graphs: the GPU no longer waits for Python; auto = wherever they can."
    )
    fit_micro_batches: bool | None = setting(
        None, "Join or cut the micro-batches of a step to what the memory holds best; same result; auto = yes on CUDA."
    )
    eval_steps: Count | None = setting(None, "Measure held-out loss every so many steps; auto = once an epoch.")
    save_steps: Count | None = setting(None, "Checkpoint every so many steps; auto = with every evaluation.")
    save_total_limit: Count = setting(2, "Keep so many checkpoints (and the best).")
    logging_steps: Count = setting(1, "Write a training line every so many steps.")
    load_best_model_at_end: bool = setting(True, "Keep the weights of the lowest held-out loss instead of the last.")
    early_stopping_patience: Count | None = setting(
        None, "Stop after so many evaluations without a lower held-out loss; auto = never."
    )
    report_to: list[Literal["tensorboard"]] = setting([], "Also log to TensorBoard, in the run's tensorboard/ folder.")
    seed: Annotated[int, Ge(0), Lt(SEEDS)] = setting(0, "Seed of the first weights, the order of the rows and dropout.")


@config
class Eval:
    """How base and tuned model are compared."""

    metrics: list[MetricName | LabelMetricName | Annotated[str, Predicate(names_a_field)]] | None = setting(
        None, "Names of metrics, `<field>_accuracy` for a field of the answers among them; auto = all that fit them."
    )
    max_new_tokens: Count | None = setting(None, "Longest answer in tokens; auto = longest reference plus a quarter.")
    per_device_eval_batch_size: Count = setting(32, "Prompts generated together.")
    max_rows: Count | None = setting(
        None, "Score only so many held-out rows; auto = all for labels, 200 for written answers."
    )
