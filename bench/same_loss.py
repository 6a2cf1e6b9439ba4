"""Does a fast mode learn as well? Held-out loss of each storage and arithmetic, fine-tuned from one learned model.

    python bench/same_loss.py data --source FOLDER    # once, on any machine: 26 MB in .cache/same_loss
    python bench/same_loss.py all --out bench/results/h100/same_loss.json     # about six minutes on one GPU
    python bench/same_loss.py all --smoke             # everything in small on a CPU, of this repository's own files

Random weights have nothing that rounding could destroy, so a Llama of 110M parameters is first pre-trained on books,
judgments, reviews and technical pages for `--seconds` (the rate falls by the clock: the number of steps differs between
machines, the shape of the schedule does not). It is saved in bf16, and every mode starts from that file. Then
`whet train` tunes it on instructions it never saw (same_loss_data.py checks that): all modes of a seed get the same
rows, order and first adapter (PEFT rounds it to bf16 over bf16 weights), and each run is its own process. A mode passes
when its mean final held-out loss is as near to bf16's as bf16's own seeds are to each other (highest - lowest), or
within 0.3 %, whichever is larger. The run measures that loss in its own mode: rounding in the forward pass counts.
Differences within a seed are reported too: the spread of the seeds hides them. Speed is not measured.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT / "whet" / "builtin" / "tiny"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
SHARE = 0.003  # of the reference's held-out loss: always near enough
HELD_OUT_EVERY = 200  # one row of so many of the pre-training stream is only measured
PACKAGES = ("torch", "transformers", "peft", "triton", "bitsandbytes")
MODES = {
    "bf16": {"base.storage": "bf16", "base.compute": "bf16"},
    "nf4": {"base.storage": "nf4", "base.compute": "bf16"},
    "fp8": {"base.storage": "fp8", "base.compute": "fp8"},
    "nf4+fp8": {"base.storage": "nf4", "base.compute": "fp8"},
    "fp8+head": {"base.storage": "fp8", "base.compute": "fp8", "base.fp8_head": "true"},
    "nf4+fp8+head": {"base.storage": "nf4", "base.compute": "fp8", "base.fp8_head": "true"},
    "int8": {"base.storage": "int8", "base.compute": "bf16"},
}  # the first is what the others are compared with
SMOKE_MODES = {name: {"base.storage": name, "base.compute": "fp32"} for name in ("fp32", "nf4")}
SIZES = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
         "num_key_value_heads": 12, "max_position_embeddings": 2048}  # fmt: skip
SMOKE_SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
               "num_key_value_heads": 2, "max_position_embeddings": 1024}  # fmt: skip
SMOKE = {"seconds": 3.0, "length": 64, "rows": 4, "micro": 4, "steps": 6, "eval_steps": 2, "batch": 4, "jobs": 1,
         "seeds": 2}  # fmt: skip
COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart by every eye
STYLES = ("-", "--", ":", "-.")
say = partial(print, file=sys.stderr, flush=True)


def modes_of(options: argparse.Namespace) -> dict[str, dict[str, str]]:
    """Mode to settings, the reference first."""
    known = SMOKE_MODES if options.smoke else MODES
    wanted = options.modes.split(",") if options.modes else list(known)
    if unknown := set(wanted) - set(known):
        sys.exit(f"no such mode: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return {name: known[name] for name in known if name in wanted or name == next(iter(known))}


def make_data(options: argparse.Namespace) -> None:
    """Write the two corpora; the pre-training one in small from this repository without --source."""
    from same_loss_data import build

    if options.source is None and not options.smoke:
        sys.exit("--source FOLDER: where pretrain/, instruction/ and formats/ are (same_loss_data.py names the files)")
    facts = build(None if options.smoke else options.source, options.data)
    say(f"data: {facts['tokens']:,} tokens, {facts['rows']} rows, {facts['rows_dropped']} dropped, "
        f"{facts['bytes'] / 1e6:.1f} MB in {options.data}")  # fmt: skip


def pretrain(options: argparse.Namespace) -> None:
    """Train from random weights for `--seconds` and save a model that whet opens: work/model, work/pretrain.json."""
    import torch
    from same_loss_data import read_tokens
    from transformers import AutoModelForCausalLM, LlamaConfig

    device = torch.device("cpu" if options.smoke else "cuda")
    torch.manual_seed(0)
    sizes = SMOKE_SIZES if options.smoke else SIZES
    config = LlamaConfig(**sizes, vocab_size=16384, tie_word_embeddings=False, bos_token_id=None, eos_token_id=2,
                         pad_token_id=0, attn_implementation="sdpa")  # fmt: skip
    network = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device)
    stream = torch.from_numpy(read_tokens(options.data).astype("int32")).to(device)
    facts = fit(network, stream, options)
    target = options.work / "model"
    shutil.rmtree(target, ignore_errors=True)
    network.to(torch.bfloat16).save_pretrained(str(target))
    for name in TOKENIZER_FILES:
        shutil.copy(TOKENIZER / name, target / name)
    facts |= {"sizes": sizes, "parameters": sum(p.numel() for p in network.parameters()), "compiled": options.compile}
    write(options.work / "pretrain.json", facts)
    say(f"pre-trained {facts['parameters']:,} parameters: {facts['steps']} steps, {facts['tokens']:,} tokens at "
        f"{facts['tokens_per_second']:,.0f} a second, held-out loss {facts['held_out_loss']:.4f}")  # fmt: skip


def fit(network: Any, stream: Any, options: argparse.Namespace) -> dict[str, Any]:
    """AdamW in bf16 autocast for options.seconds; what came of it. stream: [tokens] int32 on the device."""
    import torch

    device, size = stream.device, options.micro
    model = torch.compile(network) if options.compile else network
    everything = torch.arange((len(stream) - 1) // options.length)
    held_out = everything[everything % HELD_OUT_EVERY == HELD_OUT_EVERY // 2]
    held_out = held_out[: max(1, len(held_out) // size) * size]
    training = everything[everything % HELD_OUT_EVERY != HELD_OUT_EVERY // 2]
    matrices = [p for p in network.parameters() if p.dim() > 1]
    vectors = [p for p in network.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=options.rate, betas=(0.9, 0.95), fused=device.type == "cuda")

    def loss_of(rows: Any, model: Any = model) -> Any:
        places = rows.to(device)[:, None] * options.length + torch.arange(options.length + 1, device=device)
        ids = stream[places].long()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    model.train()
    loss_of(training[:size]).backward()  # what compiles or allocates does so before the clock starts
    network.zero_grad()
    order, step, curve, parts = training[:0], 0, [], options.rows // size
    began = time.perf_counter()
    while (share := (time.perf_counter() - began) / options.seconds) < 1:
        if len(order) < options.rows:
            order = torch.cat([order, training[torch.randperm(len(training))]])
        chosen, order = order[: options.rows], order[options.rows :]
        for group in optimiser.param_groups:
            group["lr"] = options.rate * min(share / 0.05, 0.05 + 0.95 * (1 + math.cos(math.pi * share)) / 2)
        total = torch.zeros((), device=device)
        for part in chosen.split(size):
            loss = loss_of(part) / parts
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        step, value = step + 1, total.item()  # waits for the device, so that the clock sees the step
        if step == 1 or step % 20 == 0:
            curve.append([step, round(time.perf_counter() - began, 2), round(value, 4)])
            say(f"step {step:5} {curve[-1][1]:7.1f} s  loss {value:.4f}")
    seconds = time.perf_counter() - began
    network.eval()
    with torch.no_grad():  # not compiled: it would be compiled again for this
        found = statistics.mean(loss_of(part, network).item() for part in held_out.split(size))
    return {
        "steps": step, "tokens": (tokens := step * options.rows * options.length), "seconds": round(seconds, 2),
        "tokens_per_second": round(tokens / seconds, 1), "held_out_loss": found, "curve": curve,
        "passes": round(tokens / (len(training) * options.length), 2),
    }  # fmt: skip


def recipe(options: argparse.Namespace, settings: dict[str, str], seed: int, out: Path) -> list[str]:
    """What whet is asked for; --set comes last and so wins."""
    values = {
        "model": options.work / "model", "base.device": "cpu" if options.smoke else "cuda", **settings, "method.r": 16,
        "data.dataset": options.data / "train.jsonl", "data.eval_dataset": options.data / "heldout.jsonl",
        "train.max_steps": options.steps, "train.per_device_train_batch_size": options.batch,
        "train.learning_rate": options.tune_rate, "train.eval_steps": options.eval_steps, "train.save_total_limit": 1,
        "train.load_best_model_at_end": "false", "train.seed": seed, "output_dir": out,
    }  # fmt: skip
    return [f"{path}={value}" for path, value in values.items()] + options.set


def tune(options: argparse.Namespace) -> None:
    """Run every mode with every seed, `--jobs` at a time; work/tune.json holds the curves and the machine."""
    folder = options.work / "tune"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").touch()  # `whet train` wants one; all settings are given on the command line
    jobs = [(mode, seed) for seed in range(options.seeds) for mode in modes_of(options)]
    with ThreadPoolExecutor(options.jobs) as pool:
        found = list(pool.map(lambda job: tune_one(options, *job), jobs))
    runs: dict[str, dict[str, Any]] = {mode: {} for mode in modes_of(options)}
    for (mode, seed), run in zip(jobs, found, strict=True):
        runs[mode][str(seed)] = run
    example = recipe(options, next(iter(modes_of(options).values())), 0, Path("RUN"))
    facts = {"modes": modes_of(options), "recipe": [word.replace(f"{ROOT}/", "") for word in example]}
    write(options.work / "tune.json", {**facts, **machine(options), "runs": runs})


def tune_one(options: argparse.Namespace, mode: str, seed: int) -> dict[str, Any]:
    """One run in a process of its own: {curve, train_curve, final, ...}, or {failed: why}."""
    out = options.work / "tune" / f"{mode}-{seed}"
    words = recipe(options, modes_of(options)[mode], seed, out)
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    began = time.perf_counter()
    with (log := out.with_suffix(".log")).open("w") as file:
        try:
            command = [sys.executable, "-m", "whet", "train", str(out.parent / "recipe.yaml"), *words]
            code = subprocess.run(
                command, cwd=ROOT, env=env, stdout=file, stderr=file, timeout=options.limit, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = f"over {options.limit} s"
    if code:
        say(f"{mode:10} seed {seed}: FAILED ({code})\n{(tail := log.read_text()[-1500:])}")
        return {"failed": f"{code}: {tail}"}
    found = collect(out) | {"wall_seconds": round(time.perf_counter() - began, 1)}
    say(f"{mode:10} seed {seed}: held-out loss {found['final']:.4f} after {found['wall_seconds']:.0f} s")
    return found


def collect(run: Path) -> dict[str, Any]:
    """Curves of a finished run, [step, loss] each, its last held-out loss, and what it says it ran in."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    curve = [[line["step"], line["eval_loss"]] for line in lines if line["kind"] == "eval"]
    environment = json.loads((run / "environment.json").read_text())
    finished = json.loads((run / "finished.json").read_text())
    return {
        "final": curve[-1][1], "curve": curve, "storage": environment["storage"], "compute": environment["compute"],
        "train_curve": [[line["step"], round(line["loss"], 5)] for line in lines if line["kind"] == "train"],
        "peak_memory_bytes": finished["peak_memory_bytes"], "tokens": finished["tokens"],
    }  # fmt: skip


