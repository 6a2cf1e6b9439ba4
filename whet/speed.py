"""`whet bench speed`: training speed and memory of a model on this machine, through the path that training takes.

Rows are random tokens, all learned but the first; speed does not depend on what they say. The layout, the kernels, the
optimiser and the step are those of `whet train`, so what it shows is what training will do. LoRA as it is by default:
rank 16 on all linear layers, dropout 0, as in the published comparisons.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from whet.base.console import Progress, say
from whet.base.errors import UserError
from whet.base.seed import seed_everything
from whet.data.batch.batches import Cut, Order
from whet.data.batch.pack import best_fit
from whet.data.batch.rows import Rows
from whet.data.batch.text_batches import TextBatches

RATE = 2e-4
SECTIONS = ("model", "base", "method")  # every setting of these counts, and of training those of one step
OF_A_STEP = (
    "optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "gradient_checkpointing",
    "activation_offload", "tile_mlp", "offload_optimizer", "compile", "cuda_graphs", "fit_micro_batches",
)  # fmt: skip
INSTEAD = {
    "train.per_device_train_batch_size": "--rows", "train.gradient_accumulation_steps": "--accumulation",
    "train.max_steps": "--steps", "data.max_length": "--length",
}  # fmt: skip


@dataclass(frozen=True)
class Load:
    """The work that is measured. rows x length tokens in a forward pass, accumulation of them in a step.

    lengths: a JSON list of document lengths to be packed into that budget instead of full rows.
    """

    rows: int = 8
    length: int = 2048
    accumulation: int = 1
    lengths: str | None = None
    warm: int = 5
    steps: int = 15


def check_used(method: Any, paths: Iterable[str]) -> None:
    """Raise UserError for a setting, by its dotted path, that a measurement of speed would not use."""
    for path in paths:
        section, _, name = path.partition(".")
        if section not in SECTIONS and not (section == "train" and name in OF_A_STEP):
            raise UserError(
                "a measurement of speed does not use this setting", field=path,
                expected=f"settings of {', '.join(SECTIONS)}, and of train: {', '.join(OF_A_STEP)}",
                fix=f"{INSTEAD[path]} says it" if path in INSTEAD else "remove it",
            )  # fmt: skip
    if method.name != "lora":
        raise UserError(
            "speed is measured with LoRA", field="method.name", found=method.name, expected="lora", fix="remove it"
        )


def measure_speed(model: Any, base: Any, method: Any, train: Any, load: Load) -> dict[str, Any]:
    """tokens_per_second (median of the timed steps) and what stands beside it; see the keys. Raises UserError.

    model, base, method, train: sections of a recipe. Layers are compiled on a GPU, however short the measurement is,
    unless train.compile says otherwise.
    """
    import torch

    from whet.engine.load.load import load_config
    from whet.engine.task import CAUSAL
    from whet.planning.facts import Work
    from whet.planning.plan import plan_run, resolve_base
    from whet.recipe import Recipe

    seed_everything(0)
    total = load.warm + load.steps
    recipe = Recipe(model=model, base=base, method=method, train=train)
    config = load_config(model)
    hardware, placement = resolve_base(recipe, config)
    compiled = placement.device.type == "cuda" if train.compile is None else train.compile
    rate = train.learning_rate or RATE
    recipe = replace(recipe, train=replace(train, compile=compiled, learning_rate=rate, max_steps=total))
    batches = _batches(load, min(30000, config.get_text_config().vocab_size))
    plan = plan_run(recipe, hardware, placement, task=CAUSAL, work=Work(batches, total))
    return {
        "system": "whet", "model": Path(model.path).name, "device": hardware.name, "torch": torch.__version__,
        "storage": placement.storage, "compute": placement.arithmetic, **asdict(load), **_measure(plan, total, load),
    }  # fmt: skip


def _batches(load: Load, vocabulary: int) -> TextBatches:
    """Random rows: four steps' worth of full ones, or all given lengths packed once."""
    bins, size = None, load.rows
    if load.lengths is None:
        lengths = [load.length] * (load.rows * load.accumulation * 4)
    else:
        budget = load.rows * load.length
        lengths = _read_lengths(load.lengths)
        if max(lengths) > budget:
            raise UserError(
                "a document is longer than a forward pass", file=load.lengths, found=str(max(lengths)),
                expected=f"at most {budget}", fix="--rows and --length that hold it",
            )  # fmt: skip
        row = load.length if max(lengths) <= load.length else budget
        bins, size = best_fit(lengths, row), budget // row
    draw = np.random.default_rng(1)
    parts = ((i, draw.integers(3, vocabulary, n, dtype=np.int32), np.ones(n, bool)) for i, n in enumerate(lengths))
    return TextBatches(Rows.gather(parts), bins, flat=True, order=Order(0), cut=Cut(size, load.accumulation))


