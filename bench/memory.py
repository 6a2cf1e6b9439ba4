"""Memory of training on a GPU: what the plan foretold beside what was allocated, phase by phase.

    python bench/memory.py out.jsonl                       # the whole table, each case in a process of its own
    python bench/memory.py out.jsonl --only "8B nf4;4B"    # the cases whose names hold one of these
    python bench/memory.py out.jsonl --config FILE --rows 2 --length 2048 base.storage=nf4 base.compute=bf16

Weights are random and rows full, as in `whet bench speed`; layout and step are those of training. A case runs two steps
one by one (the first compiles), then one that is looked at: what is allocated before it, what the forward pass keeps,
and the peak of the forward pass, the backward pass and the update. A case that runs out of memory says so.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).resolve().parent / "configs"
NF4, NF4_FP8 = ("base.storage=nf4", "base.compute=bf16"), ("base.storage=nf4", "base.compute=fp8")
FP8, BF16 = ("base.storage=fp8", "base.compute=fp8"), ("base.storage=bf16",)
PLAIN, RERUN = ("train.compile=false",), ("train.gradient_checkpointing=true",)
CASES: dict[str, tuple[str, int, int, tuple[str, ...]]] = {  # name: config, rows, length, settings
    "0.6B bf16 4x1024": ("Qwen3-0.6B", 4, 1024, BF16),
    "0.6B bf16 4x1024 eager": ("Qwen3-0.6B", 4, 1024, BF16 + PLAIN),
    "4B fp8 4x2048": ("Qwen3-4B", 4, 2048, FP8),
    "8B nf4 bf16 2x2048": ("Llama-3.1-8B", 2, 2048, NF4),
    "8B nf4 bf16 2x2048 eager": ("Llama-3.1-8B", 2, 2048, NF4 + PLAIN),
    "8B nf4 bf16 2x2048 checkpointing": ("Llama-3.1-8B", 2, 2048, NF4 + RERUN),
    "8B nf4 fp8 4x2048": ("Llama-3.1-8B", 4, 2048, NF4_FP8),
    "8B fp8 4x2048": ("Llama-3.1-8B", 4, 2048, FP8),
    "8B bf16 2x2048": ("Llama-3.1-8B", 2, 2048, BF16),
    "8B bf16 2x2048 eager": ("Llama-3.1-8B", 2, 2048, BF16 + PLAIN),
    "70B nf4 bf16 1x2048": ("Llama-3.1-70B", 1, 2048, NF4),
    "70B fp8 2x2048": ("Llama-3.1-70B", 2, 2048, FP8),
    "70B fp8 4x2048": ("Llama-3.1-70B", 4, 2048, FP8),
}


def measure(config: Path, rows: int, length: int, settings: list[str]) -> dict[str, Any]:
    """One case in this process; bytes."""
    import torch

    from whet.engine.load.load import load_config
    from whet.engine.task import CAUSAL
    from whet.planning.facts import Work
    from whet.planning.plan import plan_run, resolve_base
    from whet.recipe import parse
    from whet.speed import Load, _arranged, _batches

    recipe = parse(None, [f"model.path={json.dumps(str(config))}", "model.from_config=true", "train.learning_rate=1e-4",
                          "train.max_steps=4", "train.compile=true", *settings]).recipe  # fmt: skip
    hardware, placement = resolve_base(recipe, load_config(recipe.model))
    batches = _batches(Load(rows, length), min(30000, load_config(recipe.model).get_text_config().vocab_size))
    plan = plan_run(recipe, hardware, placement, task=CAUSAL, work=Work(batches, 4))
    layout = plan.layout
    found: dict[str, Any] = {
        "free": hardware.free_bytes, "foretold": layout.memory, "foretold_peak": layout.peak_bytes,
        "tokens": layout.tokens, "accumulate": layout.cut.accumulate, "mode": vars(layout.mode), "lean": layout.lean,
        "compiled": layout.compile_layers, "layers": plan.facts.model.shape.layers,
        "kept_estimate": plan.facts.model.shape.kept_bytes, "input_bytes": plan.facts.model.shape.input_bytes,
    }  # fmt: skip
    plan = replace(plan, layout=replace(layout, cuda_graphs=False))  # each phase is looked at by itself
    now, peak = torch.cuda.memory_allocated, torch.cuda.max_memory_allocated
    try:
        arranged, found["load_seconds"], _ = _arranged(plan)
        found["loaded"], found["load_peak"] = now(), peak()
        found |= _steps(arranged, recipe.train)
    except torch.OutOfMemoryError as error:
        found["out_of_memory"] = str(error).splitlines()[0][:300]
    found["reserved_peak"] = torch.cuda.max_memory_reserved()
    free, total = torch.cuda.mem_get_info()
    return found | {"device_used": total - free}


def _steps(arranged: Any, train: Any) -> dict[str, Any]:
    import torch

    from whet.training.optim import build_optimiser
    from whet.training.step import Steps

    now, peak = torch.cuda.memory_allocated, torch.cuda.max_memory_allocated
    optimiser = build_optimiser(train, arranged.trained, masters=arranged.masters)
    runner, objective, found = Steps(arranged.model, optimiser, arranged.objective, 1.0), arranged.objective, {}
    with arranged.running():
        start = time.perf_counter()
        arranged.first(lambda: runner.step(arranged.batches.step(0), 1).read())
        found["first_step_seconds"], found["first_peak"] = time.perf_counter() - start, peak()
        start = time.perf_counter()
        runner.step(arranged.batches.step(1), 2).read()
        found["step_seconds"], found["step_peak"] = time.perf_counter() - start, peak()
        largest = max(arranged.batches.step(2), key=lambda batch: batch.ids.size)
        found["before"] = now()
        torch.cuda.reset_peak_memory_stats()
        objective.before_step()
        loss = objective.losses(arranged.model, objective.to_device(largest)).sum()
        found |= {"after_forward": now(), "forward_peak": peak()}
        torch.cuda.reset_peak_memory_stats()
        loss.backward()
        found |= {"after_backward": now(), "backward_peak": peak()}
        torch.cuda.reset_peak_memory_stats()
        optimiser.collect_gradients()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        found |= {"update_peak": peak(), "after_update": now(), "largest_tokens": int(largest.ids.size)}
    return found


def run_case(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """A case of the table in a process of its own."""
    config, rows, length, settings = CASES[name]
    shape = ["--config", str(Path(given.configs) / f"{config}.json"), "--rows", str(rows), "--length", str(length)]
    command = [sys.executable, __file__, "-", *settings, *given.settings, *shape]
    done = subprocess.run(command, capture_output=True, text=True)
    last = done.stdout.strip().splitlines()[-1:] or ["{}"]
    found = json.loads(last[0]) if done.returncode == 0 else {"error": done.stderr[-1500:]}
    return {"case": name, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--only", default="", help="names to hold, separated by ;")
    parser.add_argument("--configs", default=CONFIGS)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("settings", nargs="*")
    given = parser.parse_args()
    if given.config is not None:
        print(json.dumps(measure(given.config, given.rows, given.length, given.settings)))
        return
    for name in CASES:
        if any(part in name for part in given.only.split(";")):
            found = run_case(name, given)
            short = {key: found.get(key) for key in ("case", "foretold_peak", "step_peak", "error")}
            print(json.dumps(short), flush=True)
            with Path(given.out).open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