def judge(finals: dict[str, dict[str, float | None]], reference: str) -> dict[str, Any]:
    """Is each mode as good as the reference? finals: mode to seed to final held-out loss, None = the run failed.

    A mode passes when |mean - the reference's mean| <= max(the reference's highest - lowest, SHARE of its mean). It
    needs all its seeds: one that failed or is not finite fails the mode, or all modes if it is the reference's.
    """

    def complete(values: dict[str, float | None]) -> list[float]:
        good = [value for value in values.values() if value is not None and math.isfinite(value)]
        return good if good and set(values) == set(finals[reference]) and len(good) == len(values) else []

    base = complete(finals[reference])
    if not base:
        return {"reference": reference, "modes": {mode: {"verdict": "no reference"} for mode in finals}}
    mean, spread = statistics.mean(base), max(base) - min(base)
    limit = max(spread, SHARE * mean)
    modes: dict[str, Any] = {}
    for mode, values in finals.items():
        if not (good := complete(values)):
            modes[mode] = {"verdict": "failed"}
            continue
        difference = statistics.mean(good) - mean
        verdict = "reference" if mode == reference else "pass" if abs(difference) <= limit else "MISS"
        paired = [100 * (values[seed] / finals[reference][seed] - 1) for seed in finals[reference]]  # type: ignore[operator]
        modes[mode] = {
            "mean": statistics.mean(good), "difference": difference, "difference_percent": 100 * difference / mean,
            "paired_percent": [round(value, 4) for value in paired], "verdict": verdict,
        }  # fmt: skip
    return {"reference": reference, "seed_spread": spread, "share": SHARE, "limit": limit, "modes": modes}


