"""Seconds of a step: what the plan foretells beside what an H100 and an H200 measured, and the fit of its constants.

    python bench/pace.py           # the table, with the constants as they are
    python bench/pace.py --fit     # fitted anew, and each case foretold by a fit without it

Measured steps are those of `results/`: medians of `whet bench speed`, and single steps of `bench/memory.py`, which are
never captured. The fit holds each constant near the one that is there, where few cases speak of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
FP8, BF16 = ("base.storage=fp8", "base.compute=fp8"), ("base.storage=bf16",)
NF4, NF4_FP8 = ("base.storage=nf4", "base.compute=bf16"), ("base.storage=nf4", "base.compute=fp8")
HEAD, ONE_BY_ONE, EAGER = (*FP8, "base.fp8_head=true"), ("train.cuda_graphs=false",), ("train.compile=false",)
RERUN = ("train.gradient_checkpointing=true",)
LEAST = (
    *NF4_FP8, *RERUN, "base.fp8_head=true", "train.optim=adamw_8bit", "train.activation_offload=true",
    "base.offload_embedding=true",
)  # fmt: skip
FITTED = (
    "bf16", "fp8", "attention", "compiled", "eager", "kernel_seconds", "started_compiled", "started_eager", "seen",
)  # fmt: skip
TIGHT, LOOSE = 0.05, 0.3


@dataclass(frozen=True)
class Shape:
    config: str
    rows: int
    length: int
    accumulation: int = 1


@dataclass(frozen=True)
class Case:
    """A measured step. row: what tells its row in the file."""

    name: str
    card: str
    shape: Shape
    settings: tuple[str, ...]
    file: str
    row: tuple[tuple[str, str], ...]
    lengths: str | None = None


def _h100(name: str, shape: Shape, words: tuple[str, ...], file: str, row: str) -> Case:
    lengths = str(BENCH / "lengths/gsm8k.json") if "packed" in file else None
    return Case(name, "H100 80GB", shape, words, f"h100/{file}.json", (("name", row),), lengths)


def _h200(name: str, shape: Shape, words: tuple[str, ...], file: str, case: str) -> Case:
    more = (("state", "as merged"),) if case != "qwen4b-2048" else (("tree", "after"),)
    return Case(name, "H200", shape, words, f"h200/{file}.json", (("case", case), *(more if "layout" in file else ())))


L8, L70, Q4, Q06 = "Llama-3.1-8B", "Llama-3.1-70B", "Qwen3-4B", "Qwen3-0.6B"
CASES = (
    _h100("8B fp8 and head 8x2048", Shape(L8, 8, 2048), HEAD, "llama8b-2048", "whet fp8, head too"),
    _h100("8B bf16 8x2048", Shape(L8, 8, 2048), BF16, "llama8b-2048", "whet bf16"),
    _h100("8B least 1x4096", Shape(L8, 1, 4096), LEAST, "llama8b-4096-memory", "whet nf4 + fp8, least"),
    Case("8B least, head on the host 1x4096", "H100 80GB", Shape(L8, 1, 4096), (*LEAST, "base.offload_head=true"),
         "h100/llama8b-least-head-on-host.json", ()),
    _h100("0.6B bf16 2x512", Shape(Q06, 2, 512), BF16, "qwen06b-512", "whet bf16"),
    _h100("4B fp8 and head 2x2048x4", Shape(Q4, 2, 2048, 4), HEAD, "qwen4b-2048", "whet fp8, head too"),
    _h100("4B fp8 and head, gsm8k", Shape(Q4, 8, 2048), HEAD, "qwen4b-packed", "whet fp8, head too"),
    _h200("0.6B bf16 2x512", Shape(Q06, 2, 512), BF16, "layout-before-after", "qwen06b-512"),
    _h200("4B fp8 and head 2x2048x4", Shape(Q4, 2, 2048, 4), HEAD, "layout-before-after", "qwen4b-2048"),
    _h200("8B fp8 and head 8x2048", Shape(L8, 8, 2048), HEAD, "layout-before-after", "llama8b-2048"),
    *(
        _h200(name, Shape(config, rows, length), (*words, *ONE_BY_ONE), "memory", name)
        for name, config, rows, length, words in (
            ("0.6B bf16 4x1024", Q06, 4, 1024, BF16), ("0.6B bf16 4x1024 eager", Q06, 4, 1024, BF16 + EAGER),
            ("4B fp8 4x2048", Q4, 4, 2048, FP8), ("8B nf4 bf16 2x2048", L8, 2, 2048, NF4),
            ("8B nf4 bf16 2x2048 eager", L8, 2, 2048, NF4 + EAGER),
            ("8B nf4 bf16 2x2048 checkpointing", L8, 2, 2048, NF4 + RERUN),
            ("8B nf4 fp8 4x2048", L8, 4, 2048, NF4_FP8), ("8B fp8 4x2048", L8, 4, 2048, FP8),
            ("8B bf16 2x2048", L8, 2, 2048, BF16), ("8B bf16 2x2048 eager", L8, 2, 2048, BF16 + EAGER),
            ("70B nf4 bf16 1x2048", L70, 1, 2048, NF4),
        )
    ),
)  # fmt: skip


def measured(case: Case) -> float:
    """Seconds of a step, the median of the rows that are meant."""
    found = json.loads((BENCH / "results" / case.file).read_text(encoding="utf-8"))
    rows = (found.get("after") or found["rows"]) if case.row else [found]
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else [found]
    alike = [row for row in rows if all(row.get(key) == value for key, value in case.row)]
    return statistics.median(row.get("step_seconds", row.get("median_seconds")) for row in alike)


@cache
def planned(case: Case) -> Any:
    """The plan of a case, for a card that need not be here."""
    from whet.engine.load.load import load_config
    from whet.engine.task import CAUSAL
    from whet.planning.cards import hardware_of
    from whet.planning.facts import Work
    from whet.planning.options import decide_anyway
    from whet.planning.plan import plan_run, resolve_base
    from whet.planning.rules import OF_ANY_MACHINE
    from whet.recipe import parse
    from whet.speed import Load, _batches

    compiled = () if EAGER[0] in case.settings else ("train.compile=true",)
    path = json.dumps(str(BENCH / "configs" / f"{case.shape.config}.json"))
    words = [f"model.path={path}", "model.from_config=true", "train.max_steps=20", *compiled, *case.settings]
    recipe = parse(None, words).recipe
    hardware, placement = resolve_base(recipe, load_config(recipe.model), hardware_of(case.card))
    shape = case.shape
    work = Work(_batches(Load(shape.rows, shape.length, shape.accumulation, case.lengths), 30000), 20)
    return plan_run(
        recipe, hardware, placement, task=CAUSAL, work=work, rules=OF_ANY_MACHINE, choose=decide_anyway
    )  # fmt: skip


def foretold(case: Case, reached: Any) -> float:
    from whet.planning.pace import pace_of

    found = planned(case)
    return pace_of(found.facts, found.layout, reached).seconds or float("nan")


def fitted(cases: list[Case]) -> Any:
    """Constants that suit these cases."""
    import numpy as np
    from scipy.optimize import least_squares

    from whet.planning.pace import REACHED

    start = np.log([getattr(REACHED, name) for name in FITTED])

    def of(logs: Any) -> Any:
        return replace(REACHED, **dict(zip(FITTED, np.exp(logs).tolist(), strict=True)))

    def misses(logs: Any) -> Any:
        errors = [np.log(foretold(case, of(logs)) / measured(case)) / TIGHT for case in cases]
        return np.concatenate([errors, (logs - start) / LOOSE])

    return of(least_squares(misses, start, diff_step=1e-3).x)


def main() -> None:
    from whet.planning.pace import REACHED

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true")
    given = parser.parse_args()
    reached = fitted(list(CASES)) if given.fit else REACHED
    for case in CASES:
        seconds = measured(case)
        line = f"{case.card:10} {case.name:36} {seconds:8.4f} s {foretold(case, reached) / seconds - 1:+7.1%}"
        if given.fit:
            without = fitted([other for other in CASES if other != case])
            line += f"  left out {foretold(case, without) / seconds - 1:+7.1%}"
        print(line, flush=True)
    print({name: float(f"{getattr(reached, name):.3g}") for name in FITTED}, file=sys.stderr)


if __name__ == "__main__":
    main()
