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
rows. Packing would change what a batch is and is left out. TRL names FlashAttention, which no CPU has, as padding_free's
condition; transformers' SDPA mask keeps flattened rows apart too, so it is measured all the same.
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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODEL, TICKETS = ROOT / "whet" / "builtin" / "tiny", ROOT / "examples" / "support_tickets"
RANK, ALPHA, ROWS, RATE = 16, 32, 8, 2e-3
WORSE_BY = 0.01  # whet is no worse when its interval ends below this share of the opponent's held-out loss
PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets")

KEEP = {"gradient_checkpointing": False}
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1)}
PEERS: dict[str, dict[str, Any]] = {  # args: of SFTConfig; dtype: of the weights; env: of the process
    "trl default": {},
    "trl": {"args": KEEP},
    "trl fp32": {"args": KEEP | {"bf16": False}},
    "trl bf16 weights": {"args": KEEP, "dtype": "bfloat16"},
    "trl bf16 pure": {"args": KEEP | {"bf16": False}, "dtype": "bfloat16"},
    "trl by length": {"args": KEEP | {"train_sampling_strategy": "group_by_length"}},
    "trl padding_free": {"args": KEEP | {"padding_free": True}},
    "trl compiled": {"args": KEEP | {"torch_compile": True}},
    "trl malloc": {"args": KEEP, "env": MALLOC},
    "trainer": {"args": KEEP, "plain": True},
    "trainer fp32": {"args": KEEP | {"bf16": False}, "plain": True},
    "trainer bf16 weights": {"args": KEEP, "plain": True, "dtype": "bfloat16"},
    "trainer malloc": {"args": KEEP, "plain": True, "env": MALLOC, "dtype": "bfloat16"},
}


def recipe(seed: int, steps: int, out: str) -> list[str]:
    """What whet is asked for; everything else is its default."""
    return [
        "model=builtin:tiny", "base.device=cpu", f"method.r={RANK}", f"method.lora_alpha={ALPHA}",
        f"data.dataset={TICKETS / 'train.jsonl'}", f"data.eval_dataset={TICKETS / 'test.jsonl'}",
        f"train.max_steps={steps}", f"train.per_device_train_batch_size={ROWS}", f"train.learning_rate={RATE}",
        "train.lr_scheduler_type=cosine", "train.warmup_ratio=0", f"train.seed={seed}", f"output_dir={out}/run",
    ]  # fmt: skip


def digests(rows: list[tuple[list[int], list[int]]]) -> list[str]:
    """One for each row of (ids, labels); label -100 marks what is not learned."""
    return [hashlib.sha256(repr(row).encode()).hexdigest()[:16] for row in rows]


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

    class Timed(Loop):
        stamps: list[float]

        def _log(self, *args: Any) -> None:
            super()._log(*args)
            self.stamps.append(time.perf_counter())

    keep_freed_memory()
    model, ready, forward = build_model(get_ready(parse(None, recipe(job["seed"], job["steps"], job["out"]))))
    start = start_digest(model)
    loop = Timed(ready, model, forward)
    loop.stamps = [time.perf_counter()]
    loop.fit()
    loop.recorder.close()
    batches = [loop.batches.step(step)[0] for step in range(job["steps"])]
    seen = []
    for batch in batches:
        labels = [-100] * batch.ids.shape[1]
        for place, target in zip(batch.places.tolist(), batch.targets.tolist(), strict=True):
            labels[place + 1] = target
        spans = list(zip(batch.bounds, batch.bounds[1:], strict=False))[: len(batch.sources)]
        seen += digests([(batch.ids[0, a:b].tolist(), labels[a:b]) for a, b in spans])
    rates = [line["learning_rate"] for line in ready.run.lines("metrics.jsonl") if line["kind"] == "train"]
    tokens = [batch.tokens for batch in batches]
    return {"stamps": loop.stamps, "tokens": tokens, "seen": seen, "rates": rates, "start": start}


