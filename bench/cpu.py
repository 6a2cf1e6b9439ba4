"""Training speed on a CPU: whet against TRL's SFTTrainer with PEFT, and against transformers' own Trainer with PEFT.

    pip install 'trl==1.16.0' 'datasets<5'     # the peer; whet itself does not need it
    python bench/cpu.py                        # writes bench/results/cpu/tickets.json
    python bench/cpu.py --only ''              # whet alone

Every system gets whet's own tokenised rows in whet's order and the same LoRA from the same start, AdamW, rates,
clipping, batch size and steps. That is checked on each batch of a peer, and for whet on its own record of the tokens
that each step read and learned. Each run is a process of its own; the order turns round with every seed (A B C, C B A,
...). A step lasts from the end of one optimiser step to the end of the next by the wall clock (for whet as its
timing.jsonl has it), book-keeping included (whet logs each step, the peers none). Tokens are real, not padding or
filler. A system's figure is the median over seeds of its median step. The peers run in their defaults and in each
setting that could help on a CPU (TRL documents padding_free for FlashAttention, which no CPU has; transformers' SDPA
mask keeps flattened rows apart too); the opponent is the fastest, chosen afterwards. Packing would change what a batch
is. Held-out loss comes from the saved adapters by one function: plain transformers and PEFT in fp32.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import distributions
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from whet.cli import WAITING

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "bench" / "results" / "cpu" / "tickets.json"
MODEL, TICKETS = ROOT / "whet" / "builtin" / "tiny", ROOT / "examples" / "support_tickets"
RANK, ALPHA, ROWS, RATE = 16, 32, 8, 2e-3
WORSE_BY = 0.01  # whet is no worse when its interval ends below this share of the opponent's held-out loss
PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets")
say = partial(print, file=sys.stderr, flush=True)

KEEP = {"gradient_checkpointing": False}
FLAT = KEEP | {"padding_free": True}
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1)}  # as whet sets it
PEERS: dict[str, dict[str, Any]] = {  # args: of SFTConfig; dtype: of the weights; env: of the process
    "trl default": {},
    "trl": {"args": KEEP},
    "trl fp32": {"args": KEEP | {"bf16": False}},
    "trl bf16 weights": {"args": KEEP, "dtype": "bfloat16"},
    "trl by length": {"args": KEEP | {"train_sampling_strategy": "group_by_length"}},
    "trl padding_free": {"args": FLAT},
    "trl padding_free malloc": {"args": FLAT, "env": MALLOC},
    "trl compiled": {"args": FLAT | {"torch_compile": True}, "env": MALLOC},
    "trainer malloc": {"args": KEEP, "env": MALLOC, "plain": True},
    "trainer flat malloc": {"args": FLAT, "env": MALLOC, "plain": True},
}


def recipe(seed: int, steps: int, data: str, out: str) -> list[str]:
    """What whet is asked for; everything else is its default."""
    return [
        "model=builtin:tiny", "base.device=cpu", f"method.r={RANK}", f"method.lora_alpha={ALPHA}",
        f"data.dataset={data}/train.jsonl", f"data.eval_dataset={data}/test.jsonl",
        f"train.max_steps={steps}", f"train.per_device_train_batch_size={ROWS}", f"train.learning_rate={RATE}",
        "train.lr_scheduler_type=cosine", "train.warmup_ratio=0", f"train.seed={seed}", f"output_dir={out}/run",
    ]  # fmt: skip


def whet_rows(seed: int, steps: int, data: str) -> tuple[list[Any], ...]:
    """The rows of `steps` steps in whet's order, and the held-out rows: (ids, labels) each, -100 = not learned."""
    from whet.api import prepared
    from whet.data.batch.batches import Cut, Order
    from whet.data.batch.text_batches import TextBatches
    from whet.recipe import parse

    ready = prepared(parse(None, recipe(seed, steps, data, "run")))
    assert steps * ROWS <= len(ready.train), "more steps than the data have rows for"
    order = TextBatches(ready.train, flat=True, order=Order(seed), cut=Cut(ROWS))
    train = [source for step in range(steps) for source in order.step(step)[0].sources]
    sides = ((ready.train, train), (ready.evaluation, range(len(ready.evaluation))))
    pairs = [[rows.row(index) for index in chosen] for rows, chosen in sides]
    return tuple([(ids.tolist(), np.where(learned, ids, -100).tolist()) for ids, learned in rows] for rows in pairs)