def report(options: argparse.Namespace) -> dict[str, Any]:
    """Join what the stages wrote into --out (JSON) and a plot of the same name; print the table."""
    tuned, pretrained = (json.loads((options.work / f"{name}.json").read_text()) for name in ("tune", "pretrain"))
    runs = tuned.pop("runs")
    finals = {mode: {seed: run.get("final") for seed, run in seeds.items()} for mode, seeds in runs.items()}
    judged = judge(finals, next(iter(runs)))
    for mode, seeds in runs.items():
        judged["modes"][mode]["seeds"] = seeds
    data = options.data / "data.json"
    result = {
        **tuned, "data": json.loads(data.read_text()) if data.is_file() else None, "pretrain": pretrained, **judged,
    }  # fmt: skip
    if (times := options.work / "stages.json").is_file():
        result["stage_seconds"] = json.loads(times.read_text())
    write(options.out, result)
    draw(result, options.out.with_suffix(".png"))
    print(table(result))
    say(f"{options.out} and {options.out.with_suffix('.png').name}")
    return result


def table(result: dict[str, Any]) -> str:
    """The verdicts for people."""
    lines = [f"{'mode':10} {'held-out':>9} {'vs ' + result['reference']:>10} {'by seed, %':>26}  verdict"]
    for mode, found in result["modes"].items():
        if "mean" not in found:
            lines.append(f"{mode:10} {'-':>9} {'-':>10} {'-':>26}  {found['verdict']}")
            continue
        paired = " ".join(f"{value:+.3f}" for value in found["paired_percent"])
        difference = f"{found['difference_percent']:+.3f} %"
        lines.append(f"{mode:10} {found['mean']:9.4f} {difference:>10} {paired:>26}  {found['verdict']}")
    if "limit" in result:
        reference = result["modes"][result["reference"]]["mean"]
        lines.append(f"seed spread of {result['reference']}: {result['seed_spread']:.4f} "
                     f"({100 * result['seed_spread'] / reference:.2f} %); limit {result['limit']:.4f} "
                     f"({100 * result['limit'] / reference:.2f} %)")  # fmt: skip
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """Left: held-out loss. Right: its difference to the reference of the same seed in percent, with the limit."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    reference = result["modes"][result["reference"]]["seeds"]
    for colour, (mode, found) in zip(COLOURS, result["modes"].items(), strict=False):
        for style, (seed, run) in zip(STYLES * 3, found["seeds"].items(), strict=False):
            if "failed" in run:
                continue
            steps, losses = zip(*run["curve"], strict=True)
            left.plot(steps, losses, style, color=colour, lw=1.3, label=f"{mode}, seed {seed}")
            if mode == result["reference"] or "failed" in reference.get(seed, {"failed": True}):
                continue
            base = dict(map(tuple, reference[seed]["curve"]))
            apart = [(step, 100 * (loss / base[step] - 1)) for step, loss in run["curve"] if step in base]
            right.plot(*zip(*apart, strict=True), style, color=colour, lw=1.3)
    left.set(xlabel="step", ylabel="loss", title="Held-out loss: colour = mode, line = seed")
    left.grid(alpha=0.25)
    if left.lines:
        left.legend(fontsize=7, ncols=2)
    right.axhline(0, color=COLOURS[0], lw=1)
    if "limit" in result:
        limit = 100 * result["limit"] / result["modes"][result["reference"]]["mean"]
        right.axhspan(-limit, limit, color="0.9", label=f"limit for the mean at the end: ±{limit:.2f} %")
        right.legend(fontsize=8)
    right.set(xlabel="step", ylabel="%", title=f"Difference to {result['reference']} of the same seed")
    right.grid(alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """Date, command, device and versions."""
    import torch

    versions = {found.name: found.version for found in distributions() if found.name in PACKAGES}
    device = "CPU" if options.smoke else torch.cuda.get_device_name()
    return {"date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), "command": options.command, "device": device,
            "versions": versions}  # fmt: skip


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def run_all(options: argparse.Namespace) -> None:
    """Every stage with its time; data only where it is missing."""
    times: dict[str, float] = {}
    there = (options.data / "tokens.npy.xz").is_file()
    for stage in ([] if there and not options.smoke else [make_data]) + [pretrain, tune, report]:
        began = time.perf_counter()
        if stage is report:
            write(options.work / "stages.json", times)
        stage(options)
        times[stage.__name__] = round(time.perf_counter() - began, 1)
        say(f"-- {stage.__name__}: {times[stage.__name__]} s")


STAGES = {"data": make_data, "pretrain": pretrain, "tune": tune, "report": report, "all": run_all}


def parsed(words: list[str]) -> argparse.Namespace:
    """The options that `words` mean, with what --smoke makes small."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    for name, default, text in (
        ("data", ".cache/same_loss", "folder of the two corpora"), ("work", "runs/same_loss", "model, runs, results"),
        ("out", None, "the report; default: WORK/report.json"), ("source", None, "folder of the raw data"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=Path, default=ROOT / default if default else None, help=text)
    for name, default, text in (
        ("seconds", 120.0, "of pre-training"), ("length", 1024, "tokens of a packed row"), ("rows", 64, "a step"),
        ("micro", 16, "rows in one forward pass"), ("rate", 1.2e-3, "of pre-training"), ("steps", 200, "of tuning"),
        ("eval-steps", 25, "between held-out losses"), ("batch", 16, "rows of a tuning step"),
        ("tune-rate", 2e-4, "of tuning"), ("seeds", 3, "of tuning"), ("jobs", 3, "tuning runs side by side"),
        ("limit", 240, "seconds for one tuning run"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{text} (%(default)s)")
    parser.add_argument("--modes", help=f"of {', '.join(MODES)}, with commas; the first is always there")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="setting of all tuning runs")
    parser.add_argument("--compile", action="store_true", help="compile the model of the pre-training")
    parser.add_argument("--smoke", action="store_true", help="everything in small on the CPU")
    if "--smoke" in words:
        parser.set_defaults(**SMOKE, data=ROOT / "runs/same_loss_smoke/data", work=ROOT / "runs/same_loss_smoke")
    options = parser.parse_args(words)
    places = {"--data", "--work", "--out", "--source"}  # decide nothing, and are the machine's own
    kept = [word for before, word in zip(["", *words], words, strict=False) if not {before, word} & places]
    options.command = " ".join(["python bench/same_loss.py", *kept])
    options.work, options.data = options.work.resolve(), options.data.resolve()
    options.out = options.out or options.work / "report.json"
    return options


def main(words: list[str] | None = None) -> None:
    options = parsed(sys.argv[1:] if words is None else words)
    STAGES[options.stage](options)


if __name__ == "__main__":
    main()