def work_peer(job: dict[str, Any]) -> dict[str, Any]:
    """Train with TRL's SFTTrainer, or with transformers' Trainer and TRL's collator, and note the end of each step."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.stamps: list[float] = []
            self.rates: list[float] = []

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.stamps.append(time.perf_counter())

        def on_pre_optimizer_step(self, *args: Any, optimizer: Any, **kwargs: Any) -> None:
            self.rates.append(float(optimizer.param_groups[0]["lr"]))

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.stamps.append(time.perf_counter())

    class Kept:
        """The trainer's collator, keeping what it hands out."""

        def __init__(self, collator: Any) -> None:
            self.collator, self.batches = collator, []

        def __call__(self, rows: list[Any]) -> Any:
            self.batches.append(dict(self.collator(rows)))
            return self.batches[-1]

    clock = Clock()
    trainer = peer_trainer(job, clock)
    kept = trainer.data_collator = Kept(trainer.data_collator)
    start = start_digest(trainer.model)
    trainer.train()
    trainer.model.save_pretrained(Path(job["out"]) / "run" / "adapter")
    rows = [batch_rows(batch) for batch in kept.batches]
    tokens = [sum(len(ids) for ids, _ in batch) for batch in rows]
    seen = [name for batch in rows for name in digests(batch)]
    return {"stamps": clock.stamps, "tokens": tokens, "seen": seen, "rates": clock.rates, "start": start}


def peer_trainer(job: dict[str, Any], clock: Any) -> Any:
    """The peer's trainer on whet's rows, in the settings of the job."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, set_seed
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    settings = job["settings"]
    dtype = settings.get("dtype", "float32")
    rows = Dataset.from_dict(dict(zip(("input_ids", "labels"), zip(*job["rows"], strict=True), strict=True)))
    args = SFTConfig(**{
        "output_dir": job["out"], "use_cpu": True, "max_steps": job["steps"], "per_device_train_batch_size": ROWS,
        "learning_rate": RATE, "lr_scheduler_type": "cosine", "warmup_steps": 0, "weight_decay": 0.0,
        "max_grad_norm": 1.0, "logging_strategy": "no", "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "seed": job["seed"], "train_sampling_strategy": "sequential", "max_length": None,
        "dataloader_num_workers": 0, "model_init_kwargs": {"dtype": dtype},
    } | settings.get("args", {}))  # fmt: skip
    targets = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, **targets)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    if not settings.get("plain"):
        return SFTTrainer(str(MODEL), args, None, rows, None, tokenizer, callbacks=[clock], peft_config=lora)
    set_seed(job["seed"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype), lora)
    return Trainer(model, args, DataCollatorForLanguageModeling(tokenizer.pad_token_id), rows, callbacks=[clock])


def batch_rows(batch: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of each row of a peer's batch, without padding."""
    ids, labels = batch["input_ids"], batch["labels"]
    if "attention_mask" in batch:
        lengths = batch["attention_mask"].sum(1).tolist()
        return [(ids[i, :n].tolist(), labels[i, :n].tolist()) for i, n in enumerate(lengths)]
    bounds = batch["cu_seq_lens_q"].tolist()
    return [(ids[0, a:b].tolist(), labels[0, a:b].tolist()) for a, b in zip(bounds, bounds[1:], strict=False)]


def work_judge(job: dict[str, Any]) -> dict[str, Any]:
    """Mean nll over the learned tokens of each held-out row, by run (an empty path: the base model)."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    found: dict[str, Any] = {}
    for name, adapter in job["adapters"].items():
        model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
        model = (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()
        found[name] = []
        for ids, labels in job["rows"]:
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
            found[name].append(torch.nn.functional.cross_entropy(logits, torch.tensor(labels[1:])).item())
    return {"rows": found}


def work(worker: str, place: Path) -> None:
    """The inside of a process that `call` started."""
    import torch

    job = json.loads(place.read_text())
    torch.set_num_threads(job["threads"])
    found = {"whet": work_whet, "peer": work_peer, "judge": work_judge}[worker](job)
    found["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    place.with_suffix(".out").write_text(json.dumps(found))


def call(python: str, worker: str, job: dict[str, Any]) -> dict[str, Any]:
    """Run one worker in a process of its own; what it measured, or {"failed": why}."""
    place = Path(job["out"]) / "job.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(job))
    env = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(job["threads"]))
    env |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    env |= job.get("settings", {}).get("env", {})
    load, began = os.getloadavg()[0], time.perf_counter()
    command = [python, __file__, "--worker", worker, "--job", str(place)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": "\n".join(done.stderr.strip().splitlines()[-12:])}
    seconds = round(time.perf_counter() - began, 1)
    return json.loads(place.with_suffix(".out").read_text()) | {
        "load_before": round(load, 2),
        "process_seconds": seconds,
    }


def figures(found: dict[str, Any], warmup: int) -> dict[str, Any]:
    """Speed of one run from the ends of its steps."""
    seconds = [b - a for a, b in zip(found["stamps"], found["stamps"][1:], strict=False)]
    timed = list(zip(found["tokens"], seconds, strict=True))[warmup:]
    order = sorted(s for _, s in timed)
    return {
        "tokens_per_second": round(statistics.median(n / s for n, s in timed), 1),
        "tokens_per_second_in_all": round(sum(n for n, _ in timed) / sum(order), 1),
        "step_seconds": [round(order[int(q * (len(order) - 1))], 4) for q in (0.1, 0.5, 0.9)],
        "first_step_seconds": round(seconds[0], 3),
        "steps": len(timed),
        "real_tokens": sum(n for n, _ in timed),
    } | {name: found[name] for name in ("process_seconds", "peak_bytes", "load_before", "start")}


def whet_rows(seed: int, steps: int) -> tuple[list[Any], list[Any]]:
    """The rows of `steps` steps in whet's order, and the held-out rows: (ids, labels) each."""
    from whet.api import prepared
    from whet.data.batches import Batches
    from whet.recipe import parse

    ready = prepared(parse(None, recipe(seed, steps, "run")))
    order = Batches(ready.train, None, size=ROWS, accumulate=1, flat=True, seed=seed)
    assert steps * ROWS <= len(ready.train), "more steps than the data have rows for"

    def row(rows: Any, index: int) -> tuple[list[int], list[int]]:
        ids, learned = rows.row(index)
        return ids.tolist(), [int(i) if mark else -100 for i, mark in zip(ids, learned, strict=True)]

    train = [row(ready.train, source) for step in range(steps) for source in order.step(step)[0].sources]
    return train, [row(ready.evaluation, index) for index in range(len(ready.evaluation))]


