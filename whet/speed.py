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

from whet.base.console import Progress
from whet.base.errors import UserError
from whet.base.seed import seed_everything
from whet.data.batch.batches import Batches
from whet.data.batch.pack import best_fit
from whet.data.batch.rows import Rows
from whet.data.config import Data

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
    """What is measured. rows x length tokens in a forward pass, accumulation of them in a step.

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

    from whet.engine.device import device_name, place
    from whet.engine.load.load import load_config, load_model
    from whet.planning.asked import Asked, Structure
    from whet.planning.rules import STRUCTURE, check, rule_out

    seed_everything(0)
    config = load_config(model)
    text = config.get_text_config()
    placement = place(base, method.can.storages, getattr(text, "hidden_size", None))
    asked = Asked(model=model, base=base, method=method, data=Data(), train=train, config=config, task="causal")
    check(asked.on(placement))
    train = rule_out(asked.on(placement))
    if train.compile is None:
        train = replace(train, compile=torch.cuda.is_available())
    batches = _batches(load, min(30000, text.vocab_size))
    began = time.perf_counter()
    with torch.device(placement.device):  # random weights of a config are drawn where they stay
        network = load_model(model, placement)
    loaded = time.perf_counter() - began
    attached = method.attach(network)
    check(replace(asked, structure=Structure.of(network, attached, ())), STRUCTURE)
    found = _run(train, placement, attached.train(), network, batches, load)
    return {
        "system": "whet", "model": Path(model.path).name, "device": device_name(placement.device),
        "torch": torch.__version__, "storage": placement.storage, "compute": placement.arithmetic, **asdict(load),
        "load_seconds": round(loaded, 3),
        **found,
    }  # fmt: skip


def _batches(load: Load, vocabulary: int) -> Batches:
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
    return Batches(Rows.gather(parts), bins, size=size, accumulate=load.accumulation, flat=True, seed=0)


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


def _run(train: Any, placement: Any, model: Any, network: Any, batches: Batches, load: Load) -> dict[str, Any]:
    import torch

    from whet.engine.compute.head import find_head
    from whet.engine.memory.used import peak_bytes
    from whet.training.arrange import arrange
    from whet.training.graph import GraphSteps
    from whet.training.loss import Forward
    from whet.training.optim import build_optimiser
    from whet.training.step import Steps

    autocast = placement.compute if placement.autocast else None
    total = load.warm + load.steps
    began = time.perf_counter()
    # No name for what goes in: a head that gives way to its FP8 form must be let go.
    arranged = arrange(
        train, placement, model, network,
        Forward(placement.device, placement.compute, placement.autocast, find_head(network, autocast=autocast)),
        batches, steps=total,
    )  # fmt: skip
    optimiser = build_optimiser(
        train, arranged.matrices, arranged.vectors, 2e-4, captured=arranged.graphs, masters=arranged.masters
    )
    kind = GraphSteps if arranged.graphs else Steps
    runner = kind(model, optimiser, arranged.forward, train.max_grad_norm)
    seconds, losses, tokens, first = [], [], [], None
    with arranged.running(), Progress("measuring", total) as bar:
        for index in range(total):
            made = arranged.batches.step(index)
            if index == 1 and placement.device.type == "cuda":  # after compilation, before anything is captured
                torch.cuda.reset_peak_memory_stats()
            start = _now(placement.device)
            stepped = arranged.first(partial(runner.step, made, index + 1)).read()
            seconds.append(_now(placement.device) - start)
            if first is None:
                first = (_process_seconds(), time.perf_counter() - began)
            losses.append(stepped.loss)
            tokens.append(stepped.tokens)
            bar.advance(f"{stepped.tokens / seconds[-1]:,.0f} tok/s")
    timed = [count / second for count, second in zip(tokens[load.warm :], seconds[load.warm :], strict=True)]
    times = sorted(seconds[load.warm :])
    assert first is not None
    found = {
        "tokens_per_second": round(statistics.median(timed)), "median_seconds": round(statistics.median(times), 5),
        "p10_seconds": round(times[len(times) // 10], 5), "p90_seconds": round(times[len(times) * 9 // 10], 5),
        "loss": round(losses[-1], 5), "first_loss": round(losses[0], 5), "first_step_seconds": round(first[0], 2),
        "compile_seconds": round(first[1], 2), "arrangement": arranged.facts,
        "peak_allocated_gib": round(peak_bytes(placement.device) / 2**30, 3),
    }  # fmt: skip
    if placement.device.type == "cuda":
        found["peak_reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 3)
        free, whole = torch.cuda.mem_get_info()
        found["device_used_gib"] = round((whole - free) / 2**30, 3)
    return found


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
