"""Peers' training speed on random-initialised weights of a real shape: one process, one measurement, one JSON line.

    python bench/peers.py SYSTEM CONFIG ROWS LENGTH ACCUMULATION CHECKPOINTING BITS [options]
    python bench/peers.py unsloth bench/configs/Qwen3-4B.json 2 2048 4 default 4
    python bench/peers.py unsloth bench/configs/Qwen3-4B.json 8 2048 1 off 4 --lengths bench/lengths/gsm8k.json
    python bench/peers.py checkpoint bench/configs/Qwen3-4B.json    # only write the checkpoint, print its folder

SYSTEM         unsloth | peft (transformers + PEFT + bitsandbytes, TRL's recipe in a plain loop) | peft-liger
CHECKPOINTING  default (the system's own choice) | off
BITS           4 (NF4, double quantisation) | 16

LoRA r=16 on the seven projections, dropout 0, 8-bit AdamW, bf16 compute, clipping at 1. Every real token is supervised
and only real tokens count. Full rows are ROWS x LENGTH random ids. With --lengths the micro-batches hold documents of
real lengths, about ROWS x LENGTH tokens each, laid out as --packing says:

flat    one row of whole documents; positions restart; Unsloth gets packed_seq_lengths as its own collator gives them
rows    ROWS rows of LENGTH, best fit over all documents (TRL's packing), told apart by restarting positions
sorted  one document per row, padded on the right, documents of like length together (group_by_length at its best)
padded  one document per row in file order, padded on the right

Padding on the right needs no attention mask under a causal model, so none is passed: the peers' kernels stay fast.
The step's speed is real tokens / seconds; the figure is the median of the timed steps. --first-step runs one step and
is about `first_step_seconds` (process start to the end of the first optimiser step) and `load_to_first_step_seconds`.
Gives up the trainers: a plain loop costs every peer less than its own trainer does.
The checkpoint (bf16, made on the GPU) is written once into WHET_SCRATCH and shared by all systems.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle, islice
from pathlib import Path
from typing import Any

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PAD, FIRST_ID, IGNORED = 0, 3, -100
PACKAGES = (
    "torch", "triton", "transformers", "peft", "bitsandbytes", "unsloth", "unsloth_zoo", "xformers", "liger-kernel",
)  # fmt: skip


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=("unsloth", "peft", "peft-liger", "checkpoint"))
    parser.add_argument("config", type=Path)
    for name, default in (("rows", 2), ("length", 2048), ("accumulation", 1)):
        parser.add_argument(name, type=int, nargs="?", default=default)
    parser.add_argument("checkpointing", nargs="?", choices=("default", "off"), default="default")
    parser.add_argument("bits", nargs="?", type=int, choices=(4, 16), default=4)
    parser.add_argument("--lengths", type=Path, help="JSON list of document lengths in tokens")
    parser.add_argument("--packing", choices=("flat", "rows", "sorted", "padded"), default="flat")
    parser.add_argument("--attention", default="sdpa", help="transformers' attn_implementation, for peft")
    parser.add_argument("--first-step", action="store_true", help="one step, no warm-up")
    parser.add_argument("--warm", type=int, default=5)
    parser.add_argument("--steps", type=int, default=15)
    options = parser.parse_args(argv)
    if options.first_step:
        options.warm, options.steps = 0, 1
    return options


def process_age() -> float:
    """Seconds since this process started, by the kernel's clock (10 ms); 0 where that cannot be read."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0.0
    return max(0.0, uptime - ticks / os.sysconf("SC_CLK_TCK"))


def scratch() -> Path:
    return Path(os.environ.get("WHET_SCRATCH") or Path(tempfile.gettempdir()) / "whet-bench")


def set_environment() -> None:
    """Nothing is fetched or reported, generated code goes to the scratch folder. Before any peer is imported."""
    os.environ.update(
        HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1",
        TOKENIZERS_PARALLELISM="false",
    )  # fmt: skip
    os.environ.setdefault("HF_HOME", str(scratch() / "huggingface"))
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(scratch() / "unsloth_compiled"))