def start_sum(model: Any) -> float:
    """Of the squares of all trainable weights in bf16, the type in which PEFT draws adapters for bf16 models."""
    return sum(p.detach().bfloat16().double().square().sum().item() for p in model.parameters() if p.requires_grad)


def work_whet(job: dict[str, Any]) -> dict[str, Any]:
    """Train as `whet train` does; its own records say when each step ended and of how many tokens it was."""
    from whet.recipe import parse
    from whet.training.run import train

    parsed = parse(None, recipe(job["seed"], job["steps"], job["data"], job["out"]))
    start = start_sum(untrained(parsed.recipe))
    run = train(parsed)
    steps = [
        [[token for row in job["rows"][first : first + ROWS] for token in row[side]] for side in (0, 1)]
        for first in range(0, len(job["rows"]), ROWS)
    ]
    seen = [0, 0]
    logged = [line for line in run.lines("metrics.jsonl") if line["kind"] == "train"]
    for line, (ids, labels) in zip(logged, steps, strict=True):
        seen = [seen[0] + len(ids), seen[1] + sum(label >= 0 for label in labels)]
        assert seen == [line["tokens"], line["supervised_tokens"]], "trained on something else than whet's rows"
    stamps = [0.0, *(line["seconds"] for line in run.lines("timing.jsonl"))]
    return {"stamps": stamps, "steps": steps, "start": start}


def untrained(recipe: Any) -> Any:
    """The model with its adapter as training starts from it."""
    from whet.base.seed import seed_everything
    from whet.engine.device import resolve_placement
    from whet.engine.load.load import load_model

    placement = resolve_placement(recipe.base, recipe.method.can.storages)
    seed_everything(recipe.train.seed)
    return recipe.method.attach(load_model(recipe.model, placement))


def work_peer(job: dict[str, Any]) -> dict[str, Any]:
    """Train with the peer, keep what its collator hands out, and note the end of each step."""
    from transformers import TrainerCallback

    stamps, batches = [], []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            stamps.append(time.perf_counter())

        on_train_begin = on_step_end

    trainer = peer_trainer(job, Clock())
    collator, start = trainer.data_collator, start_sum(trainer.model)
    trainer.data_collator = lambda rows: batches.append(collator(rows)) or dict(batches[-1])
    trainer.train()
    trainer.model.save_pretrained(Path(job["out"]) / "run" / "adapter")
    steps = []
    for batch in batches:
        real = batch.get("attention_mask", batch["input_ids"] >= 0).bool()
        steps.append([batch[name][real].tolist() for name in ("input_ids", "labels")])
    return {"stamps": stamps, "steps": steps, "start": start}


def peer_trainer(job: dict[str, Any], clock: Any) -> Any:
    """The peer's trainer on whet's rows, in the settings of the job."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, set_seed
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    settings, dtype = job["settings"], job["settings"].get("dtype", "float32")
    rows = Dataset.from_list([{"input_ids": ids, "labels": labels} for ids, labels in job["rows"]])
    args = SFTConfig(**{
        "output_dir": job["out"], "use_cpu": True, "max_steps": job["steps"], "per_device_train_batch_size": ROWS,
        "learning_rate": RATE, "lr_scheduler_type": "cosine", "warmup_steps": 0, "max_grad_norm": 1.0,
        "logging_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "max_length": None,
        "train_sampling_strategy": "sequential", "seed": job["seed"], "model_init_kwargs": {"dtype": dtype},
    } | settings.get("args", {}))  # fmt: skip
    lora = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    if not settings.get("plain"):
        return SFTTrainer(str(MODEL), args, None, rows, None, tokenizer, callbacks=[clock], peft_config=lora)
    set_seed(job["seed"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype), lora)
    collator = DataCollatorForLanguageModeling(tokenizer.pad_token_id, args.padding_free)
    return Trainer(model, args, collator, rows, callbacks=[clock])


def work_judge(job: dict[str, Any]) -> dict[str, Any]:
    """Mean nll over the learned tokens of each held-out row, by run (an empty path: the base model)."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    found: dict[str, Any] = {}
    for name, adapter in job["adapters"].items():
        model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
        model, found[name] = (PeftModel.from_pretrained(model, adapter) if adapter else model).eval(), []
        for ids, labels in job["rows"]:
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
            found[name].append(torch.nn.functional.cross_entropy(logits, torch.tensor(labels[1:])).item())
    return found


