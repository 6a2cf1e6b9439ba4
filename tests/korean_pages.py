"""Run directories and reports of checks whose data are Q1, Q2 and so on: all English on their pages is whet's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from test_data_page import a_row, piece
from test_report import put


def put_finished(folder: Path) -> Path:
    """A run directory with all files, for a page that has no part left out."""
    path = folder / "Q0"
    path.mkdir()
    (path / "recipe.yaml").write_text("Q1: Q2\n", encoding="utf-8")
    origins = {"Q1": ("Q2", "default", None), "Q2": (True, "decided", "the longest row"), "Q3": (1, "recipe", None)}
    keys = ("value", "origin", "reason")
    put(path, "origins.json", {name: dict(zip(keys, one, strict=True)) for name, one in origins.items()})
    put(path, "environment.json", {"device": "cpu", "device_name": "Q7", "platform": "Q8", "threads": 2})
    put(path, "data.json", {
        "format": "Q1", "format_reason": "fields Q1, Q2; ignored: Q3", "rows_read": 9, "rows_train": 6, "rows_eval": 2,
        "rows_test": 1, "tokens": 1000, "supervised_tokens": 250, "packing_fill": 0.9, "packed_rows": 3, "dropped": [1],
        "supervised_by_role": {"assistant": 250}, "rows_over_length": 1, "rows_without_target": 0, "longest_row": 7,
        "policy": {"over_length": "Q1", "loss_on": "Q2", "packing": False, "max_length": 9},
        "replay": {"rows": 3, "share": 0.1}, "added": {"rows_read": 3, "rows": 2}, "scores": {"rows_below": 3},
        "files": [{"path": "Q1", "bytes": 2048, "sha256": "0" * 64}],
    })  # fmt: skip
    classes = {
        "frozen weights": 2**31,
        "trained weights": 1,
        "gradients": 1,
        "optimiser": 1,
        "activations": 2,
        "logits": 1,
    }
    put(path, "plan.json", {"trainable_params": 5, "all_params": 1000, "memory": classes, "peak_bytes": 2**32})
    steps = [
        {"kind": "train", "step": n, "loss": 3 / n, "learning_rate": 1e-4 / n, "grad_norm": 1.0} for n in range(1, 99)
    ]
    put(
        path,
        "metrics.jsonl",
        *steps,
        {"kind": "eval", "step": 20, "eval_loss": 1.0},
        {"kind": "eval", "step": 90, "eval_loss": 0.5},
    )
    put(path, "timing.jsonl", *({"step": n, "tokens_per_second": 900.0, "memory_bytes": 2**31} for n in range(1, 99)))
    put(path, "finished.json", {
        "steps": 98, "best_step": 90, "stopped": "completed", "seconds": 218.4, "peak_memory_bytes": 2**31,
        "tokens": 4000, "supervised_tokens": 1000, "findings": [
            "the held-out loss still falls at the end (by 44 % in the last part): more epochs (train.num_train_epochs) "
            "or a higher rate (train.learning_rate) would learn more"],
    })  # fmt: skip
    metrics = ("loss", "perplexity", "exact_match", "token_f1", "rouge_l", "bleu", "chrf", "Q1_accuracy", "mae", "r2")
    scores = [{"metrics": dict.fromkeys(metrics, value)} for value in (0.25, 0.5)]
    put(path, "results/evaluation.json", {
        "rows": 100, "base": scores[0], "tuned": scores[1], "head": "Q1_accuracy", "skipped": ["Q2"],
        "difference": {"Q1_accuracy": {"low": 0.1, "high": 0.3, "p_value": 1e-9}}, "conversations": 7,
        "of": "held-out rows", "decoding": "greedy, at most 48 new tokens",
    })  # fmt: skip
    row = {"prompt": "Q2", "reference": "Q1: Q2\nQ3: Q4", "base": "", "tuned": "Q1: Q2\nQ3: Q5"}
    put(path, "results/predictions.jsonl", *(row | {"id": f"Q{n}", "exact": n > 2} for n in range(9)))
    measured = ("mean_kl", "max_kl", "top1_agreement", "greedy_agreement", "equal_labels", "max_logit_difference",
                "mean_probability_change", "mean_value_change")  # fmt: skip
    candidates = [dict.fromkeys(measured, 0.5) | {"name": name, "dtype": "Q1"} for name in ("trained", "16-bit")]
    merged = {"chosen": "trained base, Q1", "prompts": 16, "positions": 1024, "path": "Q2", "candidates": candidates}
    put(path, "results/merge.json", merged)
    return path


def put_others(path: Path) -> None:
    """What a run with labels, on a GPU, with gaps and an early end has instead."""
    put(path, "environment.json", {"device": "cuda"})
    put(path, "finished.json", {"steps": 3, "stopped": "early_stopping", "seconds": 7300, "peak_memory_bytes": 2**31,
                                "supervised_tokens": 9, "tokens": 20, "best_step": 2})  # fmt: skip
    put(path, "data.json", {"labels": {"Q1": 4, "Q2": 2}, "labels_held_out": {"Q1": 3}, "rows_eval": 3, "dropped": [],
                            "tokens": 9, "rows_on_both_sides": 2, "files": [{"path": "Q1", "rows": 3}]})  # fmt: skip
    scores = [{"metrics": {"accuracy": value}} for value in (0.5, 0.25)]
    sure, unsure = ({"accuracy": {"low": low, "high": -0.1}} for low in (-0.3, -0.05))
    found = {"base": scores[0], "tuned": scores[1], "difference": sure, "rows": 1}
    put(path, "results/test.json", found | {"of": "test rows", "split": "test"})
    put(path, "results/data-2.json", found | {"of": "rows of Q1", "difference": unsure})
    put(path, "results/data-3.json", found | {"of": "rows of Q1", "difference": {}, "tuned": scores[0]})
    put(path, "results/data-4.json", found | {"of": "rows of Q1", "difference": {}, "base": {}})
    labels = {"names": ["Q1", "Q2"], "confusion": [[3, 1], [0, 2]]}
    per_class = [{"class": f"Q{n}", "support": 4, "precision": 1, "recall": 0.75, "f1": 0.8} for n in range(400)]
    said = "the commonest class, Q1, said of every row; a base model has no head for these labels, and a random one "
    said += "says nothing"
    found |= {"of": "rows of Q1", "decoding": "the likeliest class", "baseline": said, "labels": labels}
    put(path, "results/data-1.json", found | {"labels": labels | {"per_class": per_class}})
    rows = ({"text": "Q1", "label": "Q2", "predicted": "Q1", "exact": n > 3, "probability": 0.5} for n in range(9))
    put(path, "results/data-1.predictions.jsonl", *rows)
    put(path, "results/data-5.json", found | {"difference": unsure})
    put(path, "results/data-5.predictions.jsonl", {"text": "Q1", "label": 2, "predicted": 3, "error": 1})
    put(path, "results/data-6.json", found | {"difference": {}})
    losses = [9.0 if n < 9 else None if n == 50 else 0.1 for n in range(1, 199)]
    put(path, "metrics.jsonl", *({"kind": "train", "step": 10 * n, "loss": loss} for n, loss in enumerate(losses)), 1)
    put(path, "results/predictions.jsonl", {"prompt": [{"role": "user", "content": "Q1" * 999}] * 20, "tuned": ""})
    put(path, "plan.json", [1])
    put(path, "results/merge.json", {"chosen": "Q1", "prompts": 4, "path": "Q2", "candidates": []})


def keep_all(path: Path) -> None:
    """A run that is complete."""


def cut_results(path: Path) -> None:
    for name in ("results/evaluation.json", "results/predictions.jsonl", "results/merge.json", "recipe.yaml"):
        (path / name).unlink()


def cut_end(path: Path) -> None:
    cut_results(path)
    (path / "finished.json").unlink()


def cut_all(path: Path) -> None:
    for file in [*path.rglob("*.*")]:
        file.unlink()


TWIN = {"file": "Q1", "row": 3, "text": "Q1 Q2 Q3"}
TWINS = {"similarity": 0.93, "a": TWIN, "b": TWIN | {"text": "Q1 Q3 Q3"}}
QUALITY = {
    "duplicates": {"exact_rows": 4, "near_rows": 2, "clusters": 3, "examples": [TWINS, TWINS | {"b": TWIN}]},
    "leakage": [{"between": ["train", "held out"], "rows_to_remove": 2, "exact": 7, "near": 1, "examples": [TWINS]}],
    "benchmarks": [{"between": ["train", "Q1"], "exact": 7, "near": 1, "examples": [TWINS]}],
    "contradictions": {"rows": 2, "texts": 1, "examples": [{side: TWIN | {"answer": "Q1"} for side in "ab"}]},
    "personal": {"rows": 2, "kinds": {"email": 3, "bank_account": 1},
                 "examples": [{"file": "Q1", "row": 1, "kind": "email", "shown": "Q2"}]},
    "answers": {"answers": 3, "kinds": {"truncated": 2, "refusal": 1}, "usual": [],
                "examples": [{"row": 1, "kind": "truncated", "reason": "the answer stops in the middle"}]},
    "languages": {"Q1": 1.0},
}  # fmt: skip


def report() -> dict[str, Any]:
    dropped = [{"file": "Q1", "row": n, "reason": f"{n} tokens, over 5"} for n in range(1, 9)]
    return {
        "rows_train": 100, "rows_eval": 5, "tokens": 1000, "supervised_tokens": 250, "longest_row": 50,
        "tokens_lost": 3, "policy": {"max_length": 50, "over_length": "drop", "loss_on": "assistant", "packing": False},
        "warnings": ["462 tokens are lost to data.max_length=200",
                     "2 rows are dropped, the first is Q1 row 7 (field Q2: nothing to learn: the answer is blank)",
                     "rows with personal data: 2, of it 1 email, 1 bank_account (data.personal=redact)"] * 20,
        "dropped": dropped, "supervised_by_role": {"assistant": 250}, "quality": QUALITY,
        "lengths": [{"from": 10, "to": 30, "rows": 60}, {"from": 30, "to": 51, "rows": 40}],
        "files": [{"path": f"Q{n}", "rows": 105, "bytes": 2048, "sha256": "0" * 64} for n in range(120)],
        "format": "Q1", "format_reason": "fields Q1, Q2; ignored: Q3",
    }  # fmt: skip


ROWS: list[dict[str, Any]] = [
    a_row(piece("Q1", "user"), piece("Q2", "assistant", True), *[piece("Q3" * 999, "template")] * 99) | {"file": "Q1"}
]