def checkpoint(config_path: Path) -> Path:
    """Folder of the config's random bf16 checkpoint with a small tokenizer; written when it is not there yet."""
    out = scratch() / config_path.stem
    if out.exists():
        return out
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    raw = json.loads(config_path.read_text(encoding="utf-8"))
    config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, PAD
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    part = out.with_name(f"{out.name}.part{os.getpid()}")
    model.save_pretrained(part, max_shard_size="4GB")
    words = {"<pad>": PAD, "<s>": 1, "</s>": 2} | {f"t{i}": i for i in range(FIRST_ID, 1000)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(part)
    part.rename(out)  # so that a killed process leaves no half checkpoint under the final name
    return out


def in_file_order(lengths: list[int], budget: int, count: int) -> list[list[int]]:
    """`count` groups of successive documents, each as many as fit into `budget` tokens; starts over when used up."""
    groups, group = [], []
    for length in cycle(lengths):
        if group and sum(group) + length > budget:
            groups.append(group)
            group = []
            if len(groups) == count:
                return groups
        group.append(length)
    return groups


def by_length(lengths: list[int], budget: int, count: int) -> list[list[int]]:
    """Groups of documents of like length, at most `budget` real tokens each, shuffled with the widest one first."""
    ordered = sorted(lengths, reverse=True)
    whole: list[list[int]] = [[]]
    for length in ordered:
        if whole[-1] and sum(whole[-1]) + length > budget:
            whole.append([])
        whole[-1].append(length)
    full = whole[:-1] or whole  # the last group is a remainder, which would read as a slow step
    widest = max(full, key=lambda group: len(group) * group[0])
    rest = [group for group in full if group is not widest]
    random.Random(1).shuffle(rest)
    return list(islice(cycle([widest, *rest]), count))


def best_fit(lengths: list[int], rows: int, length: int, count: int) -> list[list[list[int]]]:
    """Micro-batches of `rows` rows, each a list of document lengths that sum up to at most `length` tokens."""
    filled: list[list[int]] = []
    room: list[int] = []
    for document in sorted((min(n, length) for n in lengths), reverse=True):
        fitting = [index for index, left in enumerate(room) if left >= document]
        if fitting:
            index = min(fitting, key=room.__getitem__)
        else:
            index = len(room)
            filled.append([])
            room.append(length)
        filled[index].append(document)
        room[index] -= document
    filled = [row for row, left in zip(filled, room, strict=True) if left < length // 10] or filled  # no remainders
    random.Random(1).shuffle(filled)
    batches = [filled[start : start + rows] for start in range(0, len(filled) - rows + 1, rows)]
    assert batches, "the documents fill less than one micro-batch"
    return list(islice(cycle(batches), count))


def layout(options: argparse.Namespace, count: int) -> list[dict[str, Any]]:
    """Per micro-batch: rows (each the lengths of its documents), width of a row in tokens, real tokens.

    A row's documents may end before the width does; what follows is padding.
    """
    rows, length = options.rows, options.length
    if options.lengths is None:
        return [{"rows": [[length]] * rows, "width": length, "tokens": rows * length}] * count
    lengths = json.loads(options.lengths.read_text(encoding="utf-8"))
    if options.packing == "rows":
        chosen = best_fit(lengths, rows, length, count)
    elif options.packing == "sorted":
        chosen = [[[n] for n in group] for group in by_length(lengths, rows * length, count)]
    else:
        groups = in_file_order(lengths, rows * length, count)
        chosen = [[group] if options.packing == "flat" else [[n] for n in group] for group in groups]
    found = []
    for batch in chosen:
        widest = max(map(sum, batch))
        width = {"rows": length, "flat": widest}.get(options.packing, -(-widest // 8) * 8)
        found.append({"rows": batch, "width": width, "tokens": sum(map(sum, batch))})
    return found


def inputs(options: argparse.Namespace, batch: dict[str, Any], vocabulary: int, generator: Any) -> dict[str, Any]:
    """The arguments of one model call: input_ids, labels [R, T] (and position_ids, packed_seq_lengths)."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = (len(batch["rows"]), batch["width"])
    ids = torch.randint(FIRST_ID, min(30000, vocabulary), shape, generator=generator)
    if options.lengths is None:
        ids = ids.to(device)
        return {"input_ids": ids, "labels": ids}
    labels, positions = ids.clone(), torch.zeros(shape, dtype=torch.long)
    for row, lengths in enumerate(batch["rows"]):
        start = 0
        for n in lengths:
            positions[row, start : start + n] = torch.arange(n)
            labels[row, start] = IGNORED  # a document's first token is not predicted from the one before it
            start += n
        ids[row, start:], labels[row, start:] = PAD, IGNORED
        positions[row, start:] = torch.arange(batch["width"] - start)
    found = {"input_ids": ids.to(device), "labels": labels.to(device), "use_cache": False}
    if options.packing in ("flat", "rows"):
        found["position_ids"] = positions.to(device)
    if options.packing == "flat" and options.system == "unsloth":
        found["packed_seq_lengths"] = torch.tensor(batch["rows"][0], dtype=torch.int32)
    return found


def load_unsloth(options: argparse.Namespace, path: Path) -> Any:
    import torch
    from unsloth import FastLanguageModel

    assert options.packing != "rows" or options.lengths is None, "Unsloth packs one row: use flat"
    whole = options.lengths is not None and options.packing == "flat"
    model, _ = FastLanguageModel.from_pretrained(
        str(path), max_seq_length=options.rows * options.length if whole else options.length, dtype=torch.bfloat16,
        load_in_4bit=options.bits == 4, local_files_only=True,
    )  # fmt: skip
    return FastLanguageModel.get_peft_model(
        model, r=16, target_modules=TARGETS, lora_alpha=16, lora_dropout=0, bias="none", random_state=1,
        use_gradient_checkpointing="unsloth" if options.checkpointing == "default" else False,
    )  # fmt: skip


def load_peft(options: argparse.Namespace, path: Path) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    opener: Any = AutoModelForCausalLM
    if options.system == "peft-liger":
        from liger_kernel.transformers import AutoLigerKernelForCausalLM

        opener = AutoLigerKernelForCausalLM
    recompute, reentrant = options.checkpointing == "default", {"use_reentrant": False}
    settings: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": {"": 0}}
    if options.bits == 4:
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
    model = opener.from_pretrained(path, attn_implementation=options.attention, **settings)
    if options.bits == 4:
        model = prepare_model_for_kbit_training(model, recompute, gradient_checkpointing_kwargs=reentrant)
    elif recompute:
        model.gradient_checkpointing_enable(reentrant)
        model.enable_input_require_grads()
    lora = LoraConfig(r=16, lora_alpha=16, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    model.config.use_cache = False
    return model


def train(options: argparse.Namespace, model: Any, started: float) -> dict[str, Any]:
    """Warm-up and timed steps. `started`: when the process started, on time.perf_counter's clock."""
    import bitsandbytes as bnb
    import torch

    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = bnb.optim.AdamW8bit(trainable, lr=2e-4)
    generator = torch.Generator().manual_seed(1)
    steps, each = options.warm + options.steps, options.accumulation
    plan = layout(options, steps * each)
    calls = [inputs(options, batch, model.config.vocab_size, generator) for batch in plan]
    seconds, losses, first = [], [], 0.0
    for step in range(steps):
        if step == options.warm:
            torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for call in calls[step * each : (step + 1) * each]:
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(**call).loss
            (loss / each).backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        first = first or time.perf_counter() - started
        losses.append(loss.detach())
    tokens = [sum(b["tokens"] for b in plan[step * each : (step + 1) * each]) for step in range(steps)]
    slots = [sum(len(b["rows"]) * b["width"] for b in plan[s * each : (s + 1) * each]) for s in range(steps)]
    free, total = torch.cuda.mem_get_info()
    return {
        **figures(tokens[options.warm :], seconds[options.warm :]),
        "padding": round(1 - sum(tokens) / sum(slots), 4),
        "first_step_seconds": round(first, 2),
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        "device_used_gib": round((total - free) / 2**30, 2),
        "loss_first": round(float(losses[0]), 4),
        "loss": round(float(losses[-1]), 4),
    }


def figures(tokens: list[int], seconds: list[float]) -> dict[str, float]:
    """Median speed of the timed steps and how their seconds spread."""
    times = sorted(seconds)
    speeds = [n / s for n, s in zip(tokens, seconds, strict=True)]
    return {
        "tokens_per_second": round(statistics.median(speeds)),
        "tokens_per_second_in_all": round(sum(tokens) / sum(seconds)),
        "tokens_per_step": round(statistics.mean(tokens)),
        "median_seconds": round(statistics.median(times), 4),
        "p10_seconds": round(times[len(times) // 10], 4),
        "p90_seconds": round(times[(len(times) * 9) // 10], 4),
    }


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    started = time.perf_counter() - process_age()
    options = arguments()
    set_environment()
    if options.system == "checkpoint":
        print(checkpoint(options.config))
        return
    if options.system == "unsloth":
        import unsloth  # noqa: F401  (asks to be imported before transformers)
    import torch

    path = checkpoint(options.config)
    torch.cuda.empty_cache()  # of a checkpoint that was made just now
    torch.manual_seed(0)
    loading = time.perf_counter()
    model = (load_unsloth if options.system == "unsloth" else load_peft)(options, path).train()
    torch.cuda.synchronize()
    loaded = time.perf_counter()
    result = train(options, model, started)
    print("RESULT", json.dumps({
        "system": options.system, "config": options.config.stem, "rows": options.rows, "length": options.length,
        "accumulation": options.accumulation, "checkpointing": options.checkpointing, "bits": options.bits,
        "lengths": options.lengths and options.lengths.stem, "packing": options.packing if options.lengths else None,
        "warm": options.warm, "steps": options.steps, **result, "import_seconds": round(loading - started, 2),
        "load_seconds": round(loaded - loading, 2),
        "load_to_first_step_seconds": round(result["first_step_seconds"] - (loading - started), 2),
        "device": torch.cuda.get_device_name(), "versions": versions(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
