"""Preparing data: whet against TRL's SFTTrainer, from rows to masked and packed tokens.

    python -m venv --system-site-packages PEER && PEER/bin/pip install --no-deps trl==1.16.0 'datasets<5' ...
    python bench/data.py --data FOLDER --tokenizer FOLDER --peer-python PEER/bin/python

FOLDER of the data holds nsmc_train.jsonl.xz (text, label): a chat of one question and one answer of one word for each
row that has a text. FOLDER of the tokenizer holds tokenizer.json and a tokenizer_config.json with a chat template.
Both systems get the same rows, tokenizer, template and length, learn the answers and pack with best fit. Each run is
a process of its own, and the order turns round with every repeat. whet's time is that of `prepare`: reading the JSONL
file, splitting, counting, writing its cache. TRL's is that of `SFTTrainer._prepare_dataset` alone, for a data set that
`load_dataset` has read before (how long that took is in the JSON), without its cache. TRL runs with both of its losses
(assistant_only_loss on messages, completion_only_loss on prompts and completions) and with one and all processors;
the opponent is the fastest, chosen afterwards. The token ids of every row must be the same on both sides; masks are
compared and counted, since TRL learns the line break behind the end of the turn as well. Memory is the highest sum of
the proportional set sizes of a process and its children, looked at twice a second (Linux alone).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import lzma
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "trl", "datasets", "pyarrow")
ANSWERS = {0: "부정", 1: "긍정"}
POLL_SECONDS = 0.5
say = partial(print, file=sys.stderr, flush=True)


def systems(cores: int) -> dict[str, dict[str, Any]]:
    """What is measured: its settings by name; `after` names the run whose cache it finds."""
    found: dict[str, dict[str, Any]] = {"whet": {"processes": None}, "whet cached": {"after": "whet"}}
    found |= {"whet, 1 process": {"processes": 1}} if cores > 1 else {}
    for count in sorted({1, cores}):
        plural = "process" if count == 1 else "processes"
        for loss in ("assistant_only_loss", "completion_only_loss"):
            found[f"trl {loss}, {count} {plural}"] = {"loss": loss, "processes": count}
    return found


def write_rows(source: Path, folder: Path, limit: int) -> int:
    """messages.jsonl and completions.jsonl in `folder`, the same rows in two shapes; how many there are."""
    count = 0
    with (
        lzma.open(source, "rt", encoding="utf-8") as lines,
        (folder / "messages.jsonl").open("w", encoding="utf-8") as messages,
        (folder / "completions.jsonl").open("w", encoding="utf-8") as completions,
    ):
        for row in map(json.loads, lines):
            if count == limit:
                break
            if not row["text"].strip():
                continue
            asked = {"role": "user", "content": row["text"]}
            answered = {"role": "assistant", "content": ANSWERS[row["label"]]}
            messages.write(json.dumps({"messages": [asked, answered]}, ensure_ascii=False) + "\n")
            both = {"prompt": [asked], "completion": [answered]}
            completions.write(json.dumps(both, ensure_ascii=False) + "\n")
            count += 1
    return count


def tokenizer_of(folder: str) -> Any:
    """The tokenizer in a folder, whose configuration may carry the name of a model in front."""
    from transformers import PreTrainedTokenizerFast

    place = Path(folder)
    config = json.loads(sorted(place.glob("*tokenizer_config.json"))[-1].read_text(encoding="utf-8"))
    kept = {name: config[name] for name in ("chat_template", "eos_token", "bos_token", "pad_token") if config.get(name)}
    if "chat_template" not in kept:
        kept["chat_template"] = (place / "chat_template.jinja").read_text(encoding="utf-8")
    return PreTrainedTokenizerFast(tokenizer_file=str(place / "tokenizer.json"), **kept)


class Seen:
    """What a system made of the rows, whatever their order: counts, and sums of hashes of rows."""

    def __init__(self) -> None:
        self.rows = self.tokens = self.learned = self.ids_sum = self.masks_sum = 0

    def add(self, ids: list[int], learned: list[int]) -> None:
        """One row. learned: 1 for each token that is a target."""
        self.rows, self.tokens, self.learned = self.rows + 1, self.tokens + len(ids), self.learned + sum(learned)
        for name, parts in (("ids_sum", (ids,)), ("masks_sum", (ids, learned))):
            digest = hashlib.blake2b(repr([list(map(int, part)) for part in parts]).encode(), digest_size=8).digest()
            setattr(self, name, (getattr(self, name) + int.from_bytes(digest)) % (1 << 64))


def cpu_seconds() -> float:
    """Of this process and of the children that have ended: what other programs do on the machine counts little."""
    return sum(os.times()[:4])


def work_whet(job: dict[str, Any]) -> dict[str, Any]:
    """`prepare`, as every verb of whet calls it."""
    from whet.data.config import Data
    from whet.data.prepare import prepare

    tokenizer, file = tokenizer_of(job["tokenizer"]), str(Path(job["rows"]) / "messages.jsonl")
    processes = {"num_proc": job["settings"].get("processes")} if "num_proc" in Data.__annotations__ else {}
    data = Data(dataset=file, val_size=0, loss_on="assistant", packing=True, max_length=job["max_length"], **processes)
    start, before = time.perf_counter(), cpu_seconds()
    ready = prepare(data, tokenizer, None)
    seconds, spent, seen = time.perf_counter() - start, cpu_seconds() - before, Seen()
    for index in range(len(ready.train)):
        ids, learned = ready.train.row(index)
        seen.add(ids.tolist(), learned.astype(int).tolist())
    return {"seconds": seconds, "cpu_seconds": spent, "packed_rows": len(ready.bins or ()), **vars(seen)}


def work_trl(job: dict[str, Any]) -> dict[str, Any]:
    """The trainer's own preparation, in a trainer whose model is too small to matter."""
    import datasets
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    class Timed(SFTTrainer):
        def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
            start, before = time.perf_counter(), cpu_seconds()
            found = super()._prepare_dataset(*args, **kwargs)
            spent.append((time.perf_counter() - start, cpu_seconds() - before))
            return found

    datasets.disable_caching()
    datasets.disable_progress_bars()
    spent: list[tuple[float, float]] = []
    loss, processes = job["settings"]["loss"], job["settings"]["processes"]
    name = "messages" if loss == "assistant_only_loss" else "completions"
    start = time.perf_counter()
    rows = datasets.load_dataset("json", data_files=str(Path(job["rows"]) / f"{name}.jsonl"), split="train")
    reading, tokenizer = time.perf_counter() - start, tokenizer_of(job["tokenizer"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, **sizes))
    args = SFTConfig(
        job["out"], max_length=job["max_length"], packing=True, dataset_num_proc=None if processes == 1 else processes,
        use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, **{loss: True},
    )  # fmt: skip
    packed, seen = Timed(model, args, None, rows, None, tokenizer).train_dataset, Seen()
    for row in packed:
        begin = 0
        for size in row["seq_lengths"]:
            ids, labels = (row[key][begin : begin + size] for key in ("input_ids", "labels"))
            seen.add(ids, [int(label != -100) for label in labels])
            begin += size
    seconds, used = map(sum, zip(*spent, strict=True))
    return {
        "seconds": seconds, "cpu_seconds": used, "reading_seconds": reading, "packed_rows": len(packed), **vars(seen)
    }  # fmt: skip


