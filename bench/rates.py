"""A ladder of learning rates: what `auto` chooses should come within one point of the best rung.

    python bench/rates.py out.jsonl --method lora --rates 2e-4 5e-4 1e-3 2e-3 \\
        --set banking classify MiniLM/ train.jsonl held_out.jsonl

Each run is a stock recipe (`whet init`) with nothing changed but model, data and rate, in a process of its own; the
held-out rows are scored at the end. A run that stands in the output file is not made again. The score is the accuracy
of labels; of written answers the share of answer tokens that the model would have chosen (exact match says too little
on few rows), and the held-out loss stands beside it.

--folds K: the rows of both files are pooled, each K-th is held out once, and fold k is trained with seed k, on --rows
of the others where that is given. Rungs of a fold share rows and seed, so their difference is paired.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path


def run_once(recipe: str, model: str, train: str, held_out: str, settings: list[str]) -> dict[str, object]:
    """Train and score one rung; returns its numbers."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "recipe.yaml"
        init = subprocess.run([sys.executable, "-m", "whet", "init", recipe], capture_output=True, check=True)
        lines = init.stdout.decode().splitlines(keepends=True)  # held-out rows are given, so none are taken
        place.write_text("".join(line for line in lines if not line.startswith("  val_size:")), encoding="utf-8")
        out = f"{folder}/run"
        named = [f"model.path={model}", f"data.dataset={train}", f"data.eval_dataset={held_out}", f"output_dir={out}"]
        whet = [sys.executable, "-m", "whet"]
        subprocess.run([*whet, "train", str(place), *named, *settings], check=True, stdout=subprocess.DEVNULL)
        subprocess.run([*whet, "eval", out, "--max-rows", "600"], check=True, stdout=subprocess.DEVNULL)
        finished = json.loads(Path(out, "finished.json").read_text(encoding="utf-8"))
        metrics = json.loads(Path(out, "results", "evaluation.json").read_text(encoding="utf-8"))["tuned"]["metrics"]
        return {name: finished[name] for name in ("best_eval_loss", "steps", "best_step")} | metrics


def fold_files(files: list[str], fold: int, folds: int, rows_to_learn: int | None, folder: Path) -> list[str]:
    """Write the rows of JSON Lines files to a file to learn from and one that is held out; returns both paths."""
    rows = [line for file in files for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    others = [row for index, row in enumerate(rows) if index % folds != fold]
    parts = random.Random(fold).sample(others, rows_to_learn or len(others)), rows[fold::folds]
    paths = [folder / "train.jsonl", folder / "held_out.jsonl"]
    for path, part in zip(paths, parts, strict=True):
        path.write_text("\n".join(part) + "\n", encoding="utf-8")
    return [str(path) for path in paths]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--method", default="lora")
    parser.add_argument("--rates", nargs="+", default=["auto"])
    parser.add_argument("--folds", type=int, default=1)
    parser.add_argument("--rows", type=int, help="rows to learn from in a fold")
    parser.add_argument("--set", nargs=5, action="append", required=True,
                        metavar=("NAME", "RECIPE", "MODEL", "TRAIN", "HELD_OUT"))  # fmt: skip
    given = parser.parse_args()
    lines = given.out.read_text(encoding="utf-8").splitlines() if given.out.is_file() else []
    known = {(entry["set"], entry["method"], entry["rate"], entry.get("fold", 0)) for entry in map(json.loads, lines)}
    for fold, rate in itertools.product(range(given.folds), given.rates):
        for name, recipe, model, *files in given.set:
            if (name, given.method, rate, fold) in known:
                continue
            settings = [f"train.learning_rate={rate}", f"train.seed={fold}"]
            settings += [] if given.method == "lora" else [f"method={given.method}"]
            entry = {"set": name, "method": given.method, "rate": rate}
            with tempfile.TemporaryDirectory() as folder:
                if given.folds > 1:
                    entry["fold"] = fold
                    files = fold_files(files, fold, given.folds, given.rows, Path(folder))
                entry |= run_once(recipe, model, files[0], files[1], settings)
            print(entry, flush=True)
            with given.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()