def measure(
    options: argparse.Namespace, systems: dict[str, Any], folder: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what each system measured with each seed, held-out nll of each row by "system seed")."""
    found: dict[str, list[Any]] = {name: [] for name in systems}
    adapters, held_out = {"base": ""}, []
    for seed in range(options.seeds):
        train, held_out = whet_rows(seed, options.warmup + options.steps)
        want = digests(train)
        for name in list(systems)[:: -1 if seed % 2 else 1]:
            out = folder / f"{name} {seed}".replace(" ", "-")
            job = {"seed": seed, "steps": options.warmup + options.steps, "threads": options.threads, "out": str(out)}
            worker, python = ("whet", sys.executable) if name == "whet" else ("peer", options.peer_python)
            run = call(python, worker, job | {"rows": train, "settings": systems[name]})
            found[name].append(run)
            if "failed" in run:
                say(f"{name}, seed {seed}: FAILED\n{run['failed']}")
                continue
            same = (sorted, sorted) if "length" in name else (list, list)
            assert same[0](run["seen"]) == same[1](want), f"{name} trained on other rows than whet's"
            adapters[f"{name} {seed}"] = str(out / "run" / "adapter")
            run["figures"] = figures(run, options.warmup)
            say(f"{name:22} seed {seed}  {run['figures']['tokens_per_second']:8,.0f} tok/s  load {run['load_before']}")
    for name, runs in found.items():
        for run, first in zip(runs, found["whet"], strict=True):
            if "failed" not in run:
                assert run["start"] == first["start"], f"{name} started from another adapter than whet"
                gaps = [abs(a - b) for a, b in zip(run["rates"], first["rates"], strict=True)]
                assert max(gaps) < 1e-9, f"{name} used other learning rates than whet"
    job = {"adapters": adapters, "rows": held_out, "threads": options.threads, "out": str(folder / "judge")}
    return found, call(sys.executable, "judge", job)["rows"]


def compared(found: dict[str, Any], held_out: dict[str, Any], opponent: str) -> dict[str, Any]:
    """Held-out loss of whet against the opponent, paired over seeds and rows; positive differences are whet's loss."""
    from whet.evaluate.compare import paired

    seeds = range(len(found["whet"]))
    theirs, ours = ([v for seed in seeds for v in held_out[f"{name} {seed}"]] for name in (opponent, "whet"))
    result = paired(theirs, ours)
    mean = statistics.mean(theirs)
    return {
        "base": round(statistics.mean(held_out["base"]), 4), "opponent": round(mean, 4),
        "whet": round(statistics.mean(ours), 4), "difference": result.mean_difference,
        "interval_95": [result.low, result.high], "p_value": result.p_value, "pairs": len(ours),
        "margin": round(WORSE_BY * mean, 4), "not_worse": result.high < WORSE_BY * mean,
    }  # fmt: skip