def work(worker: str, place: Path) -> None:
    """The inside of a process that `call` started: train and report the speed, or judge."""
    import torch

    job = json.loads(place.read_text())
    torch.set_num_threads(job["threads"])
    found = {"whet": work_whet, "peer": work_peer, "judge": work_judge}[worker](job)
    if worker != "judge":
        arrange = sorted if "group_by_length" in str(job["settings"]) else list
        for side in (0, 1):
            seen, given = ([token for part in parts for token in part[side]] for parts in (found["steps"], job["rows"]))
            assert arrange(seen) == arrange(given), "trained on something else than whet's rows"
        tokens, seconds = [len(ids) for ids, _ in found["steps"]], [b - a for a, b in pairwise(found["stamps"])]
        timed = list(zip(tokens, seconds, strict=True))[job["warmup"] :]
        order = sorted(s for _, s in timed)
        found = {
            "tokens_per_second": round(statistics.median(n / s for n, s in timed), 1),
            "tokens_per_second_in_all": round(sum(n for n, _ in timed) / sum(order), 1),
            "step_ms_p10_p50_p90": [round(1000 * order[int(q * (len(order) - 1))], 1) for q in (0.1, 0.5, 0.9)],
            "versions": {d.name: d.version for d in distributions() if d.name in PACKAGES},
            "start": found["start"], "load_after": round(os.getloadavg()[0], 2),
        }  # fmt: skip
    place.with_suffix(".out").write_text(json.dumps(found))


