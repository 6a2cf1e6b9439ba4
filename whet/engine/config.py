"""The engine's own settings: which model, and how its frozen weights sit on the hardware."""

from __future__ import annotations

from typing import Literal

from whet.base.config import config, setting
from whet.engine.task import TaskName


@config
class Model:
    """Which model is tuned."""

    path: str = setting("builtin:tiny", "Local directory, hub name (`Qwen/Qwen3-0.6B`) or `builtin:tiny`.")
    revision: str | None = setting(None, "Branch, tag or commit of a hub model.")
    tokenizer: str | None = setting(None, "Directory or hub name of another tokenizer; auto = the model's own.")
    chat_template: str | None = setting(
        None, "Built-in template (chatml, alpaca) or a .jinja file; auto = the model's own, which must exist for chats."
    )
    task: TaskName | None = setting(
        None,
        "What is learned: causal text, one label (classification), several (multi_label), a number (regression) or "
        "seq2seq answers; auto = what the rows hold and the model can.",
    )
    new_tokens: list[str] = setting(
        [], "Tokens to add, each read and written whole; their rows are trained (methods lora and full)."
    )
    adapter: str | None = setting(
        None, "Run, or folder of an adapter, that is trained further; its method and its model where none is named."
    )
    from_config: bool = setting(False, "Start from random weights of the model's `config.json` (pre-training).")


@config
class Base:
    """How the base model's weights are stored and computed with."""

    storage: Literal["fp32", "bf16", "fp8", "int8", "nf4"] | None = setting(
        None,
        "Frozen weights as fp32, bf16, fp8 (e4m3), int8 or nf4 (4-bit: LoRA on it is QLoRA); auto = what suits the "
        "arithmetic, or what the checkpoint is stored as.",
    )
    compute: Literal["fp32", "bf16", "fp8"] | None = setting(
        None,
        "Arithmetic of the forward and backward pass; fp8 multiplies with frozen fp8, nf4 or int8 weights on FP8 "
        "tensor cores; auto = fp8 where the GPU has it and the model is wide enough to gain, else bf16, else fp32.",
    )
    double_quant: bool | None = setting(
        None, "nf4 only: quantise the block scales too (saves 0.37 bit a weight); auto = yes."
    )
    keep_transposed: bool | None = setting(
        None,
        "fp8 storage only: keep the bytes in both orders, which doubles them and saves a pass a step; auto = where "
        "memory is free.",
    )
    fp8_head: bool = setting(False, "Also multiply with the output head on FP8 tensor cores (fp8 compute only).")
    offload_embedding: bool = setting(
        False, "Keep the input embedding in host memory (unless it is the output head too): for the least GPU memory."
    )
    offload_head: bool = setting(
        False,
        "Keep the frozen output head, and the input embedding where it is the same, in host memory; it comes for the "
        "loss alone.",
    )
    device: Literal["cuda", "mps", "cpu"] | None = setting(None, "Where to run; auto = cuda, else mps, else cpu.")
