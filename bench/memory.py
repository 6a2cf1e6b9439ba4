"""Memory of training on a GPU: what the plan foretold beside what was allocated, phase by phase.

    python bench/memory.py out.jsonl                       # the whole table, each case in a process of its own
    python bench/memory.py out.jsonl --only "8B;4B"        # the cases whose names hold one of these
    python bench/memory.py out.jsonl --jobs 4              # beside each other; a case has its share of the memory
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
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).resolve().parent / "configs"
GIB, CARD_GIB = 1 << 30, 130
NF4, NF4_FP8 = ("base.storage=nf4", "base.compute=bf16"), ("base.storage=nf4", "base.compute=fp8")
FP8, BF16 = ("base.storage=fp8", "base.compute=fp8"), ("base.storage=bf16",)
PLAIN, RERUN = ("train.compile=false",), ("train.gradient_checkpointing=true",)
FULL = ("method.name=full", "base.storage=fp32", "base.compute=bf16")
BYTES, PAGED = ("train.optim=adamw_8bit",), ("train.optim=paged_adamw_8bit",)
DROPS = ("method.lora_dropout=0.05",)


@dataclass(frozen=True)
class Case:
    """rows x length tokens of a config under settings. free: GiB that may be used, None: the whole card; takes: GiB
    that other cases must leave while it runs."""

    config: str
    rows: int
    length: int
    settings: tuple[str, ...]
    free: float | None = None
    takes: float = 0.0

    @property
    def name(self) -> str:
        words = [self.config.rpartition("-")[2] if "MoE" not in self.config else "MoE", f"{self.rows}x{self.length}"]
        said = {"train.compile=false": "eager", "train.gradient_checkpointing=true": "checkpointing"}
        words += [said.get(one, one.rpartition("=")[2]) for one in self.settings]
        return " ".join([*words, *([f"in {self.free:g} GiB"] if self.free else [])])


SMALL, THREE, FOUR, EIGHT, LARGE = "Qwen3-0.6B", "Llama-3.2-3B", "Qwen3-4B", "Llama-3.1-8B", "Llama-3.1-70B"
MIXTURE = "MoE-14B-A2.7B"
CASES = [
    Case(SMALL, 4, 1024, BF16, takes=8), Case(SMALL, 4, 1024, BF16 + PLAIN, takes=11),
    Case(SMALL, 16, 512, BF16, takes=15), Case(SMALL, 1, 8192, BF16, takes=15), Case(SMALL, 2, 512, BF16, takes=4),
    Case(SMALL, 4, 1024, NF4, takes=8), Case(SMALL, 2, 1024, FULL, takes=16),
    Case(SMALL, 2, 1024, FULL + PLAIN, takes=18), Case(SMALL, 2, 1024, FULL + BYTES, takes=14),
    Case(SMALL, 4, 1024, BF16 + DROPS, takes=10),
    Case(SMALL, 16, 1024, BF16, 8), Case(SMALL, 4, 2048, FULL, 16),
    Case(THREE, 4, 1024, BF16, takes=20), Case(THREE, 4, 1024, NF4, takes=15),
    Case(THREE, 4, 1024, NF4 + PLAIN, takes=20),
    Case(THREE, 8, 1024, NF4, 16), Case(THREE, 8, 2048, NF4 + DROPS + PAGED, 16), Case(THREE, 4, 2048, NF4_FP8, 24),
    Case(THREE, 1, 1024, FULL, 80), Case(THREE, 4, 1024, FULL + BYTES, 48), Case(THREE, 4, 2048, FP8 + RERUN, takes=8),
    Case(FOUR, 4, 2048, FP8, takes=42), Case(FOUR, 4, 2048, NF4, 16), Case(FOUR, 8, 2048, NF4, 24),
    Case(FOUR, 2, 1024, NF4 + BYTES, takes=12), Case(FOUR, 4, 2048, NF4 + RERUN + DROPS, takes=10),
    Case(FOUR, 8, 2048, FP8, 24), Case(FOUR, 1, 16384, NF4, 24), Case(FOUR, 1, 4096, FULL + BYTES, 80),
    Case(EIGHT, 2, 2048, NF4, takes=28), Case(EIGHT, 2, 2048, NF4 + PLAIN, takes=34), Case(EIGHT, 2, 2048, NF4, 16),
    Case(EIGHT, 2, 2048, NF4, 22.5), Case(EIGHT, 4, 2048, NF4 + BYTES, 24), Case(EIGHT, 2, 2048, NF4 + RERUN, takes=10),
    Case(EIGHT, 4, 2048, NF4_FP8, 24), Case(EIGHT, 4, 2048, NF4_FP8, 48), Case(EIGHT, 8, 2048, FP8, 48),
    Case(EIGHT, 4, 2048, FP8, takes=58), Case(EIGHT, 2, 2048, BF16, 48), Case(EIGHT, 2, 2048, BF16 + PLAIN, 48),
    Case(EIGHT, 1, 512, NF4, 8), Case(EIGHT, 1, 2048, BF16, 16),
    Case(MIXTURE, 2, 1024, BF16 + PLAIN, takes=60), Case(MIXTURE, 4, 2048, BF16 + PLAIN, 48),
    Case(LARGE, 1, 2048, NF4, 48), Case(LARGE, 1, 4096, NF4, 80), Case(LARGE, 4, 2048, FP8, takes=130),
]  # fmt: skip


def measure(config: Path, rows: int, length: int, settings: list[str], free_gib: float | None) -> dict[str, Any]:
    """One case in this process; bytes. A layout that does not fit by the plan is tried all the same."""
    import torch

    from whet.engine.load.load import load_config
    from whet.engine.task import CAUSAL
    from whet.planning.facts import Work
    from whet.planning.options import decide_anyway, fits
    from whet.planning.plan import plan_run, resolve_base
    from whet.recipe import parse
    from whet.speed import Load, _arranged, _batches

    recipe = parse(None, [f"model.path={json.dumps(str(config))}", "model.from_config=true", "train.learning_rate=1e-4",
                          "train.max_steps=4", *([] if "train.compile=false" in settings else ["train.compile=true"]),
                          *settings]).recipe  # fmt: skip
    hardware, placement = resolve_base(recipe, load_config(recipe.model))
    if free_gib is not None:
        free, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(free_gib * GIB / total)
        hardware = replace(hardware, free_bytes=int(free_gib * GIB))
    batches = _batches(Load(rows, length), min(30000, load_config(recipe.model).get_text_config().vocab_size))
    plan = plan_run(recipe, hardware, placement, task=CAUSAL, work=Work(batches, 4), choose=decide_anyway)
    layout = plan.layout
    found: dict[str, Any] = {
        "free": hardware.free_bytes, "fits": fits(plan.facts, layout), "counted": bool(plan.facts.kept),
        "cuda_graphs": layout.cuda_graphs, "foretold": layout.memory, "foretold_peak": layout.peak_bytes,
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


def run_case(case: Case, given: argparse.Namespace) -> dict[str, Any]:
    """A case of the table in a process of its own."""
    shape = ["--config", str(Path(given.configs) / f"{case.config}.json"), "--rows", str(case.rows)]
    shape += ["--length", str(case.length), *([] if case.free is None else ["--free", str(case.free)])]
    command = [sys.executable, __file__, "-", *case.settings, *given.settings, *shape]
    done = subprocess.run(command, capture_output=True, text=True)
    last = done.stdout.strip().splitlines()[-1:] or ["{}"]
    found = json.loads(last[0]) if done.returncode == 0 else {"error": done.stderr[-1500:]}
    return {"case": case.name, **found}


class Card:
    """Lets cases run beside each other as far as the card holds them."""

    def __init__(self, gib: float) -> None:
        self.left, self.changed = gib, threading.Condition()

    def run(self, case: Case, given: argparse.Namespace) -> None:
        """Run a case when there is room, and write what was found."""
        takes = case.free or case.takes
        with self.changed:
            self.changed.wait_for(lambda: self.left >= takes)
            self.left -= takes
        found = run_case(case, given)
        with self.changed:
            self.left += takes
            self.changed.notify_all()
            short = {key: found.get(key) for key in ("case", "fits", "foretold_peak", "step_peak", "error")}
            print(json.dumps(short), flush=True)
            with Path(given.out).open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--only", default="", help="names to hold, separated by ;")
    parser.add_argument("--configs", default=CONFIGS)
    parser.add_argument("--jobs", type=int, default=1, help="cases beside each other; times mean nothing then")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--free", type=float, help="GiB that may be used; auto: the whole card")
    parser.add_argument("settings", nargs="*")
    given = parser.parse_args()
    if given.config is not None:
        print(json.dumps(measure(given.config, given.rows, given.length, given.settings, given.free)))
        return
    chosen = [case for case in CASES if any(part in case.name for part in given.only.split(";"))]
    card = Card(CARD_GIB)
    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(lambda case: card.run(case, given), chosen))


if __name__ == "__main__":
    main()
