"""The cases of the GPU benchmark: shapes, the systems that run each, and the command of every process.

Each peer stands in its default and in the settings that could be its best, each of whet's modes that is meant for the
case beside them. The order mixes whet and peers, so that a clock that drifts hurts both. Shapes are those of the public
models (configs/); the figures that the peers reached before are in docs/log.md.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
GSM8K = BENCH / "lengths" / "gsm8k.json"


@dataclass(frozen=True)
class System:
    """One row of a case: who runs, in which settings; `rows` and `accumulation` where they differ from the case's."""

    name: str
    kind: str  # whet | unsloth | peft | peft-liger
    settings: tuple[str, ...]
    rows: int | None = None
    accumulation: int | None = None
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    title: str
    config: str
    rows: int
    length: int
    accumulation: int
    systems: tuple[System, ...]
    lengths: Path | None = None
    first_step: bool = False
    once: bool = False  # one step without warm-up, where a step takes minutes


def peer(name: str, bits: int, checkpointing: str = "default", kind: str = "unsloth", *more: str, **kw: Any) -> System:
    label = "default" if checkpointing == "default" else "keep all"
    extra = f", {kw.pop('note')}" if "note" in kw else ""
    text = f"{name} {'NF4' if bits == 4 else '16-bit'}, {label}{extra}"
    return System(text, kind, (checkpointing, str(bits), *more), **kw)


def whet(storage: str, compute: str, *more: str, note: str = "", **kw: Any) -> System:
    name = f"whet {storage if storage == compute else f'{storage} + {compute}'}"
    settings = (f"base.storage={storage}", f"base.compute={compute}", *more)
    return System(f"{name}, {note}" if note else name, "whet", settings, **kw)


DEFAULT, KEEP4, KEEP16 = peer("Unsloth", 4), peer("Unsloth", 4, "off"), peer("Unsloth", 16, "off")
FP8, BF16, NF4 = whet("fp8", "fp8"), whet("bf16", "bf16"), whet("nf4", "fp8")
HEAD = whet("fp8", "fp8", "base.fp8_head=true", note="head too")
RERUN = "train.gradient_checkpointing=true"
LEAST = (
    "train.optim=adamw_8bit", RERUN, "train.activation_offload=true", "base.offload_embedding=true",
    "base.offload_head=true",
)  # fmt: skip
GRAPHS = {"UNSLOTH_BLOCK_CUDAGRAPHS": "1"}  # Unsloth's own option for static shapes
FLAT, SORTED, IN_ROWS = ("--packing", "flat"), ("--packing", "sorted"), ("--packing", "rows")
CASES = {
    "llama8b-2048": Case(
        "Llama-3.1-8B shape, 8 x 2048", "Llama-3.1-8B", 8, 2048, 1,
        (HEAD, KEEP16, DEFAULT, BF16, FP8, KEEP4, NF4),
    ),
    "qwen4b-2048": Case("Qwen3-4B shape, 2 x 2048 x 4", "Qwen3-4B", 2, 2048, 4, (HEAD, KEEP4, DEFAULT, FP8, BF16, NF4)),
    "qwen06b-512": Case(
        "Qwen3-0.6B shape, 2 x 512", "Qwen3-0.6B", 2, 512, 1,
        (
            BF16, KEEP16, FP8, DEFAULT, peer("PEFT", 16, "off", "peft"),
            peer("Unsloth", 16, "off", note="CUDA graphs", environment=GRAPHS),
        ),
    ),
    "qwen4b-packed": Case(
        "Qwen3-4B shape, gsm8k's lengths, 16,384 tokens a step", "Qwen3-4B", 8, 2048, 1,
        (
            HEAD, peer("Unsloth", 4, "off", "unsloth", *SORTED, note="by length"),
            peer("Unsloth", 4, "off", "unsloth", *FLAT, note="packed"),
            peer("Unsloth", 16, "off", "unsloth", *SORTED, note="by length, 2 x 4", rows=2, accumulation=4), BF16,
            peer("PEFT + Liger", 16, "default", "peft-liger", *IN_ROWS, note="packed"),
            peer("PEFT + Liger", 16, "off", "peft-liger", *SORTED, note="by length, 2 x 4", rows=2, accumulation=4),
            peer("PEFT", 4, "default", "peft", *IN_ROWS, note="packed, 2 x 4", rows=2, accumulation=4),
        ),
        lengths=GSM8K,
    ),
    "llama8b-4096-memory": Case(
        "Llama-3.1-8B shape, 1 x 4096, least memory", "Llama-3.1-8B", 1, 4096, 1,
        (
            whet("nf4", "fp8", "base.fp8_head=true", *LEAST, note="least"), DEFAULT,
            whet("nf4", "fp8", RERUN, note="recompute"),
            whet("nf4", "bf16", *LEAST, note="least"),
        ),
    ),
    "llama8b-longest": Case(
        "Llama-3.1-8B shape, QLoRA, one row of 401,408 tokens, one step", "Llama-3.1-8B", 1, 401408, 1,
        (
            whet("nf4", "fp8", "base.fp8_head=true", *LEAST, "train.tile_mlp=16384", "train.cuda_graphs=false",
                 note="least"),
        ),
        once=True,
    ),
    "llama8b-first-step": Case(
        "Llama-3.1-8B shape from disk to the end of the first step, 1 x 2048", "Llama-3.1-8B", 1, 2048, 1,
        (FP8, DEFAULT, NF4, BF16, KEEP16, peer("PEFT", 4, "default", "peft")), first_step=True,
    ),
}  # fmt: skip


def command(case: Case, system: System, scratch: Path, warm: int, steps: int) -> list[str]:
    """The process of one row."""
    rows, accumulation = system.rows or case.rows, system.accumulation or case.accumulation
    if case.first_step or case.once:
        warm, steps = 0, 1
    lengths = ["--lengths", str(case.lengths)] if case.lengths else []
    if system.kind == "whet":
        return [
            sys.executable, "-m", "whet", "bench", "speed", str(scratch / case.config), *system.settings,
            "--rows", str(rows), "--length", str(case.length), "--accumulation", str(accumulation), *lengths,
            "--warm", str(warm), "--steps", str(steps), "--json",
        ]  # fmt: skip
    checkpointing, bits, *more = system.settings
    shape = [str(rows), str(case.length), str(accumulation), checkpointing, bits]
    config = str(BENCH / "configs" / f"{case.config}.json")
    more += ["--first-step"] if case.first_step else ["--warm", str(warm), "--steps", str(steps)]
    return [sys.executable, str(BENCH / "peers.py"), system.kind, config, *shape, *lengths, *more]
