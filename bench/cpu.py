"""Training speed on a CPU: whet against TRL's SFTTrainer with PEFT, and against transformers' Trainer with PEFT.

    pip install 'trl==1.16.0' datasets       # the peer; whet itself does not need it
    python bench/cpu.py                      # about 15 minutes on 2 cores; writes bench/results/cpu/tickets.json
    python bench/cpu.py --steps 20 --seeds 1 # a look

builtin:tiny learns the support tickets. Every system gets whet's own tokenised rows in whet's order, so all train on
the same ids and targets (digests of every batch that was really used are compared), with the same LoRA, AdamW, rates,
clipping, batch size and number of steps; the starting adapters are compared too. Each measurement is its own process;
the order turns round with every seed (A B C, C B A, ...). A step is the wall time from the end of one optimiser step to
the end of the next: data, forward, backward, clipping, update and all book-keeping (whet logs every step, the peers do
not). Tokens are real ones: neither padding nor filler counts. Each system's figure is the median over seeds of its
median step; the opponent is the fastest peer, chosen after the fact. Held-out loss is computed by one function, plain
transformers and PEFT in fp32, from the adapters that were saved, and paired over seeds and rows.

The peers run in their defaults and in every setting that could help on a CPU (see PEERS). TRL documents padding_free
for FlashAttention only; transformers' SDPA mask also separates flattened rows, so it is tried.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "whet" / "builtin" / "tiny"
RANK, ALPHA, ROWS, RATE = 16, 32, 8, 2e-3
WORSE_BY = 0.01  # held-out loss: the whole interval must lie below this share of the opponent's loss

NO_RECOMPUTE = {"gradient_checkpointing": False}
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1)}
PEERS: dict[str, dict[str, Any]] = {
    "trl default": {},
    "trl": {"args": NO_RECOMPUTE},
    "trl fp32": {"args": NO_RECOMPUTE | {"bf16": False}},
    "trl bf16 weights": {"args": NO_RECOMPUTE, "dtype": "bfloat16"},
    "trl bf16 pure": {"args": NO_RECOMPUTE | {"bf16": False}, "dtype": "bfloat16"},
    "trl by length": {"args": NO_RECOMPUTE | {"train_sampling_strategy": "group_by_length"}},
    "trl padding_free": {"args": NO_RECOMPUTE | {"padding_free": True}},
    "trl compiled": {"args": NO_RECOMPUTE | {"torch_compile": True}},
    "trl malloc": {"args": NO_RECOMPUTE, "env": MALLOC},
    "trainer": {"args": NO_RECOMPUTE, "plain": True},
    "trainer fp32": {"args": NO_RECOMPUTE | {"bf16": False}, "plain": True},
    "trainer bf16 weights": {"args": NO_RECOMPUTE, "plain": True, "dtype": "bfloat16"},
    "trainer malloc": {"args": NO_RECOMPUTE, "plain": True, "env": MALLOC, "dtype": "bfloat16"},
}


def digest(rows: list[tuple[list[int], list[int]]]) -> list[str]:
    """One hash for each row of (ids, labels); -100 marks what is not learned."""
    return [hashlib.sha256(repr((list(ids), list(labels))).encode()).hexdigest()[:16] for ids, labels in rows]


def adapter_digest(model: Any) -> str:
    """Of every trainable tensor, in fp32."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        if tensor.requires_grad:
            found.update(name.encode() + tensor.detach().float().numpy().tobytes())
    return found.hexdigest()[:16]


def work_whet(job: dict[str, Any]) -> dict[str, Any]:
    """Train with whet as `whet train` does; returns what was measured."""
    from whet.engine.memory import keep_freed_memory
    from whet.recipe import parse
    from whet.train.run import Loop
    from whet.train.setup import build_model, get_ready

    class Timed(Loop):
        """Notes when each step has ended, with its line written."""

        stamps: list[float]

        def _log(self, *args: Any) -> None:
            super()._log(*args)
            self.stamps.append(time.perf_counter())

    keep_freed_memory()
    model, ready, forward = build_model(get_ready(parse(None, recipe(job["seed"], job["steps"], job["out"]))))
    started = adapter_digest(model)
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
        seen.append(digest([(batch.ids[0, a:b].tolist(), labels[a:b]) for a, b in spans]))
    rates = [line["learning_rate"] for line in ready.run.lines("metrics.jsonl") if line["kind"] == "train"]
    tokens = [batch.tokens for batch in batches]
    return {"stamps": loop.stamps, "tokens": tokens, "seen": seen, "rates": rates, "started": started,
            "adapter": str(ready.run.adapter)}  # fmt: skip


