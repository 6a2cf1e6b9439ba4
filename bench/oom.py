"""Memory that runs out for real: another process takes what is free on a GPU; each command has to go on or say so.

    python bench/oom.py out.json --place /scratch/oom                                     # Qwen3-0.6B, every command
    python bench/oom.py out.json --place DIR --config FILE.json --free 12 6 3 --set base.storage=nf4
    python bench/oom.py out.json --place DIR --verbs train bench --free 4 2 --when loaded

Weights are random, of the config; rows are words of many lengths. Each command runs alone first, then beside a process
that holds all of the device but so many GiB: from the start (the plan sees it), or as soon as the model is loaded
(nobody foresees it). What counts as recovered: exit 0, the losses of the run alone within a hundredth (another cut
rounds otherwise in bf16), and what was said; else exit 2 with one error that names memory and a fix. `--cpu` runs the
same commands on a CPU with nobody beside them, to see that the script works.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
GIB = 1 << 30
CLOSE = 0.01  # of a loss, between two cuts of one step in bf16
LIMIT_SECONDS = 1200
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "writes", "one", "short", "reply")
STORED = {"nf4": 0.3, "fp8": 0.5, "int8": 0.5}  # of a model's bf16 bytes, at least
CONTEXT_BYTES = int(0.7 * GIB)  # that a process takes before it has a tensor
# Holds the device but `free` bytes, once others use `used` bytes more than when it began; then waits to be ended.
HOG = """
import sys, time, torch
free, used = int(sys.argv[1]), int(sys.argv[2])
torch.cuda.init()
began = torch.cuda.mem_get_info()
while began[0] - torch.cuda.mem_get_info()[0] < used:
    time.sleep(0.002)
held, piece = [], 1 << 30
while piece >= 1 << 21:
    if torch.cuda.mem_get_info()[0] - piece > free:
        try:
            held.append(torch.empty(piece, dtype=torch.uint8, device="cuda"))
            continue
        except torch.OutOfMemoryError:
            pass
    piece //= 2