def call(python: str, worker: str, job: dict[str, Any]) -> dict[str, Any]:
    """Run one worker in a process of its own; what it found, or {"failed": why}."""
    place = Path(job["out"]) / "job.json"
    place.parent.mkdir(parents=True)
    place.write_text(json.dumps(job))
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(job["threads"])}
    env |= dict([WAITING])  # as whet's command sets it, for the peers as well
    env |= job.get("settings", {}).get("env", {})
    command = [python, __file__, "--worker", worker, "--out", str(place)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": done.stderr.strip()[-600:]}
    return json.loads(place.with_suffix(".out").read_text())


def measure(options: argparse.Namespace, systems: dict[str, Any], folder: Path) -> tuple[dict[str, Any], ...]:
    """(figures of each system by seed, held-out nll of each row by "system seed")."""
    found: dict[str, Any] = {name: [] for name in systems}
    adapters, held_out = {"base": ""}, []
    job = {
        "threads": options.threads, "warmup": options.warmup, "steps": options.warmup + options.steps,
        "data": str(options.data),
    }  # fmt: skip
    for seed in range(options.seeds):
        train, held_out = whet_rows(seed, job["steps"], job["data"])
        for name in list(systems)[:: -1 if seed % 2 else 1]:
            out, mine = folder / f"{name} {seed}", name == "whet"
            task = job | {"seed": seed, "out": str(out), "rows": train, "settings": systems[name]}
            run = call(sys.executable if mine else options.peer_python, "whet" if mine else "peer", task)
            found[name].append(run)
            adapters |= {} if "failed" in run else {f"{name} {seed}": str(out / "run" / "adapter")}
            say(f"{name:24} seed {seed} {run.get('tokens_per_second', run)}")
            if mine and "failed" in run:
                sys.exit("whet itself failed: there is nothing to compare")
        starts = {run[seed]["start"] for run in found.values() if "failed" not in run[seed]}
        assert len(starts) == 1, "the systems started from different adapters"
    judge = job | {"adapters": adapters, "rows": held_out, "out": str(folder / "judge")}
    return found, call(sys.executable, "judge", judge)


def summary(options: argparse.Namespace, systems: dict[str, Any], found: dict[str, Any], nll: dict[str, Any]) -> Any:
    """The whole result, ready for JSON; its table goes to stderr."""
    from torch.cpu import get_capabilities

    from whet.evaluation.compare import paired

    speeds = {name: [run.get("tokens_per_second", 0.0) for run in runs] for name, runs in found.items()}
    speed = {name: statistics.median(values) for name, values in speeds.items()}
    order = [name for name in sorted(systems, key=lambda name: -speed[name]) if all(speeds[name])]
    rows = {name: [v for seed in range(options.seeds) for v in nll[f"{name} {seed}"]] for name in order}
    loss = {name: statistics.mean(values) for name, values in rows.items()}
    say(f"\n{'system':24} {'tok/s':>7} {'median step':>12} {'held-out':>9} {'whet is':>9}")
    for name in order:
        step = statistics.median(run["step_ms_p10_p50_p90"][1] for run in found[name])
        say(f"{name:24} {speed[name]:7,.0f} {step:9.0f} ms {loss[name]:9.4f} {speed['whet'] / speed[name]:8.2f}x")
    result = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": f"python bench/cpu.py --steps {options.steps} --warmup {options.warmup} --seeds {options.seeds}",
        "cpu": get_capabilities().get("cpu_name", "CPU"), "cores": os.cpu_count(), "threads": options.threads,
        "whet": speed["whet"], "held_out": {"base": statistics.mean(nll["base"]), "whet": loss["whet"]},
        "systems": {
            name: {"settings": systems[name], "tokens_per_second": speed[name], "held_out": loss.get(name),
                   "whet_times": round(speed["whet"] / speed[name], 2) if name in order else None, "seeds": found[name]}
            for name in systems
        },
    }  # fmt: skip
    opponent = next((name for name in order if name != "whet"), None)
    if opponent is None:
        return result
    difference = paired(rows[opponent], rows["whet"])
    fair = difference.high < WORSE_BY * loss[opponent]
    say(f"\nopponent: {opponent}; whet's held-out nll is {difference.mean_difference:+.4f} ({difference.low:+.4f} .. "
        f"{difference.high:+.4f}) from it: {'not worse' if fair else 'NOT SHOWN to be as good'}")  # fmt: skip
    result["held_out"] |= {
        "opponent": loss[opponent], "not_worse": fair, "p_value": difference.p_value,
        "whet_minus_opponent": [difference.low, difference.mean_difference, difference.high],
    }  # fmt: skip
    return result | {
        "opponent": opponent, "opponent_speed": speed[opponent], "ratio": round(speed["whet"] / speed[opponent], 2),
        "ratio_by_seed": [round(a / b, 3) for a, b in zip(speeds["whet"], speeds[opponent], strict=True)],
    }  # fmt: skip


def peers_of(options: argparse.Namespace) -> list[str]:
    """The peers to measure: those that are asked for, else all where there is a TRL to run them with."""
    asked = list(PEERS) if options.only is None else [name for name in options.only.split(",") if name]
    look = [options.peer_python, "-c", "import trl, datasets"]
    if not asked or subprocess.run(look, capture_output=True, check=False).returncode == 0:
        return asked
    missing = "TRL is missing: pip install 'trl==1.16.0' 'datasets<5', or --peer-python INTERPRETER-THAT-HAS-IT"
    if options.only is not None:
        sys.exit(missing)
    say(f"{missing}; whet is measured alone")
    return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("steps", 60), ("warmup", 5), ("seeds", 3), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", help="peers by name, with commas (all); none: whet alone")
    parser.add_argument("--data", type=Path, default=TICKETS, help="folder of train.jsonl and test.jsonl")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has TRL")
    parser.add_argument("--out", type=Path, help="file of the result (bench/results/cpu/tickets.json beside peers)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        sys.exit(work(options.worker, options.out))
    peers = peers_of(options)
    systems = {"whet": {}} | {name: PEERS[name] for name in peers}
    with tempfile.TemporaryDirectory() as folder:
        result = summary(options, systems, *measure(options, systems, Path(folder)))
    text, out = json.dumps(result, indent=1) + "\n", options.out or (RESULT if peers else None)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