def work_peer(job: dict[str, Any]) -> dict[str, Any]:
    """Train with TRL's SFTTrainer, or with transformers' Trainer and TRL's collator; returns what was measured."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, set_seed
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    class Clock(TrainerCallback):
        """Notes the end of each step and its rate."""

        def __init__(self) -> None:
            self.stamps: list[float] = []
            self.rates: list[float] = []

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.stamps.append(time.perf_counter())

        def on_pre_optimizer_step(self, *args: Any, optimizer: Any, **kwargs: Any) -> None:
            self.rates.append(float(optimizer.param_groups[0]["lr"]))

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.stamps.append(time.perf_counter())

    class Watched:
        """The trainer's collator, keeping what it hands out."""

        def __init__(self, collator: Any) -> None:
            self.collator, self.batches = collator, []

        def __call__(self, rows: list[Any]) -> Any:
            self.batches.append(dict(self.collator(rows)))
            return self.batches[-1]

    settings, clock = job["settings"], Clock()
    dtype = settings.get("dtype", "float32")
    rows = Dataset.from_dict({"input_ids": [ids for ids, _ in job["rows"]], "labels": [mask for _, mask in job["rows"]]})
    args = SFTConfig(**{
        "output_dir": job["out"], "use_cpu": True, "max_steps": job["steps"], "per_device_train_batch_size": ROWS,
        "learning_rate": RATE, "lr_scheduler_type": "cosine", "warmup_steps": 0, "weight_decay": 0.0,
        "max_grad_norm": 1.0, "logging_strategy": "no", "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "seed": job["seed"], "train_sampling_strategy": "sequential", "max_length": None,
        "dataloader_num_workers": 0, "model_init_kwargs": {"dtype": dtype},
    } | settings.get("args", {}))  # fmt: skip
    lora = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    if settings.get("plain"):
        set_seed(job["seed"])
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype), lora)
        collator = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)
        trainer = Trainer(model, args, collator, rows, callbacks=[clock])
    else:
        trainer = SFTTrainer(
            str(MODEL), args, train_dataset=rows, processing_class=tokenizer, peft_config=lora, callbacks=[clock]
        )
    watched = trainer.data_collator = Watched(trainer.data_collator)
    started = adapter_digest(trainer.model)
    trainer.train()
    adapter = Path(job["out"]) / "adapter"
    trainer.model.save_pretrained(adapter)
    seen = [digest(batch_rows(batch)) for batch in watched.batches]
    tokens = [sum(len(ids) for ids, _ in batch_rows(batch)) for batch in watched.batches]
    return {"stamps": clock.stamps, "tokens": tokens, "seen": seen, "rates": clock.rates, "started": started,
            "adapter": str(adapter)}  # fmt: skip


