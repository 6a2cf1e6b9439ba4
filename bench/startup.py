"""What a command costs before it does what it is asked, held against importing torch, transformers and peft.

    python bench/startup.py                     # writes bench/results/cpu/startup.json, some minutes

Each round runs every command once in a process of its own, one at a time. A figure is the median over rounds of its CPU
seconds (user and system, with its children) and of its ratio to the imports of the same round, so that load that
others make goes into both. `first output` is the wall time until the first byte that a person sees. Commands run to
their end: one step of training with its files, plot and page, one short answer, one evaluated row; so the ratios bound
those until the first step or answer from above. Thread counts are those of OMP_NUM_THREADS=1. Every command has run
once before on the same data: `data check, nothing kept` alone finds no cache.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "bench" / "results" / "cpu" / "startup.json"
IMPORTS = "torch, transformers and peft"
LIBRARIES = "import torch, transformers, peft; print()"
MODEL_CLASSES = (  # the parts that are used: transformers imports late
    "import torch, peft; from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM; print()"
)
WHET = [sys.executable, "-m", "whet"]
TRAIN = [*WHET, "train", "recipe.yaml", "train.max_steps=1", "data.dataset=rows.jsonl", "data.val_size=1"]


def commands(place: Path, number: int) -> dict[str, tuple[list[str], Path | None]]:
    """Name to words, and the cache to use where it is not the common one."""
    return {
        IMPORTS: ([sys.executable, "-c", MODEL_CLASSES], None),
        "import torch, transformers, peft alone": ([sys.executable, "-c", LIBRARIES], None),
        "train, one step": ([*TRAIN, f"output_dir={place / f'run-{number}'}"], None),
        "train, a finished run": ([*TRAIN, f"output_dir={place / 'run'}"], None),
        "chat, one answer": ([*WHET, "chat", str(place / "run"), "--message", "Hello", "--max-new-tokens", "4"], None),
        "eval, one row": ([*WHET, "eval", str(place / f"run-{number}")], None),
        "data check": ([*WHET, "data", "check", "recipe.yaml"], None),
        "data check, nothing kept": ([*WHET, "data", "check", "recipe.yaml"], place / f"cache-{number}"),
        "adapters list": ([*WHET, "adapters", "list", str(place)], None),
        "methods": ([*WHET, "methods"], None),
    }


def measured(words: list[str], place: Path, environment: Mapping[str, str]) -> dict[str, float]:
    """CPU seconds of a command, and the wall time until it wrote something."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with subprocess.Popen(
        words, cwd=place, env=dict(environment), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
    ) as process:
        assert process.stdout is not None
        written = process.stdout.read(1)
        first = time.perf_counter() - began
        written += process.stdout.read()
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(words)}:\n{written.decode(errors='replace')}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, "first": first}


def prepare(place: Path, environment: Mapping[str, str]) -> None:
    """A recipe, three rows, and a finished run; afterwards what all commands keep is there."""
    recipe = subprocess.run([*WHET, "init", "lora"], env=dict(environment), check=True, capture_output=True, cwd=place)
    (place / "recipe.yaml").write_bytes(recipe.stdout)
    rows = [{"prompt": f"Say {word}.", "completion": word} for word in ("yes", "no", "well")]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name in ("train, a finished run", "train, one step", "eval, one row", "data check", "chat, one answer"):
        measured(commands(place, -1)[name][0], place, environment)


def summary(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Medians over rounds."""

    def median(values: list[float]) -> float:
        return round(statistics.median(values), 3)

    return {
        name: {
            "cpu_seconds": median([one[name]["cpu"] for one in rounds]),
            "share_of_imports": median([one[name]["cpu"] / one[IMPORTS]["cpu"] for one in rounds]),
            "first_output_seconds": median([one[name]["first"] for one in rounds]),
        }
        for name in rounds[0]
    }


def main() -> None:
    """Measure, write the result, print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULT)
    words = parser.parse_args()
    rounds, load = [], []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        common = os.environ | {"OMP_NUM_THREADS": "1", "WHET_CACHE": str(place / "cache"), "PYTHONPATH": str(ROOT)}
        prepare(place, common)
        for number in range(words.rounds):
            load.append(round(os.getloadavg()[0], 1))
            rounds.append({
                name: measured(one, place, common | ({} if cache is None else {"WHET_CACHE": str(cache)}))
                for name, (one, cache) in commands(place, number).items()
            })  # fmt: skip
    result: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(), "machine": platform.machine(), "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")}, "rounds": words.rounds,
        "load_before_rounds": load, "commands": summary(rounds),
    }  # fmt: skip
    words.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, figures in result["commands"].items():
        print(f"{name:40}", *(f"{value:8.2f}" for value in figures.values()))


if __name__ == "__main__":
    main()