def _read_lengths(file: str) -> list[int]:
    """The document lengths in a JSON file. Raises UserError when it is no list of whole numbers from 1."""
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"the lengths cannot be read: {error}", file=file, expected="a JSON list of whole numbers",
            fix="write one, e.g. [120, 340, 85]",
        ) from error  # fmt: skip
    if not isinstance(found, list) or not found or not all(type(n) is int and n > 0 for n in found):
        raise UserError(
            "these are no document lengths", file=file, found=str(found)[:60],
            expected="a JSON list of whole numbers from 1", fix="write one, e.g. [120, 340, 85]",
        )  # fmt: skip
    return found


def _measure(plan: Any, total: int, load: Load) -> dict[str, Any]:
    """Load, lay out and step as training does, and time it."""
    import torch

    from whet.engine.memory.scarce import refusing
    from whet.engine.memory.used import peak_bytes
    from whet.training.relief import no_room_to_train

    device, changed = plan.facts.placement.device, {}
    with refusing(partial(no_room_to_train, plan, None)):
        arranged, loaded, began = _arranged(plan)
        launcher = _launcher(plan, arranged, total, changed)
    seconds, losses, tokens, first = [], [], [], None
    with arranged.running(), Progress("measuring", total) as bar:
        for index in range(total):
            if index == 1:
                launcher.try_largest()
            if index == 1 and device.type == "cuda":  # after compilation, before anything is captured
                torch.cuda.reset_peak_memory_stats()
            start = _now(device)
            stepped = launcher.launch(index)[0].read()
            seconds.append(_now(device) - start)
            if first is None:
                first = (_process_seconds(), time.perf_counter() - began)
            losses.append(stepped.loss)
            tokens.append(stepped.tokens)
            bar.advance(f"{stepped.tokens / seconds[-1]:,.0f} tok/s")
    timed = [count / second for count, second in zip(tokens[load.warm :], seconds[load.warm :], strict=True)]
    times = sorted(seconds[load.warm :])
    assert first is not None
    measured = {
        "load_seconds": round(loaded, 3), "tokens_per_second": round(statistics.median(timed)),
        "median_seconds": round(statistics.median(times), 5), "p10_seconds": round(times[len(times) // 10], 5),
        "p90_seconds": round(times[len(times) * 9 // 10], 5), "loss": round(losses[-1], 5),
        "first_loss": round(losses[0], 5), "first_step_seconds": round(first[0], 2),
        "compile_seconds": round(first[1], 2), "layout": launcher.arranged.as_dict() | changed,
        "peak_allocated_gib": round(peak_bytes(device) / 2**30, 3),
    }  # fmt: skip
    if device.type == "cuda":
        measured["peak_reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 3)
        free, whole = torch.cuda.mem_get_info()
        measured["device_used_gib"] = round((whole - free) / 2**30, 3)
    return measured


def _launcher(plan: Any, arranged: Any, total: int, changed: dict[str, Any]) -> Any:
    """The launcher of training for the timed steps. changed: gets what memory that ran out changes of the layout."""
    from whet.training.launch import Launcher
    from whet.training.optim import build_optimiser
    from whet.training.relief import Relief

    train, layout = plan.recipe.train, arranged.layout
    optimiser = build_optimiser(
        train, arranged.trained, captured=layout.cuda_graphs, paged=layout.page_optimizer, masters=arranged.masters
    )
    relief = Relief(plan, changed.update, lambda rows: "random rows")
    return Launcher(arranged, optimiser, relief, total=total, max_grad_norm=train.max_grad_norm)


def _arranged(plan: Any) -> tuple[Any, float, float]:
    """(the model laid out, seconds to load it, the moment after that)."""
    import torch

    from whet.engine.load.load import load_model, rebuilding_notice
    from whet.training.apply import Loaded, apply
    from whet.training.objective.choose import objective_for

    recipe, placement = plan.recipe, plan.facts.placement
    if notice := rebuilding_notice(recipe.model, placement):
        say(notice, style="yellow")
    start = time.perf_counter()
    with torch.device(placement.device):  # random weights of a config are drawn where they stay
        network = load_model(recipe.model, placement)
    loaded, began = time.perf_counter() - start, time.perf_counter()
    model = recipe.method.attach(network).train()
    objective = objective_for(network, placement, plan.task, padded=False, virtual=False)
    # The objective is handed over: a head that gives way to its FP8 form must be let go.
    return apply(plan, Loaded(network, model, {}), objective), loaded, began


def _now(device: Any) -> float:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _process_seconds() -> float:
    """Seconds since this process began, or not a number where the system does not say."""
    stat = Path("/proc/self/stat")
    if not stat.is_file():
        return math.nan
    ticks = int(stat.read_text().rpartition(")")[2].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return uptime - ticks / os.sysconf("SC_CLK_TCK")
