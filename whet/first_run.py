"""`whet quickstart`: the whole path on the built-in model and data, offline, in about a minute on a CPU."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from whet.base.console import say
from whet.evaluation.printed import print_scores
from whet.evaluation.run import evaluate
from whet.recipe import parse
from whet.report.loss_plot import write_loss_plot
from whet.report.page import write_page
from whet.runs import Run
from whet.ship.merge import merge
from whet.training.run import train

FROM_TRAINING = (
    "seconds",
    "steps",
    "tokens",
    "tokens_per_second",
    "trainable_params",
    "all_params",
    "peak_memory_bytes",
)


def run_quickstart(recipe: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Train, evaluate and merge the quickstart recipe; returns base, tuned, merge, train and run_dir.

    A finished run in the same directory is used again.
    """
    began = time.perf_counter()
    run = train(parse(recipe, overrides))
    say("evaluate: the same prompts, adapter off and on", style="bold")
    evaluation = evaluate(run)
    print_scores(evaluation, say)
    say("merge: plain weights, proven to answer alike", style="bold")
    certificate = merge(run, run.path / "merged")
    write_loss_plot(run.path)
    page = write_page(run.path)
    seconds = round(time.perf_counter() - began, 1)
    _closing(run, page, evaluation, certificate, seconds)
    finished = run.finished or {}
    return {
        "base": evaluation["base"]["metrics"],
        "tuned": evaluation["tuned"]["metrics"],
        "merge": certificate,
        "train": {name: finished.get(name) for name in FROM_TRAINING},
        "seconds": seconds,
        "run_dir": str(run.path),
    }


def _closing(run: Run, page: Path, evaluation: dict[str, Any], certificate: dict[str, Any], seconds: float) -> None:
    """Print the results, and where to look next."""
    base, tuned = evaluation["base"]["metrics"], evaluation["tuned"]["metrics"]
    name = next((name for name in tuned if name.endswith("_accuracy")), "exact_match")
    say(f"{name.replace('_', ' ')} {base[name]:.0%} -> {tuned[name]:.0%}, "
        f"exact answers {base['exact_match']:.0%} -> {tuned['exact_match']:.0%}, "
        f"merged model agrees on {certificate['agreement']:.0%} of {certificate['prompts']} answers, "
        f"{seconds:.0f} s in all", style="bold green")  # fmt: skip
    say(f"  {page}  the whole story on one page")
    say(f"  {run.path / 'results' / 'predictions.jsonl'}  every answer beside its reference")
    say(f"  whet chat {run.path}  talk to it")