def work(worker: str, place: Path) -> None:
    """The inside of a process that `call` started."""
    job = json.loads(place.read_text())
    found = {"whet": work_whet, "trl": work_trl}[worker](job)
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found.setdefault("versions", {})[name] = version(name)
    place.with_suffix(".out").write_text(json.dumps(found))


def set_size(process: int) -> int:
    """Bytes of memory of a process and its children now, pages that are shared counted once; 0 where unknown."""
    total = 0
    for number in [process, *_children(process)]:
        try:
            lines = Path(f"/proc/{number}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    return total


def _children(process: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{process}/task").iterdir())
        found = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []
    return [number for child in found for number in (child, *_children(child))]


def call(python: str, worker: str, job: dict[str, Any], cache: str) -> dict[str, Any]:
    """Run one worker in a process of its own; what it found with its peak memory, or {"failed": why}."""
    place = Path(job["out"]) / "job.json"
    place.parent.mkdir(parents=True)
    place.write_text(json.dumps(job))
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "WHET_CACHE": cache}
    env |= {"HF_HOME": str(place.parent / "hub"), "TMPDIR": str(place.parent), "PYTHONWARNINGS": "ignore"}
    env.pop("OMP_NUM_THREADS", None)
    command, peak = [python, __file__, "--worker", worker, "--out", str(place)], 0
    with (place.parent / "errors").open("w+") as errors:
        process = subprocess.Popen(command, env=env, stdout=errors, stderr=errors, text=True)
        while process.poll() is None:
            peak = max(peak, set_size(process.pid))
            time.sleep(POLL_SECONDS)
        errors.seek(0)
        if process.returncode:
            return {"failed": errors.read().strip()[-800:]}
    return json.loads(place.with_suffix(".out").read_text()) | {"peak_bytes": peak}


def measure(options: argparse.Namespace, chosen: dict[str, Any], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The runs of each system."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    job = {"rows": str(folder), "tokenizer": str(options.tokenizer), "max_length": options.max_length}
    for repeat in range(options.repeats):
        order = [name for name in chosen if "after" not in chosen[name]][:: -1 if repeat % 2 else 1]
        order += [name for name in chosen if "after" in chosen[name]]
        for name in order:
            settings, mine = chosen[name], name.startswith("whet")
            out, cache = folder / f"{name} {repeat}", folder / f"cache {settings.get('after', name)} {repeat}"
            python = sys.executable if mine else options.peer_python
            task = job | {"settings": settings, "out": str(out)}
            run = call(python, "whet" if mine else "trl", task, str(cache)) | {"load": round(os.getloadavg()[0], 2)}
            found[name].append(run)
            say(f"{name:40} {run.get('seconds', 0):7.1f} s  {run.get('failed', '')}")
    return found


def summary(options: argparse.Namespace, chosen: dict[str, Any], found: dict[str, list[dict[str, Any]]]) -> Any:
    """The whole result, ready for JSON; its table goes to stderr."""
    good = {name: runs for name, runs in found.items() if runs and not any("failed" in run for run in runs)}
    sums = {run["ids_sum"] for runs in good.values() for run in runs}
    assert len(sums) == 1, "the systems did not make the same tokens of the rows"
    seconds = {name: statistics.median(run["seconds"] for run in runs) for name, runs in good.items()}
    peers = {name: value for name, value in seconds.items() if not name.startswith("whet")}
    opponent = min(peers, key=lambda name: peers[name])
    mask = good["whet"][0]["masks_sum"]
    read = statistics.median(run["reading_seconds"] for run in good[opponent])
    say(f"\n{'system':40} {'seconds':>8} {'whet is':>8} {'of CPUs':>9} {'memory':>10}  mask")
    for name in sorted(seconds, key=lambda name: seconds[name]):
        peak = max(run["peak_bytes"] for run in good[name]) / (1 << 20)
        alike = "as whet's" if good[name][0]["masks_sum"] == mask else f"{good[name][0]['learned']:,} learned"
        times, used = seconds[name] / seconds["whet"], statistics.median(run["cpu_seconds"] for run in good[name])
        say(f"{name:40} {seconds[name]:8.1f} {times:7.2f}x {used:7.1f} s {peak:6.0f} MiB  {alike}")
    ratio = round(peers[opponent] / seconds["whet"], 2)
    say(f"\nopponent: {opponent}; whet is {ratio} times as fast, its reading of the file counted and TRL's not")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": f"python bench/data.py --rows {options.rows} --max-length {options.max_length} "
                   f"--repeats {options.repeats}",
        "cpu": _cpu_name(), "cores": os.cpu_count(), "rows": good["whet"][0]["rows"],
        "tokens": good["whet"][0]["tokens"], "max_length": options.max_length,
        "whet_seconds": round(seconds["whet"], 2), "opponent": opponent,
        "opponent_seconds": round(peers[opponent], 2), "ratio": ratio,
        "ratio_with_both_reading": round((peers[opponent] + read) / seconds["whet"], 2),
        "ratio_by_repeat": [
            round(b["seconds"] / a["seconds"], 2) for a, b in zip(good["whet"], good[opponent], strict=True)
        ],
        "systems": {name: {"settings": chosen[name], "runs": found[name]} for name in found},
    }  # fmt: skip


def _cpu_name() -> str:
    from torch.cpu import get_capabilities

    return get_capabilities().get("cpu_name", "CPU")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with nsmc_train.jsonl.xz")
    parser.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json and its configuration")
    for name, default in (("rows", 100_000), ("max-length", 1024), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", help="systems by name, with semicolons; whet and one of TRL at least")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has TRL")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "cpu" / "data.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        sys.exit(work(options.worker, options.out))
    if options.data is None or options.tokenizer is None:
        parser.error("--data and --tokenizer are needed")
    if subprocess.run([options.peer_python, "-c", "import trl, datasets"], capture_output=True, check=False).returncode:
        sys.exit("TRL is missing: --peer-python INTERPRETER-THAT-HAS-IT")
    chosen = systems(os.cpu_count() or 1)
    chosen = {name: chosen[name] for name in options.only.split(";")} if options.only else chosen
    with tempfile.TemporaryDirectory() as folder:
        say(f"{write_rows(options.data / 'nsmc_train.jsonl.xz', Path(folder), options.rows):,} rows")
        result = summary(options, chosen, measure(options, chosen, Path(folder)))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text := json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
