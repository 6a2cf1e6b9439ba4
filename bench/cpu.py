"""Training speed on a CPU: whet against TRL's SFTTrainer with PEFT, and against transformers' own Trainer with PEFT.

    pip install 'trl==1.16.0' 'datasets<5'     # the peer; whet itself does not need it
    python bench/cpu.py                        # writes bench/results/cpu/tickets.json
    python bench/cpu.py --steps 20 --seeds 1   # a look

builtin:tiny learns the support tickets. Every system gets whet's own tokenised rows in whet's order, so all train on
the same ids and targets (digests of each batch that was really used are compared), with the same LoRA from the same
start, AdamW, rates, clipping, batch size and steps. Each measurement is a process of its own; the order turns round
with every seed (A B C, C B A, ...). A step is the wall time from the end of one optimiser step to the end of the next:
data, forward, backward, clipping, update and book-keeping (whet logs every step, the peers none). Tokens are real ones:
neither padding nor filler counts. A system's figure is the median over seeds of its median step. The peers run in their
defaults and in each setting that could help on a CPU; the opponent is the fastest of them, chosen after the fact.
Held-out loss comes from the saved adapters by one function, plain transformers and PEFT in fp32, paired over seeds and
rows. Packing would change what a batch is and is left out. TRL documents padding_free for FlashAttention, which needs a
GPU; transformers' SDPA mask keeps flattened rows apart too, so it is measured all the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODEL, TICKETS = ROOT / "whet" / "builtin" / "tiny", ROOT / "examples" / "support_tickets"
RANK, ALPHA, ROWS, RATE = 16, 32, 8, 2e-3
WORSE_BY = 0.01  # whet is no worse when its interval ends below this share of the opponent's held-out loss
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
    "trainer": {"args": KEEP, "plain": True},
    "trainer malloc": {"args": KEEP, "plain": True, "env": MALLOC},
}


def recipe(seed: int, steps: int, out: str) -> list[str]:
    """What whet is asked for; everything else is its default."""
    return [
        "model=builtin:tiny", "base.device=cpu", f"method.r={RANK}", f"method.lora_alpha={ALPHA}",
        f"data.dataset={TICKETS / 'train.jsonl'}", f"data.eval_dataset={TICKETS / 'test.jsonl'}",
        f"train.max_steps={steps}", f"train.per_device_train_batch_size={ROWS}", f"train.learning_rate={RATE}",
        "train.lr_scheduler_type=cosine", "train.warmup_ratio=0", f"train.seed={seed}", f"output_dir={out}/run",
    ]  # fmt: skip


def whet_rows(seed: int, steps: int) -> tuple[list[Any], list[Any]]:
    """The rows of `steps` steps in whet's order, and the held-out rows: (ids, labels) each, -100 = not learned."""
    from whet.api import prepared
    from whet.data.batches import Batches
    from whet.recipe import parse

    ready = prepared(parse(None, recipe(seed, steps, "run")))
    assert steps * ROWS <= len(ready.train), "more steps than the data have rows for"
    order = Batches(ready.train, None, size=ROWS, accumulate=1, flat=True, seed=seed)

    def row(rows: Any, index: int) -> tuple[list[int], list[int]]:
        ids, learned = rows.row(index)
        return ids.tolist(), [int(i) if mark else -100 for i, mark in zip(ids, learned, strict=True)]

    train = [row(ready.train, source) for step in range(steps) for source in order.step(step)[0].sources]
    return train, [row(ready.evaluation, index) for index in range(len(ready.evaluation))]


def digests(rows: list[Any]) -> list[str]:
    """One for each row of (ids, labels)."""
    return [hashlib.sha256(repr(tuple(row)).encode()).hexdigest()[:16] for row in rows]