def batch_rows(batch: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of each row of a peer's batch, without padding."""
    ids, labels = batch["input_ids"], batch["labels"]
    if "attention_mask" in batch:
        lengths = batch["attention_mask"].sum(1).tolist()
        return [(ids[i, :n].tolist(), labels[i, :n].tolist()) for i, n in enumerate(lengths)]
    bounds = batch["cu_seq_lens_q"].tolist()
    return [(ids[0, a:b].tolist(), labels[0, a:b].tolist()) for a, b in zip(bounds, bounds[1:], strict=False)]


def work_judge(job: dict[str, Any]) -> dict[str, Any]:
    """Mean nll over the learned tokens of each held-out row, for every adapter (None: the base model)."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    found = {}
    for name, adapter in job["adapters"].items():
        model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, adapter).eval() if adapter else model.eval()
        values = []
        for ids, labels in job["rows"]:
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
            target = torch.tensor(labels[1:])
            values.append(float(torch.nn.functional.cross_entropy(logits, target, ignore_index=-100)))
        found[name] = values
    return found


def recipe(seed: int, steps: int, out: str) -> list[str]:
    """What whet is asked for; everything else is its default."""
    return [
        "model=builtin:tiny", "base.device=cpu", f"method.r={RANK}", f"method.lora_alpha={ALPHA}",
        f"data.dataset={ROOT}/examples/support_tickets/train.jsonl",
        f"data.eval_dataset={ROOT}/examples/support_tickets/test.jsonl",
        f"train.max_steps={steps}", f"train.per_device_train_batch_size={ROWS}", f"train.learning_rate={RATE}",
        "train.lr_scheduler_type=cosine", "train.warmup_ratio=0", f"train.seed={seed}", f"output_dir={out}/run",
    ]  # fmt: skip


def labelled(rows: Any, index: int) -> tuple[list[int], list[int]]:
    """(ids, labels) of one of whet's rows."""
    ids, learned = rows.row(index)
    return ids.tolist(), [int(i) if mark else -100 for i, mark in zip(ids, learned, strict=True)]


def call(python: str, worker: str, job: dict[str, Any], threads: int) -> dict[str, Any]:
    """Run one worker in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "job.json"
        place.write_text(json.dumps(job))
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
        env = os.environ | dict.fromkeys(names, str(threads)) | {
            "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        load = os.getloadavg()[0]
        began = time.perf_counter()
        done = subprocess.run(
            [python, __file__, "--worker", worker, "--job", str(place)],
            env=env | job.get("settings", {}).get("env", {}), capture_output=True, text=True, check=False,
        )  # fmt: skip
        answer = place.with_suffix(".out")
        if done.returncode or not answer.is_file():
            raise SystemExit(f"{job.get('name', worker)} failed:\n{done.stderr[-3000:]}")
        return json.loads(answer.read_text()) | {"load": load, "process_seconds": time.perf_counter() - began}


def work(worker: str, place: Path) -> None:
    """The inside of a process that `call` started."""
    import torch

    job = json.loads(place.read_text())
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    found = {"whet": work_whet, "peer": work_peer, "judge": work_judge}[worker](job)
    found["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    place.with_suffix(".out").write_text(json.dumps(found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--worker")
    parser.add_argument("--job", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only")
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.job)
        sys.exit()
    from whet.api import prepared
    from whet.data.batches import Batches
    from whet.recipe import parse

    ready = prepared(parse(None, recipe(0, 1, "x")))
    order = Batches(ready.train, None, size=ROWS, accumulate=1, flat=True, seed=0)
    rows = [labelled(ready.train, i) for s in range(options.steps) for i in order.step(s)[0].sources]
    want = digest(rows)
    for name, settings in ({"whet": None} | PEERS).items():
        if options.only and name not in options.only.split(","):
            continue
        with tempfile.TemporaryDirectory() as out:
            job = {"name": name, "seed": 0, "steps": options.steps, "out": out, "rows": rows, "settings": settings or {}}
            try:
                got = call(sys.executable, "whet" if settings is None else "peer", job, 2)
            except SystemExit as e:
                print(name, e)
                continue
            judge = call(sys.executable, "judge", {"adapters": {name: got["adapter"]}, "rows": [labelled(ready.evaluation, i) for i in range(len(ready.evaluation))]}, 2)
        flat = [r for s in got["seen"] for r in s]
        sec = [b - a for a, b in zip(got["stamps"], got["stamps"][1:])]
        tps = [t / s for t, s in zip(got["tokens"], sec)][5:]
        print(f"{name:24s} {statistics.median(tps):8.0f} tok/s  total {sum(got['tokens'][5:])/sum(sec[5:]):8.0f}  step {1000*statistics.median(sec[5:]):.0f} ms same rows {sorted(flat)==sorted(want)} order {flat==want} start {got['started']} rates {got['rates'][:2]} {got['rates'][-1]} loss {statistics.mean(judge[name]):.4f} load {got['load']:.1f} proc {got['process_seconds']:.0f}s peak {got['peak_bytes']>>20} MiB", flush=True)