print("held", sum(map(len, held)), flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class Ended:
    """How a command ended. numbers: losses by name, that do not depend on how the work was cut; answers: texts."""

    status: int
    said: str
    seconds: float
    numbers: dict[str, list[float]]
    answers: list[str]
    layout: dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """ok: recovered, or one clear error. how: in words; apart: of the losses, as a share; same_answers: share."""

    ok: bool
    how: str
    apart: float | None = None
    same_answers: float | None = None


def verdict(found: Ended, alone: Ended) -> Verdict:
    """What a command beside the other process did, against the same alone."""
    ran_out = [line.strip() for line in found.said.splitlines() if "out of memory" in line]
    if found.status == 2:
        error = found.said.rpartition("error: ")[2]
        problem = error.partition("\n")[0]
        clear = found.said.count("error: ") == 1 and "memory" in problem and "fix:" in error
        return Verdict(clear, f"one error: {problem}" if clear else f"no clear error: {found.said[-600:]}")
    if found.status != 0:
        return Verdict(False, f"exit status {found.status}: {found.said[-600:]}")
    pairs = [
        (a, b) for name, wanted in alone.numbers.items()
        for a, b in zip(found.numbers.get(name, [float("nan")] * len(wanted)), wanted, strict=True)
    ]  # fmt: skip
    apart = max((abs(a - b) / max(abs(b), 1e-9) for a, b in pairs), default=0.0)
    same = sum(a == b for a, b in zip(found.answers, alone.answers, strict=False)) / max(1, len(alone.answers))
    whole = len(found.answers) == len(alone.answers)
    how = f"recovered: {' | '.join(ran_out)}" if ran_out else "it fitted"
    return Verdict(apart <= CLOSE and whole and all(a == a for a, _ in pairs), how, apart, same)


class Bench:
    """The model, the rows and the commands in a folder."""

    def __init__(self, place: Path, config: Path, settings: list[str], *, cpu: bool, rows: int, length: int) -> None:
        self.place, self.config, self.cpu, self.length = place, config, cpu, length
        self.device = ["base.device=cpu", "base.storage=fp32", "base.compute=fp32"] if cpu else ["base.device=cuda"]
        self.settings = [*self.device, *settings]
        place.mkdir(parents=True, exist_ok=True)
        self.weight_bytes = self._make_model()
        with (place / "rows.jsonl").open("w", encoding="utf-8") as file:
            for row in range(rows):
                count = 4 + (37 * row) % max(8, length // 2)
                answer = " ".join(WORDS[(row + place) % len(WORDS)] for place in range(count))
                file.write(json.dumps({"instruction": f"Question {row}: answer it.", "output": answer}) + "\n")

    def _make_model(self) -> int:
        """Random weights of the config with the built-in tokenizer beside them; returns their bytes in bf16."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        target = self.place / "model"
        if not (target / "config.json").is_file():
            torch.manual_seed(0)
            config = AutoConfig.from_pretrained(str(self.config))
            with torch.device("cpu" if self.cpu else "cuda"):
                model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            model.save_pretrained(str(target))
            del model
            for name in TOKENIZER:
                shutil.copy(ROOT / "whet" / "builtin" / "tiny" / name, target / name)
        return sum(file.stat().st_size for file in target.glob("*.safetensors"))

    def words(self, verb: str) -> list[str]:
        """The command of a verb, in the folder."""
        data = [f"data.dataset={json.dumps('rows.jsonl')}", "data.val_size=8", f"data.max_length={self.length}"]
        train = ["train.max_steps=6", "train.eval_steps=3", "train.save_steps=3", "train.learning_rate=1e-4",
                 "train.per_device_train_batch_size=8", "train.gradient_accumulation_steps=2"]  # fmt: skip
        method = ["method=lora", "method.r=16"]
        return {
            "train": ["train", "recipe.yaml", "model.path=model", "output_dir=new", *data, *train, *method,
                      *self.settings],
            "eval": ["eval", "run", "--max-rows", "8", "--json"],
            "predict": ["predict", "run", "rows.jsonl", "--out", "answers.jsonl", "--max-new-tokens", "32"],
            "merge": ["merge", "run", "merged"],
            "bench": ["bench", "speed", "model", *self.settings, "--rows", "8", "--length", str(self.length), "--warm",
                      "2", "--steps", "4", "--json"],
        }[verb]  # fmt: skip

    def run(self, verb: str, free_gib: float | None = None, when: str = "start") -> Ended:
        """The command, beside a process that leaves so much free (None: alone)."""
        for old in ("new", "merged", "answers.jsonl", "run/results"):
            shutil.rmtree(self.place / old, ignore_errors=True)
            if (self.place / old).is_file():
                (self.place / old).unlink()
        (self.place / "recipe.yaml").write_text("seed: 0\n", encoding="utf-8")
        hog = None if free_gib is None or self.cpu else self._hog(free_gib, when)
        start = time.perf_counter()
        try:
            done = subprocess.run(
                [sys.executable, "-m", "whet", *self.words(verb)], cwd=self.place, capture_output=True, text=True,
                timeout=LIMIT_SECONDS, check=False,
            )  # fmt: skip
        finally:
            if hog is not None:
                hog.kill()
                hog.wait()
        seconds = time.perf_counter() - start
        return Ended(done.returncode, done.stderr, round(seconds, 1), *self._left(verb, done.stdout))

    def _hog(self, free_gib: float, when: str) -> subprocess.Popen[str]:
        share = next((part for name, part in STORED.items() if f"base.storage={name}" in self.settings), 0.9)
        used = CONTEXT_BYTES + int(share * self.weight_bytes) if when == "loaded" else 0
        command = [sys.executable, "-c", HOG, str(int(free_gib * GIB)), str(used)]
        hog = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if when == "start":
            assert hog.stdout is not None
            assert hog.stdout.readline().startswith("held"), "the other process could not take the memory"
        else:
            time.sleep(8)  # it has its context before the command begins, and waits for the model
        return hog

    def _left(self, verb: str, answered: str) -> tuple[dict[str, list[float]], list[str], dict[str, Any]]:
        numbers: dict[str, list[float]] = {}
        answers: list[str] = []
        layout: dict[str, Any] = {}
        metrics = self.place / "new" / "metrics.jsonl"
        if verb == "train" and metrics.is_file():
            lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
            numbers = {name: [line[name] for line in lines if name in line] for name in ("loss", "eval_loss")}
            layout = json.loads((self.place / "new" / "layout.json").read_text(encoding="utf-8"))
        if verb == "eval" and answered.startswith("{"):
            found = json.loads(answered)
            numbers = {side: [found[side]["metrics"]["loss"]] for side in ("base", "tuned") if side in found}
        if verb == "predict" and (self.place / "answers.jsonl").is_file():
            lines = (self.place / "answers.jsonl").read_text(encoding="utf-8").splitlines()
            answers = [json.loads(line)["text"] for line in lines]
        if verb == "merge" and (self.place / "merged" / "whet_merge.json").is_file():
            numbers = {"loss": [json.loads((self.place / "merged" / "whet_merge.json").read_text())["held_out_loss"]]}
        if verb == "bench" and answered.startswith("{"):
            found = json.loads(answered)
            numbers, layout = {"loss": [found["first_loss"], found["loss"]]}, found["layout"]
        return numbers, answers, {name: layout.get(name) for name in ("cut", "mode", "out_of_memory") if name in layout}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--place", type=Path, required=True, help="a folder for the model and the runs")
    parser.add_argument("--config", type=Path, default=ROOT / "bench" / "configs" / "Qwen3-0.6B.json")
    parser.add_argument("--verbs", nargs="+", default=["train", "eval", "predict", "merge", "bench"])
    parser.add_argument("--free", nargs="+", type=float, default=[6.0, 3.0, 2.0, 1.0], help="GiB that stay free")
    parser.add_argument("--when", nargs="+", default=["start", "loaded"], choices=["start", "loaded"])
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--set", nargs="+", default=[], dest="settings", help="section.key=value of a recipe")
    given = parser.parse_args()
    config = given.config.resolve()
    bench = Bench(given.place.resolve(), config, given.settings, cpu=given.cpu, rows=given.rows, length=given.length)
    results: list[dict[str, Any]] = []
    trained = bench.run("train")
    assert trained.status == 0, trained.said
    shutil.rmtree(bench.place / "run", ignore_errors=True)
    (bench.place / "new").rename(bench.place / "run")
    for verb in given.verbs:
        alone = trained if verb == "train" else bench.run(verb)
        assert alone.status == 0, alone.said
        for when in given.when:
            for free in given.free:
                found = bench.run(verb, free, when)
                judged = verdict(found, alone)
                results.append({"verb": verb, "when": when, "free_gib": free, "seconds": found.seconds,
                                "layout": found.layout, **asdict(judged)})  # fmt: skip
                case = f"{verb:8} {when:7} {free:5.1f} GiB free: {'ok ' if judged.ok else 'BAD'}"
                apart = "" if judged.apart is None else f", {judged.apart:.2g} apart"
                print(f"{case} {judged.how[:300]}{apart}", flush=True)
                given.out.write_text(json.dumps({"config": config.stem, "settings": given.settings, "cases": results},
                                                indent=1) + "\n", encoding="utf-8")  # fmt: skip
    print(f"{sum(one['ok'] for one in results)}/{len(results)} recover or end with one clear error")
    sys.exit(not all(one["ok"] for one in results))


if __name__ == "__main__":
    main()