def summary(options: argparse.Namespace, systems: dict[str, Any], found: dict[str, Any], nll: dict[str, Any]) -> Any:
    """The whole result, ready for JSON."""
    import torch

    from whet.engine.device import device_name

    whole = {name: runs for name, runs in found.items() if all("figures" in run for run in runs)}
    speed = {n: statistics.median(run["figures"]["tokens_per_second"] for run in runs) for n, runs in whole.items()}
    opponent = max((name for name in speed if name != "whet"), key=speed.__getitem__)
    by_seed = [
        round(a["figures"]["tokens_per_second"] / b["figures"]["tokens_per_second"], 3)
        for a, b in zip(found["whet"], found[opponent], strict=True)
    ]
    given = f"--steps {options.steps} --warmup {options.warmup} --seeds {options.seeds} --threads {options.threads}"
    capabilities = torch.cpu.get_capabilities()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), "command": f"python bench/cpu.py {given}",
        "hardware": {"cpu": device_name(torch.device("cpu")), "cores": os.cpu_count(), "threads": options.threads,
                     "bf16": bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))},
        "versions": {"whet side": versions(sys.executable), "peer side": versions(options.peer_python)},
        "training": {"model": "builtin:tiny", "data": "support_tickets", "method": "lora", "r": RANK,
                     "lora_alpha": ALPHA, "target_modules": "all-linear", "rows_per_step": ROWS, "learning_rate": RATE,
                     "lr_scheduler_type": "cosine", "optim": "adamw", "max_grad_norm": 1.0,
                     "steps": options.warmup + options.steps, "of_them_timed": options.steps},
        "whet": speed["whet"], "opponent": opponent, "opponent_tokens_per_second": speed[opponent],
        "ratio": round(speed["whet"] / speed[opponent], 3), "ratio_by_seed": by_seed,
        "ratio_to_trl_default": round(speed["whet"] / speed["trl default"], 3) if "trl default" in speed else None,
        "held_out_nll": compared(found, nll, opponent),
        "systems": {
            name: {
                "settings": systems[name], "tokens_per_second": speed.get(name),
                "held_out_nll": [round(statistics.mean(nll[f"{name} {s}"]), 4) for s in range(len(runs))
                                 if f"{name} {s}" in nll],
                "seeds": [run.get("figures", run) for run in runs],
            }
            for name, runs in found.items()
        },
    }  # fmt: skip


def versions(python: str) -> dict[str, str] | None:
    """Of the packages in an interpreter; None when TRL cannot be imported there."""
    code = f"""import json, platform
from importlib.metadata import PackageNotFoundError, version
found = {{"python": platform.python_version()}}
for name in {PACKAGES!r}:
    try: found[name] = version(name)
    except PackageNotFoundError: pass
print(json.dumps(found))"""
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def say(text: str) -> None:
    """One line for people."""
    print(text, file=sys.stderr, flush=True)


def show(result: dict[str, Any]) -> None:
    """The table."""
    say(f"\n{'system':22} {'tok/s':>8} {'p10..p90 step':>17} {'first step':>11} {'peak':>9} {'held-out':>9}")
    for name, system in sorted(result["systems"].items(), key=lambda item: -(item[1]["tokens_per_second"] or 0)):
        if system["tokens_per_second"] is None:
            say(f"{name:22}   failed")
            continue
        run = system["seeds"][0]
        low, _, high = run["step_seconds"]
        say(
            f"{name:22} {system['tokens_per_second']:8,.0f} {1000 * low:6.0f}..{1000 * high:.0f} ms"
            f" {run['first_step_seconds']:9.2f} s {run['peak_bytes'] / 2**20:5.0f} MiB"
            f" {statistics.mean(system['held_out_nll']):9.4f}"
        )
    loss = result["held_out_nll"]
    say(
        f"whet / {result['opponent']}: {result['ratio']} times the tokens per second (by seed {result['ratio_by_seed']})"
    )
    low, high = loss["interval_95"]
    verdict = "not worse" if loss["not_worse"] else "NOT shown to be as good"
    say(
        f"held-out loss {loss['whet']} against {loss['opponent']}: {low:+.4f} .. {high:+.4f} (base {loss['base']}): {verdict}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="timed steps")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", help="peers, by name, with commas; all of them otherwise")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has TRL")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "cpu" / "tickets.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.job)
        return
    if "trl" not in (versions(options.peer_python) or {}):
        raise SystemExit("TRL is not installed: pip install 'trl==1.16.0' 'datasets<5', or name an interpreter that "
                         "has it with --peer-python")  # fmt: skip
    chosen = options.only.split(",") if options.only else list(PEERS)
    systems = {"whet": {}} | {name: PEERS[name] for name in chosen}
    with tempfile.TemporaryDirectory() as folder:
        found, nll = measure(options, systems, Path(folder))
    result = summary(options, systems, found, nll)
    show(result)
    text = json.dumps(result, indent=1) + "\n"
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