def start_digest(model: Any) -> str:
    """Of every trainable tensor in bf16, the type in which PEFT draws adapters for bf16 weights."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        if tensor.requires_grad:
            found.update(name.encode() + tensor.detach().bfloat16().float().numpy().tobytes())
    return found.hexdigest()[:16]


def work_whet(job: dict[str, Any]) -> dict[str, Any]:
    """Train as `whet train` does and note the end of each step, after its line is written."""
    from whet.engine.memory import keep_freed_memory
    from whet.recipe import parse
    from whet.train.run import Loop
    from whet.train.setup import build_model, get_ready

    stamps: list[float] = []

    class Timed(Loop):
        def _log(self, *args: Any) -> None:
            super()._log(*args)
            stamps.append(time.perf_counter())

    keep_freed_memory()
    model, ready, forward = build_model(get_ready(parse(None, recipe(job["seed"], job["steps"], job["out"]))))
    start, loop = start_digest(model), Timed(ready, model, forward)
    stamps.append(time.perf_counter())
    loop.fit()
    loop.recorder.close()
    batches, seen = [loop.batches.step(step)[0] for step in range(job["steps"])], []
    for batch in batches:
        labels = [-100] * batch.ids.shape[1]
        for place, target in zip(batch.places.tolist(), batch.targets.tolist(), strict=True):
            labels[place + 1] = target
        spans = list(pairwise(batch.bounds))[: len(batch.sources)]
        seen += digests([(batch.ids[0, a:b].tolist(), labels[a:b]) for a, b in spans])
    rates = [line["learning_rate"] for line in ready.run.lines("metrics.jsonl") if line["kind"] == "train"]
    tokens = [batch.tokens for batch in batches]
    return {"stamps": stamps, "tokens": tokens, "seen": seen, "rates": rates, "start": start}


def work_peer(job: dict[str, Any]) -> dict[str, Any]:
    """Train with the peer, keep what its collator hands out, and note the end of each step."""
    from transformers import TrainerCallback

    stamps: list[float] = []
    rates: list[float] = []
    batches: list[Any] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            stamps.append(time.perf_counter())

        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            rates.append(float(kwargs["optimizer"].param_groups[0]["lr"]))

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            stamps.append(time.perf_counter())

    trainer = peer_trainer(job, Clock())
    collator = trainer.data_collator

    def kept(rows: list[Any]) -> Any:
        batches.append(dict(batch := collator(rows)))
        return batch

    trainer.data_collator = kept
    start = start_digest(trainer.model)
    trainer.train()
    trainer.model.save_pretrained(Path(job["out"]) / "run" / "adapter")
    rows = [batch_rows(batch) for batch in batches]
    tokens = [sum(len(ids) for ids, _ in batch) for batch in rows]
    seen = [digest for batch in rows for digest in digests(batch)]
    return {"stamps": stamps, "tokens": tokens, "seen": seen, "rates": rates, "start": start}


def peer_trainer(job: dict[str, Any], clock: Any) -> Any:
    """The peer's trainer on whet's rows, in the settings of the job."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, set_seed
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    dtype = job["settings"].get("dtype", "float32")
    rows = Dataset.from_list([{"input_ids": ids, "labels": labels} for ids, labels in job["rows"]])
    args = SFTConfig(**{
        "output_dir": job["out"], "use_cpu": True, "max_steps": job["steps"], "per_device_train_batch_size": ROWS,
        "learning_rate": RATE, "lr_scheduler_type": "cosine", "warmup_steps": 0, "max_grad_norm": 1.0,
        "max_length": None,
        "logging_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "seed": job["seed"],
        "train_sampling_strategy": "sequential", "model_init_kwargs": {"dtype": dtype},
    } | job["settings"].get("args", {}))  # fmt: skip
    lora = LoraConfig("CAUSAL_LM", r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    if not job["settings"].get("plain"):
        return SFTTrainer(str(MODEL), args, None, rows, None, tokenizer, callbacks=[clock], peft_config=lora)
    set_seed(job["seed"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype), lora)
    collator = DataCollatorForLanguageModeling(tokenizer.pad_token_id, padding_free=args.padding_free)
    return Trainer(model, args, collator, rows, callbacks=[clock])


def batch_rows(batch: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of each row of a peer's batch, without padding."""
    ids, labels = batch["input_ids"], batch["labels"]
    if "attention_mask" in batch:
        lengths = batch["attention_mask"].sum(1).tolist()
        return [(ids[i, :n].tolist(), labels[i, :n].tolist()) for i, n in enumerate(lengths)]
    return [(ids[0, a:b].tolist(), labels[0, a:b].tolist()) for a, b in pairwise(batch["cu_seq_lens_q"].tolist())]


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
    return {"nll": found}


def work(worker: str, place: Path) -> None:
    """The inside of a process that `call` started."""
    import torch

    job = json.loads(place.read_text())
    torch.set_num_threads(job["threads"])
    found = {"whet": work_whet, "peer": work_peer, "judge": work_judge}[worker](job)
    found["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    place.with_suffix(".out").write_text(json.dumps(found))


def call(python: str, worker: str, job: dict[str, Any]) -> dict[str, Any]:
    """Run one worker in a process of its own; what it measured, or {"failed": why}."""
    place = Path(job["out"]) / "job.json"
    place.parent.mkdir(parents=True)
    place.write_text(json.dumps(job))
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    env |= {"OMP_NUM_THREADS": str(job["threads"])} | job.get("settings", {}).get("env", {})
    load = {"load_before": round(os.getloadavg()[0], 2)}
    command = [python, __file__, "--worker", worker, "--job", str(place)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": done.stderr.strip()[-600:]}
    return json.loads(place.with_suffix(".out").read_text()) | load


def figures(run: dict[str, Any], warmup: int) -> dict[str, Any]:
    """Speed of one run from the ends of its steps."""
    seconds = [b - a for a, b in pairwise(run["stamps"])]
    timed = list(zip(run["tokens"], seconds, strict=True))[warmup:]
    order = sorted(s for _, s in timed)
    return {
        "tokens_per_second": round(statistics.median(n / s for n, s in timed), 1),
        "tokens_per_second_in_all": round(sum(n for n, _ in timed) / sum(order), 1),
        "step_seconds_p10_p50_p90": [round(order[int(q * (len(order) - 1))], 4) for q in (0.1, 0.5, 0.9)],
        "first_step_seconds": round(seconds[0], 3),
    } | {name: run[name] for name in ("peak_mib", "load_before")}


def measure(
    options: argparse.Namespace, systems: dict[str, Any], folder: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(figures of each system by seed, held-out nll of each row by "system seed"). Stops where training was unequal."""
    runs: dict[str, Any] = {name: [] for name in systems}
    adapters, held_out, steps = {"base": ""}, [], options.warmup + options.steps
    for seed in range(options.seeds):
        train, held_out = whet_rows(seed, steps)
        for name in list(systems)[:: -1 if seed % 2 else 1]:
            out = folder / f"{name} {seed}"
            worker, python = ("whet", sys.executable) if name == "whet" else ("peer", options.peer_python)
            job = {"seed": seed, "steps": steps, "threads": options.threads, "out": str(out), "rows": train}
            run = call(python, worker, job | {"settings": systems[name]})
            runs[name].append(run)
            if "failed" in run:
                say(f"{name}, seed {seed}, FAILED: {run['failed']}")
                continue
            arrange = sorted if "length" in name else list
            assert arrange(run.pop("seen")) == arrange(digests(train)), f"{name} trained on other rows than whet"
            adapters[f"{name} {seed}"] = str(out / "run" / "adapter")
            run["figures"] = figures(run, options.warmup)
            say(f"{name:24} seed {seed} {run['figures']['tokens_per_second']:8,.0f} tok/s")
    for name in systems:
        for run, ours in zip(runs[name], runs["whet"], strict=True):
            assert "failed" in run or run["start"] == ours["start"], f"{name} started from another adapter than whet"
            gaps = [abs(a - b) for a, b in zip(run.get("rates", []), ours["rates"], strict=False)]
            assert max(gaps, default=0) < 1e-9, f"{name} used other learning rates than whet"
    judge = {"adapters": adapters, "rows": held_out, "threads": options.threads, "out": str(folder / "judge")}
    found = {name: [run.get("figures", run) for run in found] for name, found in runs.items()}
    return found, call(sys.executable, "judge", judge)["nll"]


def summary(options: argparse.Namespace, systems: dict[str, Any], found: dict[str, Any], nll: dict[str, Any]) -> Any:
    """The whole result, ready for JSON."""
    import torch

    from whet.engine.device import device_name
    from whet.evaluate.compare import paired

    speeds = {name: [run.get("tokens_per_second", 0.0) for run in runs] for name, runs in found.items()}
    speed = {name: statistics.median(values) for name, values in speeds.items()}
    rows = {n: [v for seed in range(options.seeds) for v in nll.get(f"{n} {seed}", [])] for n in systems}
    opponent = max((name for name in systems if name != "whet"), key=speed.__getitem__)
    result, loss = paired(rows[opponent], rows["whet"]), statistics.mean(rows[opponent])
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": "python bench/cpu.py "
        + " ".join(f"--{name} {getattr(options, name)}" for name in ("steps", "warmup", "seeds", "threads")),
        "cpu": device_name(torch.device("cpu")) + f", {os.cpu_count()} cores", "bf16_instructions":
        torch.cpu.get_capabilities().get("avx512_bf16") or torch.cpu.get_capabilities().get("amx_bf16") or False,
        "versions": {"whet": versions(sys.executable), "peer": versions(options.peer_python)},
        "whet_settings": recipe(0, options.warmup + options.steps, "")[2:],
        "opponent": opponent, "ratio": round(speed["whet"] / speed[opponent], 3),
        "ratio_by_seed": [round(a / b, 3) for a, b in zip(speeds["whet"], speeds[opponent], strict=True)],
        "held_out_nll": {
            "base": statistics.mean(nll["base"]), "opponent": loss, "whet": statistics.mean(rows["whet"]),
            "whet_minus_opponent": [result.low, result.mean_difference, result.high], "p_value": result.p_value,
            "not_worse": result.high < WORSE_BY * loss,
        },
        "systems": {
            name: {
                "settings": systems[name], "tokens_per_second": speed[name], "whet_is_times_faster":
                round(speed["whet"] / speed[name], 3) if speed[name] else None,
                "held_out_nll": statistics.mean(rows[name]) if rows[name] else None, "seeds": found[name],
            }
            for name in sorted(systems, key=lambda name: -speed[name])
        },
    }  # fmt: skip


def versions(python: str) -> dict[str, str]:
    """Of Python and of the packages that matter, in an interpreter."""
    code = (
        "import json; from importlib.metadata import distributions; "
        "print(json.dumps({d.name: d.version for d in distributions()}))"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    wanted = ("torch", "transformers", "peft", "trl", "accelerate", "datasets")
    return {name: version for name, version in json.loads(done.stdout).items() if name in wanted}


def say(text: str) -> None:
    """One line for people."""
    print(text, file=sys.stderr, flush=True)


def show(result: dict[str, Any]) -> None:
    """The table."""
    say(f"\n{'system':24} {'tok/s':>7} {'step p10 p50 p90, ms':>22} {'peak MiB':>9} {'held-out':>9} {'whet is':>9}")
    for name, system in result["systems"].items():
        if not system["tokens_per_second"]:
            continue
        run = system["seeds"][0]
        times = " ".join(f"{1000 * s:6.0f}" for s in run["step_seconds_p10_p50_p90"])
        say(f"{name:24} {system['tokens_per_second']:7,.0f} {times:>22} {run['peak_mib']:9,} "
            f"{system['held_out_nll']:9.4f} {system['whet_is_times_faster']:8.2f}x")  # fmt: skip
    loss = result["held_out_nll"]
    low, mean, high = loss["whet_minus_opponent"]
    say(f"\nwhet against {result['opponent']}: {result['ratio']} times the tokens per second; held-out nll {mean:+.4f} "
        f"({low:+.4f} .. {high:+.4f}), {'not worse' if loss['not_worse'] else 'NOT SHOWN to be as good'}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="timed steps")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default=",".join(PEERS), help="peers by name, with commas")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has TRL")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "cpu" / "tickets.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.job)
        return
    if "trl" not in versions(options.peer_python):
        sys.exit("TRL is missing: pip install 'trl==1.16.0' 'datasets<5', or --peer-python INTERPRETER-THAT-HAS-IT")
    systems = {"whet": {}} | {name: PEERS[name] for name in options.only.split(",")}
    with tempfile.TemporaryDirectory() as folder:
        result = summary(options, systems, *measure(options, systems, Path(folder)))
    show(result)
    text = json.dumps(result, indent=1) + "\n"
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
